"""One forward pass: what it is, and whether its backward pass has come."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from hf_clars.grad_norms.errors import WITHOUT_SAMPLES, SecondBackwardError, UncoveredParameterError
from hf_clars.grad_norms.explanation import CallTimes
from hf_clars.grad_norms.hooked_modules import CallPlan, HookedModule
from hf_clars.grad_norms.norm_sums import NormSums
from hf_clars.grad_norms.pytree import GivenTensors
from hf_clars.grad_norms.tied_tables import TiedTable, tied_table
from hf_clars.grad_norms.torch_internals import NO_BACKWARD, backward_number, is_asked_for, operations_recorded
from hf_clars.grad_norms.undisturbed import differentiating, undisturbed
from hf_clars.grad_norms.uses import Uses


class Trace:
    """How a pass's graph comes about: which modules were called how, after how many operations."""

    def __init__(self) -> None:
        self._begun_at = operations_recorded()
        self.marks: list[Any] = []

    def note(self, way: CallPlan | HookedModule) -> None:
        """A module with a rule was called, and is measured so, or was left to the graph."""
        self.marks += (way, self.length)

    @property
    def length(self) -> int:
        """Operations so far."""
        return operations_recorded() - self._begun_at


@dataclass(eq=False)
class ForwardPass:
    """One call of the model.

    Attributes:
        batch_size: Samples in the pass.
        measured: How many of its first samples are measured.
        layer_of: Layer index of every measured parameter.
        implicit: True when the pass was opened by a submodule rather than by the model's own forward.
        mark: Called when a gradient has reached the pass.
        model: What must be left undisturbed.
        keeps_errors: Whether an error of a hook in the backward pass is kept, in place of ending that pass.
        uses: Who uses which parameter in it.
        sums: What adds up in its backward pass.
        given: What the model was called with.
        error: What was found wrong in a backward pass, to be raised when the norms are asked for.
        device: Where the first captured call took place.
        packed: Whether saved tensors went through hooks in some module: checkpointing, or offloading.
        moves_rows: Whether the model gives rows of the batch other places.
        begun_compiled: Whether compiled code has begun it.
        unchecked: Whether compiled code in it does not hand over what the sum check compares.
        returned: Whether the model has returned: no graph is looked through for what is called later.
        told: Whether it was said that something was called outside of the model's call.
        weights: Tokens of each sample, [B], where the loss is a mean over tokens.
        backward_seen: Whether a gradient has reached this pass.
        closed: Whether its norms have been taken.
        graph: Lives as long as what the model returned can be differentiated; None: nothing was returned that is known.
        trace: What its graph is known by so far; None if it must be walked.
        begun_at: How many operations torch had recorded when the model was called.
        operations: The numbers of those that it recorded until the model returned.
        ours: How many of these are no operations of the model, but came with how its calls are measured.
        earlier: Those of the model's calls before, to which the same backward pass may come.
        times: Takes the time of each call's norms, if they are timed.
        is_split: Whether the graph knows parameters by others than themselves, as where an engine gathers them.
    """

    batch_size: int
    measured: int
    layer_of: Mapping[nn.Parameter, int]
    implicit: bool = False
    mark: Callable[[ForwardPass], None] = lambda _: None
    model: nn.Module | None = None
    keeps_errors: bool = False
    error: Exception | None = None
    device: torch.device | None = None
    packed: bool = False
    moves_rows: bool = False
    begun_compiled: bool = False
    unchecked: bool = False
    returned: bool = False
    told: bool = False
    weights: Tensor | None = None
    backward_seen: bool = False
    closed: bool = False
    graph: Callable[[], Any] | None = None
    trace: Trace | None = None
    begun_at: int = 0
    operations: range = range(0)
    ours: int = 0
    earlier: Sequence[range] = ()
    times: CallTimes | None = None
    is_split: Callable[[], bool] = lambda: False
    uses: Uses = field(init=False)
    sums: NormSums = field(init=False)
    given: GivenTensors = field(init=False)

    def __post_init__(self) -> None:
        self.uses = Uses()
        self.sums = NormSums(self.layer_of, self.uses.several)
        self.given = GivenTensors(self.batch_size)
        self._asked: tuple[int, bool] = (NO_BACKWARD, True)

    def asked(self) -> bool:
        """Whether the backward pass under way gives any measured parameter its gradient.

        Another one adds nothing to the batch: as for the gradient of an image, `torch.autograd.grad(loss, x)`.
        """
        number = backward_number()
        if number != self._asked[0]:
            trained = [p for p in self.layer_of if p.requires_grad]
            self._asked = (number, self.is_split() or any(map(is_asked_for, trained)))
        return self._asked[1]

    def free_graph(self) -> None:
        """Drop what no gradient came through; see `Uses.free_graph`."""
        if self.uses.free_graph() and not self.backward_seen:
            self.error = self.error or _came_too_late()

    def gradient_comes(self, what: object, *, again: bool) -> None:
        """A gradient has come to what is measured.

        Args:
            what: For messages.
            again: Whether one has come there before.

        Raises:
            SecondBackwardError: If it has, or the norms of the pass were taken.
        """
        if not self.backward_seen:
            self.mark(self)
        if again or self.closed:
            raise second_backward(what)

    @property
    def outside(self) -> bool:
        """Whether what is called now is no part of the model's own call."""
        return self.implicit or self.returned

    def takes(self, error: Exception) -> bool:
        """Whether an error of the user's backward pass is kept; the first one is."""
        if not self.keeps_errors or differentiating():
            return False
        self.mark(self)
        traceback.clear_frames(error.__traceback__)  # their tensors would live as long as the error
        self.error = self.error or error
        return True

    def table_of(self, param: nn.Parameter) -> TiedTable | None:
        """What the uses of a parameter with several come to, if it is a table that is looked up; see `tied_table`."""
        tables = self.sums.tables
        if param not in tables:
            tables[param] = tied_table(param, self.uses, self.measured)
        return tables[param]

    def undisturbed(self) -> AbstractContextManager[None]:
        """Around what differentiates the graph for the norms' sake: the model stays as it is."""
        return undisturbed(self.model, runs_again=self.packed)

    def guarded(self, hook: Callable[..., None]) -> Callable[..., None]:
        """A hook for the backward pass, whose error is kept if this pass keeps errors."""
        return _Guarded(self, hook) if self.keeps_errors else hook

    def norms(self, layers: int) -> Tensor | None:
        """Close the pass: its norms, once. See `NormSums.norms`."""
        self.closed = True
        if self.error is not None:
            error, self.error = self.error, None
            raise error
        return self.sums.norms(layers)


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
    """Whether an operation of somebody's own runs backward and returns some parameters' gradients, as an adjoint does.

    It calls their module and asks for their gradients. It takes them as they are, or all as one vector, and is measured
    as a whole. Hooks on the parameters see these gradients twice: no sums are checked.

    Args:
        passes: The passes under way.
        params: The module's parameters.
    """
    inside = [each for each in passes if not each.uses.returns.isdisjoint(params)]
    for forward_pass in inside:
        if forward_pass.sums.check is not None:
            forward_pass.sums.check.leave_out(params)
    return bool(inside)


def _came_too_late() -> UncoveredParameterError:
    """The error for a backward pass through what was let go before."""
    return UncoveredParameterError(
        "A backward pass went through a forward pass that was let go before: the norms were removed in between, or the "
        "gradients were cleared and other passes begun. Call backward() before remove(), inside the with block, and "
        "before the passes of the next batch."
    )


def refuse_in_the_loss(forward_pass: ForwardPass, result: Tensor, names: Sequence[str]) -> None:
    """Refuse a gradient of a result that is made of parameters alone: no graph of the model shows its use.

    Args:
        forward_pass: The pass.
        result: What the model returned.
        names: The parameters.
    """
    error = UncoveredParameterError(
        f"{', '.join(names)}: the model returns what is made of parameters alone, of shape {tuple(result.shape)}, and "
        "the loss may take it, as a temperature: nothing tells for which samples. Put the loss into the forward of a "
        "module around the model, and make the norms, or the optimizer, of that module. Or expand it to the batch "
        "before it is returned. For a penalty on weights use weight_decay, or set check_every = 0 on the norms (CLARS: "
        "optimizer.norms)."
    )

    def refuse(_: Tensor) -> None:
        if not differentiating():
            raise error

    result.register_hook(forward_pass.guarded(refuse))


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
