"""The kinds of panel that pictures of a layer-rate log are made of: heat map, summary lines, one line a layer."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator
from numpy.typing import NDArray

from hf_clars.plots.columns import Columns, Values, common_prefix, log_range, on_log_scale, quietly, shortened
from hf_clars.plots.style import DASHES, Look, say

NO_VALUE, ZERO, INFINITE = "0.78", "white", "#d55e00"
"""Colours of cells that a log scale has no place for; none of them occurs in the colour maps used here."""

NOTHING_USABLE = "no finite value above zero was logged"

_SUMMARY = {"largest": (0, "-"), "smallest": (1, "-"), "median": (-1, "--"), "every layer": (0, "-")}
"""Place in the theme's series, and dashes."""


@dataclass(frozen=True)
class Quantity:
    """One quantity [T, K] and how it is shown.

    Attributes:
        values: [T, K].
        title: Of its panel.
        label: Of its axis.
        colours: Name of a colour map.
        upper: The end of a log scale; None: from the values.
        share: Shown on a linear scale from 0 to 1, not on a log scale.
    """

    values: Values
    title: str
    label: str
    colours: str
    upper: float | None = None
    share: bool = False

    @property
    def shown(self) -> NDArray[np.bool_]:
        """Which values have a place on the scale."""
        return np.isfinite(self.values) if self.share else on_log_scale(self.values)

    @property
    def usable(self) -> bool:
        """Whether any value has a place on the scale."""
        return bool(self.shown.any())

    def norm(self) -> Normalize:
        """The scale: that of `log_range`, or from 0 to 1."""
        return Normalize(0.0, 1.0) if self.share else LogNorm(*log_range(self.values, self.upper))


def draw_heat_map(
    figure: Figure, axes: Axes, columns: Columns, quantity: Quantity, norm: Normalize, *, bar_aspect: float | None
) -> None:
    """Draw a quantity as colours over steps (x) and layers (y, the first on top), with a colour bar.

    Zeros on a log scale, NaN and infinities get colours of their own, named below the panel where they occur.

    Args:
        figure: Owns the colour bar.
        axes: The panel.
        columns: Of the quantity's steps; a cell is the median of its column.
        quantity: [T, K].
        norm: The scale.
        bar_aspect: Length over width of the colour bar; None: no bar.
    """
    cells = columns.reduce(quantity.values, np.nanmedian).T.astype(np.float64)
    low, high = float(norm.vmin or 0), float(norm.vmax or 1)
    missing, infinite, zero = np.isnan(cells), np.isinf(cells), (cells <= 0) & (not quantity.share)
    # A log scale masks zeros; just outside its ends they get the colours set for "under" and "over". The
    # margin keeps the smallest cell from falling below the scale by a rounding.
    shown = np.where(infinite, high * 10, np.where(zero, low / 10, np.clip(cells, low * (1 + 1e-9), high)))
    colour_map = colormaps[quantity.colours].with_extremes(bad=NO_VALUE, under=ZERO, over=INFINITE)
    mesh = axes.pcolormesh(
        columns.edges,
        np.arange(len(cells) + 1),
        np.ma.masked_array(shown, missing),
        norm=norm,
        cmap=colour_map,
        rasterized=True,
    )
    axes.invert_yaxis()
    if bar_aspect is not None:
        bar = figure.colorbar(mesh, ax=axes, label=quantity.label, pad=0.015, fraction=0.05, aspect=bar_aspect)
        if not quantity.share:
            number_log_axis(bar.ax.yaxis, low, high)
    found = {
        f"darkest: {low:.2g} or less": ((cells > 0) & (cells < low / 1.5)).any(),
        f"brightest: {high:.2g} or more": (np.isfinite(cells) & (cells > high * 1.5)).any(),
        "white: 0": zero.any(),
        "grey: no value": missing.any(),
        "orange: infinite": infinite.any(),
    }
    notes = "; ".join(note for note, present in found.items() if present)
    axes.set_xlabel("optimizer step" + (f"\n({notes})" if notes else ""))


def name_layers(axes: Axes, layers: Sequence[str], limit: int) -> None:
    """Write the layer names on the y axis of a heat map: all, or evenly chosen ones if more than `limit`.

    Words that the names have in common at their beginning are left out, and named beside the axis.
    """
    prefix = common_prefix(layers)
    every = math.ceil(len(layers) / limit)
    chosen = range(0, len(layers), every)
    labels = [shortened(layers[index].removeprefix(prefix)) for index in chosen]
    axes.set_yticks([index + 0.5 for index in chosen], labels, fontsize=7.5)
    for tick_label in axes.get_yticklabels():
        tick_label.set_parse_math(False)  # a "$" in a name is a "$"
    counted = f"{len(layers)} layers" if len(layers) != 1 else "1 layer"
    named = f" (1 of {every} named)" if every > 1 else ""
    without = f"\nnames without {shortened(prefix.removesuffix('.'))}" if prefix else ""
    axes.set_ylabel(f"{counted}, in the model's order{named}{without}", parse_math=False)


