"""How pictures look, in light and in dark, and how they are saved."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from hf_clars.errors import HfClarsError

SUFFIXES = (".png", ".svg")

MARK = "hf_clars.plots"
"""Written into every file made here, so that a later run may replace it but nothing of a user's."""

DASHES = ("-", "--", ":", "-.")
"""For readers who see no colours: lines differ in both."""


class PlotError(HfClarsError):
    """A picture cannot be drawn or saved; the message says why."""


class NothingToShowError(PlotError):
    """The run has nothing of what the picture shows (a method without R_k, a run without a step)."""


@dataclass(frozen=True)
class Look:
    """Colours of one theme. Each of `series` stands out from `paper` by 3:1, and from the others for every eye."""

    ink: str
    paper: str
    grid: str
    quiet: str
    series: tuple[str, ...]


# Near Okabe and Ito's set, moved until the two nearest colours are as far apart as can be (CIELAB distance, for
# ordinary sight and three kinds of colour blindness); the tests hold them to it.
THEMES = {
    "light": Look("black", "white", "0.9", "0.94", ("#252ee0", "#eb640d", "#13a074", "#793294", "#792500", "black")),
    "dark": Look("0.92", "#15171a", "0.25", "0.16", ("#2d7bff", "#e0466b", "#84ff99", "#ad80c4", "#f2aa0f", "0.92")),
}


@contextmanager
def themed(theme: str) -> Iterator[Look]:
    """Draw in a theme: matplotlib's default colours are the theme's inside the block.

    Raises:
        PlotError: There is no such theme.
    """
    if theme not in THEMES:
        raise PlotError(f"There is no theme {theme!r}: choose one of {', '.join(THEMES)}.")
    look = THEMES[theme]
    inked = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
    papered = ("figure.facecolor", "axes.facecolor", "savefig.facecolor")
    colours: dict[Any, Any] = {**dict.fromkeys(inked, look.ink), **dict.fromkeys(papered, look.paper)}
    with rc_context(colours):
        yield look


def new_figure(width: float, height: float) -> Figure:
    """Return an empty figure (inches) that is drawn by Agg: no display, and pyplot knows nothing of it."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def say(axes: Axes, look: Look, text: str) -> None:
    """Put a line of text in place of a panel that has nothing to show."""
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_visible(False)
    axes.set_facecolor(look.quiet)
    axes.text(0.5, 0.5, text, ha="center", va="center", transform=axes.transAxes, fontsize=10, wrap=True)


def finish(figure: Figure, look: Look, title: str, path: str | Path | None, dpi: int) -> Figure:
    """Put the title on a figure and save it, unless `path` is None; return it.

    The same log gives the same file, as neither a date nor random names go into it.

    Raises:
        PlotError: The file cannot be written.
    """
    text = figure.suptitle(title, fontsize=13)
    text.set_parse_math(False)
    for axes in figure.axes:  # ticks are made when they are drawn, perhaps outside the theme's block
        axes.tick_params(which="both", colors=look.ink)
    if path is None:
        return figure
    target = checked_target(path)
    metadata = {"Date": None, "Creator": MARK} if target.suffix.lower() == ".svg" else {"Software": MARK}
    try:
        with rc_context({"svg.hashsalt": "hf_clars"}):
            figure.savefig(target, dpi=dpi, metadata=metadata)
    except OSError as error:
        raise PlotError(f"The picture could not be saved to {target}: {error}.") from error
    return figure


def checked_target(path: str | Path) -> Path:
    """Return `path`, or raise `PlotError` unless it ends as a picture does: call before the drawing."""
    path = Path(path)
    if path.suffix.lower() not in SUFFIXES:
        endings = " or ".join(SUFFIXES)
        raise PlotError(f"A picture is saved as {endings}, by the ending of its name; {str(path)!r} has neither.")
    return path


def is_own_product(path: Path) -> bool:
    """Return whether the file at `path` was made here: pictures and pages carry `MARK` in their first kilobytes."""
    with path.open("rb") as file:
        return MARK.encode() in file.read(8192)
