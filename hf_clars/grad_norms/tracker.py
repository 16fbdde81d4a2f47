"""`PerSampleGradNorms`: every sample's gradient norm in every layer, out of an ordinary backward pass."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, Literal

import torch
from torch import Tensor, nn

from hf_clars.grad_norms.errors import IN_A_FORWARD, UncoveredParameterError
from hf_clars.grad_norms.explanation import CallTimes, Explanation, ParameterWay
from hf_clars.grad_norms.forward_pass import ForwardPass, refuse_in_the_loss
from hf_clars.grad_norms.hooked_norms import HookedNorms
from hf_clars.grad_norms.hooks import PlacedHooks
from hf_clars.grad_norms.sum_check import SumCheck
from hf_clars.grad_norms.token_weights import label_counts
from hf_clars.grad_norms.torch_internals import version
from hf_clars.grad_norms.torch_traces import uncompiled
from hf_clars.layers import LayerMode, ParamLayer, as_layers

CHECK_EVERY = 1000
"""In how many batches one is checked, after the first three."""


class PerSampleGradNorms(HookedNorms):
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
            `"mean_tokens"`: the loss is a mean over tokens, and norms are those of each sequence's own mean; tokens are
            the labels that are not -100, or what `set_weights` was given.
        keep_per_sample: Keep the [B] tensors. False keeps sums only, in constant memory.
        on_error: Called with an error of the measuring in a forward pass, in place of whoever called the model; then it
            is paused. An error in a backward pass is kept, and raised where results are read. None (default): both are
            raised where they happen.
        check: How often it is checked that the samples' gradients add up to the batch gradient: in the first three
            passes, whenever a parameter is used in a new way, and in every `check`-th pass after that (default 1,000).
            True: in every pass; False: never. Only passes of which every sample is measured can be checked.

    Attributes:
        check_every: What `check` says, as a number of passes; 0: never.

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
        loss_reduction: Literal["mean", "sum", "mean_tokens"] = "mean",
        keep_per_sample: bool = True,
        check: bool | int = CHECK_EVERY,
        on_error: Callable[[Exception], None] | None = None,
    ) -> None:
        if loss_reduction not in ("mean", "sum", "mean_tokens"):
            raise ValueError(
                f"loss_reduction={loss_reduction!r}: use 'mean', 'sum' or 'mean_tokens', as the loss does."
            )
        model = uncompiled(model)
        partition = as_layers(model, layers)
        self._on_error = on_error
        self.take_error = None if on_error is None else self._give_up
        self.loss_reduction = loss_reduction
        super().__init__(model, partition, samples=samples, keep_per_sample=keep_per_sample)
        self.check_every = 1 if check is True else int(check)
        self._check: SumCheck | None = None
        self._checked = self._passes_since = 0
        self._plan_compiled_check()
        self._old_grads = {p: _state_of_grad(p) for p in self._layer_of}

    def cover(self, layers: Sequence[ParamLayer]) -> None:
        """Measure other layers from now on; also as a pass begins.

        Args:
            layers: The partition; between two batches.
        """
        super().cover(layers)
        self._old_grads = {p: _state_of_grad(p) for p in self._layer_of}

    def rebind(self, swapped: Mapping[nn.Parameter, nn.Parameter]) -> None:
        """Know parameters by those that an engine has put in their place, and let go of the old ones.

        Args:
            swapped: {old: new}; between two batches.
        """
        super().rebind(swapped)
        self._old_grads = {p: _state_of_grad(p) for p in self._layer_of}

    def _begin(
        self, forward_pass: ForwardPass, given: Sequence[Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        if self.loss_reduction == "mean_tokens":
            forward_pass.weights = label_counts(self.model, kwargs)
        self._finder.checks_rows = bool(self.check_every)
        super()._begin(forward_pass, given, args, kwargs)

    def _check_result(self, forward_pass: ForwardPass, outputs: list[Tensor]) -> None:
        super()._check_result(forward_pass, outputs)
        bare, self._finder.bare = self._finder.bare, ()
        for result, params in bare if self.check_every else ():
            refuse_in_the_loss(forward_pass, result, [self._name_of(p) for p in params])
        self._choose_check(forward_pass)

    def _open(self, batch_size: int, *, implicit: bool = False) -> ForwardPass:
        opened = super()._open(batch_size, implicit=implicit)
        if implicit:
            self._choose_check(opened)
        return opened

    # ---- the sum check ---------------------------------------------------------------------------------------

    def _choose_check(self, forward_pass: ForwardPass) -> None:
        """Check this batch, if it is due and can be."""
        # Compiled code hands over the sums of all samples, also where only some are measured.
        summed = forward_pass.begun_compiled or forward_pass.measured == forward_pass.batch_size
        if not summed or not self.check_every or forward_pass.unchecked:
            self._passes_since += forward_pass.unchecked
            self._stop_check()
            return
        self._passes_since += 1
        due = forward_pass.implicit or self._check_is_due()
        if self._check is None and due and not any(p.backward_seen or p.uses.rule_calls for p in self._passes[:-1]):
            self._passes_since = 0
            names = {p: self._name_of(p) for p in self._layer_of}
            self._check = SumCheck(names, self._leaves(), keeps_errors=forward_pass.keeps_errors)
        forward_pass.sums.check = self._check

    def _check_is_due(self) -> bool:
        return self._checked < 3 or self._ways.new or self._passes_since >= self.check_every

    def _plan_compiled_check(self) -> None:
        """Compiled code is another one where sums are checked: say it before the next batch begins."""
        self._compiled.calls.checked = bool(self.check_every) and self._check_is_due()

    def _add_compiled_sum(self, param: nn.Parameter, total: Tensor, size: Tensor, dtype: torch.dtype) -> None:
        if self._check is not None and self._check.wants(param):
            self._check.add(param, total, size, dtype)

    def _leaves(self) -> dict[nn.Parameter, Tensor]:
        """The tensor that is computed with in each parameter's place."""
        return {p: leaf for p, leaf in self._in_use.leaves().items() if leaf.requires_grad and leaf.is_leaf}

    def _stop_check(self) -> None:
        if self._check is not None:
            self._check.stop()
            self._check = None
            for forward_pass in self._passes:
                forward_pass.sums.check = None

    def _close(self) -> None:
        try:
            super()._close()
        except BaseException:
            self._stop_check()
            raise
        check = self._check
        if check is not None and check.delivered and all(p.closed for p in self._passes):
            self._stop_check()
            self._checked, self._ways.new = self._checked + 1, False
            self._plan_compiled_check()
            check.raise_if_wrong()

    def reset(self) -> None:
        """Forget the batch accumulated so far."""
        self._stop_check()
        super().reset()
        self._plan_compiled_check()

    def pause(self, *, lift: bool = False) -> None:
        """Forget the batch, and do nothing until `resume()`: what was learned about the model is kept.

        Args:
            lift: Take the hooks off the model until then. Default False: a model that is compiled meanwhile, or was
                before, must know them.
        """
        self.paused = self._watch.paused = True
        self._left.clear()
        self.repeats = False
        self._following.end()
        self.reset()
        self._free_dropped()
        if lift:
            for hooks in self._all_hooks():
                hooks.lift()

    def resume(self) -> None:
        """Measure from the next forward pass on."""
        for hooks in self._all_hooks():
            hooks.place()
        self.paused = self._watch.paused = False
        self._left.clear()
        self.repeats = False
        self._old_grads = {p: _state_of_grad(p) for p in self._layer_of}

    def _all_hooks(self) -> tuple[PlacedHooks, ...]:
        return self._hooks, self._module_hooks, self._watch.hooks

    def _give_up(self, error: Exception) -> None:
        """An error in a forward pass: the pass goes on without the norms, and so does all that follows.

        What activation checkpointing will run again must save the same tensors as in the first place.
        """
        left = [p for p in (*self._left, *self._passes) if p.uses.rule_calls]
        for forward_pass in self._passes:
            forward_pass.error = forward_pass.error or error
        self.pause()
        self._left, self.repeats = left, bool(left)
        if self._on_error is not None:
            self._on_error(error)

    def remove(self) -> None:
        """Take every hook off the model. Values read so far stay readable."""
        super().remove()
        self._stop_check()

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
            self._stop_check()  # it would say the same, in words that say less
            raise UncoveredParameterError(
                f"{', '.join(missed)}: has a gradient, but no use of it was seen since the norm hooks were attached. "
                "Attach them before the first (compiled) call of the model, and call it with a tensor. "
                f"{IN_A_FORWARD}. The same goes for a loss that takes the parameter, as a temperature."
            )

    # ---- results ---------------------------------------------------------------------------------------------

    @property
    def per_sample(self) -> dict[str, Tensor]:
        """{layer name: Tensor [samples measured]}, samples in the order of the passes; empty before `backward()`."""
        if not self._keep:
            raise RuntimeError("per_sample was not kept: create PerSampleGradNorms with keep_per_sample=True.")
        self.check_all_captured()
        self._close()
        if not any(p.backward_seen for p in self._passes):
            return {}
        # An empty batch leaves no norms, but a value of length 0 for each layer.
        parts = [norms * self._unit(p) for p, norms in self._kept] or [torch.empty(len(self.layers), 0)]
        return dict(zip((layer.name for layer in self.layers), torch.cat(parts, dim=1), strict=True))

    @property
    def mean_norm(self) -> dict[str, Tensor]:
        """{layer name: scalar}, the mean of `per_sample` (n_k of Eq. 5); empty before `backward()`."""
        return {name: norms.mean() for name, norms in self.per_sample.items()}

    def set_weights(self, weights: Tensor) -> None:
        """Say how many tokens of each sequence the last forward pass's loss is a mean over, for `"mean_tokens"`.

        Args:
            weights: [B], after the forward pass, and before the results are read.

        Raises:
            ValueError: If there is no such pass, or it has another number of samples.
        """
        if not self._passes or len(weights) != self._passes[-1].batch_size:
            raise ValueError(f"{len(weights)} weights were given: call this after a forward pass on as many samples.")
        self._passes[-1].weights = weights

    def _unit(self, forward_pass: ForwardPass) -> Tensor | int:
        """A mean loss divides each sample's gradient by the batch size, or the tokens; multiply it back."""
        if self.loss_reduction != "mean_tokens":
            return forward_pass.batch_size if self.loss_reduction == "mean" else 1
        if forward_pass.weights is None:
            raise ValueError(
                "loss_reduction='mean_tokens' needs to know how many tokens of each sequence are counted: call the "
                "model with labels=, or norms.set_weights(counts) after the forward pass."
            )
        weights = forward_pass.weights.to(torch.float32)
        return torch.where(weights > 0, weights.sum() / weights.clamp(min=1), 0.0)[: forward_pass.measured]

    def explain(self) -> Explanation:
        """How each parameter is measured, as far as forward passes have shown it by now.

        With its share of the norms' time, if passes were timed: see `time_passes`.
        """
        shares = {} if self._times is None else self._times.shares()
        return Explanation(
            [
                ParameterWay(layer.name, name, self._ways.of(param), shares.get(param, 0.0) if shares else None)
                for layer in self.layers
                for param, name in zip(layer.params, layer.param_names, strict=True)
            ]
        )

    def time_passes(self, on: bool = True) -> None:
        """Time the norms of every call from the next forward pass on, for `explain`; what compiled code does is not.

        Args:
            on: False: stop, and forget the times.
        """
        self._times = CallTimes() if on else None

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
