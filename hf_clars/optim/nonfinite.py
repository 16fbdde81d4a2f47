"""A step whose norms are not all finite is not taken: weights and momentum stay as they are, no device is waited for.

NaN or infinity in a loss reaches the gradient, and any in a gradient reaches its norm, so the norms that are measured
anyway tell. The answer stays on the device: it is folded into the rates (0 for every layer), the momentum (then kept
whole, not looked ahead along) and the gradients (taken as 0, because 0 times NaN is NaN).
"""

from __future__ import annotations

from dataclasses import replace

import torch

from hf_clars.optim.measures import LayerMeasures


def hold_unless_finite(measures: LayerMeasures) -> LayerMeasures:
    """Note which layers' norms are finite and, if any are not, set all rates to 0.

    Args:
        measures: Of one step.

    Returns:
        The same with `finite` [K] and `applied` (0-dim) filled in, both bool on the device of the norms.
    """
    finite = measures.grad_norm.isfinite()
    if measures.mean_sample_norm is not None:
        finite = finite & measures.mean_sample_norm.isfinite()
    applied = finite.all()
    return replace(measures, rate=torch.where(applied, measures.rate, 0.0), finite=finite, applied=applied)
