"""A tracker's side of compiled code: the passes that it begins, and the norms that it hands over."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from hf_clars.distributed import on_device
from hf_clars.grad_norms.compiled.call import CompiledCall, used_outside, used_twice
from hf_clars.grad_norms.compiled.calls import CompiledCalls
from hf_clars.grad_norms.compiled.containers import CompiledBystander, CompiledContainer, CompiledModel
from hf_clars.grad_norms.compiled.operations import enlist
from hf_clars.grad_norms.errors import BatchAxisError, SecondBackwardError, UncoveredParameterError
from hf_clars.grad_norms.explanation import LearnedWays
from hf_clars.grad_norms.forward_pass import ForwardPass
from hf_clars.grad_norms.hooked_modules import HookedModule
from hf_clars.grad_norms.hooks import BoundHook
from hf_clars.grad_norms.model_parts import ModelParts
from hf_clars.grad_norms.torch_internals import gives_none
from hf_clars.grad_norms.undisturbed import differentiating


class Tracker(Protocol):
    """What compiled code needs of a tracker; `HookedNorms` and `PerSampleGradNorms` say what each is."""

    model: nn.Module
    meets_compiler: bool
    take_error: Callable[[Exception], None] | None
    _layer_of: dict[nn.Parameter, int]
    _ever_captured: set[nn.Parameter]
    _ways: LearnedWays
    _parts: ModelParts

    def _open(self, batch_size: int) -> ForwardPass: ...

    def _choose_check(self, forward_pass: ForwardPass) -> None: ...

    def _stop_check(self) -> None: ...

    def _add_compiled_sum(self, param: nn.Parameter, total: Tensor, size: Tensor, dtype: torch.dtype) -> None: ...


class CompiledPasses:
    """Receives what compiled code hands over, and adds it to the tracker's passes.

    Args:
        norms: The tracker.
        hooked: Its modules.

    Attributes:
        calls: What compiled code sees.
    """

    def __init__(self, norms: Tracker, hooked: list[HookedModule]) -> None:
        self._norms = weakref.proxy(norms)
        self._open: weakref.WeakValueDictionary[int, ForwardPass] = weakref.WeakValueDictionary()
        self._number = 0
        self._joined: ForwardPass | None = None
        self._arrived: set[int] = set()
        self.calls = CompiledCalls(norms.model, enlist(self), hooked)
        self.calls.by_tokens = getattr(norms, "loss_reduction", "") == "mean_tokens"
        layers = [norms._layer_of[p] for p in self.calls.params]
        self._layers, self._layer_index = sorted(set(layers)), tuple(layers)

    def rebind(self, swapped: Mapping[nn.Parameter, nn.Parameter]) -> None:
        """Know parameters by those that an engine has put in their place: {old: new}."""
        self.calls.params = [swapped.get(p, p) for p in self.calls.params]

    def hook_of(self, hooked: HookedModule) -> CompiledCall | CompiledContainer:
        """What stands for a module's hook in compiled code."""
        if hooked.path in self.calls.calls:
            return self.calls.calls[hooked.path]
        known = set(self.calls.params) - self.calls.bare_params()
        inside = ((n, p) for n, p in hooked.module.named_parameters() if p in self._norms._layer_of)
        missing = ", ".join(hooked.full_name(n) for n, p in inside if p not in known)
        return CompiledContainer(self.calls, hooked.path, missing)

    def bystander_hook(self) -> BoundHook:
        """For modules without measured parameters: outside compiled code it does nothing."""
        return BoundHook(self._nothing, traced=CompiledBystander(self.calls))

    def _nothing(self, *args: Any) -> None:
        pass

    def model_hook(self, *, begins: bool) -> CompiledModel:
        """What stands for the model's own hooks in compiled code."""
        return CompiledModel(self.calls, begins=begins)

    # ---- the model is called outside compiled code -----------------------------------------------------------

    def join(self, forward_pass: ForwardPass, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A pass has begun outside compiled code: prepare rows for compiled code inside, if there may be any."""
        self.calls.forget()
        if self.calls.params and self.calls.expects_code():
            self._joined = forward_pass
            try:
                self.calls.begin(args, kwargs)
            finally:
                self._joined = None

    def part(self, forward_pass: ForwardPass) -> list[CompiledCall]:
        """The forward pass has ended: the calls that compiled code has made in it."""
        ran = self.calls.ran()
        if self.calls.measures:
            self.calls.met_code(bool(ran))
        self.calls.end()
        forward_pass.unchecked = forward_pass.unchecked and bool(ran)
        return ran

    def refuse_other_uses(self, forward_pass: ForwardPass, ran: list[CompiledCall]) -> None:
        """Raise if a parameter that a compiled part of the model uses is used elsewhere too: nothing adds the two up.

        Raises:
            UncoveredParameterError: Naming the modules.
        """
        names = [c.name for c in ran if not forward_pass.uses.several.isdisjoint(c.hooked.params.values())]
        if names:
            raise UncoveredParameterError(used_twice(", ".join(names)))

    def note(self, calls: Sequence[CompiledCall], bare: Sequence[nn.Parameter] = ()) -> None:
        """Compiled code has made these calls in a pass, and measures bare uses of these parameters."""
        norms = self._norms
        norms.meets_compiler = norms.meets_compiler or bool(calls)
        for params, words in ((c.hooked.trainable().values(), c.in_words()) for c in calls):
            norms._ever_captured.update(params)
            norms._ways.note(words, params)
        if bare:
            norms._ever_captured.update(bare)
            norms._ways.note("copies for each sample, at its uses in the compiled graph", bare)

    # ---- what compiled code calls ----------------------------------------------------------------------------

    def compiled_pass_begins(self, batch: int, weights: Tensor | None, checked: bool) -> int:
        """See `operations.Receiver`."""
        with self._guarded():
            return self._begin_pass(batch, weights, checked)
        return 0

    @contextmanager
    def _guarded(self) -> Iterator[None]:
        """Let an error go to whom the tracker gives it, in place of ending what is compiled."""
        try:
            yield
        except Exception as error:
            if self._norms.take_error is None:
                raise
            self._norms.take_error(error)

    def _begin_pass(self, batch: int, weights: Tensor | None, checked: bool) -> int:
        self._number += 1
        forward_pass = self._joined or self._norms._open(batch)
        forward_pass.unchecked = not checked
        if self._joined is None:
            forward_pass.begun_compiled = True
            forward_pass.weights = weights
            self._norms._choose_check(forward_pass)
        self._open[self._number] = forward_pass
        return self._number

    def compiled_norms_arrive(self, number: int, squares: Tensor, uses: Tensor) -> None:
        """See `operations.Receiver`."""
        with self._guarded():
            self._take_norms(number, squares, uses)

    def _is_unasked(self) -> bool:
        """See `ForwardPass.asked`: this is inside an operation of our own, from where torch shows less of the graph."""
        return gives_none([*self.calls.params, self.calls.leaf])

    def _take_norms(self, number: int, squares: Tensor, uses: Tensor) -> None:
        forward_pass = self._open.get(number)
        if forward_pass is None or differentiating() or self._is_unasked():
            return
        try:
            forward_pass.gradient_comes("the compiled model", again=number in self._arrived)
        except SecondBackwardError:
            self._norms._stop_check()
            raise
        if failed := self._used_outside() or self._used_twice(forward_pass, uses):
            self._norms._stop_check()
            raise UncoveredParameterError(failed)
        self._arrived = {n for n in self._arrived if n in self._open} | {number}
        if forward_pass.begun_compiled:
            bare = [self.calls.params[row] for row in self.calls.beside]
            self.note(list(self.calls.calls.values()), bare)
        found = squares[:, : forward_pass.measured].clamp(min=0)  # linked uses may cancel, but for rounding
        of_layers = found.new_zeros(self._layers[-1] + 1, found.shape[1])
        of_layers.index_add_(0, on_device(self._layer_index, found.device), found)
        for layer in self._layers:
            forward_pass.sums.add_squares(layer, of_layers[layer])

    def _used_outside(self) -> str:
        """What is wrong with uses that traces have shown, and no row knows of; "" if there are none."""
        outside = self.calls.uses.outside
        if not outside:  # as in nearly every pass
            return ""
        bare = self.calls.bare_params()
        names = [words for p, words in outside.items() if p.requires_grad and p not in bare]
        return used_outside(", ".join(names)) if names else ""

    def _used_twice(self, forward_pass: ForwardPass, uses: Tensor) -> str:
        """What is wrong with rows that were used twice; "" if none was. A GPU is asked in checked passes only."""
        if uses.is_cuda and forward_pass.unchecked:
            return ""
        times = uses.tolist()
        if 0 in times:
            self._norms._parts.refuse_changes()
        names = [c.name for c in self.calls.calls.values() if any(times[i] > 1 for i in c.row_numbers)]
        return used_twice(", ".join(names)) if names else ""

    def compiled_code_refuses(self, words: str, *, rows: bool) -> None:
        """See `operations.Receiver`."""
        if not self.calls.paused:
            with self._guarded():
                raise (BatchAxisError if rows else UncoveredParameterError)(words)

    def compiled_sum_arrives(self, row: int, total: Tensor, size: Tensor, dtype: torch.dtype) -> None:
        """See `operations.Receiver`."""
        with self._guarded():
            if not self._is_unasked():
                self._norms._add_compiled_sum(self.calls.params[row], total, size, dtype)
