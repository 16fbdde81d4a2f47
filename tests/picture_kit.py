"""Logs to draw, and what is read off the figures."""

import json

import torch
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.transforms import Bbox

from hf_clars.records import LayerRateLog

NAN = float("nan")


def make_log(
    folder, *, layers: int = 5, steps: int = 30, method: str = "clars", names=None, settings=None, change=None
) -> LayerRateLog:
    """Write a log whose rates fall over time and differ by layer; R_k only for CLARS."""
    names = names or [f"encoder.stages.{index}.convolution" for index in range(layers)]
    log = LayerRateLog.create(
        folder, layers=names, settings={"method": method, "global_batch": 1024} | (settings or {})
    )
    for step in range(1, steps + 1):
        values = torch.ones(5, len(names))
        values[0] = torch.logspace(-2, 0, len(names)) * (1.001 - step / steps) ** 2
        values[4] = torch.linspace(0.1, 0.9, len(names)) / step
        if method != "clars":
            values[3:] = NAN
        if change:
            change(step, values)
        log.append(step, values)
    log.flush()
    return log


def texts(figure: Figure) -> str:
    found = [text.get_text() for axes in figure.axes for text in axes.texts]
    found += [axes.get_title(loc="left") + axes.get_xlabel() + axes.get_ylabel() for axes in figure.axes]
    return "\n".join(found)


def drawn_texts(figure: Figure) -> list[tuple[str, Bbox]]:
    """Return every text that is drawn, and where; tick labels beyond the ends of an axis are not."""
    figure.canvas.draw()
    renderer = figure.canvas.get_renderer()
    found = list(figure.texts)
    for axes in figure.axes:
        left = axes.get_title(loc="left")
        titles = [text for text in axes.findobj(Text) if text.get_text() == left]
        found += [*axes.texts, *titles, axes.xaxis.label, axes.yaxis.label]
        found += axes.get_legend().get_texts() if axes.get_legend() else []
        for axis in (axes.xaxis, axes.yaxis):
            low, high = sorted(axis.get_view_interval())
            ticks = zip(axis.get_ticklocs(), axis.get_ticklabels(), strict=True)
            found += [label for place, label in ticks if low <= place <= high]
    return [(text.get_text(), text.get_window_extent(renderer)) for text in found if text.get_text()]


def misplaced(figure: Figure) -> list[tuple[str, ...]]:
    """Return the pairs of texts that cover each other, and the texts that stick out of the figure."""
    found = drawn_texts(figure)
    assert len(found) > 20
    pairs = [(a, b) for i, a in enumerate(found) for b in found[i + 1 :]]
    width, height = figure.bbox.width, figure.bbox.height
    return [(a[0], b[0]) for a, b in pairs if a[1].padded(-1).overlaps(b[1].padded(-1))] + [
        (text,) for text, box in found if box.x0 < 0 or box.y0 < 0 or box.x1 > width or box.y1 > height
    ]


def make_history(folder, *, steps: int = 30, steps_an_epoch: float = 10, every: int = 3, nan_from: int | None = None):
    """Write a `trainer_state.json` as Trainer does; return its log history."""
    history = []
    for step in range(every, steps + 1, every):
        epoch = step / steps_an_epoch
        loss = NAN if nan_from is not None and step >= nan_from else 2 / step + 0.1
        history.append({"step": step, "epoch": epoch, "loss": loss, "learning_rate": 1.0})
        if step % (2 * every) == 0:
            history.append({"step": step, "epoch": epoch, "eval_loss": loss + 0.1, "eval_accuracy": 1 - 1 / step})
    folder.mkdir(exist_ok=True, parents=True)
    (folder / "trainer_state.json").write_text(json.dumps({"log_history": history}))
    return history
