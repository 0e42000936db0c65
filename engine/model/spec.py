"""What a model folder says, read with `json` alone: nothing here imports torch or a model class, so any process can ask."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DTYPES = ("float32", "bfloat16", "float16")
TINY = Path(__file__).resolve().parent.parent / "tiny"
LARGEST_HEADER = 100_000_000  # bytes; the limit of the safetensors format itself

# Families that the native decoder runs (`engine.model.decoder`), and those of them whose layers are made of experts, or some of them are.
MIXTURES = frozenset({"mixtral", "qwen3_moe", "olmoe"})
NATIVE = MIXTURES | {"llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi3", "olmo2"}
NO_INTERFACE = "its attention does not go through transformers' AttentionInterface"
RECURRENT = "it keeps a recurrent or convolutional state, not only keys and values"
LATENT = "it keeps a compressed (latent) cache or one shared by several layers"
REFUSED = {
    **dict.fromkeys(("falcon", "bloom", "mpt", "gptj", "gpt_neo", "codegen", "ctrl", "xlnet", "dbrx"), NO_INTERFACE),
    **dict.fromkeys(("mamba", "mamba2", "falcon_mamba", "falcon_h1", "jamba", "bamba", "zamba", "zamba2", "rwkv"), RECURRENT),
    **dict.fromkeys(("recurrent_gemma", "nemotron_h", "lfm2", "lfm2_moe", "qwen3_next", "granitemoehybrid", "minimax", "xlstm"), RECURRENT),
    **dict.fromkeys(("qwen3_5", "qwen3_5_text", "qwen3_5_moe", "qwen3_5_moe_text", "olmo_hybrid", "kimi_linear"), RECURRENT),
    **dict.fromkeys(("deepseek_v32", "longcat_flash", "gemma3n", "gemma3n_text"), LATENT),
    **dict.fromkeys(("gemma4", "gemma4_text", "glm_moe_dsa", "youtu"), LATENT),
    **dict.fromkeys(("llama4", "llama4_text"), "its attention is chunked"),
}


class ModelError(Exception):
    """A model cannot be served. `code` is one of: unknown_model, broken_config, missing_weights, broken_weights, unsupported_model,
    invalid_option, out_of_memory. The message names the value, the limit and what to do."""

    def __init__(self, code: str, message: str) -> None:
        self.code = code
        super().__init__(message)


@dataclass(frozen=True, slots=True)
class SamplingDefaults:
    """What the model's `generation_config.json` says about sampling, for parameters that a request leaves open; neutral where it says
    nothing. `do_sample: false` in writing means greedy, temperature 0. A file that is silent about it does not (transformers would then be
    greedy): temperature is what the file gives, else 1, as OpenAI's interface and its clients expect."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """A model as its files describe it. `config` is config.json as read; `dtype` is one of `DTYPES`; lengths are in tokens. `digest`
    identifies what is served: a stream may be resumed only against the same one."""

    source: str
    folder: Path
    config: Mapping[str, Any]
    dtype: str
    vocab_size: int
    max_model_len: int
    eos_ids: tuple[int, ...]
    defaults: SamplingDefaults
    digest: str
    random: bool = False  # weights are drawn, not loaded
    seed: int = 0

    @property
    def model_type(self) -> str:
        return str(self.config["model_type"])


def read_spec(
    source: str,
    *,
    dtype: str = "auto",
    max_model_len: int | None = None,
    weights: str = "auto",
    seed: int = 0,
) -> ModelSpec:
    """Read and check everything but the weights' values.

    `source` is a folder, a hub id (`owner/name`, fetched unless it is cached) or `tiny`, the model shipped in this package. `weights` is
    "auto" or "random", which needs only a config.json and draws from `seed`. Raises `ModelError`.
    """
    if weights not in ("auto", "random"):
        raise ModelError("invalid_option", f'weights={weights!r}: must be "auto" or "random"')
    folder = _folder(source, with_weights=weights == "auto")
    config = _read_json(folder / "config.json")
    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        raise ModelError("broken_config", f"{folder / 'config.json'}: no model_type")
    _refuse(config, model_type)
    inner = {**config, **config["text_config"]} if isinstance(config.get("text_config"), Mapping) else config
    generation_file = folder / "generation_config.json"
    generation = _read_json(generation_file) if generation_file.is_file() else {}
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    if generation_file.is_file():
        digest.update(generation_file.read_bytes())
    if weights == "random":
        digest.update(f"random {seed}".encode())
    else:
        for path in weight_files(folder):
            digest.update(f"{path.name} {path.stat().st_size}".encode())
            digest.update(_header(path))
    return ModelSpec(
        source=source,
        folder=folder,
        config=config,
        dtype=_dtype(dtype, inner),
        vocab_size=_integer(folder, inner, ("vocab_size",)),
        max_model_len=_length(folder, inner, max_model_len),
        eos_ids=_eos(generation, inner),
        defaults=_defaults(generation),
        digest=digest.hexdigest(),
        random=weights == "random",
        seed=seed,
    )


def read_family(folder: Path, code: str, what: str) -> Any:
    """What transformers makes of config.json, with the family's defaults. Imports transformers. Raises `ModelError` with this code, which
    begins with `what`."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (ValueError, OSError, KeyError, TypeError, ArithmeticError, StrictDataclassError) as error:
        raise ModelError(code, f"{what}: {error}") from error