def draw_summary(axes: Axes, look: Look, columns: Columns, quantity: Quantity, norm: Normalize) -> None:
    """Draw the largest, median and smallest layer of a quantity over steps."""
    usable = np.where(quantity.shown, quantity.values, np.nan)
    reductions: tuple[Callable[..., Any], ...] = (np.nanmax, np.nanmin, np.nanmedian)
    largest, smallest, median = (columns.reduce(quietly(how, usable), how) for how in reductions)
    lines = {"largest": largest, "smallest": smallest, "median": median}
    if np.allclose(largest, smallest, rtol=1e-5, atol=0, equal_nan=True):
        lines = {"every layer": median}  # else one line would hide the others
    axes.fill_between(columns.centres, smallest, largest, color="0.5", alpha=0.15, linewidth=0)
    styled = {name: (line, look.series[_SUMMARY[name][0]], _SUMMARY[name][1]) for name, line in lines.items()}
    _draw_lines(axes, look, columns, styled)
    _scale_lines(axes, look, columns, norm, quantity)


def draw_layers(
    axes: Axes, look: Look, columns: Columns, quantity: Quantity, layers: Sequence[str], norm: Normalize
) -> None:
    """Draw one line a layer, for a few layers: the median of each column."""
    usable = np.where(quantity.shown, quantity.values, np.nan)
    medians = columns.reduce(usable, np.nanmedian)
    styles = zip(cycle(look.series), cycle(DASHES), strict=False)
    styled = {
        shortened(name, 24): (medians[:, index], colour, dashes)
        for index, (name, (colour, dashes)) in enumerate(zip(layers, styles, strict=False))
    }
    _draw_lines(axes, look, columns, styled)
    _scale_lines(axes, look, columns, norm, quantity)


def draw_summary_or_layers(
    axes: Axes, look: Look, columns: Columns, quantity: Quantity, layers: Sequence[str], *, limit: int = 6
) -> None:
    """Draw each layer's line if there are at most `limit`, else the summary; or say that there is nothing."""
    if not quantity.usable:
        say(axes, look, NOTHING_USABLE)
    elif len(layers) <= limit:
        draw_layers(axes, look, columns, quantity, layers, quantity.norm())  # the legend takes the title's place
    else:
        axes.set_title("Over all layers", loc="left", fontsize=11)
        draw_summary(axes, look, columns, quantity, quantity.norm())


def _draw_lines(axes: Axes, look: Look, columns: Columns, lines: Mapping[str, tuple[Values, str, str]]) -> None:
    marker = "o" if columns.count == 1 else ""  # one step alone would be invisible as a line
    for name, (line, colour, dashes) in lines.items():
        axes.plot(columns.centres, line, dashes, color=colour, linewidth=1.3, marker=marker, label=name)
    legend_above(axes, 3)


def legend_above(axes: Axes, columns: int) -> None:
    """Put a legend above the panel, where it can hide no line; a "$" in a name is a "$"."""
    handles, _ = axes.get_legend_handles_labels()
    legend = axes.legend(
        loc="lower right",
        bbox_to_anchor=(1, 1),
        ncols=min(columns, max(1, len(handles))),
        frameon=False,
        fontsize=8.5,
        borderaxespad=0.1,
    )
    for text in legend.get_texts():
        text.set_parse_math(False)


def _scale_lines(axes: Axes, look: Look, columns: Columns, norm: Normalize, quantity: Quantity) -> None:
    if quantity.share:
        axes.set_ylim(-0.03, 1.03)
    else:
        low, high = float(norm.vmin or 0) / 1.2, float(norm.vmax or 1) * 1.2
        axes.set_yscale("log")
        axes.set_ylim(low, high)
        number_log_axis(axes.yaxis, low, high)
    axes.set_xlim(columns.edges[0], columns.edges[-1])
    rule(axes, look)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel(quantity.label)


def rule(axes: Axes, look: Look) -> None:
    """Draw a quiet grid behind everything."""
    axes.grid(True, color=look.grid, linewidth=0.6)
    axes.set_axisbelow(True)


def number_log_axis(axis: Any, low: float, high: float) -> None:
    """Number an axis from `low` to `high` with plain numbers: decades, or 1, 2, 5 of each where there are few."""
    decades = math.log10(high / low)
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if decades < 2.5 else (1.0,), numticks=12))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_locator(NullLocator())
