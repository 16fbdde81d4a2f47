"""The picture of the gradient noise scale: which batch size is still useful, over steps and layer by layer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from hf_clars.per_sample.log import PerSampleLog
from hf_clars.per_sample.noise_scale import NoiseScale
from hf_clars.plots.columns import Columns, log_range, on_log_scale
from hf_clars.plots.layer_rates import heat_map_height
from hf_clars.plots.panels import Quantity, draw_heat_map, legend_above, name_layers, number_log_axis, rule
from hf_clars.plots.style import Look, NothingToShowError, checked_target, finish, new_figure, say, themed

Floats = NDArray[np.float64]
NOT_YET = "not known yet: the gradient was mostly noise, or the run measured it in no step"


def plot_noise_scale(
    log: PerSampleLog | str | Path,
    path: str | Path | None = None,
    *,
    title: str | None = None,
    theme: str = "light",
    max_labels: int = 40,
    max_columns: int = 1000,
    dpi: int = 130,
) -> Figure:
    """Draw the noise scale and the share of signal of a run.

    Above, heat maps over steps and layers: the noise scale B_k = tr(Sigma_k) / ||G_k||^2 in samples, and the share of
    signal s_k in the squared batch gradient. Below, both of the whole model: the noise scale with one standard error
    and the batch size that was used, and the share of signal, which is 1 / 2 where the two are equal.

    Args:
        log: A log, or what `PerSampleLog.open` takes.
        path: Where to save the picture, as .png or .svg; default: nowhere.
        title: Default: "Gradient noise scale" and how many steps were measured.
        theme: "light" (default) or "dark".
        max_labels: Name every layer up to so many (default 40), evenly chosen ones of more.
        max_columns: Gather steps into at most so many columns (default 1000).
        dpi: Dots per inch of a png.

    Returns:
        The matplotlib figure.

    Raises:
        PlotError: The log has no steps or no noise scale, there is no such theme, or the picture cannot be saved.
        RecordError: There is no such log, or it is damaged.
    """
    target = None if path is None else checked_target(path)
    log = log if isinstance(log, PerSampleLog) else PerSampleLog.open(log)
    steps, read = log.noise_scale()
    if not len(steps) or bool(read.value.isnan().all()):
        raise NothingToShowError("The log of per-sample norms has no noise scale: no batch gradient was read.")
    batch = log.read()["samples"].double().numpy()
    columns = Columns(steps.numpy(), max_columns)
    height = heat_map_height(len(log.layers), max_labels)
    with themed(theme) as look:
        figure = new_figure(14, height + 4.2)
        grid = figure.add_gridspec(2, 2, height_ratios=[height, 2.6])
        maps = [figure.add_subplot(grid[0, column]) for column in (0, 1)]
        lines = [figure.add_subplot(grid[1, column]) for column in (0, 1)]
        scale = Quantity(read.value[:, :-1].numpy(), "Noise scale of each layer", "samples", "viridis")
        share = Quantity(read.share[:, :-1].numpy(), "Share of signal of each layer", r"$s_k$", "cividis", upper=1.0)
        for axes, quantity in zip(maps, (scale, share), strict=True):
            _draw_map(figure, look, axes, columns, quantity, 8 * height)
        name_layers(maps[0], log.layers, max_labels)
        maps[1].set_yticks(maps[0].get_yticks(), [])
        _draw_scale(lines[0], look, columns, read, batch)
        _draw_share(lines[1], look, columns, read.share[:, -1].numpy())
        named = f"Gradient noise scale · {len(steps)} measured steps" if title is None else title
        return finish(figure, look, named, target, dpi)


def _draw_map(figure: Figure, look: Look, axes: Axes, columns: Columns, quantity: Quantity, aspect: float) -> None:
    axes.set_title(quantity.title, loc="left", fontsize=11)
    if not quantity.usable:
        say(axes, look, NOT_YET)
        return
    draw_heat_map(figure, axes, columns, quantity, quantity.norm(), bar_aspect=aspect)


def _draw_scale(axes: Axes, look: Look, columns: Columns, read: NoiseScale, batch: Floats) -> None:
    """The model's noise scale, its band, and the batch size; the legend takes the title's place."""
    value, low, high = (x[:, -1].numpy() for x in (read.value, read.low, read.high))
    if not on_log_scale(value).any():
        say(axes, look, NOT_YET)
        return
    known = np.concatenate([value[on_log_scale(value)], batch])[:, None]
    bottom, top = log_range(known)
    bottom, top = bottom / 2, top * 2
    middle, lower, upper, size = (_medians(columns, x) for x in (value, low, high, batch))
    upper = np.where(np.isposinf(upper), top, upper)  # the band has no upper end there
    band = np.isfinite(lower) & (lower < top)
    colour = look.series[0]
    axes.fill_between(
        columns.centres, lower, upper, where=band, color=colour, alpha=0.2, linewidth=0, label="± 1 standard error"
    )
    axes.plot(columns.centres, middle, "-", color=colour, linewidth=1.5, label="noise scale")
    axes.plot(columns.centres, size, "--", color=look.series[-1], linewidth=1.2, label="batch size")
    axes.set_yscale("log")
    axes.set_ylim(bottom, top)
    number_log_axis(axes.yaxis, bottom, top)
    _finish_lines(axes, look, columns, "whole model, samples")
    legend_above(axes, 3)


def _draw_share(axes: Axes, look: Look, columns: Columns, share: Floats) -> None:
    axes.set_title("Share of signal, whole model", loc="left", fontsize=11)
    axes.plot(columns.centres, _medians(columns, share), "-", color=look.series[0], linewidth=1.5)
    axes.set_ylim(0, 1)
    _finish_lines(axes, look, columns, r"$s$")


def _finish_lines(axes: Axes, look: Look, columns: Columns, label: str) -> None:
    axes.set_xlim(columns.edges[0], columns.edges[-1])
    axes.set_xlabel("optimizer step")
    axes.set_ylabel(label)
    rule(axes, look)


def _medians(columns: Columns, values: Any) -> Floats:
    return np.asarray(columns.reduce(values, np.nanmedian), np.float64)
