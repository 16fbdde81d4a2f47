"""Watching a module's ordinary backward pass: what was saved meets the gradient of its output."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hf_clars.grad_norms.rule_call import RuleCall
from hf_clars.grad_norms.torch_internals import is_view, product_before_view, saved_tensors_are_packed

WATCHED = "hf_clars: watched"
"""Marks the operation in the graph that a watched output comes from."""


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
