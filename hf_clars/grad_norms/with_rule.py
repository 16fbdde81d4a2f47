"""Calls of modules that a rule serves: whether their tensors tell samples apart, and how their gradients are taken."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from hf_clars.grad_norms.adoption import orphan_of
from hf_clars.grad_norms.hooked_modules import HookedModule
from hf_clars.grad_norms.observation import observe
from hf_clars.grad_norms.one_product import is_taken_over, replace_backward, take_over
from hf_clars.grad_norms.own_inputs import OwnInputs
from hf_clars.grad_norms.passes import ForwardPass
from hf_clars.grad_norms.rule_call import RuleCall
from hf_clars.grad_norms.rules.embedding import EmbeddingRule


class CallsWithRule:
    """Hands calls to their rules.

    Args:
        own_inputs: Tells calls on the model's own tensors.
        captured: Takes note of a call that will be measured, and returns its number in the pass.
        arrived: Takes note that its gradient has come.
    """

    def __init__(
        self,
        own_inputs: OwnInputs,
        captured: Callable[[HookedModule, ForwardPass, dict[str, nn.Parameter], Tensor], int],
        arrived: Callable[[HookedModule, ForwardPass, int], bool],
    ) -> None:
        self._own_inputs, self._captured, self._arrived = own_inputs, captured, arrived

    def capture(self, hooked: HookedModule, current: ForwardPass, x: Tensor, output: object) -> Tensor | None:
        """Arrange for the norms of a call, by its rule or, if it does not tell samples apart, by a module around it.

        Args:
            hooked: The module.
            current: The pass.
            x: Its first tensor, or `NO_INPUT`.
            output: What it returned.

        Returns:
            What takes the output's place; None to leave it.
        """
        wanted = hooked.trainable()
        if not wanted or not isinstance(output, Tensor) or not output.requires_grad:
            return None
        rule, rows = hooked.rule, _rows_of(hooked, current, x, output)
        assert rule is not None
        if rows == 1 and self._own_inputs.holds(hooked, current, [x]):
            current.own_results.add(torch.autograd.graph.get_gradient_edge(output).node)
            rows = None
        if rows is None:
            current.orphans.append(orphan_of(hooked, current.batch_size, wanted.values(), x, [output]))
            return None
        ticket = self._captured(hooked, current, wanted, x)
        call = RuleCall(hooked, rule, current, wanted, rows, lambda: self._arrived(hooked, current, ticket))
        current.rule_calls.append(call)
        replaced = _follow(call, x, output)
        if rows == 1 and rule.positions_in_the_middle:
            current.note_if_open(hooked, output if replaced is None else replaced)
        return replaced

    def repeat(self, hooked: HookedModule, current: ForwardPass, x: Tensor, output: Tensor) -> Tensor | None:
        """Checkpointing makes a captured call again: save the same tensors in the same order, and measure nothing.

        Args:
            hooked: The module.
            current: The pass.
            x: Its first tensor.
            output: What it returned.

        Returns:
            What takes the output's place; None to leave it.
        """
        rows, wanted = _rows_of(hooked, current, x, output), hooked.trainable()
        if rows is None or not wanted or hooked.rule is None:
            return None
        return _follow(RuleCall(hooked, hooked.rule, current, wanted, rows, lambda: False), x, output)


def _rows_of(hooked: HookedModule, current: ForwardPass, x: Tensor, output: Tensor) -> int | None:
    alone = current.implicit or not hooked.path or current.was_given(x)
    return hooked.rows_of(x, output, current.batch_size, alone=alone)


def _follow(call: RuleCall, x: Tensor, output: Tensor) -> Tensor | None:
    """Take the weight gradient over, or watch the ordinary one."""
    if call.current.kept == call.current.batch_size and call.rows == 1:
        way = _way(call, x, output)
        if way is not None:
            return way(call, x, output)
    saved = call.rule.save(call.module, x.detach(), output, call.wanted.keys())
    call.tokens = saved[0] if isinstance(call.rule, EmbeddingRule) else None
    return observe(call, saved, output)


def _way(call: RuleCall, x: Tensor, output: Tensor) -> Callable[[RuleCall, Tensor, Tensor], Tensor] | None:
    """How the weight gradient should, and can, come from this engine: decided once for calls of one shape."""
    if "weight" not in call.wanted or is_taken_over(output):
        return None
    weight = call.hooked.in_use("weight")
    decisions = call.hooked.decisions
    key = (x.shape, output.dtype, x.device, tuple(call.wanted), call.module.training, x.stride(), output.stride())
    if key not in decisions:
        # Weights that an engine has split or put aside are differentiated by the engine's own graph.
        plain = weight.numel() > 0 and not hasattr(weight, "device_mesh")
        way = None
        if plain and call.rule.supplies_backward(call.module, x, output):
            way = replace_backward
        elif plain and call.rule.takes_over(call.module, x, output):
            way = take_over
        decisions[key] = way
    return decisions[key]
