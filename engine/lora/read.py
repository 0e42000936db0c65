"""An adapter as peft saves it, read from its folder and checked against the model that it is to change: nothing of it is left out, and
nothing that it does not say is made up. Weights are read from safetensors alone; pickled ones never are.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from penstock.engine.lora.config import LARGEST_WEIGHTS, WEIGHTS, LoraConfig, digest_of, read_config, regular_file
from penstock.engine.lora.errors import AdapterError, some
from penstock.engine.lora.layout import Site

__all__ = ["Lora", "broken_sites", "digest_of", "read_adapter"]

LARGEST_HEADER = 16 << 20  # bytes; two tensors of each module take well below one
DTYPES = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": np.int16}  # the last has no name in numpy
PREFIX = "base_model.model."
EMBEDDINGS = {"lm_head", "embed_out", "embed_tokens", "embed_in", "wte", "wpe"}


@dataclass(frozen=True, slots=True, eq=False)
class Lora:
    """An adapter: each of its sites changes by `x @ A.T @ B.T * scale`. `weights` has, by the site's name, A `[rank, in_features]` and B
    `[out_features, rank]`, float32, float16 or bfloat16, as they were trained. Ranks may differ from site to site. `digest` identifies what
    decides the result."""

    weights: Mapping[str, tuple[Tensor, Tensor]]
    scales: Mapping[str, float]
    digest: str

    @property
    def rank(self) -> int:
        """The largest."""
        return max(len(a) for a, _ in self.weights.values())


@dataclass(frozen=True, slots=True)
class Entry:
    """A tensor of the file as its header describes it: one of the two matrices of the module `site`."""

    key: str
    site: str
    side: str  # "A" or "B"
    shape: tuple[int, ...]
    dtype: str


def read_adapter(
    folder: Path, sites: Mapping[str, Site], limit: int = LARGEST_WEIGHTS, dtype: torch.dtype = torch.float32
) -> Lora:  # fmt: skip
    """An adapter of the model whose products are `sites`, by name; of at most `limit` bytes, and with no weights that `dtype` cannot have.
    Its weights are views of the file, to which nobody may write any more, but which may be removed: to copy them would take longer than
    all the rest. Raises `AdapterError`."""
    from safetensors import SafetensorError, safe_open

    config = read_config(folder)
    path = regular_file(folder, WEIGHTS, limit)
    try:
        _check_header(path)
        with safe_open(path, framework="pt") as file:
            found = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118  it is not a dict
            shapes = {key: (tuple(part.get_shape()), str(part.get_dtype())) for key, part in found.items()}
            entries = _checked(path, config, sites, shapes)
        tensors = _views(path, entries.values())
    except (SafetensorError, OSError, RuntimeError, ValueError) as error:
        raise AdapterError("broken_adapter", f"{path}: {error}") from error
    names = [name for name in sites if (name, "A") in entries]
    lora = Lora(
        weights={name: (tensors[entries[name, "A"].key], tensors[entries[name, "B"].key]) for name in names},
        scales={name: config.scale_of(name, entries[name, "A"].shape[0]) for name in names},
        digest=digest_of(folder, limit),
    )
    if broken := broken_sites(lora, dtype):
        kind = str(dtype).removeprefix("torch.")
        raise AdapterError("broken_adapter", f"{path}: NaN or infinity in the weights, or in {kind} times their scale, of {some(broken)}")
    return lora


def broken_sites(lora: Lora, dtype: torch.dtype) -> list[str]:
    """The sites that have NaN or infinity, or would in `dtype`, B times its scale. NaN, if there is one, is both the least and the
    largest."""
    ends = torch.stack([end for pair in lora.weights.values() for weight in pair for end in weight.aminmax()]).float().view(-1, 2, 2)
    ends[:, 1] *= torch.tensor([lora.scales[name] for name in lora.weights])[:, None]
    return [name for name, sound in zip(lora.weights, ends.to(dtype).isfinite().flatten(1).all(1).tolist(), strict=True) if not sound]


def _views(path: Path, entries: Iterable[Entry]) -> dict[str, Tensor]:
    """The tensors of a file whose header was found to be sound, in as few of torch's operations as can be: see `PageLayout.pieces`."""
    whole: npt.NDArray[np.uint8] = np.memmap(path, np.uint8, "c")
    (length,) = struct.unpack("<Q", whole[:8].data)
    header, found = json.loads(whole[8 : 8 + length].tobytes()), {}
    for entry in entries:
        begin, end = header[entry.key]["data_offsets"]
        weight = torch.from_numpy(whole[8 + length + begin : 8 + length + end].view(DTYPES[entry.dtype]).reshape(entry.shape))
        found[entry.key] = weight.view(torch.bfloat16) if entry.dtype == "BF16" else weight.float() if entry.dtype == "F64" else weight
    return found


