"""What a rule gives is looked at, so that a mistake in a rule of the user's is named where it is."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from torch import Tensor

from hf_clars.distributed import whole_shape
from hf_clars.grad_norms.errors import LayerRuleError
from hf_clars.grad_norms.hooked_modules import HookedModule
from hf_clars.grad_norms.norm_math import squared_sum
from hf_clars.grad_norms.registry import LayerRule
from hf_clars.grad_norms.sum_check import close


def given_by(
    rule: LayerRule, method: str, found: Any, hooked: HookedModule, names: Collection[str], rows: int
) -> dict[str, Tensor]:
    """What was asked of a rule, out of what it gave.

    Args:
        rule: The rule.
        method: "per_sample_grads" or "squared_norms".
        found: What the method returned.
        hooked: The module.
        names: Local names of the parameters that were asked for.
        rows: Length of the first axis.

    Raises:
        LayerRuleError: Naming rule, module and parameter.
    """
    who = f"{type(rule).__name__} of {hooked}: {method}"
    if not isinstance(found, Mapping):
        raise LayerRuleError(f"{who} returned {type(found).__name__}. Return {{parameter name: tensor}}.")
    for name in names:
        t: Any = found.get(name)
        shape = whole_shape(hooked.in_use(name)) if method == "per_sample_grads" else ()
        fits = isinstance(t, Tensor) and t.dim() and len(t) == rows and t.numel() == rows * math.prod(shape)
        if not fits or (t.dim() == len(shape) + 1 and t.shape[1:] != shape):  # axes may be flattened, and not turned
            raise _unfit(who, repr(name), t, (rows, *shape))
    return {name: found[name] for name in names}


def check_backward(
    rule: LayerRule,
    method: str,
    hooked: HookedModule,
    grads: Mapping[str, Tensor],
    names: Collection[str],
    x: tuple[Any, Sequence[int]] | None,
) -> None:
    """Look at the gradients that a rule puts in the place of autograd's.

    Args:
        rule: The rule.
        method: "input_grad" or "whole_backward".
        hooked: The module.
        grads: By local parameter name; empty where none was asked for.
        names: Those that were asked for.
        x: What it gave for the module's input, and the shape of that; None where it was not asked.

    Raises:
        LayerRuleError: Naming rule, module and what does not fit.
    """
    expected: dict[str, tuple[Any, Sequence[int]]]
    expected = {repr(n): (grads.get(n), hooked.in_use(n).shape) for n in names} if grads else {}
    if x is not None:
        expected["the input"] = x
    for what, (t, shape) in expected.items():
        if not isinstance(t, Tensor) or t.shape != shape:
            raise _unfit(f"{type(rule).__name__} of {hooked}: {method}", what, t, shape)


def _unfit(who: str, what: str, given: Any, shape: Sequence[int]) -> LayerRuleError:
    said = f"shape {tuple(given.shape)}" if isinstance(given, Tensor) else type(given).__name__
    said = "nothing" if given is None else said
    return LayerRuleError(f"{who} returned {said} for {what}. Return a tensor of shape {tuple(shape)}.")


def compare_squares(
    rule: LayerRule, hooked: HookedModule, squares: Mapping[str, Tensor], grads: Mapping[str, Tensor]
) -> None:
    """Compare what both methods of a rule give, {local parameter name: tensor} each.

    Raises:
        LayerRuleError: Naming rule, module and parameter.
    """
    for name, found in squares.items():
        if not close(found, squared_sum(grads[name])):
            raise LayerRuleError(
                f"{type(rule).__name__} of {hooked}: squared_norms of {name!r} are not the squared norms of its "
                "per_sample_grads. Leave out squared_norms, or mend it."
            )


def saved_by(rule: LayerRule, hooked: HookedModule, saved: Any) -> tuple[Tensor, ...]:
    """What a rule's `save` returned.

    Raises:
        LayerRuleError: If that is not a tuple of tensors.
    """
    if isinstance(saved, tuple) and all(isinstance(t, Tensor) for t in saved):
        return saved
    raise LayerRuleError(f"{type(rule).__name__} of {hooked}: save returned no tuple of tensors. Return (x,), or more.")
