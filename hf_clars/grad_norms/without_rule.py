"""Calls of modules that no rule serves: what the fallback needs, and the parameters that they adopt."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hf_clars.grad_norms.adoption import NO_INPUT, Orphan, orphan_of
from hf_clars.grad_norms.errors import BatchAxisError
from hf_clars.grad_norms.fallback import Fallback, ModuleCall
from hf_clars.grad_norms.graph_uses import GraphUse, find_graph_uses
from hf_clars.grad_norms.hooked_modules import HookedModule
from hf_clars.grad_norms.norm_math import squared_sum
from hf_clars.grad_norms.passes import ForwardPass
from hf_clars.grad_norms.rule_call import at_least_float32
from hf_clars.grad_norms.torch_internals import saved_tensors_are_packed
from hf_clars.grad_norms.trees import map_tensors, tensors_in

Call = tuple[tuple[Any, ...], dict[str, Any]]
Key = tuple[HookedModule, bool, tuple[str, ...]]


@dataclass(eq=False)
class _Trial:
    """A pass in which both the fallback and the graph's uses are followed, to compare them.

    Attributes:
        waiting: Uses whose gradient has not come.
        expected: Per-sample gradients by the fallback.
        found: The same by the uses.
    """

    waiting: int
    expected: dict[str, Tensor] = field(default_factory=dict)
    found: dict[str, Tensor] = field(default_factory=dict)


class CallsWithoutRule:
    """Hands calls to the general fallback.

    Args:
        layer_of: Layer index of every parameter.
        captured: Takes note of a call that will be measured, and returns its number in the pass.
        arrived: Takes note that its gradient has come.

    Attributes:
        busy: True while a module is run or differentiated once more for the norms' sake; hooks must do nothing then.
    """

    def __init__(
        self,
        layer_of: dict[nn.Parameter, int],
        captured: Callable[[HookedModule, ForwardPass, dict[str, nn.Parameter], Tensor], int],
        arrived: Callable[[HookedModule, ForwardPass, int], bool],
    ) -> None:
        self.busy = False
        self._layer_of, self._captured, self._arrived = layer_of, captured, arrived
        self._fallback = Fallback()
        self._direct: dict[Key, bool] = {}

    def capture(self, hooked: HookedModule, current: ForwardPass, x: Tensor, call: Call, output: Any) -> None:
        """Arrange for the norms of a call, and of the calls inside that could not be told apart by sample.

        Args:
            hooked: The module.
            current: The pass.
            x: Its first tensor, or `NO_INPUT`.
            call: Arguments and keyword arguments.
            output: What it returned.
        """
        adopted = [o for o in current.orphans if hooked.contains(o.hooked)]
        found = list(tensors_in(output))
        outputs = {i: t for i, t in enumerate(found) if t.requires_grad and t.is_floating_point()}
        wanted = _wanted(hooked, current, adopted)
        if (found and not outputs) or not wanted:
            return
        batch_first = any(t.dim() and t.shape[0] == current.batch_size for t in outputs.values())
        if not batch_first or (x is NO_INPUT and current.batch_size > 1):
            if hooked.params:
                orphan = orphan_of(hooked, current.batch_size, wanted.values(), x, list(outputs.values()))
                current.orphans.append(orphan)
            return
        others = [i for i, t in outputs.items() if not t.dim() or t.shape[0] != current.batch_size]
        if others and not hooked.params and hooked.path:
            return  # a gradient may come through those too: leave it to a module further out
        for i in others:
            hooked.refuse_gradient_through(outputs.pop(i), current.batch_size)
        key = (hooked, hooked.module.training, tuple(wanted))
        uses = [] if adopted or not self._direct.get(key, True) else _bare_uses(hooked, wanted, call, outputs)
        if uses and key in self._direct:
            self._watch_uses(hooked, current, uses, x)
            return
        self._adopt(hooked, current, adopted, list(outputs.values()))
        ticket = self._captured(hooked, current, wanted, x)
        trial = _Trial(len(uses))
        self._watch(hooked, current, wanted, call, outputs, ticket, trial)
        for use in uses:
            use.watch(current.batch_size, current.kept, self._active, partial(self._compare, key, trial))

    def _watch_uses(self, hooked: HookedModule, current: ForwardPass, uses: Sequence[GraphUse], x: Tensor) -> None:
        """Measure a module's bare parameters where the graph uses them."""

        def deliver(ticket: int, name: str, param: nn.Parameter, grads: Tensor | None) -> None:
            if not self._arrived(hooked, current, ticket):
                return
            if grads is None:
                raise BatchAxisError(
                    f"{hooked} used {name} with the batch as first axis before, and now in another way: give it inputs "
                    "of one layout, or freeze the parameter."
                )
            self._add(current, param, grads)

        for use in uses:
            ticket = self._captured(hooked, current, {use.name: use.param}, x)
            use.watch(current.batch_size, current.kept, self._active, partial(deliver, ticket))

    def _active(self) -> bool:
        return not self.busy

    def _compare(self, key: Key, trial: _Trial, name: str, param: nn.Parameter, grads: Tensor | None) -> None:
        """See whether the graph's uses give what the fallback gave, for later passes."""
        if key in self._direct:
            return
        if grads is None:
            self._direct[key] = False
            return
        trial.found[name] = trial.found[name] + grads if name in trial.found else grads
        trial.waiting -= 1
        if trial.waiting == 0:
            same = (_close(trial.found.get(n), want) for n, want in trial.expected.items())
            self._direct[key] = bool(trial.expected) and all(same)

    def _adopt(
        self, hooked: HookedModule, current: ForwardPass, adopted: Sequence[Orphan], outputs: list[Tensor]
    ) -> None:
        """Take calls inside over, and look whether they could do by themselves from now on."""
        self.busy = True
        try:
            for orphan in adopted:
                current.orphans.remove(orphan)
                current.supersede(hooked, orphan.params)
                if not saved_tensors_are_packed() and orphan.learn(outputs, current.batch_size):
                    current.learned.update(orphan.params)
        finally:
            self.busy = False

    def _watch(
        self,
        hooked: HookedModule,
        current: ForwardPass,
        wanted: dict[str, nn.Parameter],
        call: Call,
        outputs: dict[int, Tensor],
        ticket: int,
        trial: _Trial,
    ) -> None:
        args, kwargs = map_tensors(lambda t: t.detach(), call)
        in_use = {name: hooked.in_use(name) for name in wanted}
        remembered = ModuleCall(
            module=hooked.module,
            path=str(hooked),
            args=args,
            kwargs=kwargs,
            outputs={i: t.detach() for i, t in outputs.items()},
            edges=[torch.autograd.graph.get_gradient_edge(t) for t in outputs.values()],
            params=in_use,
            training=hooked.module.training,
            batch_size=current.batch_size,
            count=current.kept,
            replayable=all(in_use[n] is p and not hasattr(p, "ds_id") for n, p in wanted.items()),
        )
        current.fallback_calls.append(remembered)
        current.by_fallback.update(wanted.values())

        def on_gradients(grads: Sequence[Tensor | None]) -> None:
            if self._arrived(hooked, current, ticket):
                per_sample = self._measure(current, remembered, wanted, grads)
                trial.expected = per_sample if trial.waiting else {}

        torch.autograd.graph.register_multi_grad_hook(list(outputs.values()), on_gradients, mode="all")

    def _measure(
        self,
        current: ForwardPass,
        call: ModuleCall,
        wanted: dict[str, nn.Parameter],
        grads: Sequence[Tensor | None],
    ) -> dict[str, Tensor]:
        self.busy = True
        try:
            per_sample = self._fallback.per_sample_grads(call, grads)
        finally:
            self.busy = False
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


