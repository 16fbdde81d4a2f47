"""What happens while a model is called: which calls are captured, what is learned, and which uses are watched."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hf_clars.grad_norms.accumulator import NormAccumulator, may_count
from hf_clars.grad_norms.compiled.containers import ran_outside
from hf_clars.grad_norms.compiled.passes import CompiledPasses
from hf_clars.grad_norms.explanation import CallTimes, LearnedWays
from hf_clars.grad_norms.forward_pass import ForwardPass, asked_inside
from hf_clars.grad_norms.graph.finder import GraphFinder
from hf_clars.grad_norms.graph.known import KnownGraphs
from hf_clars.grad_norms.graph.measured_uses import MeasuredUse, UseArrival, count_repeated, waiting
from hf_clars.grad_norms.graph.places import ContainerCall
from hf_clars.grad_norms.graph.taint import MOVED, DataTaint, Following
from hf_clars.grad_norms.graph.walk import Use
from hf_clars.grad_norms.hooked_modules import HookedModule, find_hooked_modules
from hf_clars.grad_norms.hooks import BoundHook, PassEnds, PlacedHooks
from hf_clars.grad_norms.model_parts import ModelParts
from hf_clars.grad_norms.pytree import tensor_given, tensors_in
from hf_clars.grad_norms.torch_internals import (
    inside_backward,
    inside_function_transform,
    operations_recorded,
    saved_tensors_are_packed,
)
from hf_clars.grad_norms.undisturbed import differentiating
from hf_clars.grad_norms.with_rule import capture, refuse_nested, repeat
from hf_clars.layers import ParamLayer


class HookedNorms(NormAccumulator):
    """Places the hooks; results and checks are the subclass's.

    Args:
        model: See `NormAccumulator`, as the others.
        layers: The partition to measure.
        samples: Measure the first `samples` of each accumulated batch; None for all.
        keep_per_sample: Keep every sample's norms, not only their sums.
    """

    def __init__(
        self, model: nn.Module, layers: Sequence[ParamLayer], *, samples: int | None, keep_per_sample: bool
    ) -> None:
        super().__init__(model, layers, samples=samples, keep_per_sample=keep_per_sample)
        self._ever_captured: set[nn.Parameter] = set()
        self._finder = GraphFinder(self._in_use.param_of, self._name_of, self._in_use.are_split)
        self._following = Following()
        self._graphs = KnownGraphs()
        self._containers: list[ContainerCall] = []
        self._learned = False
        self._trained: list[bool] = []
        self._ways = LearnedWays(self._name_of)
        self._times: CallTimes | None = None
        self._module_hooks = PlacedHooks()
        self._end_hook = PassEnds(self._following.on_model_end, keep_owner=True)
        self._hook_modules()
        self._watch_results()
        self._hooks.add(model.register_forward_hook, self._end_hook, always_call=True)

    def _hook_modules(self) -> None:
        self._hooked = find_hooked_modules(self.model, self._layer_of)
        self._parts = ModelParts(self.model, self._hooked, self._layer_of, self._engine_holds_gradients)
        self._compiled = CompiledPasses(self, self._hooked)  # type: ignore[arg-type]  # the subclass is what exists
        self._following.also = self._compiled.calls.end
        self._call_hook.traced = self._compiled.model_hook(begins=True)
        self._result_hook.traced = self._end_hook.traced = self._compiled.model_hook(begins=False)
        for hooked in self._hooked:
            # Before the user's own, which shall see what goes on; the model's own stays where torch 2.8 can compile it.
            method = self._on_call if hooked.rule is not None else self._on_container_call
            hook = BoundHook(method, hooked, traced=self._compiled.hook_of(hooked))
            settings = {"with_kwargs": True, "prepend": hooked.rule is not None or bool(hooked.path)}
            self._module_hooks.add(hooked.module.register_forward_hook, hook, **settings)
        for m in self._compiled.calls.bystanders:
            self._module_hooks.add(m.register_forward_hook, self._compiled.bystander_hook())

    def cover(self, layers: Sequence[ParamLayer]) -> None:
        """Measure other layers from now on; also as a pass begins.

        Args:
            layers: The partition; between two batches.
        """
        super().cover(layers)
        self._module_hooks.remove()
        self._hook_modules()
        self._ever_captured.clear()
        self._in_use.forget()
        self._finder.forget()
        self._graphs.forget()
        self._ways.forget()

    def rebind(self, swapped: Mapping[nn.Parameter, nn.Parameter]) -> None:
        """Know parameters by those that an engine has put in their place, and let go of the old ones.

        Args:
            swapped: {old: new}; between two batches.
        """
        super().cover([layer.with_params(swapped) for layer in self.layers])
        for hooked in self._hooked:
            hooked.rebind(swapped)
        self._compiled.rebind(swapped)
        self._ever_captured = {swapped.get(p, p) for p in self._ever_captured}
        self._in_use.rebind(swapped)
        self._finder.forget()
        self._graphs.forget()

    @property
    def hooked(self) -> Sequence[HookedModule]:
        """The modules that are measured, and what is known of each."""
        return self._hooked

    # ---- forward pass ----------------------------------------------------------------------------------------

    @property
    def active(self) -> bool:
        """As the accumulator's; False also while the graph is differentiated for the norms' sake."""
        return not (self.paused or differentiating()) and super().active

    def _open(self, batch_size: int, *, implicit: bool = False) -> ForwardPass:
        self._following.enter(whole=not implicit)
        self._parts.refuse_changes()
        return super()._open(batch_size, implicit=implicit)

    def _begin(
        self, forward_pass: ForwardPass, given: Sequence[Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        forward_pass.times, forward_pass.moves_rows = self._times, self._finder.moves_rows
        forward_pass.earlier = [p.operations for p in self._passes if p.operations and not p.backward_seen]
        forward_pass.begun_at = operations_recorded()
        self._following.end()
        self._in_use.begin()
        self._containers.clear()
        self._compiled.join(forward_pass, args, kwargs)  # first: its operations are none of the graph's
        mixed = any(h.own_dims & h.data_dims for h in self._hooked)
        before, self._trained = self._trained, [p.requires_grad for p in self._layer_of]
        other = self._finder.given.look(given, forward_pass.batch_size)
        if not self._learned or before != self._trained or self._finder.asks_for_data or mixed or other:
            self._following.begin(given, forward_pass.batch_size, self._finder.given.loose)
        else:
            self._graphs.begin(forward_pass)

    @Following.unfollowed
    def _on_container_call(
        self, hooked: HookedModule, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        """A module without a rule may be a gate for what is used inside."""
        if not self._passes or self.paused or differentiating() or inside_function_transform():
            return
        if not torch.is_grad_enabled():
            if not (self._following.elsewhere or self._passes[-1].returned):
                self._passes[-1].uses.note_without_grad(hooked, self._hooked)
            return
        if inside_backward():
            self._on_repeated_container_call(hooked, output)
            return
        forward_pass = self._passes[-1]
        forward_pass.packed = forward_pass.packed or saved_tensors_are_packed()
        if hooked.params:
            self._in_use.learn(hooked)
        taint = self._following.taint
        kept = self._finder.gates_may_be_needed or hooked in self._finder.gated
        if taint is not None or forward_pass.moves_rows or kept:
            self._containers.append(ContainerCall.of(hooked, (args, kwargs), output, taint))

    def _on_repeated_container_call(self, hooked: HookedModule, output: Any) -> None:
        """Reentrant checkpointing makes the graph of a module only now."""
        forward_pass = next((p for p in self._under_way() if p.uses.recomputed[hooked]), None)
        if forward_pass is not None and not asked_inside(self._passes, list(hooked.module.parameters())):
            forward_pass.uses.recomputed[hooked] -= 1
            self._watch_uses(forward_pass, [t for t in tensors_in(output) if t.requires_grad], None, [], again=True)

    @Following.unfollowed
    def _on_call(
        self, hooked: HookedModule, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Any:
        """After the forward of a module with a rule. What is returned takes the output's place."""
        if self.paused and not inside_backward():
            return None
        last = self._passes[-1] if self._passes else None
        if last is not None and not last.measured and not last.implicit:
            return None  # also the cheapest way out when enough samples are measured
        x = tensor_given(args, kwargs)
        if x is None or x.dim() == 0 or inside_function_transform() or (differentiating() and not inside_backward()):
            return None
        refuse_nested(hooked, x)
        self._in_use.learn(hooked)
        taint = self._following.taint
        if not torch.is_grad_enabled():
            if last is not None and not self._following.elsewhere:
                last.uses.without_grad[hooked] += 1
                if hooked.moved_at(x, taint, last.moves_rows) == MOVED:
                    last.uses.moved_without_grad.add(hooked)
            return None
        if inside_backward():
            return self._on_repeated_call(hooked, x, (args, kwargs), output)
        forward_pass = self._current(x.shape[0])
        if forward_pass is None or not forward_pass.measured:
            return None
        if forward_pass.begun_compiled:
            raise ran_outside(hooked)
        forward_pass.packed = forward_pass.packed or saved_tensors_are_packed()
        before = operations_recorded()
        replaced = capture(hooked, forward_pass, x, (args, kwargs), output, taint)
        forward_pass.ours += operations_recorded() - before
        if taint is not None and replaced is not None and taint.holds(x):
            taint.mark(tensors_in(replaced), taint.moved(x))
        if forward_pass.outside:
            self._ever_captured.update(hooked.params.values())
            self._ways.new = True  # the sums alone show what else uses a parameter there
        return replaced

    def _on_repeated_call(
        self, hooked: HookedModule, x: Tensor, call: tuple[tuple[Any, ...], dict[str, Any]], output: Any
    ) -> Any:
        """Activation checkpointing runs the module again, and wants the same tensors to be saved in the same order.

        Reentrant checkpointing ran it without gradients before, so this is the call to capture.
        """
        if asked_inside(self._passes, hooked.params.values()):
            return None
        for forward_pass in self._under_way():
            if forward_pass.uses.recomputed[hooked] and not differentiating() and not self.paused:
                forward_pass.uses.recomputed[hooked] -= 1
                self._ever_captured.update(hooked.trainable().values())
                known = len(forward_pass.uses.rule_calls)
                replaced = capture(hooked, forward_pass, x, call, output, None, recomputed=True)
                for made in forward_pass.uses.rule_calls[known:]:
                    self._ways.note(made.in_words(), made.wanted.values())
                return replaced
        return repeat(hooked, self._under_way(), x, call, output)

    def _under_way(self) -> list[ForwardPass]:
        """Passes that a recomputation may belong to: those that a gradient has reached first, and the latest first."""
        alive = (p for p in (self._left or self._passes) if may_count(p))
        return sorted(alive, key=lambda p: p.backward_seen)[::-1]

    # ---- the end of the forward pass -------------------------------------------------------------------------

    def _check_result(self, forward_pass: ForwardPass, outputs: list[Tensor]) -> None:
        taint = self._following.end()
        containers, self._containers = self._containers, []
        compiled = self._compiled.part(forward_pass)
        forward_pass.operations = range(forward_pass.begun_at, operations_recorded())
        if not forward_pass.measured:
            return
        self._compiled.note(compiled)
        for param in (p for call in compiled for p in call.hooked.trainable().values()):
            forward_pass.uses.add(param)
            forward_pass.uses.compiled.add(param)
        forward_pass.uses.note_recomputation()
        mark = None if containers else self._graphs.end(forward_pass, trained=sum(self._trained))
        try:
            known = self._graphs.find(mark, forward_pass, outputs)
            if known is not None:
                self._hook_uses(forward_pass, [m.use for m in known], known)
            else:
                found = self._watch_uses(forward_pass, outputs, taint, containers)
                if mark is not None and found is not None and not forward_pass.packed:
                    self._graphs.add(mark, forward_pass, outputs, found)
        finally:
            forward_pass.uses.leave_graph()
        self._compiled.refuse_other_uses(forward_pass, compiled)
        if taint is not None and forward_pass.batch_size > 1:
            self._learned, self._finder.unknown = True, False

    def _watch_uses(
        self,
        forward_pass: ForwardPass,
        outputs: list[Tensor],
        taint: DataTaint | None,
        containers: list[ContainerCall],
        *,
        again: bool = False,
    ) -> list[MeasuredUse] | None:
        """Find the uses of parameters that no rule measures, and hook them.

        Returns:
            Those that are measured where they are; None if there are others, or if a rule's call proved wrong.
        """
        found, gates = self._finder.find(forward_pass, outputs, taint, containers)
        if again:  # a module inside may have been seen to
            seen = {(m.use.node, m.use.index) for m in waiting(forward_pass)}
            found = [m for m in found if (m.use.node, m.use.index) not in seen]
        uses = [m.use for m in found] + [use for gate in gates for use in gate.uses for _ in gate.edges]
        self._hook_uses(forward_pass, uses, found, again=again)
        for gate in gates:
            gate.watch(forward_pass)
        if again:
            count_repeated(forward_pass)
        right = [call for call in forward_pass.uses.rule_calls if not call.cancelled]
        for call in right:
            self._ever_captured.update(call.wanted.values())
        if self._ways.are_new(
            {u.key for u in uses} | {(c.hooked, c.fused, c.plan.key[0]) for c in forward_pass.uses.rule_calls}
        ):
            for call in right:
                self._ways.note(call.in_words(), call.wanted.values())
            for measured in found:
                self._ways.note(measured.in_words(), measured.use.leaves.values())
            for gate in gates:
                self._ways.note(gate.in_words(), (p for use in gate.uses for p in use.leaves.values()))
        return None if gates or len(right) < len(forward_pass.uses.rule_calls) else found

    def _hook_uses(
        self, forward_pass: ForwardPass, uses: Sequence[Use], found: Sequence[MeasuredUse], *, again: bool = False
    ) -> None:
        """Count uses, and hook those that are measured where they are."""
        for param in (p for use in uses for p in use.leaves.values()):
            if not again:
                forward_pass.uses.add(param)
            self._ever_captured.add(param)
        for measured in found:
            UseArrival(forward_pass, measured).wait(measured.use.node)

    # ---- compiled code ---------------------------------------------------------------------------------------

    @property
    def paused(self) -> bool:
        """While True, hooks do nothing: no pass begins, and nothing is kept."""
        return self._paused

    @paused.setter
    def paused(self, paused: bool) -> None:
        self._paused = paused
        if hasattr(self, "_compiled"):
            self._compiled.calls.paused = paused

    def why_not_compiled(self) -> str:
        """Names of the parameters that are used where no layer rule is; "" if the model can be compiled as a whole."""
        return self._compiled.calls.reason

    def remove(self) -> None:
        """Take every hook off the model. Values read so far stay readable."""
        self._following.end()
        super().remove()
        self._module_hooks.remove()
        for forward_pass in self._passes:
            forward_pass.free_graph()
        self._free_dropped()

    def _name_of(self, param: nn.Parameter) -> str:
        pairs = (pair for layer in self.layers for pair in zip(layer.params, layer.param_names, strict=True))
        return next((name for p, name in pairs if p is param), "a parameter")
