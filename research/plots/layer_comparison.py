"""The same quantity of every layer, over epochs, for several methods side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter
from numpy.typing import NDArray

from hf_clars.plots.columns import on_log_scale, shortened

Lines = tuple[Sequence[str], NDArray[np.floating[Any]]]
"""Layer names, from input to output, and values [epochs, K]."""

_PLAIN = FuncFormatter(lambda value, _: f"{value:g}")


def plot_layers(path: Path, rows: Mapping[str, Mapping[str, Lines]], *, ylabel: str) -> None:
    """Draw one row of panels a network, one panel a method, one line a layer, dark at the input.

    Args:
        path: The png to write.
        rows: {network: {method: lines}}; all panels of a row share the vertical axis.
        ylabel: Of the first panel of each row.
    """
    columns = max(len(methods) for methods in rows.values())
    figure = Figure(figsize=(2.9 * columns + 2.2, 3.4 * len(rows)), layout="constrained")
    parts = figure.subfigures(len(rows), 1, squeeze=False)[:, 0]
    for part, (network, methods) in zip(parts, rows.items(), strict=True):
        panels = part.subplots(1, columns, squeeze=False, sharey=True)[0]
        for axes in panels[len(methods) :]:
            axes.set_visible(False)
        for axes, (method, (layers, values)) in zip(panels, methods.items(), strict=False):
            shades = colormaps["viridis"](np.linspace(0, 0.93, len(layers)))
            epochs = np.arange(1, len(values) + 1)
            usable = np.where(on_log_scale(values), values, np.nan)  # a layer that died has none
            for k, layer in enumerate(layers):
                axes.plot(epochs, usable[:, k], color=shades[k], linewidth=1.5, label=shortened(layer, 26))
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter(_PLAIN)
            axes.yaxis.set_minor_formatter(_PLAIN if _decades(methods) < 1 else NullFormatter())
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            axes.set_xlabel("epoch")
            axes.set_title(f"{network}: {method}", fontsize=9.5)
            axes.grid(True, color="0.9", linewidth=0.6)
        panels[0].set_ylabel(ylabel)
        part.legend(*panels[0].get_legend_handles_labels(), loc="outside right upper", fontsize=7, frameon=False)
    figure.savefig(path, dpi=110)


def _decades(methods: Mapping[str, Lines]) -> float:
    """How many decades the values of one row of panels span."""
    usable = np.concatenate([values[on_log_scale(values)] for _, values in methods.values()])
    return float(np.log10(usable.max() / usable.min())) if len(usable) else 0.0
