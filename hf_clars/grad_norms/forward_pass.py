"""One forward pass and what its backward pass has delivered so far."""

from __future__ import annotations

import threading
import traceback
from collections import Counter
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hf_clars.grad_norms.errors import WITHOUT_SAMPLES, SecondBackwardError, UncoveredParameterError
from hf_clars.grad_norms.norm_math import SMALL, squared_sum
from hf_clars.grad_norms.pytree import memory_of
from hf_clars.grad_norms.torch_internals import inside_backward, operations_recorded, takes_any

if TYPE_CHECKING:
    from hf_clars.grad_norms.explanation import CallTimes
    from hf_clars.grad_norms.hooked_modules import HookedModule
    from hf_clars.grad_norms.rule_call import CallPlan, RuleCall
    from hf_clars.grad_norms.sum_check import SumCheck
    from hf_clars.grad_norms.tied_tables import TiedTable

_under_way: set[quietly] = set()
"""Our own differentiations, in all threads: hooks of all trackers must do nothing in these."""


class _Thread(threading.local):
    """What is known of a thread.

    Attributes:
        calls_models: Whether it is a user's. Those of the autograd engine call no model, and work for any thread.
        differentiations: How many of our own it has under way.
    """

    calls_models = False
    differentiations = 0


_thread = _Thread()


def note_caller() -> None:
    """A model is called in this thread: what other threads differentiate is none of its business."""
    _thread.calls_models = True


def differentiating() -> bool:
    """Whether the graph is differentiated for the norms' sake, and not by the user."""
    if not _under_way or _thread.differentiations:
        return bool(_under_way)
    return inside_backward() and not _thread.calls_models


class quietly:
    """Differentiate without any tracker taking note."""

    __slots__ = ()

    def __enter__(self) -> None:
        _under_way.add(self)
        _thread.differentiations += 1

    def __exit__(self, *_: object) -> None:
        _thread.differentiations -= 1
        _under_way.discard(self)


