"""A layer's gradients without a rule: what takes the place of a rule's backward pass that failed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hf_clars.grad_norms.pytree import map_tensors
from hf_clars.grad_norms.rule_call import RuleCall
from hf_clars.grad_norms.undisturbed import quietly

_INPUT = torch.empty(0)
"""Stands for the module's input among what the module was called with."""


def note_call(call: RuleCall, x: Tensor, given: tuple[tuple[Any, ...], dict[str, Any]]) -> None:
    """Note what it takes to make a call once more; only where a rule's error is not to end the backward pass.

    Args:
        call: The call.
        x: The module's input.
        given: Arguments and keyword arguments, `x` among them.
    """
    call.given = map_tensors(lambda t: _INPUT if t is x else t.detach(), given)
    if torch.is_autocast_enabled(x.device.type):
        call.autocast = torch.get_autocast_dtype(x.device.type)


def plain_backward(
    call: RuleCall, names: Sequence[str], x: Tensor, g: Tensor, *, input_wanted: bool
) -> tuple[Tensor | None, dict[str, Tensor]]:
    """Run the module's forward once more, and let autograd differentiate it.

    The module itself, its hooks, its buffers and the graph around it take no note of it.

    Args:
        call: The call, made with `x` in the first place.
        names: Local names of the parameters whose gradients are wanted.
        x: The module's input, as it was multiplied.
        g: Gradient of its output.
        input_wanted: Whether the input's gradient is asked for.

    Returns:
        The input's gradient, or None; and each parameter's by local name.
    """
    twice = torch.is_grad_enabled()  # someone differentiates this backward pass too
    params: dict[str, Tensor] = {n: call.hooked.in_use(n) for n, _ in call.module.named_parameters(recurse=False)}
    if not twice:
        params = {n: p.detach().requires_grad_(n in names) for n, p in params.items()}
        x = x.detach().requires_grad_(input_wanted)
    args, kwargs = map_tensors(lambda t: x if t is _INPUT else t, call.given)
    region = torch.autocast(x.device.type, call.autocast, enabled=call.autocast is not None)
    with torch.enable_grad(), quietly(), region:
        output = type(call.module).forward(_twin(call.module, params), *args, **kwargs)
        sources = [*(params[n] for n in names), *([x] if input_wanted else [])]
        found = torch.autograd.grad(output, sources, g, create_graph=twice)
    return found[len(names)] if input_wanted else None, dict(zip(names, found, strict=False))


def _twin(module: nn.Module, params: dict[str, Tensor]) -> nn.Module:
    """The same module with these tensors for its parameters, and copies of its buffers."""
    twin = module.__new__(type(module))
    buffers = {n: None if b is None else b.clone() for n, b in module._buffers.items()}
    twin.__dict__.update(module.__dict__, _parameters={**module._parameters, **params}, _buffers=buffers)
    return twin
