"""Calls of modules that a rule serves: whether their tensors tell samples apart, and how their gradients are taken."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from hf_clars.distributed import is_split
from hf_clars.grad_norms.errors import (
    IN_A_FORWARD,
    TIME_FIRST,
    WITHOUT_SAMPLES,
    BatchAxisError,
    MixedDevicesError,
)
from hf_clars.grad_norms.forward_pass import ForwardPass
from hf_clars.grad_norms.functions import (
    Way,
    fuse_weight_grad,
    is_taken,
    observe,
    observe_several,
    own_place,
    replace_backward,
)
from hf_clars.grad_norms.graph.layout import Layout
from hf_clars.grad_norms.graph.taint import MOVED, DataTaint
from hf_clars.grad_norms.hooked_modules import CallPlan, HookedModule, folded_rows
from hf_clars.grad_norms.plain_backward import note_call
from hf_clars.grad_norms.pytree import differentiable_in, is_differentiable, map_tensors
from hf_clars.grad_norms.rule_call import RuleCall
from hf_clars.grad_norms.rule_results import saved_by
from hf_clars.grad_norms.undisturbed import differentiating
from hf_clars.grad_norms.uses import RuleUse

Call = tuple[tuple[Any, ...], dict[str, Any]]
_UNKNOWN: Any = object()


def capture(
    hooked: HookedModule,
    forward_pass: ForwardPass,
    x: Tensor,
    call: Call,
    output: Any,
    taint: DataTaint | None,
    *,
    recomputed: bool = False,
) -> Any:
    """Arrange for the norms of a call by its rule, if its tensors may tell samples apart; else leave it to the graph.

    Args:
        hooked: The module.
        forward_pass: The pass.
        x: Its first tensor.
        call: Arguments and keyword arguments.
        output: What it returned.
        taint: Tells what depends on the data, in passes that follow it.
        recomputed: Whether reentrant activation checkpointing makes the call, in the backward pass.

    Returns:
        What takes the output's place; None to leave it.
    """
    look, plan = None, _UNKNOWN
    if taint is None and not recomputed and isinstance(output, Tensor):
        look = _look(hooked, forward_pass, x, output)
        plan = hooked.plans.get(look, _UNKNOWN)
    if plan is _UNKNOWN:
        plan = _decide(hooked, forward_pass, x, output, taint, recomputed=recomputed)
        if look is None or not (plan is None or plan.lasts):
            forward_pass.trace = None
        else:
            hooked.keep_plan(look, plan)
    outside = forward_pass.outside and not recomputed
    if plan is None:
        if outside:
            _refuse_a_gradient(hooked, forward_pass, x, output)
        elif forward_pass.trace is not None:
            forward_pass.trace.note(hooked)
        return None
    _check_device(hooked, forward_pass, x)
    measured = RuleCall(plan, forward_pass=forward_pass, proven=plan.proven or outside or recomputed)
    rows = Layout() if x in forward_pass.given else hooked.layout_of(x, taint)
    if rows is not None and plan.moved != MOVED and (rows.axis == 0 or plan.rule.weight_sharing_axes):
        measured.given_rows = rows
    if not recomputed:
        for param in plan.wanted.values():
            forward_pass.uses.add(param)
    forward_pass.uses.rule_calls.append(measured)
    replaced = _follow(measured, x, call, output)
    if outside:
        _say_whose_rows(hooked, forward_pass, x, output if replaced is None else replaced)
        return replaced
    measured.place(output if replaced is None else replaced, x)
    if forward_pass.trace is not None:
        forward_pass.trace.note(plan)
    return replaced


def refuse_nested(hooked: HookedModule, x: Tensor) -> None:
    """Rules read shapes, and samples of a nested tensor have shapes of their own.

    Args:
        hooked: The module.
        x: Its first tensor.

    Raises:
        BatchAxisError: If that is nested, and the call may be a part of the loss.
    """
    if x.is_nested and torch.is_grad_enabled() and hooked.trainable():
        raise BatchAxisError(
            f"{hooked} is called on a nested tensor, in which no axis is the batch's: pad it "
            f"(torch.nested.to_padded_tensor), freeze these parameters, or {WITHOUT_SAMPLES}."
        )


def _look(hooked: HookedModule, forward_pass: ForwardPass, x: Tensor, output: Tensor) -> tuple[Any, ...]:
    """What calls must have in common to be measured by one plan; weights that are made of others are no leaves."""
    module = hooked.module
    used = [hooked.in_use(name) for name in hooked.params]
    return (
        (forward_pass.batch_size, forward_pass.measured, forward_pass.outside, module.training),
        (x.shape, x.stride(), x.dtype, x.device),
        (output.shape, output.stride(), output.dtype, output.requires_grad),
        *[(t.requires_grad, t.is_leaf) for t in used],
    )


def _decide(
    hooked: HookedModule,
    forward_pass: ForwardPass,
    x: Tensor,
    output: Any,
    taint: DataTaint | None,
    *,
    recomputed: bool,
) -> CallPlan | None:
    """How to measure a call, or None to leave it to the graph. Arguments as for `capture`."""
    wanted = hooked.trainable()
    rule = hooked.rule
    assert rule is not None
    results = differentiable_in(output)
    if not wanted or not results or not (rule.several_results or isinstance(output, Tensor)):
        return None
    if any(hooked.is_made(name) for name in wanted):
        return None
    tainted = None if taint is None else taint.holds(x) or x in forward_pass.given
    if tainted is not None and forward_pass.batch_size > 1:
        (hooked.data_dims if tainted else hooked.own_dims).add(x.dim())
        hooked.plans.clear()
    moved = 0 if forward_pass.batch_size == 1 else hooked.moved_at(x, taint, forward_pass.moves_rows)
    axes = rule.batch_axes(hooked.module, results)
    if axes[0] and taint is not None and forward_pass.batch_size > 1 and taint.layout_of(x) == Layout():
        warnings.warn(f"{hooked} takes time first. {TIME_FIRST}.", stacklevel=2)
    rows = _rows(hooked, forward_pass, x, results[0], axes[0])
    unproven = (rows is None or rows > 1) and hooked.calls.get(_key(x, rows or 0)) != "observed"
    if recomputed and (unproven or hooked in forward_pass.uses.moved_without_grad):
        forward_pass.error = forward_pass.error or _unknown_rows(hooked, forward_pass, x, results[0], _RECOMPUTED)
        return None
    outside = forward_pass.outside and not recomputed
    if outside and unproven:
        return None
    if rows is None and tainted:
        hooked.settle((0, x.dim()), "graph")  # compiled code must not take its first axis for the batch either
    if rows is None or (x.dim() in hooked.own_dims and tainted is not True and forward_pass.batch_size > 1):
        return None
    key = _key(x, rows)
    known = hooked.calls.get(key)
    doubted = x.dim() in hooked.left_to_graph and forward_pass.batch_size > 1 and x not in forward_pass.given
    if known == "graph" or doubted:
        return None
    if moved == MOVED or (moved and known == "certain"):  # another call's rows were
        known = None
    always = outside or not hooked.path or forward_pass.batch_size == 1
    simple = always or (x in forward_pass.given and moved != MOVED)
    # Numbers [B] may be those of B positions.
    sure = simple or (tainted is True and x.dim() > 1 and not moved)
    lasts = known is not None or always
    if known is None and rows == 1 and sure:
        known = "certain"
        if forward_pass.batch_size > 1 and tainted is not None:
            hooked.calls[key] = known
    plan = CallPlan(hooked, rule, wanted, rows, key=key, axes=axes, layout=Layout(axes[0]))
    # What a module that was never seen is called on may be made of parameters alone, and so may what numbers look up.
    plan.x_depends_on_data = x.dim() > 1 and (x.dim() in hooked.data_dims if tainted is None else tainted)
    plan.lasts = lasts
    plan.proven, plan.moved = known is not None or forward_pass.batch_size == 1, moved
    if (known is not None or (key in hooked.expected and moved != MOVED)) and rows == 1 and not rule.several_results:
        plan.way = _way(plan, x, output, all_measured=forward_pass.measured == forward_pass.batch_size)
    return plan


_RECOMPUTED = (
    "It was called by reentrant activation checkpointing, which hides the graph around it: checkpoint with "
    "use_reentrant=False (Trainer: gradient_checkpointing_kwargs={'use_reentrant': False}), or freeze its parameters."
)
_OUTSIDE = f"It was called outside of the model's own call, which would show it. {IN_A_FORWARD}."


def _unknown_rows(
    hooked: HookedModule, forward_pass: ForwardPass, x: Tensor, output: Tensor, why: str
) -> BatchAxisError:
    return BatchAxisError(
        f"{hooked} takes {tuple(x.shape)} and returns {tuple(output.shape)}, but the batch has "
        f"{forward_pass.batch_size} samples, and nothing tells whose rows they are. {why}"
    )


def _refuse_a_gradient(hooked: HookedModule, forward_pass: ForwardPass, x: Tensor, output: Any) -> None:
    """What is called outside of the model's own call need not be a part of the loss; if it is, it was not measured."""
    results = differentiable_in(output)
    if results and hooked.trainable():
        error = _unknown_rows(hooked, forward_pass, x, results[0], _OUTSIDE)

        def refuse() -> None:
            raise error

        _when_a_gradient_comes(results, forward_pass, refuse)