@dataclass(eq=False)
class ForwardPass:
    """The bookkeeping of one forward pass.

    Attributes:
        batch_size: Samples in the pass.
        measured: How many of its first samples are measured.
        implicit: True when the pass was opened by a submodule rather than by the model's own forward.
        mark: Called when a gradient has reached the pass.
        without_grad: How often a module was called without gradients: reentrant checkpointing will call it again.
        moved_without_grad: Those that were called so on rows that were given other places.
        moves_rows: Whether the model gives rows of the batch other places.
        returned: Parameters whose gradient an operation of somebody's own returned, where modules will be called again.
        recomputed: Modules whose parameters were counted for such calls already.
        error: What was found wrong in a backward pass, to be raised when the norms are asked for.
        params: The model's parameters, for what must leave them undisturbed.
        keeps_errors: Whether an error of a hook in the backward pass is kept so, in place of ending that pass.
        device: Where the first captured call took place.
        packed: Whether saved tensors went through hooks in some module: checkpointing, or offloading.
        uses: How often each parameter is used.
        several: Parameters with more than one use.
        rule_calls: Calls that rules measure.
        open_uses: Other uses whose gradient has not come; each holds on to its place in the graph.
        gates: Modules around some of them.
        fired: Uses whose gradient has come.
        tickets: How many uses were numbered.
        small: Layer index and per-sample gradients of small parameters, which are squared together in the end.
        squares: {layer index: Tensor [measured]}, squared norms added up over the layer's parameters.
        pending: Per-sample gradients of parameters used more than once: those add up before they are squared.
        tables: Parameters used more than once that are tables looked up; see `tied_tables.py`.
        check: Compares sums with the batch gradient, in passes that are checked.
        compiled: Parameters that compiled code measures in it.
        begun_compiled: Whether compiled code has begun it.
        unchecked: Whether compiled code in it does not hand over what the sum check compares.
        weights: Tokens of each sample, [B], where the loss is a mean over tokens.
        backward_seen: Whether a gradient has reached this pass.
        closed: Whether its norms have been taken.
        graph: Lives as long as what the model returned can be differentiated; None: nothing was returned that is known.
        given: What the model was called with, of tensors with more axes than the batch: {shape: (memory, strides)}.
        trace: What its graph is known by so far, see `graph/known.py`; None if it must be walked.
        begun_at: How many operations torch had recorded when it began.
        times: Takes the time of each call's norms, if they are timed.
    """

    batch_size: int
    measured: int
    implicit: bool = False
    mark: Callable[[ForwardPass], None] = lambda _: None
    params: Callable[[], Iterable[nn.Parameter]] = tuple
    without_grad: Counter[HookedModule] = field(default_factory=Counter)
    moved_without_grad: set[HookedModule] = field(default_factory=set)
    moves_rows: bool = False
    returned: set[nn.Parameter] = field(default_factory=set)
    recomputed: Counter[HookedModule] = field(default_factory=Counter)
    error: Exception | None = None
    keeps_errors: bool = False
    device: torch.device | None = None
    packed: bool = False
    uses: Counter[nn.Parameter] = field(default_factory=Counter)
    several: set[nn.Parameter] = field(default_factory=set)
    rule_calls: list[RuleCall] = field(default_factory=list)
    open_uses: dict[int, Any] = field(default_factory=dict)
    gates: list[Any] = field(default_factory=list)
    fired: set[int] = field(default_factory=set)
    tickets: int = 0
    small: list[tuple[int, Tensor]] = field(default_factory=list)
    squares: dict[int, Tensor] = field(default_factory=dict)
    pending: dict[nn.Parameter, Tensor] = field(default_factory=dict)
    tables: dict[nn.Parameter, TiedTable | None] = field(default_factory=dict)
    check: SumCheck | None = None
    compiled: set[nn.Parameter] = field(default_factory=set)
    begun_compiled: bool = False
    unchecked: bool = False
    weights: Tensor | None = None
    backward_seen: bool = False
    closed: bool = False
    graph: Callable[[], Any] | None = None
    given: dict[tuple[int, ...], set[tuple[int | None, tuple[int, ...]]]] = field(default_factory=dict)
    trace: list[Any] | None = None
    begun_at: int = 0
    times: CallTimes | None = None

    def free_graph(self) -> None:
        """Drop what no gradient came through, so that the graph and its hooks do not keep each other."""
        if self.open_uses and not self.backward_seen:
            self.error = self.error or _came_too_late()
        self.open_uses.clear()
        for gate in self.gates:
            gate.free_graph()
        self.gates.clear()
        for call in self.rule_calls:
            call.leave_graph()

    def note(self, way: CallPlan | HookedModule) -> None:
        """A module with a rule was called and is measured so, or was left to the graph: a mark in the trace."""
        if self.trace is not None:
            self.trace += (way, operations_recorded() - self.begun_at)

    def note_given(self, tensors: Iterable[Tensor]) -> None:
        """Remember what the model was called with: the first axis of that is the batch by contract."""
        for t in tensors:
            place = memory_of(t) if t.dim() > 1 and t.shape[0] == self.batch_size else None
            if place is not None:
                self.given.setdefault(t.shape, set()).add((place, t.stride()))

    def was_given(self, x: Tensor) -> bool:
        """Whether a module's input is what the model was called with."""
        alike = self.given.get(x.shape)
        return alike is not None and (memory_of(x), x.stride()) in alike

    def arrive(self, ticket: int, what: str) -> None:
        """Note that a use's gradient has come.

        Raises:
            SecondBackwardError: If it had come already, or the norms of the pass were taken.
        """
        self.mark(self)
        if self.closed or ticket in self.fired:
            raise second_backward(what)
        self.fired.add(ticket)

    def takes(self, error: Exception) -> bool:
        """Whether an error of the user's backward pass is kept so; the first one is."""
        if not self.keeps_errors or differentiating():
            return False
        traceback.clear_frames(error.__traceback__)  # their tensors would live as long as the error
        self.error = self.error or error
        return True

    def guarded(self, hook: Callable[..., None]) -> Callable[..., None]:
        """A hook for the backward pass, whose error is kept if this pass keeps errors."""
        return _Guarded(self, hook) if self.keeps_errors else hook

    def next_ticket(self) -> int:
        """A number for a use."""
        self.tickets += 1
        return self.tickets

    def add_use(self, param: nn.Parameter) -> None:
        """Count a use of a parameter."""
        uses = self.uses[param] = self.uses.get(param, 0) + 1
        if uses > 1:
            self.several.add(param)

    def forget_use(self, param: nn.Parameter) -> None:
        """Take back a use that was counted."""
        self.uses[param] -= 1
        if self.uses[param] < 2:
            self.several.discard(param)

    def add_squares(self, layer: int, squares: Tensor) -> None:
        """Add one parameter's squared norms [measured] to its layer."""
        held = self.squares.get(layer)
        self.squares[layer] = squares if held is None else held + squares

    def add_grads(self, param: nn.Parameter, layer: int, grads: Tensor) -> None:
        """Add one use's per-sample gradients [measured, *shape]; those of several uses add up before being squared."""
        if param in self.several:
            held = self.pending.get(param)
            self.pending[param] = grads if held is None else held + grads
        elif grads.numel() < SMALL and not grads.is_complex():
            self.small.append((layer, grads))
        else:
            self.add_squares(layer, squared_sum(grads))

    def _square_small(self) -> None:
        """Square all gradients of one shape at once: there are many of them, and each operation takes its time."""
        by_shape: dict[tuple[Any, ...], list[tuple[int, Tensor]]] = {}
        for layer, grads in self.small:
            by_shape.setdefault((grads.shape, grads.dtype), []).append((layer, grads))
        self.small.clear()
        for group in by_shape.values():
            stacked = torch.stack([grads.flatten(1) if grads.dim() > 1 else grads[:, None] for _, grads in group])
            for (layer, _), squares in zip(group, torch.linalg.vecdot(stacked, stacked).unbind(), strict=True):
                self.add_squares(layer, squares)

    def norms(self, layer_of: dict[nn.Parameter, int], layers: int) -> Tensor | None:
        """Close the pass: its norms, once.

        Args:
            layer_of: Layer index of every parameter.
            layers: Number of layers K.

        Returns:
            Norms [K, measured], zero for layers that got no gradient; None when no layer got any.
        """
        self.closed = True
        if self.error is not None:
            error, self.error = self.error, None
            raise error
        for param, grads in self.pending.items():
            self.add_squares(layer_of[param], squared_sum(grads))
        self.pending.clear()
        for param, table in self.tables.items():
            squares = None if table is None else table.squares()
            if squares is not None:
                self.add_squares(layer_of[param], squares)
        self.tables.clear()
        self._square_small()
        if not self.squares:
            return None
        zeros = torch.zeros_like(next(iter(self.squares.values())))
        norms = torch.stack([self.squares.get(k, zeros) for k in range(layers)]).sqrt()
        self.squares.clear()
        return norms


