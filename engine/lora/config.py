"""What peft's `adapter_config.json` says, read with `json` alone: nothing here imports torch or peft, so any process can ask.

Files are not trusted. Where peft takes regular expressions, none is run: which modules an adapter changes is told by the names of its
weights, and the keys of `rank_pattern` and `alpha_pattern` are run by an automaton of our own (`NamePattern`), in time that does not depend
on what they say. Whatever would change the result and is not known here is refused by its name.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from penstock.engine.lora.errors import AdapterError

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
LARGEST_CONFIG, LARGEST_WEIGHTS = 1 << 20, 4 << 30  # bytes
READ = 1 << 22  # bytes at once
LARGEST_RANK, LARGEST_ALPHA = 4096, 1e6
MOST_NAMES = 4096  # of target_modules, exclude_modules, layers_to_transform
MOST_PATTERNS, LONGEST_PATTERN = 1024, 256  # EVA writes one for each module
MOST_LOOPS = 64  # patterns with * or +, which take longer

OTHER_WEIGHTS = "it trains more than the two matrices of LoRA"
OTHER_PRODUCT = "it is another product than that of LoRA's two matrices"
REFUSED = {
    "use_dora": "DoRA scales the columns of the base model's weights",
    "lora_bias": OTHER_WEIGHTS,
    **dict.fromkeys(("modules_to_save", "trainable_token_indices"), OTHER_WEIGHTS),
    "target_parameters": "it changes parameters, not modules",
    "layer_replication": "it repeats layers of the base model",
    "alora_invocation_tokens": "it begins in the middle of a sequence",
    "kasa_config": "it was made on a changed base model",
    "megatron_config": "its modules are Megatron's",
    **dict.fromkeys(("use_qalora", "use_bdlora", "arrow_config", "monteclora_config", "velora_config"), OTHER_PRODUCT),
}
# Those that leave the base model alone. The others take a part out of it, unless peft converted the adapter, which it then says is `true`.
HARMLESS_STARTS = (None, True, False, "gaussian", "eva", "orthogonal", "mica")
# What is read here, and then where an adapter came from and how it was trained, which changes nothing. `fan_in_fan_out` is of these: it
# says how the base model keeps its weight, and A and B are kept as ever.
KNOWN = {
    "peft_type", "task_type", "base_model_name_or_path", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "bias",
    "init_lora_weights", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern",
    "auto_mapping", "peft_version", "revision", "inference_mode", "lora_dropout", "fan_in_fan_out", "loftq_config", "eva_config",
    "corda_config", "lora_ga_config", "megatron_core", "runtime_config", "qalora_group_size", "ensure_weight_tying",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class NamePattern:
    """A key of `rank_pattern` or `alpha_pattern`. peft matches names of modules against the regular expression `(.*\\.)?(key)$`; of these,
    the ones are understood that consist of letters, digits, `_`, `-`, `.` (any character), `\\.`, `\\d` and `[0-9]`, each of them once or
    with `*` or `+`, after a `^` and before a `$` that may be there. Masks have bit i where step i of the key takes the character; state i
    is before step i. A name costs one pass over its characters, whatever the key is."""

    text: str
    length: int
    letters: Mapping[str, int]
    digits: int
    any: int
    loops: int  # steps that take any number of characters, and none
    anchored: bool

    @classmethod
    def parse(cls, text: str) -> NamePattern | None:
        """None if it is not one of those that are understood."""
        body = text.removeprefix("^").removesuffix("$")
        steps = re.findall(r"(\\\.|\\d|\[0-9\]|[A-Za-z0-9_.-])([*+]?)", body)
        if not steps or "".join(what + how for what, how in steps) != body:
            return None
        plain = [(what, loop) for what, how in steps for loop in {"": (False,), "*": (True,), "+": (False, True)}[how]]
        if any(here and after for (_, here), (_, after) in pairwise(plain)):
            return None  # two loops in a row could be left both at once
        letters: dict[str, int] = {}
        digits = every = loops = 0
        for at, (what, loop) in enumerate(plain):
            loops |= loop << at
            if what == ".":
                every |= 1 << at
            elif what in ("\\d", "[0-9]"):
                digits |= 1 << at
            else:
                letters[what[-1]] = letters.get(what[-1], 0) | 1 << at
        return cls(text, len(plain), letters, digits, every, loops, text.startswith("^"))

    def matches(self, name: str) -> bool:
        first = 0
        if not self.loops:  # then only one part of the name is long enough
            first = len(name) - self.length
            if first < 0 or (first and (self.anchored or name[first - 1] != ".")):
                return False
        state = start = 1 | (self.loops & 1) << 1
        for letter in name[first:]:
            taken = state & (self.any | self.letters.get(letter, 0) | (self.digits if "0" <= letter <= "9" else 0))
            state = taken & self.loops | (taken & ~self.loops) << 1
            state |= (state & self.loops) << 1
            if letter == "." and self.loops and not self.anchored:
                state |= start  # the key may begin after any dot
        return bool(state >> self.length)


@dataclass(frozen=True, slots=True)
class LoraConfig:
    """What matters of a config: ranks and alphas by module, the first pattern that matches a module's name decides; then only for checks,
    which modules are meant, and `base`, the name of the model that it was made for. `modules`, `excluded` and `parents` are None where
    only a regular expression would say."""

    rank: int
    alpha: float
    ranks: tuple[tuple[NamePattern, int], ...]
    alphas: tuple[tuple[NamePattern, float], ...]
    rank_stabilized: bool
    modules: frozenset[str] | None
    excluded: frozenset[str] | None
    layers: frozenset[int]  # empty: all
    parents: frozenset[str] | None  # of what layers are counted; empty: of anything
    base: str | None

    def rank_of(self, name: str) -> int:
        """Of the module with this name, in the base model."""
        return next((rank for pattern, rank in self.ranks if pattern.matches(name)), self.rank)

    def scale_of(self, name: str, rank: int) -> float:
        """What B @ A of the module with this name is multiplied with, where its rank is `rank`."""
        alpha = next((alpha for pattern, alpha in self.alphas if pattern.matches(name)), self.alpha)
        return alpha / (math.sqrt(rank) if self.rank_stabilized else rank)

    def targets(self, name: str) -> bool | None:
        """Whether peft would put an adapter on this module; None if only a regular expression would tell."""
        parts = name.split(".")
        ends = {".".join(parts[at:]) for at in range(len(parts))}
        if self.modules is None or self.excluded is None:
            return False if self.modules is not None and not ends & self.modules else None
        if ends & self.excluded or not ends & self.modules:
            return False
        if not self.layers or name in self.modules:
            return True
        if self.parents is None:
            return None
        counted = (int(at) for parent, at in pairwise(parts) if at.isdecimal() and (not self.parents or parent in self.parents))
        return next(counted, None) in self.layers

    def deciding(self) -> bytes:
        """All that decides the result, beside the weights; equal for configs that mean the same."""
        ranks, alphas = [[key.text, rank] for key, rank in self.ranks], [[key.text, alpha] for key, alpha in self.alphas]
        return json.dumps([self.rank, self.alpha, ranks, alphas, self.rank_stabilized]).encode()


def read_config(folder: Path) -> LoraConfig:
    """Read and check `adapter_config.json`. Raises `AdapterError` (missing_adapter, broken_adapter, unsupported_adapter)."""
    path = regular_file(folder, CONFIG, LARGEST_CONFIG)
    try:
        values = json.loads(path.read_bytes(), parse_constant=_not_a_number, object_pairs_hook=_unique)
    except (OSError, ValueError, RecursionError) as error:
        raise AdapterError("broken_adapter", f"{path}: {error}") from error
    if not isinstance(values, dict):
        raise AdapterError("broken_adapter", f"{path}: must be a JSON object")
    checked = _Checked(path, values)
    checked.refuse_what_is_not_known()
    parents = checked.names("layers_pattern")
    return LoraConfig(
        rank=int(checked.number("r", values.get("r", 8), whole=True)),
        alpha=checked.number("lora_alpha", values.get("lora_alpha", 8)),
        ranks=tuple((pattern, int(rank)) for pattern, rank in checked.patterns("rank_pattern", whole=True)),
        alphas=checked.patterns("alpha_pattern"),
        rank_stabilized=checked.flag("use_rslora"),
        modules=None if values.get("target_modules") is None else checked.names("target_modules"),
        excluded=checked.names("exclude_modules"),
        layers=checked.layers("layers_to_transform"),
        parents=parents if parents is not None and all(re.fullmatch(r"\w+", name) for name in parents) else None,
        base=checked.base(),
    )


def digest_of(folder: Path, limit: int = LARGEST_WEIGHTS) -> str:
    """BLAKE2b of 256 bits, in hexadecimal, of all that decides what an adapter does: equal digests give equal streams. `limit` is in
    bytes. Raises `AdapterError` (missing_adapter, broken_adapter, unsupported_adapter)."""
    deciding = read_config(folder).deciding() + b"\n"
    path = regular_file(folder, WEIGHTS, limit)
    try:
        with path.open("rb", buffering=0) as file:
            digest, part = hashlib.blake2b(deciding, digest_size=32), memoryview(bytearray(READ))
            while size := file.readinto(part):
                digest.update(part[:size])
            return digest.hexdigest()
    except OSError as error:
        raise AdapterError("broken_adapter", f"{path}: {error}") from error


def regular_file(folder: Path, name: str, limit: int) -> Path:
    """The path of a file that is there, a file, and not larger than `limit` bytes. A link to one is one: the hub's cache consists of them.
    Raises `AdapterError` (missing_adapter, broken_adapter)."""
    path = folder / name
    try:
        found = path.stat()
    except FileNotFoundError as error:
        pickled = name == WEIGHTS and (folder / "adapter_model.bin").exists()
        why = "; pickled weights (adapter_model.bin) are never read: save it again with safetensors" if pickled else ""
        raise AdapterError("missing_adapter", f"{path}: there is no such file{why}") from error
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
        raise AdapterError("broken_adapter", f"{str(path)!r}: {error}") from error
    if not stat.S_ISREG(found.st_mode):
        raise AdapterError("broken_adapter", f"{path}: is not a regular file")
    if found.st_size > limit:
        raise AdapterError("broken_adapter", f"{path}: {found.st_size} bytes, and at most {limit} are read")
    return path


def _not_a_number(text: str) -> float:
    raise ValueError(f"{text} is not JSON")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(values := dict(pairs)) < len(pairs):
        raise ValueError("a key is there twice")
    return values


@dataclass(frozen=True, slots=True)
class _Checked:
    """The config as found, and its values once they are as they must be."""

    path: Path
    values: Mapping[str, Any]

    def error(self, key: str, value: object, limit: str, code: str = "broken_adapter") -> AdapterError:
        return AdapterError(code, f"{self.path}: {key}={repr(value)[:120]}: {limit}", key)

    def unsupported(self, key: str, value: object, why: str) -> AdapterError:
        return self.error(key, value, f"not supported, because {why}", "unsupported_adapter")

    def refuse_what_is_not_known(self) -> None:
        kind, task, bias, start = (self.values.get(key) for key in ("peft_type", "task_type", "bias", "init_lora_weights"))
        if not isinstance(kind, str):
            raise self.error("peft_type", kind, "must be a string")
        if kind != "LORA":
            raise self.unsupported("peft_type", kind, "only LORA is")
        if task not in (None, "CAUSAL_LM"):
            raise self.unsupported("task_type", task, "only CAUSAL_LM is")
        if bias not in (None, "none"):
            raise self.unsupported("bias", bias, OTHER_WEIGHTS)
        if not any(start is known or (isinstance(start, str) and start.lower() == known) for known in HARMLESS_STARTS):
            why = "it was trained on a changed base model; have peft convert it (path_initial_model_for_weight_conversion)"
            raise self.unsupported("init_lora_weights", start, why)
        for key, value in self.values.items():
            if value and key not in KNOWN:
                raise self.unsupported(ascii(key[:80])[1:-1], value, REFUSED.get(key, "what it means is not known here"))

    def flag(self, key: str) -> bool:
        value = self.values.get(key)
        if value is not None and not isinstance(value, bool):
            raise self.error(key, value, "must be true or false")
        return bool(value)

    def number(self, key: str, value: object, *, whole: bool = False) -> float:
        low, high, kinds = (1, LARGEST_RANK, int) if whole else (-LARGEST_ALPHA, LARGEST_ALPHA, int | float)
        if isinstance(value, bool) or not isinstance(value, kinds) or not low <= value <= high:
            raise self.error(key, value, f"must be {'an integer' if whole else 'a number'} from {low:g} to {high:g}")
        return float(value)

    def patterns(self, key: str, *, whole: bool = False) -> tuple[tuple[NamePattern, float], ...]:
        found = self.values.get(key) or {}
        if not isinstance(found, dict) or len(found) > MOST_PATTERNS:
            raise self.error(key, found, f"must be a map of at most {MOST_PATTERNS} entries")
        patterns: list[tuple[NamePattern, float]] = []
        for text, value in found.items():
            pattern = NamePattern.parse(text) if len(text) <= LONGEST_PATTERN else None
            if pattern is None:
                forms = f"only names, ., \\., \\d, [0-9], *, +, ^ and $ are understood of regular expressions, {LONGEST_PATTERN} characters"
                raise self.unsupported(key, text, forms)
            patterns.append((pattern, self.number(f"{key}[{text}]", value, whole=whole)))
        if sum(pattern.loops > 0 for pattern, _ in patterns) > MOST_LOOPS:
            raise self.error(key, found, f"at most {MOST_LOOPS} of its keys may have * or +", "unsupported_adapter")
        return tuple(patterns)

    def names(self, key: str) -> frozenset[str] | None:
        """None for a string, which is a regular expression, but for layers_pattern, which is mostly a name."""
        found = self.values.get(key) or []
        if isinstance(found, str) and key != "layers_pattern":
            return None
        found = [found] if isinstance(found, str) else found
        if not isinstance(found, list) or len(found) > MOST_NAMES or not all(isinstance(name, str) for name in found):
            raise self.error(key, found, f"must be a string or a list of at most {MOST_NAMES} strings")
        return frozenset(found)

    def layers(self, key: str) -> frozenset[int]:
        found = self.values.get(key)
        found = [] if found is None else [found] if isinstance(found, int) else found
        if not isinstance(found, list) or len(found) > MOST_NAMES or not all(type(at) is int for at in found):
            raise self.error(key, found, f"must be an integer or a list of at most {MOST_NAMES} integers")
        return frozenset(found)

    def base(self) -> str | None:
        value = self.values.get("base_model_name_or_path")
        if value is not None and not isinstance(value, str):
            raise self.error("base_model_name_or_path", value, "must be a string")
        return value[:200] if value else None