def _say_whose_rows(hooked: HookedModule, forward_pass: ForwardPass, x: Tensor, output: Any) -> None:
    """Nothing shows it where the model is not called, or has returned."""
    words = (
        f"{hooked} was called on {tuple(x.shape)} outside of a call of the model itself with a tensor. Its rows are "
        f"taken for the batch's {forward_pass.batch_size} samples, in their order: if they are not, norms are wrong. "
        f"{IN_A_FORWARD}."
    )

    def say() -> None:
        if not forward_pass.told:
            forward_pass.told = True
            warnings.warn(words, stacklevel=2)

    _when_a_gradient_comes(differentiable_in(output), forward_pass, say)


def _when_a_gradient_comes(results: Iterable[Tensor], forward_pass: ForwardPass, then: Callable[[], None]) -> None:
    for result in results:
        result.register_hook(forward_pass.guarded(lambda _: None if differentiating() else then()))


def _key(x: Tensor, rows: int) -> tuple[int, ...]:
    """What calls must have in common to be laid out alike: tokens of any length, but windows of one size."""
    return (rows, x.dim()) if rows == 1 else (rows, *x.shape[1:])


def repeat(hooked: HookedModule, passes: Iterable[ForwardPass], x: Tensor, call: Call, output: Any) -> Any:
    """Checkpointing makes a captured call again: save the same tensors in the same order, and measure nothing.

    Args:
        hooked: The module.
        passes: The passes that it may belong to, the likeliest first. It is of one that has no gradient for it yet.
        x: Its first tensor.
        call: Arguments and keyword arguments.
        output: What it returned.

    Returns:
        What takes the output's place; None to leave it.
    """
    rule, results = hooked.rule, differentiable_in(output)
    assert rule is not None
    if not hooked.trainable() or not results:
        return None
    axis = rule.batch_axes(hooked.module, results)[0]
    found: list[tuple[RuleUse, ForwardPass]] = []
    for forward_pass in passes:
        rows = _rows(hooked, forward_pass, x, results[0], axis)
        key = _key(x, rows) if rows else None
        calls = forward_pass.uses.rule_calls
        found += [(c, forward_pass) for c in calls if c.hooked is hooked and c.plan.key == key]
    if not found:
        return None
    known, of = next((each for each in found if not each[0].fired), found[0])
    return _follow(RuleCall(known.plan, forward_pass=of, repeats=True), x, call, output)


