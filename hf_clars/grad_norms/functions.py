"""The autograd Functions behind a module, and the two ways of a rule: in place of its backward pass, or beside it.

The module runs as it is. In place of autograd's backward pass: its output is given a new place in the graph, a function
whose backward pass makes the per-sample gradients, squares them, and returns their sum as the weight gradient.
Autograd's own weight gradient, which would cost the same product once more, is never computed. Beside it: what was
saved meets the gradient of the output, and nothing in the graph changes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hf_clars.grad_norms.errors import LayerRuleError
from hf_clars.grad_norms.explanation import timed
from hf_clars.grad_norms.plain_backward import plain_backward
from hf_clars.grad_norms.rule_call import RuleCall
from hf_clars.grad_norms.rule_results import check_backward
from hf_clars.grad_norms.sum_check import close
from hf_clars.grad_norms.torch_internals import is_view, no_autocast, product_before_view, saved_tensors_are_packed
from hf_clars.grad_norms.undisturbed import differentiating

WATCHED = "hf_clars: watched"
"""Marks the operation in the graph that a watched output comes from."""

Way = Callable[[RuleCall, Tensor, Tensor], Tensor]
"""`fuse_weight_grad` or `replace_backward`."""


# ---- in place of autograd's backward pass --------------------------------------------------------------------


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
    if not sums or call.forward_pass.sums.check is None or call.plan.shipped:
        return x_grad, sums
    plain_x, plain = plain_backward(call, names, x, g, input_wanted=wanted)
    if plain_x is not None and not (x_grad is not None and close(x_grad, plain_x)):
        raise LayerRuleError(
            f"{type(call.rule).__name__} of {call.hooked}: input_grad gives another gradient of the module's input "
            "than autograd. Mend it, or leave out fuses_weight_grad and input_grad."
        )
    return x_grad, plain


def _as(t: Tensor, dtype: torch.dtype) -> Tensor:
    """`t.to(dtype)`, which takes its time even where there is nothing to do."""
    return t if t.dtype == dtype else t.to(dtype)


OWN_NODES = (f"{_OwnBackward.__name__}Backward",)
"""Names of this function's place in the graph."""


# ---- beside it -----------------------------------------------------------------------------------------------


def observe(call: RuleCall, saved: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
    """Measure a call when the gradient of its output comes.

    Args:
        call: The call.
        saved: What the rule needs of the forward pass.
        output: What the module returned.

    Returns:
        What takes the output's place; None to leave it.
    """
    watched, place, node = None, output.output_nr, output.grad_fn
    if is_view(output):
        node, place = product_before_view(output) if call.plan.lasts and call.given_rows is None else None, 0
        if node is None:
            watched = own_place(output)
            node = watched.grad_fn
        else:  # a function of our own in Python takes longer than the layer's other hooks together
            call.places = ((node, 0),)
    # At the operation, and not at the tensor: after all that hooks of the user's make of the gradient.
    assert node is not None
    node.register_prehook(call.forward_pass.guarded(_Watch(call, Held(saved), place, output.shape)))
    if call.rule.gives_input_grad or call.rule.gives_whole_backward:
        # Another tracker might take this operation's backward pass over, and cut it off.
        last = output.grad_fn if watched is None else node
        assert last is not None
        last.metadata[WATCHED] = True  # type: ignore[index]
    return watched


class _Watch:
    """A hook on the operation that a module's output comes from; only the graph holds it, and what it holds.

    Args:
        call: The module's call.
        held: What the rule saved.
        place: Which of the operation's results the output is.
        shape: The output's.
    """

    __slots__ = ("call", "held", "place", "shape")

    def __init__(self, call: RuleCall, held: Held, place: int, shape: torch.Size) -> None:
        self.call, self.held, self.place, self.shape = call, held, place, shape

    def __call__(self, grads: Sequence[Tensor | None]) -> None:
        g = grads[self.place]
        if g is not None and self.call.arrived():
            g = g.detach() if g.requires_grad else g
            self.call.measure(self.held.take(), g if g.shape == self.shape else g.view(self.shape))


def observe_several(call: RuleCall, saved: tuple[Tensor, ...], results: Sequence[Tensor], axes: Sequence[int]) -> None:
    """Measure a call of a module with several results when their gradients come.

    Args:
        call: The call.
        saved: What the rule needs of the forward pass.
        results: Differentiable results, in places of their own in the graph.
        axes: The batch axis of each.
    """
    held = Held(saved)

    def on_gradients(grads: Sequence[Tensor | None]) -> None:
        if call.arrived():
            first = tuple(None if g is None else g.detach().movedim(a, 0) for g, a in zip(grads, axes, strict=True))
            call.measure(held.take(), first)

    torch.autograd.graph.register_multi_grad_hook(list(results), call.forward_pass.guarded(on_gradients), mode="all")


class Held:
    """Tensors kept the way autograd keeps them: activation checkpointing and offloading apply to them too.

    Args:
        tensors: Any number.
    """

    __slots__ = ("_packed", "_tensors", "_versions")

    def __init__(self, tensors: tuple[Tensor, ...]) -> None:
        self._tensors, self._versions, self._packed = tensors, [t._version for t in tensors], None
        if saved_tensors_are_packed():
            # Kept itself, and not its node alone: torch 2.8 frees with it what the node saved.
            self._packed = _Holder.apply(torch.empty(0, requires_grad=True), *tensors)
            self._tensors = ()

    def take(self) -> tuple[Tensor, ...]:
        """Give them back, once. They are let go of, as autograd does with what it saved, before the graph goes.

        Raises:
            RuntimeError: One was changed in place meanwhile.
        """
        if self._packed is not None:
            kept, self._packed = self._packed, None
            return kept.grad_fn.saved_tensors
        tensors, self._tensors = self._tensors, ()
        if self._versions != [t._version for t in tensors]:
            raise RuntimeError(
                "A tensor that is needed for gradient norms was modified by an in-place operation after the module "
                "that took it had run. Make that operation out of place."
            )
        return tensors


class _Holder(torch.autograd.Function):
    """A node beside the graph; its backward never runs."""

    @staticmethod
    def forward(ctx: Any, ticket: Tensor, *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors)
        return ticket.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[None, ...]:
        return (None,) * (1 + len(ctx.saved_tensors))


def own_place(t: Tensor) -> Tensor:
    """A place of its own in the graph for what a module returned: the same values in the same memory.

    A hook sees the gradient that arrives at a tensor's place in the graph. That is not always the gradient of the
    module's output: where one output is made from another (a hidden state, and what is pooled from it), the gradient of
    the first includes what comes through the second; and the place of a view (a Linear layer's output over tokens is
    one) is lost when an operation after it works in place.
    """
    return _OwnPlace.apply(t)


class _OwnPlace(torch.autograd.Function):
    """Identity."""

    @staticmethod
    def forward(ctx: Any, t: Tensor) -> Tensor:
        return t.detach()  # shares memory and version: a following in-place operation works, or fails, as before

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g