class _Guarded:
    """See `ForwardPass.guarded`."""

    def __init__(self, forward_pass: ForwardPass, hook: Callable[..., None]) -> None:
        self.forward_pass, self.hook = forward_pass, hook

    def __call__(self, *args: Any) -> None:
        if self.forward_pass.error is not None:
            return
        try:
            self.hook(*args)
        except Exception as error:
            if not self.forward_pass.takes(error):
                raise


def asked_inside(passes: Iterable[ForwardPass], params: Collection[nn.Parameter]) -> bool:
    """Whether an operation of somebody's own runs backward and takes some parameters itself, as a reversible network's.

    It calls their module, asks for their gradients, and returns them, so that it is measured as a whole. Hooks on the
    parameters see these gradients twice: no sums are checked.

    Args:
        passes: The passes under way.
        params: The module's parameters.
    """
    if not takes_any(params) or not any(p in each.returned for each in passes for p in params):
        return False
    for forward_pass in passes:
        if forward_pass.check is not None:
            forward_pass.check.leave_out(params)
    return True


def _came_too_late() -> UncoveredParameterError:
    """The error for a backward pass through what was let go before."""
    return UncoveredParameterError(
        "A backward pass went through a forward pass that was let go before: the norms were removed in between, or the "
        "gradients were cleared and other passes begun. Call backward() before remove(), inside the with block, and "
        "before the passes of the next batch."
    )


def second_backward(what: object) -> SecondBackwardError:
    """The error for a second backward pass through one forward pass."""
    return SecondBackwardError(
        f"A second backward pass reached {what} through the same forward pass: a second backward(), or "
        "torch.autograd.grad before it, or norms were read, or another pass begun, before all was done. A sample's "
        "gradient norm is that of all its losses together: add the losses and call backward() once. Where a loss needs "
        "a gradient of its own (a gradient penalty with create_graph=True), its norms cannot be told by sample: "
        f"{WITHOUT_SAMPLES}, or LARS."
    )


@dataclass(frozen=True)
class NormTotals:
    """Sums over the measured samples of one accumulated batch, in the units of the local `p.grad`.

    Attributes:
        norms: [K], sum of ||c g_i|| where c g_i is what sample i adds to `p.grad`.
        squares: [K], sum of ||c g_i||^2.
        captured: Samples (or micro-batches) measured.
        total: Samples that went into `p.grad`, in the unit of `captured` (samples, or micro-batches of the measured
            size).
    """

    norms: Tensor
    squares: Tensor
    captured: int
    total: float
