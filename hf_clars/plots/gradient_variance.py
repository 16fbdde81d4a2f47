"""The picture of how much the samples of a batch disagree: R_k, and the gradient variance factor M_k that it estimates.

Figure 2 of Huo, Gu and Huang (AAAI 2021) shows M_k = mean_i ||grad_k f_i||^2 / ||mean_i grad_k f_i||^2 over all
training data, once an epoch. A log has no such pass; it has R_k of each batch, and 1 / R_k^2 is the same quotient
over that batch: exactly with norm="rms", at least as a lower bound with norm="mean" (the mean of norms is at most
their root mean square).
"""

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from hf_clars.plots.columns import Columns, Values, on_log_scale, quietly, shortened
from hf_clars.plots.layer_rates import RATIO, heat_map_height, opened, title_of
from hf_clars.plots.panels import (
    Quantity,
    draw_heat_map,
    draw_summary_or_layers,
    legend_above,
    name_layers,
    number_log_axis,
    rule,
)
from hf_clars.plots.style import DASHES, Look, NothingToShowError, checked_target, finish, new_figure, themed
from hf_clars.records import LayerRateLog

ESTIMATE = r"$1\,/\,R_k^2$"
LABEL = rf"{ESTIMATE}  (estimate of $M_k$)"
QUARTERS = ("1st quarter", "2nd", "3rd", "4th")


def plot_gradient_variance(
    log: LayerRateLog | str | Path,
    path: str | Path | None = None,
    *,
    title: str | None = None,
    theme: str = "light",
    max_labels: int = 40,
    max_columns: int = 1000,
    dpi: int = 130,
) -> Figure:
    """Draw R_k and 1 / R_k^2, the estimate of M_k, over time and over layers.

    Above, 1 / R_k^2 as a heat map over steps and layers, and beside it, row by row, its median in each quarter of
    the run. Below, R_k and 1 / R_k^2 over steps: a line for each layer if there are at most 6, else the largest,
    median and smallest.

    Args:
        log: A log, or what `LayerRateLog.open` takes.
        path: Where to save the picture, as .png or .svg; default: nowhere.
        title: Default: method and global batch size.
        theme: "light" (default) or "dark".
        max_labels: Name every layer up to so many (default 40), evenly chosen ones of more.
        max_columns: Gather steps into at most so many columns (default 1000).
        dpi: Dots per inch of a png, and of the heat map inside an svg.

    Returns:
        The matplotlib figure.

    Raises:
        PlotError: The log has no steps or no R_k (only CLARS measures it), or the picture cannot be saved.
        RecordError: There is no such log.
    """
    target = None if path is None else checked_target(path)
    log = opened(log)
    ratio = Quantity(log["ratio"], "", RATIO, "cividis", upper=1.0)
    if not ratio.usable:
        raise NothingToShowError(
            "This log has no R_k, so nothing estimates M_k: only CLARS measures the samples' gradient norms. Train "
            "with --method clars."
        )
    estimate = Quantity(inverse_square(ratio.values), _heading(log), LABEL, "viridis")
    columns = Columns(log.steps, max_columns)
    heat_height = heat_map_height(len(log.layers), max_labels)
    with themed(theme) as look:
        figure = new_figure(14, heat_height + 3.5)
        grid = figure.add_gridspec(2, 2, height_ratios=[heat_height, 2.1])
        heat, profile, left, right = (figure.add_subplot(grid[place]) for place in ((0, 0), (0, 1), (1, 0), (1, 1)))
        heat.set_title(estimate.title, loc="left", fontsize=11)
        draw_heat_map(figure, heat, columns, estimate, estimate.norm(), bar_aspect=8 * heat_height)
        name_layers(heat, log.layers, max_labels)
        _draw_profile(profile, look, estimate)
        profile.set_yticks(heat.get_yticks(), [])
        draw_summary_or_layers(left, look, columns, ratio, log.layers)
        draw_summary_or_layers(right, look, columns, estimate, log.layers)
        named = shortened(title_of("Disagreement of samples", log) if title is None else title, 110)
        return finish(figure, look, named, target, dpi)


def inverse_square(ratio: Values) -> Values:
    """Return 1 / R^2; NaN where R is missing, infinite where it is 0."""
    with np.errstate(divide="ignore", over="ignore"):
        return np.asarray(1 / np.square(ratio.astype(np.float64)))


def _heading(log: LayerRateLog) -> str:
    bound = "" if log.settings.get("norm") == "rms" else "  (a lower bound: norm = mean)"
    return rf"Estimate of $M_k$ in each batch:  {ESTIMATE}{bound}"


def _draw_profile(axes: Axes, look: Look, estimate: Quantity) -> None:
    """Draw the median of each quarter of the run by layer, in the rows of the heat map."""
    usable = np.where(on_log_scale(estimate.values), estimate.values, np.nan)
    parts = [part for part in np.array_split(usable, len(QUARTERS)) if len(part)]
    names = QUARTERS if len(parts) == len(QUARTERS) else [f"step {i + 1} of {len(parts)}" for i in range(len(parts))]
    rows = np.arange(usable.shape[1]) + 0.5
    marker = "o" if len(rows) <= 40 else ""
    medians = [quietly(np.nanmedian, part.T) for part in parts]
    for name, line, colour, dashes in zip(names, medians, look.series, DASHES, strict=False):
        axes.plot(line, rows, dashes, color=colour, label=name, marker=marker, markersize=3, linewidth=1.3)
    low, high = float(np.nanmin(medians)), float(np.nanmax(medians))
    low, high = (low / 1.2, high * 1.2) if high / low > 1.5 else (low / 2, high * 2)
    axes.set_xscale("log")
    axes.set_xlim(low, high)
    number_log_axis(axes.xaxis, low, high)
    axes.set_ylim(len(rows), 0)
    rule(axes, look)
    axes.set_xlabel(f"{LABEL}, median over time")
    axes.set_title("By layer", loc="left", fontsize=11)
    legend_above(axes, 4)
