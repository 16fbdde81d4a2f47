"""A layer's weight gradient and its per-sample norms out of one product.

The module runs as it is. Its output is then given a new place in the graph: a function whose backward pass makes the
per-sample gradients, squares them, and returns their sum as the weight gradient. Autograd's own weight gradient, which
would cost the same product once more, is never computed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hf_clars.grad_norms.errors import LayerRuleError
from hf_clars.grad_norms.explanation import timed
from hf_clars.grad_norms.forward_pass import differentiating
from hf_clars.grad_norms.observation import WATCHED
from hf_clars.grad_norms.plain_backward import plain_backward
from hf_clars.grad_norms.rule_call import RuleCall
from hf_clars.grad_norms.rule_results import check_backward
from hf_clars.grad_norms.sum_check import close
from hf_clars.grad_norms.torch_internals import no_autocast


def fuse_weight_grad(call: RuleCall, x: Tensor, output: Tensor) -> Tensor:
    """The module's output, whose gradient now goes through the per-sample gradients.

    Args:
        call: The call, `wanted` holding the weight and possibly the bias.
        x: The module's input, with its graph.
        output: What it returned.

    Returns:
        The same values in the same memory.
    """
    # Under autocast the module computed with a copy of its input in the lower precision.
    return _behind(call, x, output, _as(x, output.dtype), call.hooked.in_use("weight"))


def replace_backward(call: RuleCall, x: Tensor, output: Tensor) -> Tensor:
    """The module's output, whose gradient now goes through the rule's own backward pass. Arguments as above."""
    used, *more = call.rule.operands(call.module, x, output)
    weight = call.rule.weight_as_used(call.module, call.hooked.in_use("weight"), output)
    return _behind(call, x, output, used.detach(), weight, *more)


def _behind(call: RuleCall, x: Tensor, output: Tensor, used: Tensor, weight: Tensor, *more: Tensor) -> Tensor:
    names = list(call.wanted)
    # The output travels in a list: as a tensor argument it would come back as a view, which in-place ReLUs refuse.
    return _OwnBackward.apply(call, names, [output], more, x, used, weight, *(call.hooked.in_use(n) for n in names))


def is_taken(output: Tensor) -> bool:
    """Whether another tracker has taken this output's weight gradient over, or watches it: it would be cut off."""
    node = output.grad_fn
    return node is not None and (node.name() in OWN_NODES or WATCHED in node.metadata)  # type: ignore[operator]


class _OwnBackward(torch.autograd.Function):
    """Identity on the output; its backward pass stands for the module's."""

    @staticmethod
    def forward(
        ctx: Any,
        call: RuleCall,
        names: list[str],
        held: list[Tensor],
        more: tuple[Tensor, ...],
        x: Tensor,
        used: Tensor,
        weight: Tensor,
        *params: Tensor,
    ) -> Tensor:
        output = held[0]
        ctx.call, ctx.names, ctx.dtype, ctx.x_dtype, ctx.x_shape = call, names, output.dtype, x.dtype, x.shape
        ctx.param_dtypes = [p.dtype for p in params]
        ctx.save_for_backward(weight, used, *more)
        return output.detach()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        # Kernels cannot be differentiated; what is made of torch's operations can, if someone makes a graph of it.
        return (_once_only if ctx.call.plan.way is replace_backward else _backward)(ctx, g)


def _backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    call: RuleCall = ctx.call
    weight, *saved = ctx.saved_tensors
    wanted = ctx.needs_input_grad[4]
    with no_autocast(g.device.type), timed(call.forward_pass.times, call.wanted.values(), g.device):
        try:
            x_grad, sums = _gradients(call, tuple(saved), weight, g, wanted)
            if call.is_looked_at:
                asked = (x_grad, ctx.x_shape) if wanted else None
                method = "input_grad" if call.plan.way is fuse_weight_grad else "whole_backward"
                check_backward(call.rule, method, call.hooked, sums, call.wanted, asked)
            x_grad, sums = _compared(call, ctx.names, saved[0], g, x_grad, sums, wanted)
        except Exception as error:
            if not call.forward_pass.takes(error):
                raise
            x_grad, sums = plain_backward(call, ctx.names, saved[0], g, input_wanted=wanted)
        grads = [_as(sums[n], d) if sums else None for n, d in zip(ctx.names, ctx.param_dtypes, strict=True)]
    x_grad = None if x_grad is None else _as(x_grad, ctx.x_dtype)
    return None, None, None, None, x_grad, None, None, *grads


_once_only = once_differentiable(_backward)


def _gradients(
    call: RuleCall, saved: tuple[Tensor, ...], weight: Tensor, g: Tensor, input_wanted: bool
) -> tuple[Tensor | None, dict[str, Tensor]]:
    """The input's gradient and the parameters', whose norms are added on the way.

    Args:
        call: The call.
        saved: The input as it was used, and what else `operands` returned.
        weight: The weight.
        g: Gradient of the output.
        input_wanted: Whether the input's gradient is asked for.
    """
    module, rule, asked = call.module, call.rule, not differentiating()  # else only the input's gradient leads on
    whole = call.plan.way is replace_backward
    if whole and not asked:
        done = rule.whole_backward(module, saved, weight, g, input_wanted=True) if input_wanted else None
        return None if done is None else done.input_grad, {}
    if not whole or call.shared:  # several uses add up before they are squared: that takes the samples' gradients
        sums = call.summed_grads(saved[0], g) if asked else {}
        return rule.input_grad(module, saved[0], _as(weight, g.dtype), g) if input_wanted else None, sums
    done = rule.whole_backward(module, saved, weight, g, input_wanted=input_wanted, measured=call.forward_pass.measured)
    call.add_squares(done.squares, done.grads, g.dtype)
    return done.input_grad, done.grads


def _compared(
    call: RuleCall,
    names: list[str],
    x: Tensor,
    g: Tensor,
    x_grad: Tensor | None,
    sums: dict[str, Tensor],
    wanted: bool,
) -> tuple[Tensor | None, dict[str, Tensor]]:
    """In a checked pass, autograd's gradients in place of those of a rule of the user's: sums are compared with them.

    Raises:
        LayerRuleError: If the input's gradient is not the rule's.
    """
    if not sums or call.forward_pass.check is None or call.plan.shipped:
        return x_grad, sums
    plain_x, plain = plain_backward(call, names, x, g, input_wanted=wanted)
    if plain_x is not None and not (x_grad is not None and close(x_grad, plain_x)):
        raise LayerRuleError(
            f"{type(call.rule).__name__} of {call.hooked}: input_grad gives another gradient of the module's input "
            "than autograd. Mend it, or leave out fuses_weight_grad and input_grad."
        )
    return x_grad, plain


Way = Callable[[RuleCall, Tensor, Tensor], Tensor]
"""`fuse_weight_grad` or `replace_backward`."""

OWN_NODES = (f"{_OwnBackward.__name__}Backward",)
"""Names of this function's place in the graph."""


def _as(t: Tensor, dtype: torch.dtype) -> Tensor:
    """`t.to(dtype)`, which takes its time even where there is nothing to do."""
    return t if t.dtype == dtype else t.to(dtype)
