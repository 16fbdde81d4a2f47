"""Calls of modules that no rule serves: what the fallback needs, and the parameters that they adopt."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hf_clars.grad_norms.adoption import NO_INPUT, Orphan, orphan_of
from hf_clars.grad_norms.batch_axis import check_batch_axis
from hf_clars.grad_norms.errors import WITHOUT_SAMPLES, UncoveredParameterError
from hf_clars.grad_norms.graph_uses import GraphRegion
from hf_clars.grad_norms.hooked_modules import HookedModule
from hf_clars.grad_norms.module_call import ModuleCall
from hf_clars.grad_norms.norm_math import at_least_float32, squared_sum
from hf_clars.grad_norms.own_inputs import OwnInputs
from hf_clars.grad_norms.own_place import own_place
from hf_clars.grad_norms.passes import ForwardPass
from hf_clars.grad_norms.torch_internals import saved_tensors_are_packed
from hf_clars.grad_norms.trees import map_tensors, tensors_in
from hf_clars.grad_norms.without_rule.agreement import precision_now
from hf_clars.grad_norms.without_rule.direct_measures import DirectMeasures
from hf_clars.grad_norms.without_rule.fallback import Fallback
from hf_clars.grad_norms.without_rule.watched_call import Call, WatchedCall


class CallsWithoutRule:
    """Hands calls to the general fallback.

    Args:
        layer_of: Layer index of every parameter.
        own_inputs: Tells calls on the model's own tensors.
        captured: Takes note of a call that will be measured, and returns its number in the pass.
        arrived: Takes note that its gradient has come.

    Attributes:
        busy: True while a module is run or differentiated once more for the norms' sake; hooks must do nothing then.
    """

    def __init__(
        self,
        layer_of: dict[nn.Parameter, int],
        own_inputs: OwnInputs,
        captured: Callable[[HookedModule, ForwardPass, dict[str, nn.Parameter], Tensor], int],
        arrived: Callable[[HookedModule, ForwardPass, int], bool],
    ) -> None:
        self.busy = False
        self._layer_of, self._own_inputs = layer_of, own_inputs
        self._captured, self._arrived = captured, arrived
        self._fallback = Fallback()
        self._direct = DirectMeasures(layer_of, captured, arrived, lambda: not self.busy, self._quietly)

    @contextmanager
    def _quietly(self) -> Iterator[None]:
        self.busy = True
        try:
            yield
        finally:
            self.busy = False

    @property
    def replaying(self) -> bool:
        """True while a module's forward runs once more, and not as a part that checkpointing recomputes."""
        return self._fallback.replaying

    def capture(
        self, hooked: HookedModule, current: ForwardPass, x: Tensor, call: Call, output: Any, *, prove: bool
    ) -> Any:
        """Arrange for the norms of a call, and of what it uses inside that could not be told apart by sample.

        Args:
            hooked: The module.
            current: The pass.
            x: Its first tensor, or `NO_INPUT`.
            call: Arguments and keyword arguments.
            output: What it returned.
            prove: Whether it will be proven that no use of a parameter escapes in this pass.

        Returns:
            What takes the output's place; None to leave it.
        """
        found = list(tensors_in(output))
        outputs = {i: t for i, t in enumerate(found) if t.requires_grad and t.is_floating_point()}
        region = GraphRegion(outputs.values(), tensors_in(call))
        adopted = [o for o in current.orphans if hooked.contains(o.hooked) and (not outputs or o.is_inside(region))]
        axes = hooked.batch_axes(outputs)
        others = [i for i, t in outputs.items() if t.dim() <= axes[i] or t.shape[axes[i]] != current.batch_size]
        # Where the first output does not have it, as in a time-first attention, the gradient will come through that.
        batch_first = any(not axes[i] and i not in others for i in (outputs if not hooked.path else [*outputs][:1]))
        telling = batch_first and (current.batch_size == 1 or x is not NO_INPUT)
        if telling and self._own_inputs.holds(hooked, current, tensors_in(call)):
            current.own_results.update(t.grad_fn for t in outputs.values() if t.grad_fn is not None)
            telling = False
        if prove and telling:
            hooked.strays.update(_strays(hooked, current, region))
        wanted = _wanted(hooked, current, adopted, _measured_inside(hooked, current, region))
        if (found and not outputs) or not wanted:
            return None
        if not telling:
            if hooked.params:
                orphan = orphan_of(hooked, current.batch_size, wanted.values(), x, list(outputs.values()))
                current.orphans.append(orphan)
            return None
        if others and not hooked.params and hooked.path:
            return None  # a gradient may come through those too: leave it to a module further out
        output, outputs = _in_own_places(output, outputs)
        for i in others:
            hooked.refuse_gradient_through(outputs.pop(i), current.batch_size)
        current.supersede(hooked, (p for n, p in wanted.items() if n in hooked.strays))
        watched = WatchedCall(hooked, current, x, call, outputs, wanted, adopted, region)
        if not self._direct.take(watched):
            if prove:
                current.count_inside(wanted.values(), region.uses(hooked.leaves(wanted)))
            self._watch_module(watched)
        return output

    def check_batch_axis(self, current: ForwardPass, outputs: Sequence[Tensor]) -> None:
        """Prove that the batch is the first axis of calls whose shapes leave that open; see `batch_axis.py`."""
        calls = list(current.open_calls)
        current.open_calls.clear()
        with self._quietly():
            check_batch_axis(outputs, calls, current.batch_size)
        for call in calls:
            call.hooked.proven_dims.add(len(call.shape))

    def _adopt(
        self, hooked: HookedModule, current: ForwardPass, adopted: Sequence[Orphan], outputs: list[Tensor]
    ) -> None:
        """Take calls inside over, and look whether they could do by themselves from now on."""
        current.leave(adopted)
        with self._quietly():
            for orphan in adopted:
                current.supersede(hooked, orphan.params)
                if not saved_tensors_are_packed() and orphan.learn(outputs, current.batch_size):
                    current.learned.update(orphan.params)

    def _watch_module(self, watched: WatchedCall) -> None:
        """Measure a module by the fallback; the first time, look whether the graph's uses would give the same."""
        # The hook below must not hold on to `watched`, which knows the graph.
        hooked, current, outputs, wanted = watched.hooked, watched.current, watched.outputs, watched.wanted
        axes = hooked.batch_axes(outputs)
        first = [t for i, t in outputs.items() if not axes[i]]
        for output in first:
            current.note_if_open(hooked, output)
        trial, uses = self._direct.trial(watched)
        self._adopt(hooked, current, watched.adopted, first)
        ticket = self._captured(hooked, current, watched.wanted, watched.x)
        args, kwargs = map_tensors(lambda t: t.detach(), watched.call)
        leaves = hooked.leaves(watched.wanted)
        remembered = ModuleCall(
            module=hooked.module,
            path=str(hooked),
            args=args,
            kwargs=kwargs,
            outputs={i: t.detach() for i, t in outputs.items()},
            axes=list(axes.values()),
            edges=[torch.autograd.graph.get_gradient_edge(t) for t in outputs.values()],
            params={name: used for name, (_, used) in leaves.items()},
            training=hooked.module.training,
            batch_size=current.batch_size,
            count=current.kept,
            precision=precision_now([*outputs.values(), *(used for _, used in leaves.values())]),
            autocast=_autocast_type(next(iter(outputs.values())).device.type),
            replayable=all(used is p and not hasattr(p, "ds_id") for p, used in leaves.values()),
        )
        current.fallback_calls.append(remembered)

        def on_gradients(grads: Sequence[Tensor | None]) -> None:
            if self._arrived(hooked, current, ticket):
                per_sample = self._measure(current, remembered, wanted, grads)
                trial.expect(per_sample)

        torch.autograd.graph.register_multi_grad_hook(list(outputs.values()), on_gradients, mode="all")
        self._direct.follow(uses, current, trial)

    def _measure(
        self,
        current: ForwardPass,
        call: ModuleCall,
        wanted: dict[str, nn.Parameter],
        grads: Sequence[Tensor | None],
    ) -> dict[str, Tensor]:
        try:
            with self._quietly():
                per_sample = self._fallback.per_sample_grads(call, grads)
        finally:
            call.edges.clear()
            current.fallback_calls.remove(call)
        for name, own in per_sample.items():
            self._add(current, wanted[name], own)
        return per_sample

    @torch.no_grad()
    def _add(self, current: ForwardPass, param: nn.Parameter, grads: Tensor) -> None:
        grads = at_least_float32(grads)
        if param in current.several:
            current.add_pending(param, grads)
        else:
            current.add_squares(self._layer_of[param], squared_sum(grads))