def _bare_uses(
    hooked: HookedModule, wanted: dict[str, nn.Parameter], call: Call, outputs: dict[int, Tensor]
) -> list[GraphUse]:
    """Where the graph uses a module's own parameters, if that may be looked at and they are all that is wanted."""
    if saved_tensors_are_packed() or wanted.keys() != hooked.trainable().keys():
        return []
    in_use = {name: (p, hooked.in_use(name)) for name, p in wanted.items()}
    return find_graph_uses(outputs.values(), tensors_in(call), in_use)


def _close(found: Tensor | None, expected: Tensor) -> bool:
    scale = float(expected.abs().max()) if expected.numel() else 0.0
    return found is not None and torch.allclose(found, expected.to(found.dtype), rtol=1e-3, atol=1e-5 * scale)


def _wanted(hooked: HookedModule, current: ForwardPass, adopted: Sequence[Orphan]) -> dict[str, nn.Parameter]:
    """The parameters that a call is measured for, by their name in the module."""
    left = {p for orphan in adopted for p in orphan.params}
    inner = {n: p for n, p in hooked.inner.items() if p in left}
    if hooked.params:
        # A module may use the weights of one inside without calling it, as MultiheadAttention does with out_proj.
        inner.update((n, p) for n, p in hooked.inner.items() if not current.uses[p])
    return {n: p for n, p in {**hooked.params, **inner}.items() if hooked.in_use(n).requires_grad}
