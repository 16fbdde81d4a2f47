"""The numbers of the interactive page: layer-rate logs, made small enough for one file.

A short log is kept as it is (float32). A longer one is gathered into columns of equally many steps, each the median,
and quantised to 16 bits at equal distances on a logarithmic scale, as `page/runs.js` reads them: code 0 is no value,
1 is zero, 2 is infinite, 3 to 65535 reach from the smallest to the largest value above zero.
"""

import base64
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib import colormaps

from hf_clars.plots.columns import Columns, Values, common_prefix, log_range, on_log_scale, shortened
from hf_clars.plots.noise_view import NoiseView
from hf_clars.records import LayerRateLog

BUDGET = 2_600_000
"""Bytes of base64 for all values of a page; what is left of 3 MB is for names, steps and the page itself."""

MOST_COLUMNS = 1000
MOST_POINTS = 1000

NO_VALUE, ZERO, INFINITE, FIRST, LAST = 0, 1, 2, 3, 65535

DESCRIPTIONS = {
    "rate": ("rate γₖ", "γₖ", "viridis"),
    "noise_scale": ("noise scale Bₖ = tr Σₖ / ‖Gₖ‖², in samples", "Bₖ", "viridis"),
    "ratio": ("agreement of samples Rₖ = ‖gₖ‖ / nₖ", "Rₖ", "cividis"),
    "weight_norm": ("weight norm ‖wₖ‖", "‖wₖ‖", "viridis"),
    "grad_norm": ("gradient norm ‖gₖ‖", "‖gₖ‖", "viridis"),
    "mean_sample_norm": ("mean norm of the samples' gradients nₖ", "nₖ", "viridis"),
    "signal": ("share of signal sₖ in ‖gₖ‖²", "sₖ", "cividis"),
    "damping": ("factor fₖ of the step", "fₖ", "viridis"),
}
"""Label, symbol and colour map of each quantity, in the order of the page's menu."""

SHARES = ("ratio", "signal", "damping")
"""Quantities whose scale ends at 1."""


@dataclass(frozen=True)
class PageRun:
    """One run of a page.

    Attributes:
        name: What tells it from the others.
        log: With at least one step; of layer rates, or of per-sample norms.
        loss: (step, training loss), finite and above zero.
        eval_loss: (step, evaluation loss), likewise.
    """

    name: str
    log: LayerRateLog | NoiseView
    loss: Sequence[tuple[int, float]] = ()
    eval_loss: Sequence[tuple[int, float]] = ()


def page_data(runs: Sequence[PageRun]) -> dict[str, Any]:
    """Return what the page shows of some runs, JSON-able.

    Args:
        runs: At least one.
    """
    values = sum(len(run.log) * len(run.log.layers) * len(run.log.quantities) for run in runs)
    layers = sum(len(run.log.layers) * len(run.log.quantities) for run in runs)
    exact = values * 4 * 4 / 3 <= BUDGET
    columns = max(1, min(MOST_COLUMNS, int(BUDGET / (layers * 2 * 4 / 3))))
    names = [
        {"name": name, "label": label, "symbol": symbol, "colours": colours}
        for name, (label, symbol, colours) in DESCRIPTIONS.items()
        if any(name in run.log.quantities for run in runs)
    ]
    palettes = {colours: _palette(colours) for _, _, colours in DESCRIPTIONS.values()}
    return {
        "quantities": names,
        "palettes": palettes,
        "runs": [_run_data(run, exact, columns) for run in runs],
    }


def _run_data(run: PageRun, exact: bool, most_columns: int) -> dict[str, Any]:
    log, steps, prefix = run.log, run.log.steps, common_prefix(run.log.layers)
    columns = Columns(steps, len(steps) if exact else most_columns)
    firsts = steps[:: columns.width]
    lasts = steps[np.minimum(np.arange(1, columns.count + 1) * columns.width, len(steps)) - 1]
    quantities = {}
    for quantity in (name for name in DESCRIPTIONS if name in log.quantities):
        values = log[quantity]
        if not on_log_scale(values).any():
            continue  # not measured (or useless): the page says so
        upper = 1.0 if quantity in SHARES else None
        low, high = log_range(values, upper)
        cells = values if columns.width == 1 else columns.reduce(values, np.nanmedian)
        quantities[quantity] = {"shown_low": low, "shown_high": high} | (_float32(cells) if exact else _log16(cells))
    return {
        "name": run.name,
        "layers": log.layers,
        "labels": [shortened(layer.removeprefix(prefix), 36) for layer in log.layers],
        "prefix": shortened(prefix.removesuffix(".")),
        "loss": _thinned(run.loss),
        "eval_loss": _thinned(run.eval_loss),
        "noise": _every_few(log.curve) if isinstance(log, NoiseView) else [],
        "settings": {key: _text(value) for key, value in log.settings.items()},
        "first_steps": firsts.tolist(),
        "last_steps": lasts.tolist(),
        "edges": columns.edges.tolist(),
        "quantities": quantities,
    }


def _thinned(points: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """Every so many points of a long curve, to seven digits; the last one is always among them."""
    return [(step, float(f"{value:.7g}")) for step, value in _every_few(points)]


def _every_few(points: Sequence[Any]) -> Sequence[Any]:
    every = math.ceil(len(points) / MOST_POINTS) if points else 1
    return points[::-1][::every][::-1]


def _float32(cells: Values) -> dict[str, Any]:
    return {"encoding": "float32", "error": 0, "data": _base64(cells.T.astype("<f4"))}


def _log16(cells: Values) -> dict[str, Any]:
    """Return cells [columns, K] as codes, layer by layer, with the largest relative error that they make."""
    usable = on_log_scale(cells)
    exponents = np.log(np.where(usable, cells, 1.0), dtype=np.float64)
    # A column's median may be unusable (0 beside one value above) although the log has a usable value.
    low, high = (exponents[usable].min(), exponents[usable].max()) if usable.any() else (0.0, 0.0)
    step = max(high - low, 1e-6) / (LAST - FIRST)
    codes = np.where(usable, np.rint((exponents - low) / step) + FIRST, NO_VALUE)
    codes = np.where(cells == 0, ZERO, np.where(np.isposinf(cells), INFINITE, codes))
    return {
        "encoding": "log16",
        "low": math.exp(low),
        "high": math.exp(low + step * (LAST - FIRST)),
        "error": math.expm1(step / 2),
        "data": _base64(codes.T.astype("<u2")),
    }


def _palette(name: str) -> str:
    """Return 256 colours of a map, three bytes each."""
    return _base64(np.rint(255 * colormaps[name](np.arange(256))[:, :3]).astype(np.uint8))


def _base64(array: np.ndarray) -> str:
    return base64.b64encode(np.ascontiguousarray(array).tobytes()).decode("ascii")


def _text(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
