"""LARS times a function of R_k: what lies between LARS (1) and CLARS (R_k), and what Theorem 2 suggests.

They are candidates, compared here at equal budget, and no options of `hf_clars.optim`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from hf_clars.optim import CLARS, LayerMeasures
from hf_clars.optim.measures import StepTensors

SMALLEST_RATIO = 1e-12


class RatioVariant(CLARS):
    """gamma_k = lr * eta * ||w_k|| / ||g_k|| * h_k, with h_k in [0, 1] a function of R_k.

    Args:
        model: The module to train.
        lr: gamma_scale.
        factor: R [K] -> h [K]; called once a step.
        **settings: As of `CLARS`; `norm="rms"` where h is a function of ||g_k|| over the root mean square norm.
    """

    def __init__(self, model: nn.Module, lr: float, *, factor: Callable[[Tensor], Tensor], **settings: Any) -> None:
        super().__init__(model, lr, **settings)
        self.factor = factor

    def _measure(self, tensors: StepTensors) -> LayerMeasures:
        measures = super()._measure(tensors)
        assert measures.ratio is not None
        ratio = measures.ratio.clamp(min=SMALLEST_RATIO)
        return LayerMeasures(
            measures.rate / ratio * self.factor(ratio),
            measures.weight_norm,
            measures.grad_norm,
            measures.mean_sample_norm,
            measures.ratio,
        )


def power(exponent: float) -> Callable[[Tensor], Tensor]:
    """Make h = R^p: LARS at p = 0, CLARS at p = 1."""
    return lambda ratio: ratio**exponent


def floor(smallest: float) -> Callable[[Tensor], Tensor]:
    """Make h = max(R, floor): CLARS that never steps much more carefully than LARS."""
    return lambda ratio: ratio.clamp(min=smallest)


class Averaged:
    """h = the running mean of R over steps, with the first steps weighted as they come (as Adam corrects its means).

    Args:
        decay: Weight of the past.
    """

    def __init__(self, decay: float) -> None:
        self.decay = decay
        self.mean: Tensor | None = None
        self.weight = 0.0

    def __call__(self, ratio: Tensor) -> Tensor:
        """R [K] of this step -> the mean so far [K]."""
        self.weight = self.decay * self.weight + (1 - self.decay)
        fresh = (1 - self.decay) * ratio
        self.mean = fresh if self.mean is None else self.decay * self.mean + fresh
        return self.mean / self.weight


def capped(batch_size: int) -> Callable[[Tensor], Tensor]:
    """Make h = min(1, B / M_k): Theorem 2's min{(1 - beta) / 8 L_k, (1 - beta) B / (8 L_k M_k)}, with LARS' 1 / L_k.

    M_k = E||g_i||^2 / ||E g_i||^2 is estimated from the batch without the bias that the noise in ||g_k||^2 brings:
    ||E g||^2 = (B ||g_k||^2 - s) / (B - 1) with s the mean square norm, so B / M_k = (B R^2 - 1) B / (B - 1).

    Args:
        batch_size: B.
    """
    return lambda ratio: ((batch_size * ratio.square() - 1) * batch_size / max(1, batch_size - 1)).clamp(0.0, 1.0)


def make_variant(model: nn.Module, lr: float, kind: str, value: float, batch_size: int, **settings: Any) -> CLARS:
    """A variant by name.

    Args:
        model: The module to train.
        lr: gamma_scale.
        kind: "power", "floor", "average" or "cap".
        value: Exponent, floor or decay; not used by "cap".
        batch_size: B.
        settings: As of `CLARS`.

    Returns:
        The optimizer.

    Raises:
        KeyError: If there is no such variant.
    """
    if kind == "cap":
        return RatioVariant(model, lr, factor=capped(batch_size), norm="rms", **settings)
    makers: dict[str, Callable[[float], Callable[[Tensor], Tensor]]] = {
        "power": power,
        "floor": floor,
        "average": Averaged,
    }
    return RatioVariant(model, lr, factor=makers[kind](value), **settings)
