"""`PerSampleGradNorms`: every sample's gradient norm in every layer, out of an ordinary backward pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from hf_clars.grad_norms.accumulator import NormAccumulator, remove_all
from hf_clars.grad_norms.errors import UncoveredParameterError
from hf_clars.grad_norms.forward_pass import ForwardPass, differentiating
from hf_clars.grad_norms.graph.finder import ContainerCall, GraphFinder
from hf_clars.grad_norms.graph.measured_uses import watch
from hf_clars.grad_norms.graph.taint import DataTaint
from hf_clars.grad_norms.hooked_modules import HookedModule, find_hooked_modules
from hf_clars.grad_norms.hooks import BoundHook
from hf_clars.grad_norms.sum_check import SumCheck
from hf_clars.grad_norms.torch_internals import (
    inside_backward,
    inside_function_transform,
    saved_tensors_are_packed,
    version,
)
from hf_clars.grad_norms.trees import tensors_in
from hf_clars.grad_norms.with_rule import capture, repeat
from hf_clars.layers import LayerMode, ParamLayer, param_layers

CHECK_EVERY = 1000
"""In how many batches one is checked, after the first three."""


class PerSampleGradNorms(NormAccumulator):
    """Measure the gradient norm of each sample in each layer while `backward()` runs.

    Use it around any training step; the model is not wrapped, renamed or changed, and `p.grad` is what it would be
    without it, up to rounding (where the weight gradient comes from the per-sample ones, it is summed in another
    order)::

        with PerSampleGradNorms(model) as norms:
            loss_fn(model(x), y).backward()
        norms.per_sample["conv1"]     # Tensor [B]
        norms.mean_norm["conv1"]      # scalar: n_k of Eq. 5

    A sample's gradient is that of its own use of the layer: the gradient with respect to the i-th copy of the weights
    if every sample had its own copy. Without batch coupling this is grad_k f_i; under train-mode BatchNorm it is the
    part of the batch gradient that enters through sample i. The parts always add up to the batch gradient.

    Several backward passes without clearing the gradients (gradient accumulation) are one batch: `per_sample` then
    holds their samples one after the other. After `zero_grad()` a new batch begins.

    Args:
        model: Any module whose layers take and return tensors with the batch axis first.
        layers: `"module"` (default) or `"tensor"`, see `hf_clars.param_layers`; or a ready partition.
        samples: Measure only the first `samples` of each accumulated batch (the paper's J_t); None: all.
        loss_reduction: `"mean"` (default): the loss is a mean over the samples of each backward pass, and norms are
            those of grad_k f_i itself. `"sum"`: norms are of each sample's contribution to the loss as it is.
        keep_per_sample: Keep the [B] tensors. False keeps sums only, in constant memory.
        check: How often it is checked that the samples' gradients add up to the batch gradient: in the first three
            passes, whenever a parameter is used in a new way, and in every `check`-th pass after that (default 1,000).
            True: in every pass; False: never. Only passes of which every sample is measured can be checked.

    Raises:
        ValueError: For an unknown `layers` or `loss_reduction`, or `samples` below 1.
        UncoveredParameterError: When results are read, naming a parameter with a gradient whose use was not seen.
        BatchAxisError: When rows of a tensor cannot be told apart by sample.
        SumCheckError: When results are read, if the samples' gradients do not add up to the batch gradient.
        SecondBackwardError: When `backward()` runs twice through one forward pass.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        layers: LayerMode | Sequence[ParamLayer] = "module",
        samples: int | None = None,
        loss_reduction: Literal["mean", "sum"] = "mean",
        keep_per_sample: bool = True,
        check: bool | int = CHECK_EVERY,
    ) -> None:
        if loss_reduction not in ("mean", "sum"):
            raise ValueError(f"loss_reduction={loss_reduction!r}: use 'mean' or 'sum', as the loss does.")
        partition = param_layers(model, layers=layers) if isinstance(layers, str) else layers
        super().__init__(model, partition, samples=samples, keep_per_sample=keep_per_sample)
        self.loss_reduction = loss_reduction
        self._check_every = 1 if check is True else int(check)
        self._old_grads = {p: _state_of_grad(p) for p in self._layer_of}
        self._ever_captured: set[nn.Parameter] = set()
        self._in_use: dict[Tensor, nn.Parameter] = {}
        self._own_params: set[nn.Parameter] = set()
        self._finder = GraphFinder(self._param_of, self._name_of)
        self._taint: DataTaint | None = None
        self._containers: list[ContainerCall] = []
        self._learned = False
        self._check: SumCheck | None = None
        self._batches = 0
        self._new_ways = False
        self._known_ways: set[object] = set()
        self._module_handles: list[RemovableHandle] = []
        self._hook_modules()
        self._watch_results()
        self._handles.append(model.register_forward_hook(BoundHook(self._on_model_end), always_call=True))

    def _hook_modules(self) -> None:
        self._hooked = find_hooked_modules(self.model, self._layer_of)
        for hooked in self._hooked:
            # Before the user's own hooks: they shall see the output that goes on.
            handle = hooked.module.register_forward_hook(
                BoundHook(self._on_call if hooked.rule is not None else self._on_container_call, hooked),
                with_kwargs=True,
                prepend=True,
            )
            self._module_handles.append(handle)

    def cover(self, layers: Sequence[ParamLayer]) -> None:
        """Measure other layers from now on; also as a pass begins.

        Args:
            layers: The partition; between two batches.
        """
        super().cover(layers)
        remove_all(self._module_handles)
        self._hook_modules()
        self._ever_captured.clear()
        self._old_grads = {p: _state_of_grad(p) for p in self._layer_of}
        self._in_use.clear()
        self._finder.forget()

    def rebind(self, swapped: Mapping[nn.Parameter, nn.Parameter]) -> None:
        """Know parameters by those that an engine has put in their place, and let go of the old ones.

        Args:
            swapped: {old: new}; between two batches.
        """
        super().cover([layer.with_params(swapped) for layer in self.layers])
        for hooked in self._hooked:
            hooked.rebind(swapped)
        self._ever_captured = {swapped.get(p, p) for p in self._ever_captured}
        self._old_grads = {p: _state_of_grad(p) for p in self._layer_of}
        self._in_use = {used: swapped.get(p, p) for used, p in self._in_use.items()}
        self._finder.forget()

    # ---- forward ---------------------------------------------------------------------------------------------

    @property
    def active(self) -> bool:
        """As the accumulator's; False also while the graph is differentiated for the norms' sake."""
        return not differentiating() and super().active

    def _begin(self, current: ForwardPass, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._end_taint()
        self._containers.clear()
        self._own_params = set(self.model.parameters())
        mixed = any(h.own_dims & h.data_dims for h in self._hooked)
        if not self._learned or self._finder.asks_for_data or self._finder.always_asks_for_data or mixed:
            self._taint = DataTaint()
            self._taint.mark(tensors_in((args, kwargs)))
            self._taint.__enter__()

    def _on_model_end(self, *_: Any) -> None:
        """Also when the forward pass failed: a mode that follows the data must not outlive it."""
        self._end_taint()

    def _end_taint(self) -> DataTaint | None:
        taint, self._taint = self._taint, None
        if taint is not None:
            taint.__exit__(None, None, None)
        return taint

    def _on_container_call(
        self, hooked: HookedModule, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        """A module without a rule may be a gate for what is used inside."""
        if not self._passes or differentiating() or inside_function_transform():
            return
        if not torch.is_grad_enabled():
            self._passes[-1].without_grad[hooked] += bool(hooked.params)
            return
        if inside_backward():
            self._on_repeated_container_call(hooked, output)
            return
        current = self._passes[-1]
        current.packed = current.packed or saved_tensors_are_packed()
        if hooked.params:
            self._learn_what_is_in_use(hooked)
        if self._taint is None and hooked not in self._finder.gated:
            return
        edges = [torch.autograd.graph.get_gradient_edge(t) for t in tensors_in(output) if t.requires_grad]
        inputs = {t.grad_fn for t in tensors_in((args, kwargs)) if t.grad_fn is not None}
        self._containers.append(ContainerCall(hooked, edges, inputs))

    def _on_repeated_container_call(self, hooked: HookedModule, output: Any) -> None:
        """Reentrant checkpointing makes the graph of a module only now."""
        current = next((p for p in reversed(self._passes) if p.recomputed[hooked]), None)
        if current is not None:
            current.recomputed[hooked] -= 1
            self._watch_uses(current, [t for t in tensors_in(output) if t.requires_grad], None, [], count=False)

    def _on_call(
        self, hooked: HookedModule, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Any:
        """After the forward of a module with a rule. What is returned takes the output's place."""
        last = self._passes[-1] if self._passes else None
        if last is not None and not last.kept and not last.implicit:
            return None  # also the cheapest way out when enough samples are measured
        x = args[0] if args and isinstance(args[0], Tensor) else next(tensors_in((args, kwargs)), None)
        if x is None or x.dim() == 0 or differentiating() or inside_function_transform():
            return None
        self._learn_what_is_in_use(hooked)
        if not torch.is_grad_enabled():
            if last is not None:
                last.without_grad[hooked] += 1
            return None
        if inside_backward():
            return self._on_repeated_call(hooked, x, (args, kwargs), output)
        current = self._current(x.shape[0])
        if current is None or not current.kept:
            return None
        current.packed = current.packed or saved_tensors_are_packed()
        replaced = capture(hooked, current, x, (args, kwargs), output, self._taint)
        if self._taint is not None and replaced is not None and self._taint.holds(x):
            self._taint.mark(tensors_in(replaced))
        if current.implicit:
            self._ever_captured.update(hooked.params.values())
        return replaced

    def _learn_what_is_in_use(self, hooked: HookedModule) -> None:
        """FSDP lets a module compute with a gathered tensor that is not the parameter which was recorded."""
        for name, param in hooked.params.items():
            used = hooked.in_use(name)
            if used is not param:
                self._in_use[used] = param

    def _on_repeated_call(
        self, hooked: HookedModule, x: Tensor, call: tuple[tuple[Any, ...], dict[str, Any]], output: Any
    ) -> Any:
        """Activation checkpointing runs the module again.

        Reentrant checkpointing ran it without gradients before, so this is the call to capture. The other kind captured
        it, and only wants the same tensors to be saved in the same order.
        """
        for current in reversed(self._passes):
            if current.recomputed[hooked]:
                current.recomputed[hooked] -= 1
                self._ever_captured.update(hooked.trainable().values())
                return capture(hooked, current, x, call, output, None, recomputed=True)
            if any(c.hooked is hooked for c in current.rule_calls):
                return repeat(hooked, current, x, call, output)
        return None

    # ---- the end of the forward pass -------------------------------------------------------------------------

    def _check_result(self, current: ForwardPass, outputs: list[Tensor]) -> None:
        taint = self._end_taint()
        containers, self._containers = self._containers, []
        if not current.kept:
            self._stop_check()
            return
        for hooked, times in current.without_grad.items():
            current.recomputed[hooked] += times
            for param in list(hooked.trainable().values()) * times:
                current.add_use(param)
        try:
            self._watch_uses(current, outputs, taint, containers)
        finally:
            for call in current.rule_calls:
                call.leave_graph()
        if taint is not None and current.batch_size > 1:
            self._learned, self._finder.asks_for_data = True, False
        self._choose_check(current)

    def _watch_uses(
        self,
        current: ForwardPass,
        outputs: list[Tensor],
        taint: DataTaint | None,
        containers: list[ContainerCall],
        *,
        count: bool = True,
    ) -> None:
        found, gates = self._finder.find(current, outputs, taint, containers)
        uses = [m.use for m in found] + [use for gate in gates for use in gate.uses for _ in gate.edges]
        for param in (p for use in uses for p in use.leaves.values()):
            if count:
                current.add_use(param)
            self._ever_captured.add(param)
        for measured in found:
            watch(current, measured, self._deliver)
        for gate in gates:
            current.gates.append(gate)
            gate.watch(current, self._deliver)
        for call in current.rule_calls:
            if not call.cancelled:
                self._ever_captured.update(call.wanted.values())
        ways = {use.key for use in uses} | {(c.hooked, c.taken_over, c.key[0]) for c in current.rule_calls}
        if not ways <= self._known_ways:
            self._known_ways |= ways
            self._new_ways = True

    # ---- the sum check ---------------------------------------------------------------------------------------

    def _choose_check(self, current: ForwardPass) -> None:
        """Check this batch, if it is due and can be."""
        whole = current.kept == current.batch_size and not current.implicit
        if not whole or not self._check_every:
            self._stop_check()
            return
        due = self._batches < 3 or self._new_ways or self._batches % self._check_every == 0
        if self._check is None and due and not any(p.backward_seen or p.rule_calls for p in self._passes[:-1]):
            self._check = SumCheck({p: self._name_of(p) for p in self._layer_of}, self._leaves())
        current.check = self._check

    def _leaves(self) -> dict[nn.Parameter, Tensor]:
        """The tensor that is computed with in each parameter's place."""
        used = {p: leaf for leaf, p in self._in_use.items()}
        leaves = {p: used.get(p, p) for p in self._layer_of}
        return {p: leaf for p, leaf in leaves.items() if leaf.requires_grad and leaf.is_leaf}

    def _stop_check(self) -> None:
        if self._check is not None:
            self._check.stop()
            self._check = None
            for current in self._passes:
                current.check = None

    def _close(self) -> None:
        try:
            super()._close()
        except BaseException:
            self._stop_check()
            raise
        check = self._check
        if check is not None and check.delivered and all(p.closed for p in self._passes):
            self._stop_check()
            self._batches, self._new_ways = self._batches + 1, False
            check.raise_if_wrong()

    def reset(self) -> None:
        """Forget the batch accumulated so far."""
        self._stop_check()
        super().reset()

    def remove(self) -> None:
        """Take every hook off the model. Values read so far stay readable."""
        self._end_taint()
        super().remove()
        remove_all(self._module_handles)
        self._stop_check()
        for current in self._passes:
            current.free_graph()
        self._free_dropped()

    # ---- uses ------------------------------------------------------------------------------------------------

    def _deliver(self, current: ForwardPass, param: nn.Parameter, grads: Tensor, dtype: torch.dtype) -> None:
        if current.check is not None:
            current.check.add_grads(param, grads, dtype)
        current.add_grads(param, self._layer_of[param], grads)

    def _param_of(self, leaf: Tensor) -> nn.Parameter | None:
        """See `GraphWalk`."""
        param = self._in_use.get(leaf, leaf)
        if param in self._layer_of:
            return param  # type: ignore[return-value]
        if param in self._own_params or isinstance(param, nn.Parameter):
            return None
        raise KeyError(leaf)

    def _name_of(self, param: nn.Parameter) -> str:
        for layer in self.layers:
            for p, name in zip(layer.params, layer.param_names, strict=True):
                if p is param:
                    return name
        return "a parameter"

    def check_all_captured(self) -> None:
        """Raise if a parameter has a gradient, but no use of it was ever seen.

        Raises:
            UncoveredParameterError: Naming the parameters.
        """
        if not self._ever_captured and any(p.batch_size == 0 for p in self._passes):
            return  # a process without samples so far: nothing of its passes is looked at
        if len(self._ever_captured) == len(self._layer_of):
            return
        names = {p: n for layer in self.layers for p, n in zip(layer.params, layer.param_names, strict=True)}
        unseen = (p for p in names if p.grad is not None and p not in self._ever_captured)
        missed = [names[p] for p in unseen if _state_of_grad(p) != self._old_grads[p]]
        if missed:
            raise UncoveredParameterError(
                f"{', '.join(missed)}: has a gradient, but no use of it was seen since the norm hooks were attached. "
                "Attach them before the first (compiled) call of the model, call the model as a whole, and use the "
                "parameter inside its forward, so that what the model returns depends on it."
            )

    # ---- results ---------------------------------------------------------------------------------------------

    @property
    def per_sample(self) -> dict[str, Tensor]:
        """{layer name: Tensor [samples measured]}, samples in the order of the passes; empty before `backward()`."""
        if not self._keep:
            raise RuntimeError("per_sample was not kept: create PerSampleGradNorms with keep_per_sample=True.")
        self._close()
        self.check_all_captured()
        if not any(p.backward_seen for p in self._passes):
            return {}
        # An empty batch leaves no norms, but a value of length 0 for each layer.
        parts = [norms * self._unit(p) for p, norms in self._kept] or [torch.empty(len(self.layers), 0)]
        return dict(zip((layer.name for layer in self.layers), torch.cat(parts, dim=1), strict=True))

    @property
    def mean_norm(self) -> dict[str, Tensor]:
        """{layer name: scalar}, the mean of `per_sample` (n_k of Eq. 5); empty before `backward()`."""
        return {name: norms.mean() for name, norms in self.per_sample.items()}

    def _unit(self, current: ForwardPass) -> int:
        """A mean loss divides each sample's gradient by the batch size; multiply it back."""
        return current.batch_size if self.loss_reduction == "mean" else 1

    def __enter__(self) -> PerSampleGradNorms:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self._stop_check()  # what went wrong first is what matters
        self.remove()


def _state_of_grad(param: nn.Parameter) -> tuple[int, int] | None:
    """Changes whenever the gradient does: what was there before the hooks is none of their business."""
    return None if param.grad is None else (id(param.grad), version(param.grad))
