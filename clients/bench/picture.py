"""Pictures of distributions, for people: what a median and a percentile leave out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from penstock.clients.bench.measure import Run, percentile
from penstock.clients.errors import PenstockError

PERCENTS = (50, 90, 99)


def plot(path: Path, title: str, series: Mapping[str, list[float]], x: str, y: str) -> None:
    """Cumulative distributions, one line a series. Raises `PenstockError` if matplotlib is missing or the file cannot be written."""
    figure = _figure(8, 5)
    axes = figure.add_subplot()
    _distributions(axes, series)
    axes.set(title=title, xlabel=x, ylabel=y)
    _write(figure, path)


def plot_rates(path: Path, title: str, runs: Mapping[float, Run]) -> None:
    """The time to the first token and the gap between tokens, each on a scale of its own: the distribution at every rate, requests a
    second, and below it percentiles against the rate if there are several. Raises `PenstockError` as `plot` does."""
    figure = _figure(12, 9 if len(runs) > 1 else 5)
    panels = figure.subplots(2 if len(runs) > 1 else 1, 2, squeeze=False)
    kinds = {
        "time to the first token": {rate: [1e3 * trace.first for trace in run.traces] for rate, run in runs.items()},
        "gap between tokens": {rate: [1e3 * gap for trace in run.traces for gap in trace.gaps] for rate, run in runs.items()},
    }
    for column, (name, values) in zip(panels.T, kinds.items(), strict=True):
        _distributions(column[0], {f"{rate:g} requests/s": ordered for rate, ordered in values.items()}, shades=True)
        column[0].set(title=name, xlabel="milliseconds", ylabel="share", xscale="log")
        _number(column[0].xaxis)
        for below in column[1:]:
            rates = sorted(rate for rate, one in values.items() if one)
            for percent in PERCENTS:
                below.plot(rates, [percentile(values[rate], percent) for rate in rates], marker="o", label=f"p{percent}")
            below.set(xlabel="requests a second", ylabel="milliseconds", xscale="log", yscale="log")
            _number(below.yaxis)
            below.set_xticks(rates, [f"{rate:g}" for rate in rates])
            below.minorticks_off()
            below.grid(alpha=0.3)
            below.legend()
    figure.suptitle(title)
    _write(figure, path)


def plot_adapters(path: Path, title: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """By the number of adapters: the ratio to no adapters, and how long a token takes. Raises `PenstockError` as `plot` does."""
    figure = _figure(12, 5)
    ratio, gap = figure.subplots(1, 2)
    rows = sorted(rows, key=lambda row: row["adapters"])
    top = max(1.15, *(1.1 * row["ratio"] for row in rows))
    places, counts = range(len(rows)), [str(row["adapters"]) for row in rows]
    ratio.plot(places, [row["ratio"] for row in rows], marker="o")
    for place, row in zip(places, rows, strict=True):
        ratio.annotate(f"{row['output_tokens_per_s']:,.0f} tok/s", (place, row["ratio"]), (0, 8), textcoords="offset points", ha="center")
    ratio.set(title="tokens a second, to the same without adapters", ylabel="ratio", ylim=(0, top))
    for percent in (50, 99):
        gap.plot(places, [1e3 * row[f"itl_p{percent}_s"] for row in rows], marker="o", label=f"p{percent}")
    gap.set(title="gap between tokens", ylabel="milliseconds", ylim=(0, None))
    gap.legend()
    for axes in (ratio, gap):
        axes.set_xticks(places, counts)
        axes.margins(x=0.12)
        axes.set_xlabel("adapters in the batch")
        axes.grid(alpha=0.3)
    figure.suptitle(title)
    _write(figure, path)


def _distributions(axes: Any, series: Mapping[str, list[float]], *, shades: bool = False) -> None:
    """`shades`: the series have an order, and their colours show it."""
    from matplotlib import colormaps

    for number, (name, values) in enumerate(series.items()):
        ordered = sorted(values)
        color = colormaps["viridis"](0.9 * number / max(1, len(series) - 1)) if shades else None
        axes.plot(ordered, [(rank + 1) / len(ordered) for rank in range(len(ordered))], label=name, color=color)
    axes.set(ylim=(0, 1))
    axes.grid(alpha=0.3)
    axes.legend()


def _number(axis: Any) -> None:
    """Plain numbers on a logarithmic axis, also where it spans less than a decade."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_locator(NullLocator())


def _figure(width: float, height: float) -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise PenstockError("--plot needs matplotlib: pip install 'penstock[plots]'") from error
    return Figure(figsize=(width, height), layout="constrained")


def _write(figure: Any, path: Path) -> None:
    try:
        figure.savefig(path, dpi=120)
    except OSError as error:
        raise PenstockError(f"cannot write {path}: {error}") from error
