"""The weight update, apart from where its rates come from: single-tensor and multi-tensor paths.

mNAG with one rate a layer (Eq. 4): v' = w - gamma g, w' = v' + beta (v' - v). With the buffer m = v' - v this is
m <- beta m - gamma g and w <- w + beta m - gamma g: the rate is inside the buffer, so a rate that changes does not
rescale old steps. One buffer a weight. `"heavy_ball"` is what the authors' published code does instead:
m <- beta m + g and w <- w - gamma m, the rate outside.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

MomentumForm = Literal["nesterov", "heavy_ball"]


def single_tensor_update(
    params: list[Tensor],
    grads: list[Tensor],
    buffers: list[Tensor],
    rates: Sequence[Tensor | float],
    *,
    momentum: float,
    weight_decay: float,
    form: MomentumForm,
) -> None:
    """Update each weight and its buffer in place, one after the other; `grads` are left as they are.

    Args:
        params: Weights.
        grads: Their gradients.
        buffers: Their momentum buffers, zero before the first step.
        rates: gamma of each weight's layer: 0-dim tensors, or numbers where reading them makes no device wait.
        momentum: beta in [0, 1).
        weight_decay: Coupled: g + weight_decay * w is applied.
        form: `"nesterov"` or `"heavy_ball"`.
    """
    for w, g, m, rate in zip(params, grads, buffers, rates, strict=True):
        decayed = g.add(w, alpha=weight_decay) if weight_decay else g
        if form == "nesterov":
            step, scale = (decayed * rate, 1.0) if isinstance(rate, Tensor) else (decayed, rate)
            m.mul_(momentum).sub_(step, alpha=scale)
            w.add_(m, alpha=momentum).sub_(step, alpha=scale)
        else:
            m.mul_(momentum).add_(decayed)
            step, scale = (m * rate, 1.0) if isinstance(rate, Tensor) else (m, rate)
            w.sub_(step, alpha=scale)


def multi_tensor_update(
    params: list[Tensor],
    grads: list[Tensor],
    buffers: list[Tensor],
    rates: list[Tensor],
    *,
    momentum: float,
    weight_decay: float,
    form: MomentumForm,
) -> None:
    """The same update by torch's foreach functions. Arguments as in `single_tensor_update`, rates as tensors."""
    if weight_decay:
        grads = list(torch._foreach_add(grads, params, alpha=weight_decay))
    if form == "nesterov":
        steps = torch._foreach_mul(grads, rates)
        torch._foreach_mul_(buffers, momentum)
        torch._foreach_sub_(buffers, steps)
        torch._foreach_add_(params, buffers, alpha=momentum)
        torch._foreach_sub_(params, steps)
    else:
        torch._foreach_mul_(buffers, momentum)
        torch._foreach_add_(buffers, grads)
        torch._foreach_sub_(params, torch._foreach_mul(buffers, rates))
