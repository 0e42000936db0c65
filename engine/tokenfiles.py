"""The files of a tokenizer: where they are, how they are opened, and which they are (a digest).

tokenizer.json is the authority where a model has one: it is what the model's makers tested, and what other engines read. Only models
without one need transformers' `AutoTokenizer`, which builds the tokenizer from older files, and imports torch on the way.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

JSON = "tokenizer.json"
CONFIG = "tokenizer_config.json"
NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
TEMPLATES = ("chat_template.jinja", "chat_template.json", "additional_chat_templates/*.jinja")
DECIDING = (JSON, CONFIG, "special_tokens_map.json", "added_tokens.json", *TEMPLATES)
OLDER = ("vocab.json", "vocab.txt", "merges.txt", "*.model", "*.tiktoken", "tekken.json")  # what models without tokenizer.json have


class TokenizeError(ValueError):
    """Text cannot become ids, or a tokenizer cannot be loaded. `code`: `invalid_request` (then `field` names what was wrong),
    `template_error` or `model_error`."""

    def __init__(self, code: str, message: str, field: str | None = None) -> None:
        self.code, self.message, self.field = code, message, field
        super().__init__(message)


def tokenizer_folder(source: str | Path) -> Path:
    """The folder of a model's tokenizer files: `source` itself, or for a hub id the local snapshot, fetched first where it is missing."""
    folder = Path(source)
    if folder.is_dir():
        return folder
    if folder.is_absolute() or str(source).startswith(".") or str(source).count("/") > 1:
        raise TokenizeError("model_error", f"{source}: there is no such folder", "model")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(str(source), allow_patterns=[*DECIDING, *OLDER, "config.json"]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise TokenizeError("model_error", f"{source}: neither a folder nor to be had from the hub: {error}", "model") from error


def tokenizer_digest(folder: Path) -> str:
    """SHA-256, in hexadecimal, of the tokenizer's files and templates, names and contents: equal digests give equal ids and texts."""
    patterns = DECIDING if (folder / JSON).is_file() else (*DECIDING, *OLDER)
    found = {path.relative_to(folder).as_posix(): path for pattern in patterns for path in folder.glob(pattern) if path.is_file()}
    digest = hashlib.sha256()
    for name in sorted(found):
        content = found[name].read_bytes()
        digest.update(f"{name}\0{len(content)}\0".encode())
        digest.update(content)
    return digest.hexdigest()


def load_fast(folder: Path) -> Any:
    """transformers' tokenizer of a folder, of the kind that has a `tokenizers.Tokenizer` inside. Raises `TokenizeError`."""
    try:
        if (folder / JSON).is_file():
            # Not AutoTokenizer: its module imports torch, and some of its classes replace what tokenizer.json says by what they think.
            from transformers.tokenization_utils_tokenizers import TokenizersBackend

            return TokenizersBackend.from_pretrained(str(folder), local_files_only=True)
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False, use_fast=True)
    except Exception as error:  # the libraries raise whatever they meet in broken files, down to bare Exception
        raise TokenizeError("model_error", f"{folder}: the tokenizer cannot be loaded: {error}", "model") from error
    if not getattr(tokenizer, "is_fast", False):
        raise TokenizeError("model_error", f"{folder}: {type(tokenizer).__name__} has no fast form, with a tokenizer.json", "model")
    return tokenizer


def load_backend(folder: Path) -> Any:
    """The `tokenizers.Tokenizer` alone, as transformers would set it up for decoding, without importing it. Raises `TokenizeError`."""
    if not (folder / JSON).is_file():
        return load_fast(folder).backend_tokenizer
    from tokenizers import AddedToken, Tokenizer

    try:
        backend = Tokenizer.from_file(str(folder / JSON))
        config = _read_map(folder / CONFIG)
        added = sorted((config.get("added_tokens_decoder") or {}).items(), key=lambda item: int(item[0]))
        # Tokens that only the configuration knows, or that only it calls special.
        backend.add_tokens([AddedToken(token["content"], **{flag: token[flag] for flag in FLAGS if flag in token}) for _, token in added])
        names = [config.get(name) for name in NAMED] + list(config.get("additional_special_tokens") or [])
        texts = [name["content"] if isinstance(name, dict) else name for name in names if name]
        known = {token.content for token in backend.get_added_tokens_decoder().values()}
        backend.add_special_tokens([text for text in texts if text not in known])
    except Exception as error:  # the library raises bare Exception
        raise TokenizeError("model_error", f"{folder}: the tokenizer cannot be loaded: {error}", "model") from error
    return backend


def _read_map(path: Path) -> dict[str, Any]:
    value = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    if not isinstance(value, dict):
        raise ValueError(f"{path.name} is not a map")
    return value
