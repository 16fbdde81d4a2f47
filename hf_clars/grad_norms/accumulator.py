"""What every estimator of gradient norms shares: which forward passes belong to the batch being accumulated."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hf_clars.distributed import keeps_gradients_elsewhere
from hf_clars.grad_norms.errors import BatchAxisError, MixedDevicesError
from hf_clars.grad_norms.forward_pass import ForwardPass, NormTotals
from hf_clars.grad_norms.gradient_watch import GradientWatch
from hf_clars.grad_norms.hooks import ModelReturns, PassBegins, PlacedHooks
from hf_clars.grad_norms.model_parts import LeavesInUse
from hf_clars.grad_norms.pytree import of_the_batch, tensors_within
from hf_clars.grad_norms.torch_internals import NO_BACKWARD, backward_number, inside_backward, inside_function_transform
from hf_clars.grad_norms.undisturbed import differentiating, note_caller
from hf_clars.layers import ParamLayer


class NormAccumulator:
    """Follows a model's forward and backward passes and adds up norms over an accumulated batch.

    A batch is everything that has been added to `p.grad` since it was last cleared. In a single process the
    accumulator sees that (every `p.grad` is None) and starts afresh by itself; `reset()` does it by hand.

    Args:
        model: The module whose forward is one (micro-)batch; never changed.
        layers: The partition to measure.
        samples: Measure the first `samples` of each accumulated batch; None for all.
        keep_per_sample: Keep every sample's norms, not only their sums.

    Attributes:
        paused: While True, hooks do nothing: no pass begins, and nothing is kept.
        repeats: Whether hooks work although it is paused, in what activation checkpointing runs again.
        meets_compiler: Whether compiled code was seen: it must know the hooks from the start.
        take_error: Gets an error of a hook in a forward pass, in place of the model's caller; None: nobody does.
        batches: How many batches it has let go of.
        engine_dropped_a_batch: For engines that hold the gradients: whether one was dropped since this was last called.
    """

    take_error: Callable[[Exception], None] | None = None
    repeats = False
    meets_compiler = False
    batches = 0

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[ParamLayer],
        *,
        samples: int | None,
        keep_per_sample: bool = False,
    ) -> None:
        if samples is not None and samples < 1:
            raise ValueError(f"samples={samples}: give a positive number of samples, or None for every sample.")
        self.model = model
        self.layers = list(layers)
        self.samples = samples
        self.paused = False
        self._layer_of = {p: k for k, layer in enumerate(self.layers) for p in layer.params}
        self._in_use = LeavesInUse(self._layer_of, model)
        self._keep = keep_per_sample
        self.engine_dropped_a_batch: Callable[[], bool] = lambda: False
        self._passes: list[ForwardPass] = []
        self._dropped: list[ForwardPass] = []
        self._left: list[ForwardPass] = []  # passes that were under way when an error ended the measuring
        self._kept: list[tuple[ForwardPass, Tensor]] = []
        self._norms: Tensor | None = None
        self._squares: Tensor | None = None
        self._watch = GradientWatch(list(self._layer_of))
        self._last_backward = NO_BACKWARD
        self._call_hook, self._result_hook = PassBegins(self._on_model_call), ModelReturns(self._on_model_result)
        self._hooks = PlacedHooks()
        self._hooks.add(model.register_forward_pre_hook, self._call_hook, with_kwargs=True)

    def _watch_results(self) -> None:
        """Hook the model's result; after the subclass has placed its own hooks, so that they come first."""
        self._hooks.add(self.model.register_forward_hook, self._result_hook)

    # ---- which pass is open ----------------------------------------------------------------------------------

    @property
    def active(self) -> bool:
        """False where a call of the model begins no pass: without gradients, under torch.func, in recomputation."""
        return torch.is_grad_enabled() and not inside_backward() and not inside_function_transform()

    def _on_model_call(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self.active:
            if self.repeats and torch.is_grad_enabled() and not inside_backward():
                # What runs again from now on belongs to this call, if the others have had their backward pass.
                self._left = [p for p in self._left if not p.backward_seen]
                self.repeats = bool(self._left)
            return
        given = tensors_within((args, kwargs))
        if any(t.is_nested for t in given):
            raise BatchAxisError(
                "The model is called with a nested tensor, in which no axis is the batch's: pad it before "
                "(torch.nested.to_padded_tensor)."
            )
        batched = of_the_batch(given)
        if batched is not None:
            if module is not self.model and next(module.parameters(), None) is None:
                raise MixedDevicesError(
                    "nn.DataParallel calls copies of the model, whose parts of the batch are not measured as one: use "
                    "DistributedDataParallel, or let the process see a single device (CUDA_VISIBLE_DEVICES=0)."
                )
            forward_pass = self._open(batched.shape[0])
            forward_pass.given.note(given)
            self._begin(forward_pass, given, args, kwargs)

    def _begin(
        self, forward_pass: ForwardPass, given: Sequence[Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """Subclasses may prepare a pass here; `given` are the tensors that the model is called with."""

    def _on_model_result(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if not self.active or not self._passes:
            return
        forward_pass = self._passes[-1]
        if forward_pass.implicit:
            return  # the model was called without a tensor, and its modules opened the pass, as where it runs in parts
        outputs = [t for t in tensors_within(output) if t.requires_grad]
        mark = forward_pass.guarded(
            lambda _, p=forward_pass: self._mark(p) if not differentiating() and p.asked() else None
        )
        forward_pass.graph = weakref.ref(mark)
        self._check_result(forward_pass, outputs)
        forward_pass.returned = True
        for tensor in outputs:
            tensor.register_hook(mark)

    def _check_result(self, forward_pass: ForwardPass, outputs: list[Tensor]) -> None:
        """Subclasses may verify a pass here."""

    def _mark(self, forward_pass: ForwardPass) -> None:
        """A gradient has reached this pass: it counts, also if gradients were cleared between forward and backward."""
        if not forward_pass.backward_seen:
            number = backward_number()
            if number != self._last_backward:
                self._drop_if_cleared()
            self._last_backward = number
            forward_pass.backward_seen = True
            if forward_pass not in self._passes:
                self._passes.append(forward_pass)

    def _open(self, batch_size: int, *, implicit: bool = False) -> ForwardPass:
        note_caller()
        self._free_dropped()
        self._close()
        self._drop_if_cleared()
        measured = batch_size
        if self.samples is not None:
            held = sum(p.measured for p in self._passes if may_count(p))
            measured = max(0, min(batch_size, self.samples - held))
        keeps_errors = self.take_error is not None
        given = (batch_size, measured, self._layer_of, implicit, self._mark, self.model, keeps_errors)
        opened = ForwardPass(*given, is_split=self._in_use.are_split)
        self._passes.append(opened)
        return opened

    def _free_dropped(self) -> None:
        for forward_pass in self._dropped:
            forward_pass.free_graph()
        self._dropped.clear()

    def _current(self, batch_size: int | None) -> ForwardPass | None:
        """The pass that a submodule's call belongs to: the open one, or a new one for a model called in parts.

        Args:
            batch_size: Of the submodule's input; None if it takes no tensor, which cannot open a pass.
        """
        if self._passes:
            last = self._passes[-1]
            if not last.closed and not (last.implicit and last.backward_seen):
                return last
        return None if batch_size is None else self._open(batch_size, implicit=True)

    def _drop_if_cleared(self) -> None:
        """Forget a batch whose gradients are gone, or zero (a skipped step, `zero_grad()` by hand, `p.grad.zero_()`).

        Sharded engines keep gradients elsewhere while they accumulate, so `p.grad is None` says nothing there, and the
        engine is asked.
        """
        if self.engine_dropped_a_batch():
            self.reset()
            return
        done = [p for p in self._passes if p.backward_seen]
        if not done:
            return
        gone = all(p.grad is None for p in self._layer_of) and not self._engine_holds_gradients()
        if gone or self._watch.cleared(param for p in done for param in p.uses.times):
            self.reset()

    def _engine_holds_gradients(self) -> bool:
        """Whether DeepSpeed or FSDP keeps this model's gradients."""
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return False
        # Inside a backward pass FSDP2 has put whole weights into the modules: the recorded ones tell then.
        return any(keeps_gradients_elsewhere(p) for p in (*self._layer_of, *self.model.parameters()))

    # ---- results ---------------------------------------------------------------------------------------------

    def _close(self) -> None:
        """Turn passes that have had their backward into norms."""
        for forward_pass in self._passes:
            if (forward_pass.closed and forward_pass.error is None) or not forward_pass.backward_seen:
                continue
            norms = forward_pass.norms(len(self.layers))
            if norms is None:
                continue
            if self._keep:
                self._kept.append((forward_pass, norms))
            sums, squares = norms.sum(1), norms.square().sum(1)
            self._norms = sums if self._norms is None else self._norms + sums
            self._squares = squares if self._squares is None else self._squares + squares

    def totals(self) -> NormTotals | None:
        """Sums over the batch accumulated so far, or None when no measured sample has reached any layer."""
        self._close()
        if self._norms is None or self._squares is None:
            return None
        done = [p for p in self._passes if p.backward_seen]
        return NormTotals(
            norms=self._norms,
            squares=self._squares,
            captured=sum(p.measured for p in done),
            total=sum(p.batch_size for p in done),
        )

    def reset(self) -> None:
        """Forget the batch accumulated so far."""
        self.batches += 1
        # Gradients may be cleared between forward and backward: such a pass is let go only when the next one begins.
        self._dropped += self._passes
        self._passes.clear()
        self._kept.clear()
        self._norms = self._squares = None
        self._watch.forget()

    def cover(self, layers: Sequence[ParamLayer]) -> None:
        """Measure other layers from now on.

        Args:
            layers: The partition; between two batches.
        """
        self.reset()
        self._free_dropped()
        self.layers = list(layers)
        self._layer_of.clear()
        self._layer_of.update((p, k) for k, layer in enumerate(self.layers) for p in layer.params)
        self._watch.hooks.remove()
        self._watch = GradientWatch(list(self._layer_of))

    @property
    def attached(self) -> bool:
        """Whether hooks are on the model."""
        return bool(self._hooks)

    def remove(self) -> None:
        """Take every hook off the model. Values read so far stay readable."""
        self._close()
        self._left.clear()
        self.repeats = False
        self._watch.hooks.remove()
        self._hooks.remove()


def may_count(forward_pass: ForwardPass) -> bool:
    """Whether a gradient has reached a pass, or may do so: a pass may fail, or its result be thrown away."""
    unknown = forward_pass.implicit or forward_pass.begun_compiled
    graph = forward_pass.graph
    return forward_pass.backward_seen or (unknown if graph is None else graph() is not None)