def _check_header(path: Path) -> None:
    with path.open("rb") as file:
        start = file.read(8)
    length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
    if not 0 < length <= LARGEST_HEADER:
        raise AdapterError("broken_adapter", f"{path}: not a safetensors file, or its header has more than {LARGEST_HEADER} bytes")


def _place(key: str) -> tuple[str, str] | None:
    """The module and the side, "A" or "B", of `base_model.model.<module>.lora_A.weight`; older files have an adapter's name before
    `weight`. None for any other name."""
    for side in ("A", "B"):
        site, found, rest = key.removeprefix(PREFIX).rpartition(f".lora_{side}.")
        if found and (rest == "weight" or (rest.endswith(".weight") and rest.count(".") == 1)):
            return site, side
    return None


def _checked(
    path: Path, config: LoraConfig, sites: Mapping[str, Site], shapes: Mapping[str, tuple[tuple[int, ...], str]]
) -> dict[tuple[str, str], Entry]:
    """The tensors of a file by module and side, after everything is checked that can be, before a byte of them is read."""
    entries: dict[tuple[str, str], Entry] = {}
    strange: list[str] = []
    for key, (shape, dtype) in shapes.items():
        place = _place(key)
        if place is None:
            strange.append(key)
        elif place in entries:
            raise AdapterError("broken_adapter", f"{path}: both {some([key, entries[place].key])} are there for the same matrix")
        else:
            entries[place] = Entry(key, *place, shape, dtype)
    _check_names(path, config, sites, entries, strange)
    wrong = [f"{entry.key} ({entry.dtype})" for entry in entries.values() if entry.dtype not in DTYPES]
    if wrong:
        raise AdapterError("unsupported_adapter", f"{path}: must be of {', '.join(DTYPES)}: {some(wrong)}")
    _check_shapes(path, config, sites, entries)
    return entries


def _check_names(
    path: Path, config: LoraConfig, sites: Mapping[str, Site], entries: Mapping[tuple[str, str], Entry], strange: list[str]
) -> None:
    there = {site for site, _ in entries}
    on_embeddings = [key for key in strange if ".lora_embedding_" in key]
    on_embeddings += [name for name in there if name not in sites and name.rsplit(".", 1)[-1] in EMBEDDINGS]
    if on_embeddings:
        raise AdapterError("unsupported_adapter", f"{path}: adapters on embeddings and heads are not supported: {some(on_embeddings)}")
    if strange:
        message = f"{path}: neither lora_A nor lora_B of a module, which is all that is supported: {some(strange)}"
        raise AdapterError("unsupported_adapter", message)
    if not there:
        raise AdapterError("broken_adapter", f"{path}: no weights are in it")
    unexpected = [name for name in there if name not in sites]
    if len(unexpected) == len(there):
        raise _other_model(path, config, f"this model has none of its modules, or does not take adapters on them: {some(unexpected)}")
    if unexpected:
        raise _other_model(path, config, f"this model does not have these modules, or does not take adapters on them: {some(unexpected)}")
    halves = [f"{site}.lora_{side}" for site in there for side in ("A", "B") if (site, side) not in entries]
    if halves:
        raise AdapterError("broken_adapter", f"{path}: missing: {some(halves)}")
    untold = [name for name in there if config.targets(name) is False]
    if untold:
        message = f"{path}: it has weights of modules that are not among the targets of its adapter_config.json: {some(untold)}"
        raise AdapterError("broken_adapter", message, "target_modules")
    missing = [name for name in sites if name not in there and config.targets(name)]
    if missing:
        message = f"missing: the weights of {some(missing)}, which are among the targets of its adapter_config.json"
        raise _other_model(path, config, f"{message}; or they were lost")


def _check_shapes(path: Path, config: LoraConfig, sites: Mapping[str, Site], entries: Mapping[tuple[str, str], Entry]) -> None:
    """What the model says of a shape and what the config says of it, the rank, are told apart: they mean different mistakes."""
    expected_ranks = {name: config.rank_of(name) for name in dict.fromkeys(site for site, _ in entries)}
    ranks: list[str] = []
    sizes: list[str] = []
    for entry in entries.values():
        site, rank = sites[entry.site], expected_ranks[entry.site]
        expected = (rank, site.in_features) if entry.side == "A" else (site.out_features, rank)
        if entry.shape != expected:
            side = 1 if entry.side == "A" else 0
            other = len(entry.shape) != 2 or entry.shape[side] != expected[side]
            (sizes if other else ranks).append(f"{entry.key}: expected {list(expected)}, found {list(entry.shape)}")
    if sizes:
        raise _other_model(path, config, f"its shapes are not this model's: {some(sizes)}")
    if ranks:
        raise AdapterError("broken_adapter", f"{path}: ranks are not those of its adapter_config.json: {some(ranks)}", "r")


def _other_model(path: Path, config: LoraConfig, what: str) -> AdapterError:
    made = f"its adapter_config.json says {config.base!r}" if config.base else "its adapter_config.json does not say which"
    return AdapterError("wrong_base_model", f"{path}: {what}; it was probably made for another base model ({made})")
