"""The pictures of a study: test accuracy over epochs, and what tuning saw."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, NullFormatter

WARMUP, TUNED = "+warmup", "learning rate or eta, whichever is tuned"
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "black", "#56b4e9", "0.55", "#8c564b", "#7f3c8d")

Curves = Mapping[str, Sequence[Sequence[float]]]
"""{arm: accuracy by epoch of each seed}."""


def plot_curves(path: Path, panels: Mapping[str, Curves], *, ylabel: str = "test accuracy, %") -> None:
    """Draw the mean over the seeds of each arm, and between which values they lie.

    Args:
        path: The png to write.
        panels: {title: curves}; arms that end in "+warmup" are drawn in a panel of their own, to the right.
        ylabel: Of all panels.
    """
    figure, grid = _grid(len(panels))
    colours = _colours(arm for curves in panels.values() for arm in curves)
    for row, (title, curves) in zip(grid, panels.items(), strict=True):
        for axes, warm in zip(row, (False, True), strict=True):
            for arm, seeds in curves.items():
                if arm.endswith(WARMUP) == warm:
                    _draw_seeds(axes, seeds, colours[_plain(arm)])
            if curves and warm and not any(arm.endswith(WARMUP) for arm in curves):
                axes.axis("off")
                continue
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            _finish(axes, _panel_title(title, warm), "epoch", ylabel)
        _same_limits(row)
    _legend(figure, colours)
    figure.savefig(path, dpi=110)


def plot_tuning(path: Path, panels: Mapping[str, Mapping[str, Sequence[tuple[float, float | None, bool]]]]) -> None:
    """Draw the accuracy on held-out images of every tuning run over its value.

    Args:
        path: The png to write.
        panels: {title: {arm: (value, accuracy after the last epoch or None where it diverged, chosen)}}.
    """
    figure, grid = _grid(len(panels))
    colours = _colours(arm for arms in panels.values() for arm in arms)
    for row, (title, arms) in zip(grid, panels.items(), strict=True):
        for axes, warm in zip(row, (False, True), strict=True):
            for arm, points in arms.items():
                if arm.endswith(WARMUP) == warm:
                    _draw_tuning(axes, points, colours[_plain(arm)])
            axes.set_xscale("log")
            axes.xaxis.set_minor_formatter(NullFormatter())
            _finish(
                axes,
                _panel_title(title, warm),
                TUNED,
                "accuracy, %",
            )
        _same_limits(row)
    _legend(figure, colours, note="ring: chosen; cross at 0: diverged")
    figure.savefig(path, dpi=110)


def _grid(rows: int) -> tuple[Figure, Any]:
    figure = Figure(figsize=(12.5, 4.0 * rows), layout="constrained")
    return figure, figure.subplots(rows, 2, squeeze=False)


def _panel_title(title: str, warm: bool) -> str:
    return f"{title}, {'with' if warm else 'without'} warmup"


def _plain(arm: str) -> str:
    return arm.removesuffix(WARMUP)


def _colours(arms: Any) -> dict[str, str]:
    names = list(dict.fromkeys(_plain(arm) for arm in arms))
    return {name: _COLOURS[i % len(_COLOURS)] for i, name in enumerate(names)}


def _draw_seeds(axes: Axes, seeds: Sequence[Sequence[float]], colour: str) -> None:
    longest = max((len(seed) for seed in seeds), default=0)
    if not longest:
        return
    values = np.full((len(seeds), longest), np.nan)
    for i, seed in enumerate(seeds):
        values[i, : len(seed)] = 100 * np.asarray(seed)
    epochs = np.arange(1, longest + 1)
    axes.plot(epochs, np.nanmean(values, axis=0), color=colour, linewidth=1.5)
    axes.fill_between(
        epochs, np.nanmin(values, axis=0), np.nanmax(values, axis=0), color=colour, alpha=0.15, linewidth=0
    )


def _draw_tuning(axes: Axes, points: Sequence[tuple[float, float | None, bool]], colour: str) -> None:
    fine = [(value, 100 * accuracy) for value, accuracy, _ in points if accuracy is not None]
    axes.plot([v for v, _ in fine], [a for _, a in fine], color=colour, linewidth=1.2, marker="o", markersize=3.5)
    lost = [value for value, accuracy, _ in points if accuracy is None]
    axes.plot(lost, [0.0] * len(lost), "x", color=colour, markersize=6)
    for value, accuracy, chosen in points:
        if chosen and accuracy is not None:
            axes.plot(value, 100 * accuracy, "o", color=colour, markersize=10, fillstyle="none")


def _finish(axes: Axes, title: str, xlabel: str, ylabel: str) -> None:
    axes.set_title(title, fontsize=10)
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    axes.grid(True, color="0.9", linewidth=0.6)
    axes.set_axisbelow(True)


def _same_limits(row: Sequence[Axes]) -> None:
    limits = [axes.get_ylim() for axes in row]
    for axes in row:
        axes.set_ylim(max(-3, min(low for low, _ in limits)), min(101, max(high for _, high in limits)))


def _legend(figure: Figure, colours: Mapping[str, str], *, note: str | None = None) -> None:
    handles = [Line2D([], [], color=colour, label=name) for name, colour in colours.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(6, len(handles)), frameon=False, title=note)
