"""What is drawn of a run or of several, under which file names, and what may be replaced."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from hf_clars.per_sample.log import PerSampleLog
from hf_clars.plots.comparison import plot_comparison
from hf_clars.plots.gradient_variance import plot_gradient_variance
from hf_clars.plots.layer_rates import plot_layer_rates
from hf_clars.plots.noise_scale import plot_noise_scale
from hf_clars.plots.page import write_page
from hf_clars.plots.runs import Run
from hf_clars.plots.style import NothingToShowError, PlotError, is_own_product
from hf_clars.plots.training_curves import plot_training_curves
from hf_clars.records import LayerRateLog

RATES, VARIANCE, CURVES, NOISE = "layer_rates", "gradient_variance", "training_curves", "noise_scale"
COMPARED = "_compared"


@dataclass(frozen=True)
class Product:
    """A file that was written, or why it was not: `problem` is None or one paragraph.

    `missing` says that the run has nothing to show there, which is no failure.
    """

    path: Path
    problem: str | None = None
    missing: bool = False


def draw_run(
    run: Run,
    folder: Path,
    *,
    pictures: Iterable[str] = (RATES, VARIANCE, CURVES, NOISE),
    formats: Sequence[str] = ("png",),
    theme: str = "light",
    page: bool = False,
    overwrite: bool = False,
) -> list[Product]:
    """Draw one run into a folder.

    Args:
        run: From `open_runs`.
        folder: Where to; it must exist.
        pictures: Of "layer_rates", "gradient_variance", "training_curves" and "noise_scale"; default: all.
        formats: "png", "svg" or both.
        theme: "light" (default) or "dark"; the names of dark pictures end in "_dark".
        page: Write the interactive page `layer_rates.html` too.
        overwrite: Replace files that were not made here. Default False: they are left, and named as a problem.

    Returns:
        A product for each file; what a run does not have (R_k, accuracy) is a problem of that file only.
    """
    draw: dict[str, Callable[[Path], object]] = {
        RATES: lambda path: plot_layer_rates(_log_of(run), path, theme=theme),
        VARIANCE: lambda path: plot_gradient_variance(_log_of(run), path, theme=theme),
        CURVES: lambda path: plot_training_curves([run], path, theme=theme),
        NOISE: lambda path: plot_noise_scale(_samples_of(run), path, theme=theme),
    }
    wanted = {name: draw[name] for name in pictures}
    return _make(folder, wanted, [run] if page else [], f"{RATES}.html", formats, theme, overwrite)


def draw_comparison(
    runs: Sequence[Run],
    folder: Path,
    *,
    formats: Sequence[str] = ("png",),
    theme: str = "light",
    page: bool = False,
    overwrite: bool = False,
) -> list[Product]:
    """Draw several runs against each other: rates, loss and accuracy, and with `page` one page of all.

    Args:
        runs: Two or more.
        folder: As in `draw_run`, and all further arguments.
        formats: As in `draw_run`.
        theme: As in `draw_run`.
        page: As in `draw_run`.
        overwrite: As in `draw_run`.

    Returns:
        A product for each file.
    """
    draw: dict[str, Callable[[Path], object]] = {
        RATES + COMPARED: lambda path: plot_comparison(runs, path, theme=theme),
        CURVES + COMPARED: lambda path: plot_training_curves(runs, path, theme=theme),
    }
    return _make(folder, draw, runs if page else [], f"{RATES}{COMPARED}.html", formats, theme, overwrite)


def _make(
    folder: Path,
    draw: dict[str, Callable[[Path], object]],
    on_page: Sequence[Run],
    page_name: str,
    formats: Sequence[str],
    theme: str,
    overwrite: bool,
) -> list[Product]:
    ending = "" if theme == "light" else f"_{theme}"
    todo = [(folder / f"{name}{ending}.{kind}", make) for name, make in draw.items() for kind in formats]
    if on_page:
        todo.append((folder / page_name, lambda path: write_page(on_page, path)))
    return [_product(path, make, overwrite) for path, make in todo]


def _product(path: Path, make: Callable[[Path], object], overwrite: bool) -> Product:
    try:
        if path.exists() and not overwrite and not is_own_product(path):
            raise PlotError(f"{path.name} was not made by hf_clars, so it is left as it is: allow --overwrite.")
        make(path)
    except (PlotError, OSError) as error:
        return Product(path, str(error), missing=isinstance(error, NothingToShowError))
    return Product(path)


def _samples_of(run: Run) -> PerSampleLog:
    if run.samples is None:
        raise NothingToShowError(f"The run {run.name} kept no log of per-sample norms.")
    return run.samples


def _log_of(run: Run) -> LayerRateLog:
    if run.log is None:
        raise NothingToShowError(f"The run {run.name} kept no layer-rate log: CLARS, LARS and NAG do.")
    return run.log
