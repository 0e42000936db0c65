"""What is wrong with an adapter, or with a way of merging some."""

from __future__ import annotations


class AdapterError(Exception):
    """An adapter cannot be served. `code` is one of:

    - missing_adapter: the folder or one of its two files is not there;
    - broken_adapter: a file is not what its format says, or the two contradict each other;
    - unsupported_adapter: peft can read it, but it changes the model in a way that this engine does not know;
    - changed_adapter: its source has another one now, and what was loaded from there is gone, or is to be merged;
    - wrong_base_model: it was made for a model of other modules or sizes;
    - invalid_recipe: these adapters cannot be merged in this way.

    The message names the value, the limit and what to do; `field` the key of `adapter_config.json` or of a `Recipe`, where it is one."""

    def __init__(self, code: str, message: str, field: str | None = None) -> None:
        self.code, self.message, self.field = code, message, field
        super().__init__(message)


def some(names: list[str], most: int = 5) -> str:
    """A few of them and how many there are, for a message. Names come from files of others: what cannot be printed is escaped."""
    shown = ", ".join(repr(name[:160]) for name in sorted(names)[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"
