"""Measures the uses that a walk finds, in the backward pass."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import GradientEdge, Node

from hf_clars.distributed import whole_shape
from hf_clars.grad_norms.explanation import timed
from hf_clars.grad_norms.forward_pass import ForwardPass
from hf_clars.grad_norms.graph.layout import Layout
from hf_clars.grad_norms.graph.nodes import operand_grads
from hf_clars.grad_norms.graph.norms_alone import norms_alone
from hf_clars.grad_norms.graph.operands import Operand, call_for_each
from hf_clars.grad_norms.graph.walk import Use
from hf_clars.grad_norms.norm_math import MAX_ELEMENTS, at_least_float32
from hf_clars.grad_norms.torch_internals import NOTHING, dtype_at, no_autocast, results_of, saves_packed
from hf_clars.grad_norms.undisturbed import differentiating, quietly, without_hooks


@dataclass(eq=False)
class MeasuredUse:
    """A use, and which rows of its operation's results are whose.

    Attributes:
        use: The use.
        layouts: One for each result of the operation; None for results that belong to no sample.
        name: Of the first parameter, for messages.
        careful: Whether what the graph saved may be read only once, as under activation checkpointing.
    """

    use: Use
    layouts: list[Layout | None]
    name: str
    careful: bool = False

    def in_words(self) -> str:
        """How it is measured, for people."""
        layout = next((la for la in self.layouts if la is not None), None)
        where = "" if layout is None or layout == Layout() else f", samples along axis {layout.axis}"
        led = ", led back to it through operations on parameters" if self.use.child[0].next_functions else ""
        return f"in the graph, at {self.use.node.name()}{where}{led}"

    def grads(self, grads: Sequence[Tensor | None], batch: int, measured: int) -> Tensor:
        """Each sample's gradient of the operand, [measured, *shape]."""
        use, of = self.use, self._operand(grads, batch, measured)
        own = isinstance(use.node, BackwardCFunction) and not saves_packed(
            use.node
        )  # the engine may go on to much else
        if self.careful and not own and not use.node.name().startswith(("Expand", "Add", "Sub")):
            return of.one_by_one(lambda stacks: _grads_by_engine(use, stacks))
        return operand_grads(of)

    def norms(self, forward_pass: ForwardPass, grads: Sequence[Tensor | None]) -> Tensor | None:
        """Each sample's norm alone, [measured], of the one parameter; None where its gradients must be made."""
        param = next(iter(self.use.leaves.values()))
        check = forward_pass.sums.check
        summed = check is not None and check.wants(param)
        if self.careful or summed or param in forward_pass.uses.several:
            return None
        of = self._operand(grads, forward_pass.batch_size, forward_pass.measured)
        return norms_alone(of, self.use.child[0], alone=len(self.use.leaves) == 1)

    def _operand(self, grads: Sequence[Tensor | None], batch: int, measured: int) -> Operand:
        use = self.use
        return Operand(use.node, use.index, use.shape, grads, self.layouts, batch, measured)


def _grads_by_engine(use: Use, stacks: Sequence[Tensor | None]) -> Tensor:
    """By a backward pass of its own, which unpacks once more what was saved: [b, *shape of the operand].

    Args:
        use: The use.
        stacks: [b, *shape of the result] for each result of its operation; None where there is no gradient.
    """
    edges = [GradientEdge(use.node, i) for i, t in enumerate(stacks) if t is not None]
    given = [t for t in stacks if t is not None]
    # Nothing goes on through the other operands: what the operand was used for before them is another use.
    children = ((child, k) for child, k in use.node.next_functions if child not in (None, use.child[0]))
    others = {GradientEdge(child, k) for child, k in children if child is not None}
    with _stopped(others):
        (found,) = batched_grads(edges, [GradientEdge(*use.child)], given, apart=True)
    return given[0].new_zeros(len(given[0]), *use.shape) if found is None else found


def _stopped(edges: Iterable[GradientEdge]) -> ExitStack:
    """No gradient goes on from these places."""
    stack = ExitStack()
    for edge in edges:

        def stop(grads: Sequence[Tensor | None], number: int = edge.output_nr) -> tuple[Tensor | None, ...]:
            return tuple(torch.zeros_like(g) if g is not None and i == number else g for i, g in enumerate(grads))

        stack.enter_context(edge.node.register_prehook(stop))
    return stack


