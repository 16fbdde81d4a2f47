"""mNAG (Eq. 2 and 4): Nesterov's accelerated gradient with the rate inside the momentum buffer."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from hf_clars.layers import LayerMode
from hf_clars.optim.base import LayerwiseOptimizer
from hf_clars.optim.measures import LayerMeasures, StepTensors
from hf_clars.optim.update import MomentumForm


class NAG(LayerwiseOptimizer):
    """Mini-batch Nesterov accelerated gradient, one rate for all layers.

    v' = w - lr * g, w' = v' + momentum * (v' - v), with v = w before the first step. At a constant rate this equals
    `torch.optim.SGD(nesterov=True)`; under a schedule it does not, because here old steps keep the rate they were taken
    with. `momentum=0` is mini-batch gradient descent.

    Args:
        model: A module, or parameters / groups as torch's optimizers take them.
        lr: The learning rate gamma. Default 0.1.
        momentum: beta in [0, 1). Default 0.9.
        weight_decay: Coupled: lr * weight_decay * w is part of the step. Default 0.
        layers: Partition for param groups and measures, `"module"` (default) or `"tensor"`.
        params: Groups of the model's parameters with their own `lr`, `momentum` or `weight_decay`.
        measure: Measure ||w_k|| at every step too (`last_step`). Default False: only the rate and ||g_k||, whose being
            finite decides whether the step is taken.
        momentum_form: `"nesterov"` (default) or `"heavy_ball"`, see `hf_clars.optim.update`.
        foreach: Use the multi-tensor path. Default: on the CPU no, elsewhere yes, whichever is faster.

    Raises:
        ValueError: For settings out of range.
    """

    def __init__(
        self,
        model: nn.Module | Iterable[Any],
        lr: float = 0.1,
        *,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        layers: LayerMode = "module",
        params: Iterable[dict[str, Any]] | None = None,
        measure: bool = False,
        momentum_form: MomentumForm = "nesterov",
        foreach: bool | None = None,
    ) -> None:
        self.measure = measure
        super().__init__(
            model,
            {"lr": lr, "momentum": momentum, "weight_decay": weight_decay},
            layers=layers,
            params=params,
            scale_norm_and_bias=True,
            momentum_form=momentum_form,
            foreach=foreach,
        )

    def _measure(self, tensors: StepTensors) -> LayerMeasures:
        weight_norm, grad_norm, _ = self._layer_norms(tensors)
        if not self.measure:
            weight_norm = torch.full_like(grad_norm, float("nan"))
        return LayerMeasures(self._rates(torch.ones_like(grad_norm)), weight_norm, grad_norm)

    def _weights(self) -> dict[Tensor, int]:
        """None where their norms are not asked for."""
        return super()._weights() if self.measure else {}

    def _minds_scale(self) -> bool:
        """They do: a step is as long as the gradient."""
        return True
