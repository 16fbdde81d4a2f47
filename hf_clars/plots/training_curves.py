"""The picture of loss and accuracy, by optimizer step and by epoch, of one run or of several."""

import math
from collections.abc import Callable, Sequence
from itertools import cycle
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator

from hf_clars.plots.columns import shortened
from hf_clars.plots.panels import rule
from hf_clars.plots.runs import Run
from hf_clars.plots.style import DASHES, Look, NothingToShowError, checked_target, finish, new_figure, say, themed

LOSS, EVAL_LOSS, ACCURACY = "loss", "eval_loss", "eval_accuracy"

_Style = tuple[str, str]


def plot_training_curves(
    runs: Sequence[Run],
    path: str | Path | None = None,
    *,
    title: str | None = None,
    theme: str = "light",
    dpi: int = 130,
) -> Figure:
    """Draw training loss, evaluation loss and evaluation accuracy of runs.

    One run has an axis of optimizer steps (batches) below and one of epochs above. Several are drawn twice, over steps
    on the left and over epochs on the right: a large batch takes few steps an epoch, so runs of different batch sizes
    differ on one axis and may agree on the other. If batch sizes differ, a third column has the last loss and the best
    accuracy over the batch size. A loss that is no longer finite ends its line, and the legend says at which step.

    Args:
        runs: From `open_runs`; those without any logged loss or accuracy are left out.
        path: Where to save the picture, as .png or .svg; default: nowhere.
        title: Default: the name of a single run, else their number.
        theme: "light" (default) or "dark".
        dpi: Dots per inch of a png.

    Returns:
        The matplotlib figure.

    Raises:
        PlotError: No run has logged a loss or an accuracy, or the picture cannot be saved.
    """
    target = None if path is None else checked_target(path)
    shown = [run for run in runs if any(run.points(key) for key in (LOSS, EVAL_LOSS, ACCURACY))]
    if not shown:
        raise NothingToShowError(
            "No loss or accuracy was logged: trainer_state.json is missing or has none yet. Draw again after the first "
            "checkpoint, or at the end of training."
        )
    with themed(theme) as look:
        figure = _draw_one(look, shown[0]) if len(shown) == 1 else _draw_several(look, shown)
        default = shown[0].name if len(shown) == 1 else f"{len(shown)} runs"
        what = "Loss and accuracy" if len(_to_draw(shown)) > 1 else "Loss"
        named = shortened(f"{what} · {default}" if title is None else title, 110)
        return finish(figure, look, named, target, dpi)


def _to_draw(runs: Sequence[Run]) -> list[Callable[..., None]]:
    """What has something to show: a run without evaluation, as of a language model, has no accuracy."""
    return [_draw_loss, _draw_accuracy] if any(run.points(ACCURACY) for run in runs) else [_draw_loss]


def _draw_one(look: Look, run: Run) -> Figure:
    """Loss beside accuracy, if there is any, with steps below and epochs above."""
    draws = _to_draw([run])
    figure = new_figure(12 if len(draws) > 1 else 7.5, 4.6)
    for axes, draw in zip(figure.subplots(1, len(draws), squeeze=False)[0], draws, strict=True):
        draw(axes, look, [run], [(look.series[0], DASHES[0])], over_epochs=False)
        _add_epochs(axes, run)
    _name_runs(figure, figure.axes[0], [run])
    return figure


def _draw_several(look: Look, runs: Sequence[Run]) -> Figure:
    """Loss above accuracy, if there is any; over steps, over epochs, and over batch sizes if they differ."""
    batches = {run.settings.get("global_batch") for run in runs}
    by_batch = len(batches) > 1 and all(isinstance(batch, int) for batch in batches)
    draws = _to_draw(runs)
    figure = new_figure(11 + 4.5 * by_batch, 3.7 * len(draws) + 0.19 * len(runs))
    panels = figure.subplots(len(draws), 2 + by_batch, squeeze=False)
    styles = [style for style, _ in zip(zip(cycle(look.series), cycle(DASHES), strict=False), runs, strict=False)]
    for row, draw in zip(panels, draws, strict=True):
        draw(row[0], look, runs, styles, over_epochs=False)
        draw(row[1], look, runs, styles, over_epochs=True)
    _share_steps([row[0] for row in panels], runs)
    if by_batch:
        _draw_over_batch(panels[0, 2], look, runs, LOSS, "last training loss", last_finite)
        if len(draws) > 1:
            _draw_over_batch(panels[1, 2], look, runs, ACCURACY, "best accuracy", max)
    _name_runs(figure, panels[0, 0], runs)
    return figure


def _share_steps(panels: Sequence[Axes], runs: Sequence[Run]) -> None:
    """Give loss and accuracy one axis of steps, as long as the longest run."""
    steps = [step for run in runs for key in (LOSS, EVAL_LOSS, ACCURACY) for step, _, _ in run.points(key)]
    if steps:
        margin = max(0.5, 0.02 * (max(steps) - min(steps)))
        for axes in panels:
            axes.set_xlim(min(steps) - margin, max(steps) + margin)


