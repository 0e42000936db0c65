"""What can be wrong with a source, as one type and one table of codes."""

from __future__ import annotations

# code → (whether trying again helps, what it means)
CODES: dict[str, tuple[bool, str]] = {
    "invalid": (False, "the text is no source"),
    "not_listed": (False, "the operator allows nothing at this place, or it leads to one that is not allowed"),
    "not_found": (False, "there is nothing there, or no adapter_config.json"),
    "not_allowed": (False, "the place wants another token, or one at all"),
    "no_safetensors": (False, "there is no adapter_model.safetensors, and weights of no other kind are read"),
    "too_large": (False, "a file has more bytes than the limit"),
    "broken_archive": (False, "the archive cannot be unpacked, or does not hold exactly one adapter"),
    "timed_out": (True, "connecting, a read or the whole of it took longer than its limit"),
    "stopped": (True, "nobody waited for it any more"),
    "unreachable": (True, "the place does not answer, or not as it should"),
    "changed": (True, "the files were written to while they were read"),
    "not_installed": (False, "sources of this kind need a package that is not there"),
    "disk": (False, "the files cannot be written"),
}


class SourceError(Exception):
    """Raised where an adapter cannot be had from its source. `message` holds no secret: of a source it shows what `Source.shown` does.
    `retry`: whether trying again helps, as the table says unless the place said something else."""

    def __init__(self, code: str, message: str, retry: bool | None = None) -> None:
        self.code = code
        self.message = message
        self.retry = CODES[code][0] if retry is None else retry
        super().__init__(message)

    def __reduce__(self) -> tuple[type[SourceError], tuple[str, str, bool]]:
        return SourceError, (self.code, self.message, self.retry)
