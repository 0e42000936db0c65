"""Options of the command line made from the tables of fields, so that no parameter is written twice."""

from __future__ import annotations

import inspect
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields
from typing import Annotated, Any, TypeVar

import typer

from penstock.clients.order import refuse

F = TypeVar("F", bound=Callable[..., Any])


def with_tables(*tables: type[Any], panels: tuple[str, ...], skip: tuple[str, ...] = ()) -> Callable[[F], F]:
    """A command whose last parameter is `**given` gets an option for each field of `tables` (one panel of the help each), but for `skip`.
    `given` then holds the fields as typer read them, `None` where the option was not used: see `only_given`."""

    def decorate(command: F) -> F:
        own = [
            one for one in inspect.signature(command, eval_str=True).parameters.values() if one.kind is not inspect.Parameter.VAR_KEYWORD
        ]
        made = [
            inspect.Parameter(spec.name, inspect.Parameter.KEYWORD_ONLY, default=_option(spec, kind, panel), annotation=kind | None)
            for table, panel in zip(tables, panels, strict=True)
            for spec in fields(table)
            if spec.name not in skip
            for kind in (_kind(typing.get_type_hints(table)[spec.name]),)
        ]
        parameters = [one.replace(kind=inspect.Parameter.KEYWORD_ONLY) for one in own] + made
        command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        command.__annotations__ = {one.name: one.annotation for one in parameters}
        return command

    return decorate


Adapter = Annotated[
    str | None, typer.Option(help="the name of a LoRA adapter, or its source", rich_help_panel="Prompt", show_default=False)
]
AdapterToken = Annotated[
    str | None,
    typer.Option(help="what its source wants", envvar="PENSTOCK_ADAPTER_TOKEN", rich_help_panel="Prompt", show_default=False),
]


def only_given(given: Mapping[str, Any]) -> dict[str, Any]:
    """The fields whose options were used. Raises `InvalidRequest` for a bias or a template variable that cannot be read."""
    values = {name: value for name, value in given.items() if value is not None and value != []}
    if "logit_bias" in values:
        values["logit_bias"] = [_pair("logit_bias", text) for text in values["logit_bias"]]
    if "template_kwargs" in values:
        values["template_kwargs"] = dict(_assignment(text) for text in values["template_kwargs"])
    return values


def _kind(hint: Any) -> Any:
    """What an option of this field takes: a number, a switch, text, or several of them."""
    parts = [part for part in typing.get_args(hint) if part is not type(None)] if _is_union(hint) else [hint]
    first = parts[0]
    if typing.get_origin(first) is tuple:
        return list[int] if typing.get_args(first)[0] is int else list[str]
    if typing.get_origin(first) is not None or first not in (int, float, bool, str):
        return list[str]
    return first


def _is_union(hint: Any) -> bool:
    return typing.get_origin(hint) in (typing.Union, types.UnionType)


def _option(spec: Any, kind: Any, panel: str) -> Any:
    shown = "" if spec.default in (None, (), MISSING) or spec.default is False else f" [dim]\\[default: {spec.default}][/dim]"
    note = {"logit_bias": " (ID:BIAS)", "template_kwargs": " (NAME=VALUE)"}.get(spec.name, "")
    several = "; may be repeated" if typing.get_origin(kind) is list else ""
    flag = "--" + (spec.metadata.get("flag") or spec.name.replace("_", "-"))
    name = f"{flag}/--no-{flag[2:]}" if kind is bool else flag
    return typer.Option(None, name, help=spec.metadata["help"] + note + several + shown, rich_help_panel=panel, show_default=False)


def _pair(name: str, text: str) -> tuple[int, float]:
    token, _, bias = text.partition(":")
    try:
        return int(token), float(bias)
    except ValueError:
        raise refuse(name, text, "ID:BIAS, such as 17:-2.5") from None


def _assignment(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not (name and equals):
        raise refuse("template_kwargs", text, "NAME=VALUE")
    return name, {"true": True, "false": False}.get(value, value)
