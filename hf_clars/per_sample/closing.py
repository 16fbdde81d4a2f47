"""What a watched training says at its end: which batch size is still useful, and which examples were the hardest."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from hf_clars.per_sample.log import FOLDER
from hf_clars.per_sample.monitor import NormMonitor
from hf_clars.per_sample.window import Hard

SHOWN = 5
"""How many examples are named; `windows.jsonl` has all."""


def closing_words(monitor: NormMonitor, hardest: Sequence[Hard], output: Path | None) -> str:
    """What was found, in a few lines.

    Args:
        monitor: After training.
        hardest: The examples of the last window, the largest norm first.
        output: The run's folder, if it keeps a log there.

    Returns:
        The lines; empty if no step was measured.
    """
    if monitor.last is None:
        return ""
    lines = [f"Per-sample gradient norms, last measured at step {monitor.last.step:,}"]
    if monitor.ended is not None:
        lines.append("     ended  before the training did, with the warning above")
    if monitor.with_gradient:
        lines.append(f"noise scale  {_noise_scale(monitor, monitor.last.samples)}")
    if hardest:
        lines.append(f"   hardest  {_named(hardest)}")
    if output is not None:
        lines.append(f"   left in  {output / FOLDER}; `hf-clars plot {output}` draws it")
    return "\n".join(lines)


def _noise_scale(monitor: NormMonitor, batch: int) -> str:
    """The model's noise scale, and on which side of it the batch is."""
    if not monitor.noise.steps:
        if batch < 2:
            return "not known: a step had one row only, and texts that are packed into one row are one sample"
        return "left out: a BatchNorm in training mode makes each sample's gradient depend on the others"
    read = monitor.noise.layer(monitor.noise.read(), -1)
    value, low, high = read["value"], read["low"], read["high"]
    if not math.isfinite(value):
        if low > batch:  # infinity only where the average has no upper end
            return f"more than {low:.3g} samples; the batch of {batch:,} is below it: a larger one still pays"
        return f"not known yet: the gradients of {batch:,} samples are mostly noise; measure more steps"
    band = f" ({low:.3g} to {high:.3g})" if math.isfinite(low) else ""
    if monitor.norm_layers_only:
        return f"{value:.3g}{band}, of the normalisation layers alone: read a trend off it, and no batch size"
    if batch > (high if math.isfinite(low) else value):
        side = "is above it: a larger one gains little, a smaller one may do as well"
    elif batch < (low if math.isfinite(low) else value):
        side = "is below it: a larger one still pays"
    else:
        side = "is about as large: a larger one gains less and less"
    return f"{value:.3g} samples{band}; the batch of {batch:,} {side} (not for losses that compare samples)"


def _named(hardest: Sequence[Hard]) -> str:
    known = {hard.sample.index: hard.sample.norm for hard in reversed(hardest) if hard.sample.index >= 0}
    if not known:
        return "not known by their index: train on hf_clars.with_index(dataset), as the warning above says"
    largest = sorted(known.items(), key=lambda pair: -pair[1])[:SHOWN]
    return "of the last window: " + ", ".join(f"index {index} (norm {norm:.3g})" for index, norm in largest)
