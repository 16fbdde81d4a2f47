"""The interactive page of one run or several: one html file that needs no network."""

import base64
import hashlib
import html
import json
import math
import re
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

from hf_clars.plots.layer_rates import opened
from hf_clars.plots.noise_view import noise_view
from hf_clars.plots.page_data import PageRun, page_data
from hf_clars.plots.runs import Run
from hf_clars.plots.style import MARK, NothingToShowError, PlotError

LOSS, EVAL_LOSS = "loss", "eval_loss"
SCRIPTS = ("runs.js", "draw.js", "page.js")


def write_page(runs: Sequence[Run], path: str | Path, *, title: str | None = None) -> Path:
    """Write a page that shows the layer-rate logs of runs in a browser, and their logs of per-sample norms.

    The reader points at a cell to read layer, step and value, chooses the quantity, zooms, and sets two runs side by
    side; charts have the losses and the model's noise scale over the same steps. Logs are reduced to what fits 3 MB
    (see `page_data`); the page says how exact a value is. Names and settings of runs are data, never markup or code,
    and the page's own policy forbids any other script and any connection.

    Args:
        runs: From `open_runs`, each with a log of one kind or both.
        path: The file to write; it is replaced if it exists.
        title: Default: the names of the runs.

    Returns:
        The path.

    Raises:
        PlotError: A run has no log or no steps, or the file cannot be written.
    """
    logs = []
    for run in runs:
        logs += _page_runs(run)
    shown = "Layer-wise rates" if any(run.log for run in runs) else "Per-sample gradient norms"
    script, style = "\n".join(_part(name) for name in SCRIPTS), _part("page.css")
    parts = {
        "mark": MARK,
        "title": html.escape(title or f"{shown}: {', '.join(run.name for run in runs)}"),
        "style": style,
        "style_hash": _hash(style),
        "script": script,
        "script_hash": _hash(script),
        "data": _in_script(json.dumps(page_data(logs), allow_nan=False)),
    }
    # In one pass: what is put in is never searched for marks itself.
    page = re.sub(r"@@(\w+)@@", lambda found: parts[found[1]], _part("page.html"))
    target = Path(path)
    try:
        target.write_text(page, encoding="utf-8", errors="replace")  # a folder's name may be no unicode
    except OSError as error:
        raise PlotError(f"The page could not be saved to {target}: {error}.") from error
    return target


def _page_runs(run: Run) -> list[PageRun]:
    """A run, or where it kept both logs two: layer rates, and per-sample norms."""
    losses = [_drawable(run, key) for key in (LOSS, EVAL_LOSS)]
    found = [] if run.log is None else [PageRun(run.name, opened(run.log), *losses)]
    view = None if run.samples is None else noise_view(run.samples)
    if view is not None and len(view):
        name = run.name if run.log is None else f"{run.name}, per-sample norms"
        found.append(PageRun(name, view, *losses))
    if not found:
        raise NothingToShowError(
            f"The run {run.name} kept no layer-rate log and no per-sample norms for a page to show."
        )
    return found


def _drawable(run: Run, key: str) -> list[tuple[int, float]]:
    """The points of a loss that a logarithmic scale has a place for."""
    return [(step, value) for step, _, value in run.points(key) if 0 < value < math.inf]


def _part(name: str) -> str:
    return (files("hf_clars.plots") / "page" / name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    """Return the source expression that a content security policy allows `text` by."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def _in_script(text: str) -> str:
    """Return JSON that cannot end the script element it stands in: same value, but no letter that html knows."""
    for letter in "<>&":
        text = text.replace(letter, f"\\u{ord(letter):04x}")
    return text
