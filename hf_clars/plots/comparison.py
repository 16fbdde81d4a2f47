"""The picture that compares the layer rates of several runs."""

from collections.abc import Sequence
from itertools import cycle
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from hf_clars.plots.columns import Columns, on_log_scale, quietly, shortened
from hf_clars.plots.layer_rates import RATIO, heat_map_height, opened
from hf_clars.plots.panels import (
    NOTHING_USABLE,
    Quantity,
    draw_heat_map,
    name_layers,
    number_log_axis,
    rule,
)
from hf_clars.plots.runs import Run
from hf_clars.plots.style import (
    DASHES,
    Look,
    NothingToShowError,
    PlotError,
    checked_target,
    finish,
    new_figure,
    say,
    themed,
)

MOST_MAPS = 4
MOST_BANDS = 3


def plot_comparison(
    runs: Sequence[Run],
    path: str | Path | None = None,
    *,
    title: str | None = None,
    theme: str = "light",
    max_labels: int = 40,
    max_columns: int = 1000,
    dpi: int = 130,
) -> Figure:
    """Draw the layer rates of several runs on one scale.

    Above, a heat map of the rates of each of the first 4 runs, all in the same colours; below, over steps, the median
    layer's rate and R_k of every run, with a band from the smallest to the largest layer where there are at most 3.

    Args:
        runs: Two or more from `open_runs`, each with a log.
        path: Where to save the picture, as .png or .svg; default: nowhere.
        title: Default: the number of runs.
        theme: "light" (default) or "dark".
        max_labels: Name every layer up to so many (default 40), evenly chosen ones of more.
        max_columns: Gather steps into at most so many columns (default 1000).
        dpi: Dots per inch of a png.

    Returns:
        The matplotlib figure.

    Raises:
        PlotError: There are fewer than two runs, one has no log or no steps, or the picture cannot be saved.
    """
    target = None if path is None else checked_target(path)
    if len(runs) < 2:
        raise PlotError("A comparison needs at least two runs.")
    logs = {}
    for run in runs:
        if run.log is None:
            raise NothingToShowError(f"The run {run.name} kept no layer-rate log: there are no rates to compare.")
        logs[run.name] = opened(run.log)
    columns = {name: Columns(log.steps, max_columns) for name, log in logs.items()}
    rates = {name: Quantity(log["rate"], name, r"rate $\gamma_k$", "viridis") for name, log in logs.items()}
    ratios = {name: Quantity(log["ratio"], name, RATIO, "cividis", upper=1.0) for name, log in logs.items()}
    mapped = list(logs)[:MOST_MAPS]
    heat_height = heat_map_height(max(len(logs[name].layers) for name in mapped), max_labels)
    with themed(theme) as look:
        width, lines_height = 5.2 if len(mapped) == 2 else 3.6, 3.2 + 0.19 * len(runs)
        figure = new_figure(4.2 + width * len(mapped), heat_height + 1.2 + lines_height)
        above, below = figure.subfigures(2, 1, squeeze=False, height_ratios=[heat_height + 1, lines_height])[:, 0]
        maps = above.subplots(1, len(mapped), squeeze=False)[0]
        norm = shared_norm(list(rates.values()))
        for index, (axes, name) in enumerate(zip(maps, mapped, strict=True)):
            aspect = 8 * heat_height if index == len(mapped) - 1 else None
            _draw_map(figure, axes, look, columns[name], rates[name], norm, aspect)
            name_layers(axes, logs[name].layers, max_labels)
            if index and logs[name].layers == logs[mapped[0]].layers:
                axes.set_yticks(maps[0].get_yticks(), [])
                axes.set_ylabel("")
        left, right = below.subplots(1, 2)
        _draw_medians(left, look, "Rate of the median layer", columns, rates)
        _draw_medians(right, look, f"{RATIO} of the median layer", columns, ratios)
        _share_steps([*maps, left, right], list(columns.values()))
        legend = below.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
        for text in legend.get_texts():
            text.set_parse_math(False)
        counted = f"{len(runs)} runs" + (f", the first {MOST_MAPS} as maps" if len(runs) > MOST_MAPS else "")
        return finish(figure, look, shortened(title or f"Layer-wise rates · {counted}", 110), target, dpi)


def _share_steps(panels: Sequence[Axes], columns: Sequence[Columns]) -> None:
    """Give all panels one axis of steps, from the first step of any run to the last: a shorter run ends earlier."""
    first, last = min(c.edges[0] for c in columns), max(c.edges[-1] for c in columns)
    for axes in panels:
        axes.set_xlim(first, last)


def shared_norm(quantities: Sequence[Quantity]) -> LogNorm | None:
    """The scale that holds all quantities; None if none has a value for it."""
    norms = [quantity.norm() for quantity in quantities if quantity.usable]
    if not norms:
        return None
    return LogNorm(min(float(norm.vmin or 0) for norm in norms), max(float(norm.vmax or 1) for norm in norms))


def _draw_map(
    figure: Figure,
    axes: Axes,
    look: Look,
    columns: Columns,
    rate: Quantity,
    norm: LogNorm | None,
    bar_aspect: float | None,
) -> None:
    axes.set_title(shortened(rate.title, 48), loc="left", fontsize=11, parse_math=False)
    if norm is None or not rate.usable:
        say(axes, look, NOTHING_USABLE)
        return
    draw_heat_map(figure, axes, columns, rate, norm, bar_aspect=bar_aspect)


def _draw_medians(
    axes: Axes, look: Look, title: str, columns: dict[str, Columns], quantities: dict[str, Quantity]
) -> None:
    """Draw a line a run; runs without the quantity are named."""
    shown = {name: quantity for name, quantity in quantities.items() if quantity.usable}
    banded = len(shown) <= MOST_BANDS
    axes.set_title(title + ("  (band: all layers)" if banded and shown else ""), loc="left", fontsize=11)
    norm = shared_norm(list(shown.values()))
    if norm is None:
        say(axes, look, NOTHING_USABLE)
        return
    for (name, quantity), colour, dashes in zip(quantities.items(), cycle(look.series), cycle(DASHES), strict=False):
        if name not in shown:
            continue
        usable = np.where(on_log_scale(quantity.values), quantity.values, np.nan)
        gathered, centres = columns[name], columns[name].centres
        median = gathered.reduce(quietly(np.nanmedian, usable), np.nanmedian)
        axes.plot(centres, median, dashes, color=colour, linewidth=1.5, label=shortened(name, 60))
        if banded:
            low, high = (gathered.reduce(quietly(how, usable), how) for how in (np.nanmin, np.nanmax))
            axes.fill_between(centres, low, high, color=colour, alpha=0.12, linewidth=0)
    bottom, top = float(norm.vmin or 0) / 1.2, float(norm.vmax or 1) * 1.2
    axes.set_yscale("log")
    axes.set_ylim(bottom, top)
    number_log_axis(axes.yaxis, bottom, top)
    rule(axes, look)
    without = [name for name in quantities if name not in shown]
    note = f"\n(not measured: {', '.join(shortened(name, 24) for name in without)})" if without else ""
    axes.set_xlabel("optimizer step" + note, parse_math=False)
    axes.set_ylabel(next(iter(shown.values())).label)