def _rows(hooked: HookedModule, forward_pass: ForwardPass, x: Tensor, output: Tensor, axis: int) -> int | None:
    assert hooked.rule is not None
    if not hooked.rule.has_batch_axis(hooked.module, x):
        return None
    if axis:
        return 1 if x.dim() > axis and x.shape[axis] == output.shape[axis] == forward_pass.batch_size else None
    return folded_rows(x, output, forward_pass.batch_size)


def _check_device(hooked: HookedModule, forward_pass: ForwardPass, x: Tensor) -> None:
    if forward_pass.device is None:
        forward_pass.device = x.device
    elif forward_pass.device != x.device:
        raise MixedDevicesError(
            f"{hooked} runs on {x.device}, but layers before it on {forward_pass.device}: the norms of a model that is "
            f"split over devices are not supported. Move it to one device (no device_map), or freeze the part on "
            f"the other."
        )


def _follow(call: RuleCall, x: Tensor, given: Call, output: Any) -> Any:
    """Take the weight gradient over, or watch the ordinary one."""
    plan, rule = call.plan, call.plan.rule
    if plan.way is not None and not is_taken(output):
        call.fused = True
        if call.forward_pass.keeps_errors or not plan.shipped:
            note_call(call, x, given)
        return plan.way(call, x, output)
    args, kwargs = given
    plain = isinstance(args, tuple) and len(args) == 1 and args[0] is x and not kwargs
    args, kwargs = ((x.detach(),), {}) if plain else map_tensors(lambda t: t.detach(), given)
    saved = rule.save(plan.module, args, kwargs, output, plan.wanted.keys())
    saved = saved if plan.shipped else saved_by(rule, call.hooked, saved)
    call.tokens = rule.lookup_tokens(saved)
    if not rule.several_results:
        return observe(call, saved, output)
    if torch.is_autocast_enabled(x.device.type):
        call.autocast = torch.get_autocast_dtype(x.device.type)
    watched: list[Tensor] = []

    def place(t: Any) -> Any:
        if not is_differentiable(t):
            return t
        watched.append(own_place(t))
        return own_place(watched[-1])  # a hook of the user's on it comes first

    placed = map_tensors(place, output)
    observe_several(call, saved, watched, plan.axes)
    return placed


def _way(plan: CallPlan, x: Tensor, output: Tensor, *, all_measured: bool) -> Way | None:
    """How the weight gradient should, and can, come from this engine."""
    if "weight" not in plan.wanted:
        return None
    weight = plan.hooked.in_use("weight")
    # Weights that an engine has split or put aside are differentiated by the engine's own graph.
    if weight.numel() == 0 or is_split(weight):
        return None
    rule = plan.rule
    if rule.gives_whole_backward and rule.supplies_backward(plan.module, x, output):
        return replace_backward
    taken = all_measured and rule.gives_input_grad and rule.fuses_weight_grad(plan.module, x, output)
    return fuse_weight_grad if taken else None
