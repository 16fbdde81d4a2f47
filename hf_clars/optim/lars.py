"""LARS (Eq. 3): each layer's rate in proportion to ||w_k|| / ||g_k||."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from hf_clars.layers import LayerMode
from hf_clars.optim.base import LayerwiseOptimizer
from hf_clars.optim.measures import LayerMeasures, StepTensors
from hf_clars.optim.rates import trust_ratio
from hf_clars.optim.update import MomentumForm

TRUST_CLIP = 1e8


class LARS(LayerwiseOptimizer):
    """Layer-wise adaptive rate scaling on mNAG: gamma_k = lr * eta * ||w_k|| / ||g_k||.

    Args:
        model: A module, or parameters / groups as torch's optimizers take them (every tensor is then a layer).
        lr: gamma_scale, the global rate that schedules move. Default 0.1.
        eta: Trust coefficient. Default 1e-3.
        momentum: beta in [0, 1); the rate is inside the buffer. Default 0.9.
        weight_decay: Coupled: g_k + weight_decay * w_k is applied, and weight_decay * ||w_k|| is added to the
            denominator, as You et al. do. Default 0.
        trust_clip: Upper bound on ||w_k|| / ||g_k||. Default 1e8, which healthy training does not reach: it bounds what
            a layer whose gradient has died to rounding noise can do. None: no bound.
        layers: `"module"` (default) or `"tensor"`.
        scale_norm_and_bias: False trains biases and normalisation weights at `lr` itself. Default True.
        params: Groups of the model's parameters with their own `lr`, `eta`, `momentum`, `weight_decay`, `trust_clip`.
            `param_groups` shows them as they are. Default: one group for every layer.
        momentum_form: `"nesterov"` (default) or `"heavy_ball"`.
        foreach: Use the multi-tensor path. Default: on the CPU no, elsewhere yes, whichever is faster.

    A layer whose weights or gradient have norm zero takes the ratio 1: a plain step of rate lr * eta.

    Raises:
        ValueError: For settings out of range.
    """

    def __init__(
        self,
        model: nn.Module | Iterable[Any],
        lr: float = 0.1,
        *,
        eta: float = 1e-3,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        trust_clip: float | None = TRUST_CLIP,
        layers: LayerMode = "module",
        scale_norm_and_bias: bool = True,
        params: Iterable[dict[str, Any]] | None = None,
        momentum_form: MomentumForm = "nesterov",
        foreach: bool | None = None,
    ) -> None:
        defaults = {
            "lr": lr,
            "eta": eta,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "trust_clip": trust_clip,
        }
        super().__init__(
            model,
            defaults,
            layers=layers,
            params=params,
            scale_norm_and_bias=scale_norm_and_bias,
            momentum_form=momentum_form,
            foreach=foreach,
        )

    def _measure(self, tensors: StepTensors) -> LayerMeasures:
        weight_norm, grad_norm, _ = self._layer_norms(tensors)
        ratio = trust_ratio(
            weight_norm,
            grad_norm,
            weight_decay=self._weight_decays(weight_norm),
            clip=self._clips(weight_norm),
        )
        return LayerMeasures(self._rates(ratio), weight_norm, grad_norm)
