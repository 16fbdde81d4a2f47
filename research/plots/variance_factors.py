"""The picture of M_k by layer over epochs (Figure 2)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure
from numpy.typing import NDArray

from hf_clars.plots.columns import shortened


def plot_variance_factors(
    path: Path,
    *,
    title: str,
    layers: Sequence[str],
    thin: Sequence[bool],
    epochs: Sequence[int],
    values: NDArray[np.floating[Any]],
) -> None:
    """Draw one line a layer, dark at the input and bright at the output.

    Args:
        path: The png to write.
        title: Above the panel.
        layers: K names, from input to output.
        thin: For each, whether to draw it thin and dotted (normalisation layers).
        epochs: [E].
        values: M [E, K].
    """
    figure = Figure(figsize=(8.4, 4.6), layout="constrained")
    axes = figure.subplots()
    shades = colormaps["viridis"](np.linspace(0, 0.93, len(layers)))
    for k, layer in enumerate(layers):
        style: dict[str, Any] = {"linewidth": 0.9, "linestyle": ":"} if thin[k] else {"linewidth": 1.8, "marker": "o"}
        axes.plot(epochs, values[:, k], color=shades[k], label=shortened(layer, 28), markersize=3.5, **style)
    axes.set_yscale("log")
    axes.set_xticks(epochs)
    axes.set_xlabel("epochs of training")
    axes.set_ylabel("gradient variance factor $M_k$")
    axes.set_title(title, fontsize=10)
    axes.grid(True, color="0.9", linewidth=0.6)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right upper", fontsize=7.5, frameon=False)
    figure.savefig(path, dpi=110)
