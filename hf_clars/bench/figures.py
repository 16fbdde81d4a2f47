"""The two pictures: what each way costs, network by network, and how this package's cost grows."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from hf_clars.bench.cost import CostRow
from hf_clars.bench.growth import UNITS, GrowthRow
from hf_clars.bench.ways import HfClars, Plain
from hf_clars.grad_norms.rules.costs import Form, WeightUse, cheapest_form

TARGET = 1.25
"""The cost that this package is to stay below."""

FORMS: dict[Form, tuple[str, str]] = {
    "outer": ("#009e73", "^"),
    "gram": ("#0072b2", "o"),
    "product": ("#e69f00", "s"),
}
"""Colour and marker of each form."""

OURS, OTHERS, LIMIT = "#0072b2", "#e69f00", "#d55e00"
"""Of Okabe and Ito's colours; position and text tell the same as the colours."""


def save_cost_page(rows: Sequence[CostRow], path: Path) -> Path:
    """Horizontal bars: time of each way divided by the plain step's, one panel a network.

    Args:
        rows: Of any number of networks.
        path: Of the PNG.

    Returns:
        The path.
    """
    networks = list(dict.fromkeys(row.network for row in rows))
    columns = min(2, len(networks))
    lines = math.ceil(len(networks) / columns)
    figure = _new_figure(7.2 * columns, 1.2 + 2.5 * lines)
    for index, network in enumerate(networks):
        axes = figure.add_subplot(lines, columns, index + 1)
        _draw_bars(axes, [row for row in rows if row.network == network and row.way != Plain.name])
    figure.suptitle(
        f"Gradient and per-sample norms: time as a multiple of the plain forward and backward pass\n"
        f"(bars: median and quartiles over rounds; dotted: the plain step; dashed: target {TARGET})"
    )
    return _save(figure, path)


def _draw_bars(axes: Axes, rows: Sequence[CostRow]) -> None:
    right = 1.5 * max([TARGET, *(row.ratio.high for row in rows if row.ratio)])  # notes stand beside the bars
    paper = {"facecolor": "white", "edgecolor": "none", "pad": 1.5}  # behind text that the lines would cross
    for place, row in enumerate(rows):
        if row.ratio is None:
            note = textwrap.fill(row.note, 80, max_lines=2, placeholder=" ...")
            axes.text(0.02 * right, place, note, va="center", fontsize=7.5, bbox=paper, zorder=4)
            continue
        middle = row.ratio.median
        spread = [[middle - row.ratio.low], [row.ratio.high - middle]]
        colour = OURS if row.way == HfClars.name else OTHERS
        axes.barh(place, middle, 0.62, xerr=spread, color=colour, ecolor="0.25", capsize=2.5)
        label = f"{middle:.2f}" + (f"\n{row.note}" if row.note else "")
        axes.text(row.ratio.high + 0.015 * right, place, label, va="center", fontsize=8.5, bbox=paper, zorder=4)
    axes.axvline(1, color="0.4", linestyle=":", linewidth=1, zorder=0.5)
    axes.axvline(TARGET, color=LIMIT, linestyle="--", linewidth=1.2, zorder=3)
    axes.set_xlim(0, right)
    axes.set_yticks(range(len(rows)), [row.way for row in rows])
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlabel("time / time of the plain step")
    if rows:
        axes.set_title(
            f"{rows[0].network}: {rows[0].batch} samples of {rows[0].image_size} pixels or tokens", fontsize=10.5
        )


def save_growth_page(rows: Sequence[GrowthRow], path: Path) -> Path:
    """The ratio against batch, image size, width and depth; and where each form of the norms is cheapest.

    Args:
        rows: Of any axes.
        path: Of the PNG.

    Returns:
        The path.
    """
    figure = _new_figure(15, 7.5)
    high = 1.05 * max([TARGET, *(row.ratio.high for row in rows)])
    low = 0.97 * min([1.0, *(row.ratio.low for row in rows)])
    for index, axis in enumerate(UNITS):
        axes = figure.add_subplot(2, 3, index + 1 + index // 2)
        _draw_line(axes, [row for row in rows if row.axis == axis])
        axes.set_xlabel(UNITS[axis])
        axes.set_ylim(low, high)
    for place, side in ((3, 1), (6, 3)):
        _draw_forms(figure.add_subplot(2, 3, place), side)
    figure.suptitle(
        f"Cost of per-sample gradient norms with hf_clars: time / time of the plain step\n"
        f"(points: median; bars: quartiles over rounds; dotted: the plain step; dashed: target {TARGET})"
    )
    return _save(figure, path)


def _draw_forms(axes: Axes, side: int) -> None:
    """Where the cost model takes which form: channels against positions, for kernels of one size."""
    positions = [n**2 for n in (1, 2, 3, 4, 6, 8, 11, 16, 23, 32, 45, 64)]
    channels = [2**k for k in range(3, 13)]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for form, (colour, marker) in FORMS.items():
        points = [
            (c, t)
            for c in channels
            for t in positions
            if cheapest_form(WeightUse(16, t, c, c, pixels=t, kernel=(side, side)), device) == form
        ]
        if points:
            across, up = zip(*points, strict=True)
            axes.scatter(across, up, c=colour, marker=marker, s=26, label=form)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.set_xlabel("channels, in and out")
    axes.set_ylabel("positions of the output (pixels)")
    axes.set_title(f"Form taken for {side}x{side} kernels ({device}, B = 16)", fontsize=10.5)
    axes.set_ylim(top=2**14.5)  # room for the legend
    axes.legend(loc="upper center", ncols=len(FORMS), fontsize=8.5)


def _draw_line(axes: Axes, rows: Sequence[GrowthRow]) -> None:
    values = [row.value for row in rows]
    middle = [row.ratio.median for row in rows]
    spread = [[row.ratio.median - row.ratio.low for row in rows], [row.ratio.high - row.ratio.median for row in rows]]
    axes.errorbar(values, middle, yerr=spread, color=OURS, marker="o", capsize=3, linewidth=1.5)
    axes.axhline(1, color="0.4", linestyle=":", linewidth=1)
    axes.axhline(TARGET, color=LIMIT, linestyle="--", linewidth=1.2)
    axes.set_xscale("log", base=2)
    axes.set_xticks(values, [str(value) for value in values])
    axes.minorticks_off()
    axes.set_ylabel("time / plain step")
    axes.grid(True, color="0.92", linewidth=0.6)
    axes.set_axisbelow(True)


def _new_figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)  # no window, and no global state of pyplot
    return figure


def _save(figure: Figure, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    return path