def weight_files(folder: Path) -> tuple[Path, ...]:
    """The safetensors files of a folder, sorted. Raises `ModelError` if there are none or if one that the index names is missing."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names = _read_json(index).get("weight_map")
        if not isinstance(names, Mapping) or not all(isinstance(name, str) for name in names.values()):
            raise ModelError("broken_weights", f"{index}: no weight_map")
        files = [folder / name for name in sorted(set(names.values()))]
    else:
        files = [path for path in (folder / "model.safetensors",) if path.is_file()]
    if not files:
        raise ModelError("missing_weights", f"{folder}: no model.safetensors and no index of shards (pickled weights are never loaded)")
    for path in files:
        if path.parent != folder or not path.is_file():
            raise ModelError("missing_weights", f"{path}: named by the index, but not there")
    return tuple(files)


def _folder(source: str, *, with_weights: bool) -> Path:
    folder = TINY if source == "tiny" and not Path(source).exists() else Path(source).expanduser()
    if not folder.is_dir() and source.count("/") == 1 and not source.startswith((".", "/", "~")):
        folder = _fetch(source, with_weights=with_weights)
    if not folder.is_dir():
        raise ModelError("unknown_model", f"{source!r}: neither a folder, nor a hub id (owner/name), nor tiny")
    if not (folder / "config.json").is_file():
        raise ModelError("unknown_model", f"{folder}: no config.json")
    return folder.resolve()


def _fetch(source: str, *, with_weights: bool) -> Path:
    """From the local hub cache, else from the hub, because the user named it."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
    from huggingface_hub.utils.tqdm import disable_progress_bars

    disable_progress_bars()  # an executor's output is a log

    patterns = ["*.json", "*.jinja", "*.txt", "tokenizer*"] + (["*.safetensors"] if with_weights else [])
    try:
        return Path(snapshot_download(source, allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ModelError("unknown_model", f"{source!r}: no such folder, and the hub gave: {error}") from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError("broken_config", f"{path}: {error}") from error
    if not isinstance(value, dict):
        raise ModelError("broken_config", f"{path}: must be a JSON object")
    return value


def _header(path: Path) -> bytes:
    """The header of a safetensors file, checked against the file's size."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else LARGEST_HEADER + 1
        header = file.read(length) if length <= min(size, LARGEST_HEADER) else b""
    try:
        tensors = json.loads(header)
        end = max((entry["data_offsets"][1] for name, entry in tensors.items() if name != "__metadata__"), default=0)
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError) as error:
        raise ModelError("broken_weights", f"{path}: not a safetensors file, or cut off in its header") from error
    if 8 + length + end != size:
        raise ModelError("broken_weights", f"{path}: {size} bytes, but its header asks for {8 + length + end}; download it again")
    return header


def _refuse(config: Mapping[str, Any], model_type: str) -> None:
    if model_type in REFUSED:
        raise ModelError("unsupported_model", f"{model_type}: not supported, because {REFUSED[model_type]}")
    if config.get("is_encoder_decoder"):
        raise ModelError("unsupported_model", f"{model_type}: not supported, because it is an encoder with a decoder")
    if config.get("quantization_config"):
        method = config["quantization_config"].get("quant_method") if isinstance(config["quantization_config"], Mapping) else None
        raise ModelError("unsupported_model", f"{model_type}: its weights are quantized ({method}); give the unquantized ones")


def _dtype(asked: str, config: Mapping[str, Any]) -> str:
    dtype = str(config.get("dtype") or config.get("torch_dtype") or "float32").removeprefix("torch.") if asked == "auto" else asked
    if dtype not in DTYPES:
        raise ModelError("invalid_option", f"dtype={dtype!r}: must be auto or one of {', '.join(DTYPES)}")
    return dtype


def _integer(folder: Path, config: Mapping[str, Any], names: tuple[str, ...]) -> int:
    value = next((config[name] for name in names if config.get(name) is not None), None)
    if value is None:
        value = _family_default(folder, names)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ModelError("broken_config", f"{folder / 'config.json'}: {names[0]}={value!r}: must be a positive integer")
    return value


def _family_default(folder: Path, names: tuple[str, ...]) -> object:
    """Values that a config.json leaves to its family: only then is the family's config class imported."""
    config = read_family(folder, "broken_config", str(folder / "config.json"))
    return next((value for name in names if (value := getattr(config.get_text_config(), name, None)) is not None), None)


def _length(folder: Path, config: Mapping[str, Any], asked: int | None) -> int:
    """Most tokens of a sequence. LongRoPE and dynamic NTK choose their frequencies by the longest sequence of a batch, so sequences would
    change each other: there the length is limited to where that choice never happens."""
    limit = _integer(folder, config, ("max_position_embeddings", "n_positions", "max_sequence_length", "seq_length"))
    rope = config.get("rope_parameters") or config.get("rope_scaling")
    rope = rope if isinstance(rope, Mapping) else {}
    kinds = [entry for entry in (rope, *rope.values()) if isinstance(entry, Mapping)]
    why = ""
    for kind in kinds:
        name = kind.get("rope_type", kind.get("type"))
        phi3_yarn = name == "yarn" and config.get("model_type") == "phi3"  # there it is another name for longrope
        if name in ("longrope", "su", "dynamic") or phi3_yarn:
            original = kind.get("original_max_position_embeddings") or config.get("original_max_position_embeddings") or limit
            limit = min(limit, original) if isinstance(original, int) else limit
            why = f" (its {name} position embedding is exact per sequence only up to there)"
    if asked is not None and not 1 <= asked <= limit:
        raise ModelError("invalid_option", f"max_model_len={asked}: must be from 1 to {limit}, the model's limit{why}")
    return asked or limit


def _eos(generation: Mapping[str, Any], config: Mapping[str, Any]) -> tuple[int, ...]:
    found = generation.get("eos_token_id")
    found = config.get("eos_token_id") if found is None else found
    ids = found if isinstance(found, list) else [] if found is None else [found]
    if not all(isinstance(item, int) and not isinstance(item, bool) for item in ids):
        raise ModelError("broken_config", f"eos_token_id={found!r}: must be an integer or a list of integers")
    return tuple(sorted(set(ids)))


def _defaults(generation: Mapping[str, Any]) -> SamplingDefaults:
    """Out-of-range values are refused here, at start, and not with the first request that relies on them."""
    greedy = generation.get("do_sample") is False

    def number(name: str, neutral: float, low: float, high: float) -> float:
        value = generation.get(name)
        if value is None:
            return neutral
        if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
            raise ModelError("broken_config", f"generation_config.json: {name}={value!r}: must be a number from {low:g} to {high:g}")
        return float(value)

    return SamplingDefaults(
        temperature=0.0 if greedy else number("temperature", 1.0, 0, 100),
        top_k=int(number("top_k", 0, 0, 2**31 - 1)),
        top_p=number("top_p", 1.0, 0, 1) or 1.0,
        min_p=number("min_p", 0.0, 0, 1),
        repetition_penalty=number("repetition_penalty", 1.0, 0, 100) or 1.0,
    )
