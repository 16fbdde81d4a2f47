"""The study's pictures, from its kept runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from hf_clars.plots.columns import Columns
from hf_clars.plots.panels import Quantity, draw_heat_map, name_layers, rule
from hf_clars.plots.style import DASHES, Look, finish, new_figure, themed
from research.cifar10.choosing import Row, Runs
from research.cifar10.settings import Settings

DPI, SIZE = 110, (6.2, 4.3)


def plot_rates(path: Path, runs: Runs, lines: Sequence[tuple[str, Settings]], title: str) -> None:
    """Draw accuracy over the peak rate: seed 0 as a line, other seeds as hollow points.

    Args:
        path: The png to write.
        runs: Kept runs.
        lines: Name and settings, whose rate does not count.
        title: Of the panel.
    """
    with themed("light") as look:
        figure = new_figure(*SIZE)
        axes = figure.subplots()
        rates = sorted({rate for _, s in lines for rate in runs.rates(s)})
        for (name, settings), colour, dashes in zip(lines, look.series, DASHES, strict=False):
            _draw_rates(axes, runs, name, settings, colour, dashes)
        axes.set_title(title, fontsize=10)
        _rate_axis(axes, rates)
        _label(axes, look, "peak rate a", "held-out accuracy, %")
        axes.legend(frameon=False, fontsize=9)
        finish(figure, look, "Accuracy over the rate", path, DPI)


def _draw_rates(axes: Axes, runs: Runs, name: str, settings: Settings, colour: str, dashes: str) -> None:
    found = sorted(runs.rates(settings).items())
    axes.plot(*zip(*found, strict=True), dashes, color=colour, marker="o", markersize=4, label=name)
    for seed in range(1, 6):
        others = runs.rates(Settings(**{**vars(settings), "seed": seed}))
        axes.plot(list(others), list(others.values()), "o", color=colour, markersize=4, fillstyle="none")


def _rate_axis(axes: Axes, rates: Sequence[float]) -> None:
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator(list(rates)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_locator(NullLocator())


def plot_shares(path: Path, runs: Mapping[str, Row], title: str) -> None:
    """Draw the median layer's share of signal over epochs.

    Args:
        path: The png to write.
        runs: {name: a run that measured it}.
        title: Of the panel.
    """
    with themed("light") as look:
        figure = new_figure(*SIZE)
        axes = figure.subplots()
        for (name, row), colour, dashes in zip(runs.items(), look.series, DASHES, strict=False):
            curve = np.array(row["curve"])
            epochs = curve[:, 0] * row["epochs"] / updates(row)
            axes.plot(epochs, curve[:, 2], dashes, color=colour, marker="o", markersize=3, label=name)
        axes.set_title(title, fontsize=10)
        axes.set_ylim(-0.03, 1.22)  # the legend above the curves
        axes.set_yticks([0.0, 0.2, 0.4, 0.6, 0.8, 1.0])
        _label(axes, look, "epoch", r"$s_k$ of the median layer")
        axes.legend(frameon=False, fontsize=9, ncols=2, loc="upper center")
        finish(figure, look, "How much of a layer's squared batch gradient is signal", path, DPI)


def updates(row: Row) -> int:
    """Updates of a run of 45,000 images."""
    return 45_000 // int(row["batch"]) * int(row["epochs"])


def plot_layers(path: Path, row: Row, title: str) -> None:
    """Draw the share of signal of every layer of a run over its steps.

    Args:
        path: The png to write.
        row: A run that kept them.
        title: Of the picture.
    """
    steps, values = np.array([point[0] for point in row["curve"]], dtype=np.int64), np.array(row["signal"])
    quantity = Quantity(values, "", r"$s_k$", "cividis", share=True)
    with themed("light") as look:
        figure = new_figure(7.5, 0.9 + 0.2 * len(row["layers"]))
        axes = figure.subplots()
        draw_heat_map(figure, axes, Columns(steps, len(steps)), quantity, quantity.norm(), bar_aspect=25)
        name_layers(axes, row["layers"], 40)
        finish(figure, look, title, path, DPI)


def plot_batches(path: Path, lines: Mapping[str, Mapping[int, float]], best: Mapping[int, float], title: str) -> None:
    """Draw accuracy over the batch size, as points below the best of all at each.

    Args:
        path: The png to write.
        lines: {name: {B: accuracy}}.
        best: {B: the highest accuracy of all methods and rates there}.
        title: Of the picture.
    """
    sizes = sorted({b for line in lines.values() for b in line})
    with themed("light") as look:
        figure = new_figure(*SIZE)
        axes = figure.subplots()
        for i, (name, line) in enumerate(lines.items()):
            found = sorted(line.items())
            gaps = [accuracy - best[b] for b, accuracy in found]
            colour, dashes = look.series[i % len(look.series)], DASHES[i % len(DASHES)]
            axes.plot([b for b, _ in found], gaps, dashes, color=colour, marker="o", markersize=4, label=name)
        _rate_axis(axes, sizes)
        axes.axhline(0, color=look.grid, linewidth=1)
        axes.set_ylim(max(-10.5, axes.get_ylim()[0]), 0.5)
        _label(axes, look, "batch size B (equal samples)", "points below the best of all")
        axes.legend(frameon=False, fontsize=8)
        finish(figure, look, title, path, DPI)


def _label(axes: Axes, look: Look, x: str, y: str) -> None:
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    rule(axes, look)
