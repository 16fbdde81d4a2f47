"""The picture of a run: the rate of each layer over time, and why (how much its samples agree)."""

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from hf_clars.optim.methods import METHODS
from hf_clars.plots.columns import Columns, shortened
from hf_clars.plots.panels import NOTHING_USABLE, Quantity, draw_heat_map, draw_summary, name_layers
from hf_clars.plots.style import Look, NothingToShowError, checked_target, finish, new_figure, say, themed
from hf_clars.records import LayerRateLog

SIGNAL = r"$s_k = \Vert \mathrm{E}\,g_k\Vert^2\,/\,\Vert g_k\Vert^2$"
RATIO = r"$R_k = \Vert g_k\Vert\,/\,n_k$"


def plot_layer_rates(
    log: LayerRateLog | str | Path,
    path: str | Path | None = None,
    *,
    title: str | None = None,
    theme: str = "light",
    max_labels: int = 40,
    max_columns: int = 1000,
    dpi: int = 130,
) -> Figure:
    """Draw what each layer did during a run.

    Above, heat maps over steps and layers: the rates gamma_k, and R_k = ||g_k|| / n_k (1: all samples pull
    this layer one way; near 0: they cancel out). Below, the largest, median and smallest of both. Their scales
    are logarithmic and pass over the extreme 1% of steps (see `log_range`). For a method that measures no n_k
    (LARS, NAG) a line of text says so in place of R_k. For SignalLARS s_k, the share of signal in the squared batch
    gradient, takes the place of R_k, and below it is the factor f_k that it makes of LARS' step, both from 0 to 1.

    Args:
        log: A log, or what `LayerRateLog.open` takes.
        path: Where to save the picture, as .png or .svg; default: nowhere.
        title: Default: method and global batch size, from the log's settings "method" and "global_batch".
        theme: "light" (default) or "dark".
        max_labels: Name every layer up to so many (default 40), evenly chosen ones of more.
        max_columns: Gather steps into at most so many columns (default 1000): the median in the heat maps,
            the extremes in the lines.
        dpi: Dots per inch of a png, and of the heat maps inside an svg.

    Returns:
        The matplotlib figure, drawn by Agg: no display is needed, and pyplot's state is not touched.

    Raises:
        PlotError: The log has no steps, there is no such theme, or the picture cannot be saved.
        RecordError: There is no such log.
    """
    target = None if path is None else checked_target(path)
    log = opened(log)
    columns = Columns(log.steps, max_columns)
    known = METHODS.get(str(log.settings.get("method", "")).lower())
    formula = r"$\gamma_k$" if known is None else known.formula
    rate = Quantity(log["rate"], f"Rates  {formula}", r"rate $\gamma_k$", "viridis")
    ratio = Quantity(log["ratio"], f"Agreement of samples  {RATIO}", r"$R_k$", "cividis", upper=1.0)
    below = ratio
    if "signal" in log.quantities:
        ratio = Quantity(log["signal"], rf"Share of signal  {SIGNAL}", r"$s_k$", "cividis", share=True)
        below = Quantity(log["damping"], r"Factor $f_k$", r"$f_k$", "cividis", share=True)
    heat_height = heat_map_height(len(log.layers), max_labels)
    with themed(theme) as look:
        figure, panels = _make_panels(heat_height, ratio.usable)
        _draw_pair(figure, look, panels[:2], columns, rate, 8 * heat_height)
        name_layers(panels[0], log.layers, max_labels)
        if ratio.usable:
            _draw_pair(figure, look, panels[2:], columns, ratio, 8 * heat_height, below)
            panels[2].set_yticks(panels[0].get_yticks(), [])  # the same rows as in the map beside it
        else:
            note = f"{RATIO} is not shown: the log has no $n_k$ (only CLARS measures per-sample gradient norms)."
            say(panels[2], look, note)
        named = shortened(title_of("Layer-wise rates", log) if title is None else title, 110)
        return finish(figure, look, named, target, dpi)


def opened(log: LayerRateLog | str | Path) -> LayerRateLog:
    """Return a log that has something to show.

    Raises:
        PlotError: The log has no steps.
        RecordError: There is no such log.
    """
    log = log if isinstance(log, LayerRateLog) else LayerRateLog.open(log)
    if not len(log):
        raise NothingToShowError("The layer-rate log holds no steps yet: plot it after its first flush.")
    return log


def heat_map_height(layers: int, max_labels: int) -> float:
    """The height of a heat map in inches at which the names of its layers do not touch."""
    return 0.9 + 0.165 * min(max(layers, 8), max_labels)


def title_of(subject: str, log: LayerRateLog) -> str:
    """The subject of a picture, with method and batch size of the run."""
    method, batch = str(log.settings.get("method") or ""), log.settings.get("global_batch")
    known = METHODS.get(method.lower())
    parts = [method.upper() if known is None else known.title, f"batch of {batch}" if batch else ""]
    return " · ".join([subject, *filter(None, parts)])


def _make_panels(heat_height: float, has_ratios: bool) -> tuple[Figure, list[Axes]]:
    """Return the figure and its panels: rate map and lines, then ratio map and lines, or one for a text."""
    lines_height = 2.1
    if has_ratios:
        figure = new_figure(14, heat_height + lines_height + 1.4)
        grid = figure.add_gridspec(2, 2, height_ratios=[heat_height, lines_height])
        places = [grid[0, 0], grid[1, 0], grid[0, 1], grid[1, 1]]
    else:
        figure = new_figure(11, heat_height + lines_height + 1.7)
        grid = figure.add_gridspec(3, 1, height_ratios=[heat_height, lines_height, 0.35])
        places = [grid[0], grid[1], grid[2]]
    return figure, [figure.add_subplot(place) for place in places]


def _draw_pair(
    figure: Figure,
    look: Look,
    panels: list[Axes],
    columns: Columns,
    quantity: Quantity,
    bar_aspect: float,
    below: Quantity | None = None,
) -> None:
    """Draw a quantity in two panels: its heat map, and below it the summary lines of the same or of another."""
    heat, lines = panels
    below = quantity if below is None else below
    heat.set_title(quantity.title, loc="left", fontsize=11)
    lines.set_title("Over all layers" if below is quantity else below.title, loc="left", fontsize=11)
    if not quantity.usable:
        for axes in panels:
            say(axes, look, NOTHING_USABLE)
        return
    draw_heat_map(figure, heat, columns, quantity, quantity.norm(), bar_aspect=bar_aspect)
    draw_summary(lines, look, columns, below, below.norm())