@dataclass(eq=False)
class Gate:
    """Results of a module around some uses, from which each sample's gradient is led back to them.

    Where rows are routed to experts by index, no axis of a tensor belongs to the samples. The results of the module
    around do. This costs a backward pass of that module for every sample.

    Attributes:
        edges: Where the module's results come from; [B, ...] each.
        uses: Uses inside the module.
        name: Of the module.
        careful: As of a `MeasuredUse`.
    """

    edges: list[GradientEdge]
    name: str
    careful: bool = False
    uses: list[Use] = field(default_factory=list)

    def watch(self, forward_pass: ForwardPass) -> None:
        """Measure the uses when gradients of the module's results come: each result adds its part."""
        for edge in self.edges:
            GateArrival(forward_pass, edge, self).wait(edge.node)

    def in_words(self) -> str:
        """How it is measured, for people."""
        return f"one backward pass a sample of {self.name}"

    def parts(self, edge: GradientEdge, g: Tensor, batch: int, measured: int) -> list[tuple[Use, Tensor]]:
        """What one result's gradient adds to each use, [measured, *shape of the operand].

        It ends at the other results: theirs holds it already.
        """
        places = [GradientEdge(use.node, i) for use in self.uses for i in range(results_of(use.node))]
        step = max(1, MAX_ELEMENTS // max(1, g.numel()))
        parts: list[list[Tensor]] = [[] for _ in self.uses]
        for start in range(0, measured, step):
            stack = Layout().one_sample_each(g, batch, slice(start, min(start + step, measured)))
            with _stopped(other for other in self.edges if other != edge):
                found = iter(batched_grads([edge], places, [stack], apart=self.careful))
            for use, part in zip(self.uses, parts, strict=True):
                of_use = [next(found) for _ in range(results_of(use.node))]
                if all(t is None for t in of_use):
                    part.append(g.new_zeros(len(stack), *use.shape))
                elif self.careful:
                    part.append(_grads_by_engine(use, of_use))
                else:
                    part.append(call_for_each(use.node, use.index, of_use, use.shape))
        return [(use, torch.cat(part)) for use, part in zip(self.uses, parts, strict=True) if part]


class Arrival:
    """A hook on an operation: measures what is used there when its gradient comes, once.

    The pass has it in its list, and it holds on to the graph only until then: the operation holds the hook.

    Args:
        forward_pass: The pass.
        waits: What is measured.
    """

    def __init__(self, forward_pass: ForwardPass, waits: Any) -> None:
        self.forward_pass = forward_pass
        self.waits = waits
        self.came = False

    def wait(self, node: Node) -> None:
        """Wait for the gradient of an operation's results."""
        self.forward_pass.uses.in_graph.append(self)
        node.register_prehook(self.forward_pass.guarded(self))

    def take(self, what: str) -> Any:
        """The gradient has come: what is measured; None if it was let go of before, or nobody asked for it.

        Raises:
            SecondBackwardError: If one had come already, or the norms of the pass were taken.
        """
        if not self.forward_pass.asked():
            self.came |= torch.is_grad_enabled()  # else it is differentiated again, and that shows no samples
            return None
        again, self.came = self.came, True
        self.forward_pass.gradient_comes(what, again=again)
        waited, self.waits = self.waits, None
        return waited

    def free_graph(self) -> None:
        """Let go of the graph."""
        self.waits = None

    def __call__(self, grads: Sequence[Tensor | None]) -> None:
        """A hook: gradients of all results of the operation."""
        raise NotImplementedError

    def deliver(self, use: Use, own: Tensor, dtype: torch.dtype) -> None:
        """Lead an operand's gradients back to its parameters, and add them to these."""
        sums = self.forward_pass.sums
        if sums.check is not None:
            dtype = use.coarsest(dtype)
        for param, t in lead_back(use, own, apart=self.forward_pass.packed):
            sums.take(param, t, dtype)


class GateArrival(Arrival):
    """Waits for the gradient of a gate's result.

    Args:
        forward_pass: The pass.
        edge: Where the result comes from.
        gate: The gate.
    """

    def __init__(self, forward_pass: ForwardPass, edge: GradientEdge, gate: Gate) -> None:
        super().__init__(forward_pass, edge)
        self.gate = gate
        self.output = edge.output_nr

    def free_graph(self) -> None:
        """Let go of the graph."""
        super().free_graph()
        self.gate.edges.clear()
        self.gate.uses.clear()

    def __call__(self, grads: Sequence[Tensor | None]) -> None:
        """See `Arrival`."""
        g = grads[self.output]
        if differentiating() or g is None:
            return
        forward_pass = self.forward_pass
        edge: GradientEdge | None = self.take(self.gate.name)
        if edge is None:
            return
        params = (p for use in self.gate.uses for p in use.leaves.values())
        intact, time = forward_pass.undisturbed(), timed(forward_pass.times, params, g.device)
        with torch.no_grad(), quietly(), intact, no_autocast(g.device.type), time:
            for use, own in self.gate.parts(edge, g.detach(), forward_pass.batch_size, forward_pass.measured):
                self.deliver(use, at_least_float32(own), g.dtype)


class UseArrival(Arrival):
    """Waits for the gradient of the operation of a `MeasuredUse`."""

    def __call__(self, grads: Sequence[Tensor | None]) -> None:
        """See `Arrival`."""
        if differentiating() or all(g is None for g in grads):
            return
        forward_pass = self.forward_pass
        measured: MeasuredUse | None = self.take(self.waits.name if self.waits else "a parameter")
        if measured is None or not forward_pass.measured:
            return
        given = [None if g is None else g.detach() for g in grads]
        some = next(g for g in given if g is not None)
        params = measured.use.leaves.values()
        own_function = isinstance(measured.use.node, BackwardCFunction)
        intact = forward_pass.undisturbed() if own_function or measured.careful else NOTHING
        time = timed(forward_pass.times, params, some.device)
        with torch.no_grad(), quietly(), intact, no_autocast(some.device.type), time:
            norms = measured.norms(forward_pass, given)
            if norms is not None:
                forward_pass.sums.take(next(iter(params)), norms.unsqueeze(1), some.dtype)
                return
            own = at_least_float32(measured.grads(given, forward_pass.batch_size, forward_pass.measured))
            if own_function and forward_pass.uses.without_grad and bool(own.any()):
                forward_pass.uses.returning(measured.use.node, params)
            self.deliver(measured.use, own, some.dtype)


def waiting(forward_pass: ForwardPass) -> list[MeasuredUse]:
    """The uses of a pass whose gradient has not come."""
    return [a.waits for a in forward_pass.uses.in_graph if isinstance(a.waits, MeasuredUse)]


def lead_back(use: Use, grads: Tensor, *, apart: bool) -> list[tuple[nn.Parameter, Tensor]]:
    """From an operand that is made of parameters to these, all samples at once.

    Args:
        use: The use.
        grads: [b, *shape of the operand].
        apart: See `batched_grads`.

    Returns:
        Each parameter with [b, *its shape].
    """
    node = use.child[0]
    if not node.next_functions:
        return [(param, grads) for param in use.leaves.values()]
    own = [grads.to(dtype_at(*use.child))]
    found = batched_grads([GradientEdge(*use.child)], list(use.leaves), own, apart=apart)
    return [
        (param, grads.new_zeros(len(grads), *whole_shape(leaf)) if t is None else at_least_float32(t))
        for (leaf, param), t in zip(use.leaves.items(), found, strict=True)
    ]


def batched_grads(
    edges: Sequence[GradientEdge],
    inputs: Sequence[Tensor | GradientEdge],
    stacks: Sequence[Tensor],
    *,
    apart: bool = False,
) -> list[Tensor | None]:
    """Differentiate once for every entry of the stacks, together where the operations allow it. The graph stays.

    Args:
        edges: Places in the graph.
        inputs: What to differentiate by.
        stacks: For each place [b, *its shape].
        apart: One entry after the other: checkpointing must not run a module again for all together, as its hooks look
            at no such run, and what they save would be missing.

    Returns:
        For each input [b, *its shape]; None where the places do not depend on it.
    """

    def grads(outputs: list[Tensor], batched: bool) -> tuple[Tensor | None, ...]:
        return torch.autograd.grad(
            edges,
            cast(Any, inputs),
            grad_outputs=outputs,
            retain_graph=True,
            allow_unused=True,
            is_grads_batched=batched,
        )

    ends = [t if isinstance(t, Tensor) else getattr(t.node, "variable", None) for t in inputs]
    with without_hooks(t for t in ends if t is not None):
        try:
            if not apart:
                return list(grads(list(stacks), True))
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:  # an operation without a batching rule
            pass
        rows = [grads([m[i] for m in stacks], False) for i in range(len(stacks[0]))]
    return [None if each[0] is None else torch.stack(each) for each in zip(*rows, strict=True)]


def count_repeated(forward_pass: ForwardPass) -> None:
    """A module's graph was made in the backward pass. Its call was counted once, whatever uses there are."""
    found = forward_pass.uses
    behind = [use for arrival in found.in_graph if isinstance(arrival, GateArrival) for use in arrival.gate.uses]
    times = Counter(p for use in (*(m.use for m in waiting(forward_pass)), *behind) for p in use.leaves.values())
    times.update(p for c in found.rule_calls if not (c.cancelled or c.fired) for p in c.wanted.values())
    found.several.update(p for p, n in times.items() if n > 1)