def _autocast_type(device: str) -> torch.dtype | None:
    on = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if on else None


def _in_own_places(output: Any, outputs: dict[int, Tensor]) -> tuple[Any, dict[int, Tensor]]:
    """All that a module returned, and its differentiable outputs, with places of their own in the graph."""
    output = map_tensors(lambda t: own_place(t) if t.requires_grad and t.is_floating_point() else t, output)
    placed = list(tensors_in(output))
    return output, {i: placed[i] for i in outputs}


def _strays(hooked: HookedModule, current: ForwardPass, region: GraphRegion) -> dict[str, nn.Parameter]:
    """Parameters of modules inside that were used otherwise than by a call of their modules, or more often.

    Such as `table.weight` handed to a function, a ParameterList, or a method other than `forward`.
    """
    waiting = {p for orphan in current.orphans for p in orphan.params}
    known = current.measured_by_rules(hooked.inner.values()) - waiting
    inner = {n: p for n, p in hooked.inner.items() if p in known}
    uses = region.uses(hooked.leaves(inner))
    often = Counter(use.param for use in uses)
    return {use.name: use.param for use in uses if often[use.param] > current.uses[use.param]}


def _measured_inside(hooked: HookedModule, current: ForwardPass, region: GraphRegion) -> set[str]:
    """Own parameters that are used by calls of modules inside alone, and measured there.

    Where the module uses one directly too, it is measured for all of them, and the calls inside are not.
    """
    tied = {n: p for n, p in hooked.params.items() if n in hooked.tied}
    if not tied:
        return set()
    uses = Counter(use.name for use in region.uses(hooked.leaves(tied)))
    measured = set()
    for name, param in tied.items():
        inside = current.tied_inside(hooked, param, uses[name])
        if inside and uses[name] <= len(inside):
            measured.add(name)
        elif all(h.rule is not None for h in inside):
            current.supersede(hooked, [param])
        else:
            raise UncoveredParameterError(
                f"{hooked} uses {name} directly, and {inside[0]} uses the same parameter and has no layer rule: their "
                "gradients cannot be told apart. Register a rule for either class, set requires_grad=False on the "
                f"parameter, or {WITHOUT_SAMPLES}."
            )
    return measured


def _wanted(
    hooked: HookedModule, current: ForwardPass, adopted: Sequence[Orphan], measured: Collection[str] = ()
) -> dict[str, nn.Parameter]:
    """The parameters that a call is measured for, by their name in the module."""
    left = {p for orphan in adopted for p in orphan.params}
    left.update(current.measured_by_rules(hooked.strays.values()) if hooked.strays else ())
    inner = {n: p for n, p in hooked.inner.items() if p in left}
    if hooked.params:
        # A module may use the weights of one inside without calling it, as MultiheadAttention does with out_proj.
        inner.update((n, p) for n, p in hooked.inner.items() if not current.uses[p])
    own = {n: p for n, p in hooked.params.items() if n not in measured}
    return {n: p for n, p in {**own, **inner}.items() if hooked.in_use(n).requires_grad}