def last_finite(values: list[float]) -> float:
    """The last value of a run, NaN for one that ended in a loss that is not finite."""
    return values[-1] if math.isfinite(values[-1]) else math.nan


def _draw_loss(axes: Axes, look: Look, runs: Sequence[Run], styles: list[_Style], *, over_epochs: bool) -> None:
    axes.set_title("Loss  (lines: training, dots: evaluation)", loc="left", fontsize=11)
    finite: list[float] = []
    for run, (colour, dashes) in zip(runs, styles, strict=True):
        steps, epochs, losses = _columns_of(run, LOSS)
        label = _label(run, steps, losses)
        axes.plot(epochs if over_epochs else steps, losses, dashes, color=colour, linewidth=1.3, label=label)
        e_steps, e_epochs, e_losses = _columns_of(run, EVAL_LOSS)
        axes.plot(e_epochs if over_epochs else e_steps, e_losses, "o", color=colour, markersize=3.5)
        finite += [value for value in (*losses, *e_losses) if math.isfinite(value)]
    if not finite:
        say(axes, look, "no finite loss was logged")
        return
    if min(finite) > 0 and max(finite) > 50 * min(finite):
        axes.set_yscale("log")
    _label_axes(axes, look, "loss", over_epochs)


def _draw_accuracy(axes: Axes, look: Look, runs: Sequence[Run], styles: list[_Style], *, over_epochs: bool) -> None:
    axes.set_title("Accuracy on the evaluation data", loc="left", fontsize=11)
    for run, (colour, dashes) in zip(runs, styles, strict=True):
        steps, epochs, accuracies = _columns_of(run, ACCURACY)
        where = epochs if over_epochs else steps
        percent = [100 * value for value in accuracies]
        axes.plot(where, percent, dashes, color=colour, linewidth=1.3, marker="o", markersize=3.5)
    _label_axes(axes, look, "top-1 accuracy (%)", over_epochs)


def _draw_over_batch(
    axes: Axes, look: Look, runs: Sequence[Run], key: str, label: str, choose: Callable[[list[float]], float]
) -> None:
    """Draw one number a run over its batch size, a line a method."""
    axes.set_title(f"{label.capitalize()} by batch size", loc="left", fontsize=11)
    methods: dict[str, list[tuple[int, float]]] = {}
    for run in runs:
        values = [value for _, _, value in run.points(key)]
        if values:
            place = methods.setdefault(str(run.settings.get("method", "")).upper(), [])
            place.append((run.settings["global_batch"], (100 if key == ACCURACY else 1) * choose(values)))
    if not methods:
        say(axes, look, f"no {label} was logged")
        return
    # In ink, as the colours of this picture stand for runs.
    for (method, points), marker, dashes in zip(methods.items(), cycle("os^D"), cycle(DASHES), strict=False):
        axes.plot(
            *zip(*sorted(points), strict=True),
            dashes,
            color=look.ink,
            marker=marker,
            markersize=5,
            linewidth=1.3,
            label=method,
        )
    axes.set_xscale("log", base=2)
    sizes = sorted({batch for points in methods.values() for batch, _ in points})
    axes.xaxis.set_major_locator(FixedLocator(sizes[:: math.ceil(len(sizes) / 6)]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    rule(axes, look)
    axes.set_xlabel("batch size B")
    axes.set_ylabel(f"{label} (%)" if key == ACCURACY else label)
    axes.legend(frameon=False, fontsize=8.5)


def _columns_of(run: Run, key: str) -> tuple[list[float], list[float], list[float]]:
    points = run.points(key)
    return [step for step, _, _ in points], [epoch for _, epoch, _ in points], [value for _, _, value in points]


def _label(run: Run, steps: list[float], losses: list[float]) -> str:
    bad = next((step for step, loss in zip(steps, losses, strict=True) if not math.isfinite(loss)), None)
    note = "" if bad is None else f"  (loss not finite from step {bad:,})"
    return shortened(run.name, 40) + note


def _label_axes(axes: Axes, look: Look, label: str, over_epochs: bool) -> None:
    rule(axes, look)
    axes.set_ylabel(label)
    axes.set_xlabel("epoch" if over_epochs else "optimizer step (one batch each)")
    axes.set_xlim(left=0)
    if not over_epochs:
        axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")


def _add_epochs(axes: Axes, run: Run) -> None:
    """Number epochs above a panel over steps, if epochs were logged."""
    step, epoch = next(((s, e) for s, e, _ in reversed(run.points(LOSS) or run.points(EVAL_LOSS)) if e > 0), (1, 0.0))
    if not epoch or not axes.lines:
        return
    a_step = epoch / step
    above = axes.secondary_xaxis("top", functions=(lambda x: np.multiply(x, a_step), lambda x: np.divide(x, a_step)))
    above.set_xlabel("epoch")


def _name_runs(figure: Figure, axes: Axes, runs: Sequence[Run]) -> None:
    """Name the runs below the panels, where long names and many runs have room."""
    handles, labels = axes.get_legend_handles_labels()
    if len(runs) == 1 and labels == [shortened(runs[0].name, 40)]:
        return  # the title has it
    legend = figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    for text in legend.get_texts():
        text.set_parse_math(False)
