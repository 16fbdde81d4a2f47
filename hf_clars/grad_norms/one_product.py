"""A layer's weight gradient and its per-sample norms out of one product.

The module runs as it is. Its output is then given a new place in the graph: a function whose backward pass makes the
per-sample gradients, squares them, and returns their sum as the weight gradient. Autograd's own weight gradient, which
would cost the same product once more, is never computed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hf_clars.grad_norms.rule_call import RuleCall, no_autocast


def take_over(call: RuleCall, x: Tensor, output: Tensor) -> Tensor:
    """The module's output, whose gradient now goes through the per-sample gradients.

    Args:
        call: The call, `wanted` holding the weight and possibly the bias.
        x: The module's input, with its graph.
        output: What it returned.

    Returns:
        The same values in the same memory.
    """
    names = list(call.wanted)
    return _OneProduct.apply(call, names, output.detach(), x, *(call.hooked.in_use(n) for n in names))


def is_taken_over(output: Tensor) -> bool:
    """Whether another tracker has taken this output's weight gradient over: a second one would cut the first off."""
    return output.grad_fn is not None and output.grad_fn.name() == f"{_OneProduct.__name__}Backward"


class _OneProduct(torch.autograd.Function):
    """Identity on the output; see `take_over`."""

    @staticmethod
    def forward(ctx: Any, call: RuleCall, names: list[str], output: Tensor, x: Tensor, *params: Tensor) -> Tensor:
        ctx.call, ctx.names, ctx.dtype = call, names, output.dtype
        ctx.param_dtypes = [p.dtype for p in params]
        # Under autocast the module computed with a copy of its input in the lower precision.
        x_kept = x if x.dtype == output.dtype else x.to(output.dtype)
        ctx.save_for_backward(x_kept, params[names.index("weight")])
        ctx.x_dtype = x.dtype
        ctx.mark_dirty(output)  # the same tensor, so that a following in-place activation works on it as before
        return output

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        call: RuleCall = ctx.call
        with no_autocast(g.device.type):
            sums = call.summed_grads(x, g)
            grads = [_as(sums.pop(n), dtype) for n, dtype in zip(ctx.names, ctx.param_dtypes, strict=True)]
            x_grad = None
            if ctx.needs_input_grad[3]:
                x_grad = _as(call.rule.input_grad(call.module, x, _as(weight, ctx.dtype), g), ctx.x_dtype)
        return None, None, None, x_grad, *grads


def _as(t: Tensor, dtype: torch.dtype) -> Tensor:
    """`t.to(dtype)`, which takes its time even where there is nothing to do."""
    return t if t.dtype == dtype else t.to(dtype)
