"""The weight update, apart from where its rates come from: single-tensor and multi-tensor paths.

mNAG with one rate a layer (Eq. 4): v' = w - gamma g, w' = v' + beta (v' - v). With the buffer m = v' - v this is
m <- beta m - gamma g and w <- w + beta m - gamma g: the rate is inside the buffer, so a rate that changes does not
rescale old steps. One buffer a weight. `"heavy_ball"` is what the authors' published code does instead:
m <- beta m + g and w <- w - gamma m, the rate outside.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

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
    applied: Tensor | None = None,
) -> None:
    """Update each weight and its buffer in place, one after the other; `grads` are left as they are.

    The last weights come first: after a pass over all of them for their norms, they are the ones still in cache.

    Args:
        params: Weights.
        grads: Their gradients.
        buffers: Their momentum buffers, zero before the first step.
        rates: gamma of each weight's layer: 0-dim tensors, or numbers where reading them makes no device wait.
        momentum: beta in [0, 1).
        weight_decay: Coupled: g + weight_decay * w is applied.
        form: `"nesterov"` or `"heavy_ball"`.
        applied: 0-dim bool on the weights' device, asked there: False, with rates of 0, leaves weights and buffers
            exactly as they are, whatever `grads` hold. None: the step is taken.
    """
    kept, ahead = _momentum_factors(momentum, applied, buffers[0].dtype)
    for w, g, m, rate in reversed(list(zip(params, grads, buffers, rates, strict=True))):
        decayed = g.add(w, alpha=weight_decay) if weight_decay else g
        if applied is not None:
            decayed = torch.where(applied, decayed, 0.0)  # 0 times NaN is NaN
        if form == "nesterov":
            step, scale = (decayed * rate, 1.0) if isinstance(rate, Tensor) else (decayed, rate)
            m.mul_(kept).sub_(step, alpha=scale)
            if isinstance(ahead, Tensor):
                w.addcmul_(m, ahead).sub_(step, alpha=scale)
            else:
                w.add_(m, alpha=ahead).sub_(step, alpha=scale)
        else:
            m.mul_(kept).add_(decayed)
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
    applied: Tensor | None = None,
) -> None:
    """The same update by torch's foreach functions. Arguments as in `single_tensor_update`, rates as tensors."""
    # Private name: torch._foreach_*, one kernel for all tensors. torch documents them as beta under this name, and its
    # own optimizers are built on them. It ends when torch gives them a name without the underscore.
    if weight_decay:
        grads = list(torch._foreach_add(grads, params, alpha=weight_decay))
    if applied is not None:
        grads = [torch.where(applied, grad, 0.0) for grad in grads]  # 0 times NaN is NaN
    kept, ahead = _momentum_factors(momentum, applied, buffers[0].dtype)
    if form == "nesterov":
        steps = torch._foreach_mul(grads, rates)
        torch._foreach_mul_(buffers, kept)
        torch._foreach_sub_(buffers, steps)
        torch._foreach_sub_(params, steps)
        if isinstance(ahead, Tensor):
            del grads, steps  # the next line needs their memory
            torch._foreach_add_(params, torch._foreach_mul(buffers, ahead))
        else:
            torch._foreach_add_(params, buffers, alpha=ahead)
    else:
        torch._foreach_mul_(buffers, kept)
        torch._foreach_add_(buffers, grads)
        torch._foreach_sub_(params, torch._foreach_mul(buffers, rates))


def _momentum_factors(momentum: float, applied: Tensor | None, dtype: torch.dtype) -> tuple[Any, Any]:
    """(what is kept of the buffer, how far the weights go along it); 1 and 0 for a step that is not taken."""
    if applied is None:
        return momentum, momentum
    taken = applied.double()
    return (taken * momentum + (1.0 - taken)).to(dtype), (taken * momentum).to(dtype)
