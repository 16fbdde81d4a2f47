"""`PerSampleGradNorms`: every sample's gradient norm in every layer, out of an ordinary backward pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from hf_clars.grad_norms.accumulator import NormAccumulator, remove_all
from hf_clars.grad_norms.adoption import NO_INPUT
from hf_clars.grad_norms.coverage import check_coverage
from hf_clars.grad_norms.errors import WITHOUT_SAMPLES, MixedDevicesError, SecondBackwardError, UncoveredParameterError
from hf_clars.grad_norms.hooked_modules import HookedModule, find_hooked_modules
from hf_clars.grad_norms.hooks import BoundHook
from hf_clars.grad_norms.own_inputs import OwnInputs
from hf_clars.grad_norms.passes import ForwardPass
from hf_clars.grad_norms.torch_internals import inside_backward, inside_function_transform, version
from hf_clars.grad_norms.trees import tensors_in
from hf_clars.grad_norms.with_rule import CallsWithRule
from hf_clars.grad_norms.without_rule.calls import CallsWithoutRule
from hf_clars.layers import LayerMode, ParamLayer, param_layers


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

    Raises:
        ValueError: For an unknown `layers` or `loss_reduction`, or `samples` below 1.
        UncoveredParameterError: In the first forward pass (or when a module without a rule gets its gradient), naming a
            trainable parameter whose use no hook sees.
        BatchAxisError: When a module's tensors do not have the batch axis first.
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
    ) -> None:
        if loss_reduction not in ("mean", "sum"):
            raise ValueError(f"loss_reduction={loss_reduction!r}: use 'mean' or 'sum', as the loss does.")
        partition = param_layers(model, layers=layers) if isinstance(layers, str) else layers
        super().__init__(model, partition, samples=samples, keep_per_sample=keep_per_sample)
        self.loss_reduction = loss_reduction
        self._unchecked = set(self._layer_of)
        self._old_grads = {p: _state_of_grad(p) for p in self._layer_of}
        self._own_inputs = OwnInputs(model)
        self._without_rule = CallsWithoutRule(self._layer_of, self._own_inputs, self._captured, self._arrived)
        self._with_rule = CallsWithRule(self._own_inputs, self._captured, self._arrived)
        self._ever_captured: set[nn.Parameter] = set()
        self._in_use: dict[nn.Parameter, nn.Parameter] = {}
        self._module_handles: list[RemovableHandle] = []
        self._hook_modules()
        self._watch_results()

    def _hook_modules(self) -> None:
        self._hooked = find_hooked_modules(self.model, self._layer_of)
        for hooked in self._hooked:
            # Before the user's own hooks: they shall see the output that goes on.
            handle = hooked.module.register_forward_hook(
                BoundHook(self._on_call if hooked.params else self._on_container_call, hooked),
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
        self._unchecked = set(self._layer_of)
        self._ever_captured.clear()
        self._old_grads = {p: _state_of_grad(p) for p in self._layer_of}
        self._in_use.clear()

    def remove(self) -> None:
        """Take every hook off the model. Values read so far stay readable."""
        super().remove()
        remove_all(self._module_handles)

    def follow(self, swapped: Mapping[nn.Parameter, nn.Parameter]) -> None:
        """Know parameters by those that an engine has put in their place, and let go of the old ones.

        Args:
            swapped: {old: new}; between two batches.
        """
        super().cover([layer.with_params(swapped) for layer in self.layers])
        for hooked in self._hooked:
            hooked.follow(swapped)
        self._unchecked = {swapped.get(p, p) for p in self._unchecked}
        self._ever_captured = {swapped.get(p, p) for p in self._ever_captured}
        self._old_grads = {p: _state_of_grad(p) for p in self._layer_of}
        self._in_use = {used: swapped.get(p, p) for used, p in self._in_use.items()}

    # ---- forward ---------------------------------------------------------------------------------------------

    @property
    def active(self) -> bool:
        """As the accumulator's; False also while a module is run or differentiated once more by the fallback."""
        return not self._without_rule.busy and super().active

    def _on_container_call(
        self, hooked: HookedModule, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Any:
        """A module without parameters of its own matters only for what is used inside without the batch first."""
        if inside_function_transform():
            return None
        if self._unchecked:
            self._learn_what_is_in_use(hooked)
        if self._passes and (self._passes[-1].orphans or self._unchecked or hooked.strays):
            return self._on_call(hooked, module, args, kwargs, output)
        return None

    def _on_call(
        self, hooked: HookedModule, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Any:
        """After a module's forward. What is returned takes the output's place."""
        if inside_function_transform():
            return None
        last = self._passes[-1] if self._passes else None
        if self._without_rule.replaying or (last is not None and not last.kept and not last.implicit):
            return None  # also the cheapest way out when enough samples are measured
        x = args[0] if args and isinstance(args[0], Tensor) else next(tensors_in((args, kwargs)), None)
        if x is None or x.dim() == 0:
            x = NO_INPUT
        if self._unchecked:
            self._learn_what_is_in_use(hooked)
        if not torch.is_grad_enabled():
            if last is not None:
                last.without_grad[hooked] += 1
            return None
        if inside_backward():
            return self._on_repeated_call(hooked, x, (args, kwargs), output)
        current = self._current(None if x is NO_INPUT else x.shape[0])
        if current is None:
            return None
        return self._capture(hooked, current, x, (args, kwargs), output) if current.kept else None

    def _learn_what_is_in_use(self, hooked: HookedModule) -> None:
        """FSDP lets a module compute with a gathered tensor that is not the parameter which was recorded."""
        for name, param in {**hooked.params, **hooked.inner}.items():
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
            if current.without_grad[hooked]:
                current.without_grad[hooked] -= 1
                return self._capture(hooked, current, x, call, output)
            if hooked in current.captured and hooked.rule is not None:
                return self._with_rule.repeat(hooked, current, x, output)
        return None

    def _capture(
        self,
        hooked: HookedModule,
        current: ForwardPass,
        x: Tensor,
        call: tuple[tuple[Any, ...], dict[str, Any]],
        output: Any,
    ) -> Any:
        """Arrange for the norms of one call."""
        if hooked.rule is None:
            return self._without_rule.capture(hooked, current, x, call, output, prove=bool(self._unchecked))
        return self._with_rule.capture(hooked, current, x, output)

    def _captured(self, hooked: HookedModule, current: ForwardPass, wanted: dict[str, nn.Parameter], x: Tensor) -> int:
        """Take note of a call that will be measured; returns its number in the pass."""
        if current.device is None and x is not NO_INPUT:
            current.device = x.device
        elif x is not NO_INPUT and current.device != x.device:
            raise MixedDevicesError(
                f"{hooked} runs on {x.device}, but layers before it on {current.device}: the norms of a model that is "
                f"split over devices are not supported. Move it to one device (no device_map), or freeze the part on "
                f"the other."
            )
        current.captured.add(hooked)
        for param in wanted.values():
            current.add_use(param)
        for name in hooked.tied & wanted.keys() if hooked.tied else ():
            current.tied_uses.setdefault(wanted[name], []).append(hooked)
        if hooked.rule is None or not hooked.ever_captured:
            hooked.ever_captured = True
            self._ever_captured.update(wanted.values())
        return current.next_call()

    # ---- backward --------------------------------------------------------------------------------------------

    def _arrived(self, hooked: HookedModule, current: ForwardPass, call: int) -> bool:
        """Note that a call's gradient has come; False while the fallback differentiates for itself."""
        if self._without_rule.busy:
            return False
        self._mark(current)
        if call in current.fired:
            raise SecondBackwardError(
                f"A second backward pass reached {hooked} through the same forward pass: a second backward(), or "
                "torch.autograd.grad before it. A sample's gradient norm is that of all its losses together: add the "
                f"losses and call backward() once. Where a loss needs a gradient of its own (a gradient penalty with "
                f"create_graph=True), its norms cannot be told by sample: {WITHOUT_SAMPLES}, or LARS."
            )
        current.fired.add(call)
        return True

    # ---- coverage --------------------------------------------------------------------------------------------

    def _check_result(self, current: ForwardPass, outputs: list[Tensor]) -> None:
        current.check_adopted()
        if current.open_calls:
            self._without_rule.check_batch_axis(current, outputs)
        if not self._unchecked or not current.kept:
            return
        names = {
            param: hooked.full_name(name)
            for hooked in self._hooked
            for name, param in hooked.params.items()
            if param in self._unchecked
        }
        check_coverage(outputs, current.captured_uses(), names, self._in_use, current.uses_by_fallback)
        current.uses_by_fallback.clear()
        self._unchecked.clear()

    def check_all_captured(self) -> None:
        """Raise if a parameter has a gradient that no hook has ever seen.

        Raises:
            UncoveredParameterError: Naming the parameters.
        """
        if not self._ever_captured and any(p.batch_size == 0 for p in self._passes):
            return  # a process without samples so far: nothing of its passes is looked at
        names = {p: n for layer in self.layers for p, n in zip(layer.params, layer.param_names, strict=True)}
        unseen = (p for p in names if p.grad is not None and p not in self._ever_captured)
        missed = [names[p] for p in unseen if _state_of_grad(p) != self._old_grads[p]]
        if missed:
            raise UncoveredParameterError(
                f"{', '.join(missed)}: has a gradient, but its module was never called with gradients enabled since "
                "the norm hooks were attached. Attach them before the first (compiled) call of the model, and call the "
                "modules that own the weights."
            )

    # ---- results ---------------------------------------------------------------------------------------------

    @property
    def per_sample(self) -> dict[str, Tensor]:
        """{layer name: Tensor [samples measured]}, samples in the order of the passes; empty before `backward()`."""
        if not self._keep:
            raise RuntimeError("per_sample was not kept: create PerSampleGradNorms with keep_per_sample=True.")
        self._close()
        if not any(p.backward_seen for p in self._passes):
            self.check_all_captured()
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
        self.remove()


def _state_of_grad(param: nn.Parameter) -> tuple[int, int] | None:
    """Changes whenever the gradient does: what was there before the hooks is none of their business."""
    return None if param.grad is None else (id(param.grad), version(param.grad))
