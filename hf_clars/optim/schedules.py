"""Rates over a run as pure functions of the step: the factor that gamma_scale is multiplied with."""

from __future__ import annotations

import bisect
import math
from collections.abc import Sequence


def warmup(step: int, *, warmup_steps: int) -> float:
    """Gradual warmup (Goyal et al., 2017): from 0 in equal parts, 1 from step `warmup_steps` on.

    Args:
        step: Optimizer step, from 0.
        warmup_steps: Length; 0: none.

    Returns:
        The factor, in [0, 1].
    """
    return min(1.0, step / warmup_steps) if warmup_steps else 1.0


def polynomial(step: int, *, total_steps: int, warmup_steps: int = 0, power: float = 2.0, end: float = 0.0) -> float:
    """Polynomial decay over what remains after a warmup, as in the paper's Figure 4 (power 2).

    Args:
        step: Optimizer step, from 0.
        total_steps: Steps of the whole run.
        warmup_steps: Steps of gradual warmup.
        power: Default 2.
        end: The factor at the end. Default 0.

    Returns:
        The factor.
    """
    if step < warmup_steps:
        return warmup(step, warmup_steps=warmup_steps)
    rest = (total_steps - min(step, total_steps)) / max(1, total_steps - warmup_steps)
    return end + (1.0 - end) * rest**power


def steps_down(step: int, *, boundaries: Sequence[float], factor: float = 0.1, warmup_steps: int = 0) -> float:
    """Multiplied by `factor` at each boundary, as in Figure 3, after an optional warmup.

    Args:
        step: Optimizer step, from 0.
        boundaries: Steps at which to multiply, increasing.
        factor: Default 0.1.
        warmup_steps: Steps of gradual warmup.

    Returns:
        The factor.
    """
    if step < warmup_steps:
        return warmup(step, warmup_steps=warmup_steps)
    return factor ** bisect.bisect_right(boundaries, step)


def time_varying(step: int, *, delay_steps: float, steepness: float, alpha: float = 1.0, minimum: float = 0.0) -> float:
    """TVLARS' phi_t = 1 / (alpha + exp(lambda (t - d_e))) + gamma_min: high from the start, then a sigmoid down.

    Source: Do et al., "Revisiting LARS for Large Batch Training Generalization of Neural Networks", arXiv 2309.14053.

    Args:
        step: t, from 0.
        delay_steps: d_e, the middle of the descent.
        steepness: lambda, a step.
        alpha: 1 / alpha bounds the factor.
        minimum: gamma_min, what is left at the end.

    Returns:
        The factor.
    """
    exponent = min(steepness * (step - delay_steps), 700.0)  # exp of more is no float
    return 1.0 / (alpha + math.exp(exponent)) + minimum
