"""Graphs that need not be walked again, as one like them was: its uses are found again where they were.

A walk looks at every operation, and costs more than a rule. A graph is known by which modules were called how, and by
how many operations torch had recorded by each call and by the end: an operation more, or a call in another order, is
another graph. It is only known if every parameter that trains has a use. Uses that no rule measures are found again by
their way down from the input of a rule's call, or from what the model returned; operations, shapes and parameters
there must be the same. What this cannot see is an operation that takes a parameter a second time, in the place of a
constant; the sum check does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.autograd.graph import Node

from hf_clars.grad_norms.forward_pass import ForwardPass, Trace
from hf_clars.grad_norms.graph.measured_uses import MeasuredUse
from hf_clars.grad_norms.graph.walk import Use
from hf_clars.grad_norms.torch_internals import leaves_below

Mark = tuple[Any, ...]
Way = tuple[tuple[str, int], ...]

_MOST = 256
"""Graphs that are remembered. A model that makes more of them (by dropping layers at random) is walked again."""


@dataclass(frozen=True)
class _Place:
    """Where a use is found again.

    Attributes:
        start: The number of the place that the way begins at, see `_starts`.
        way: Operations on the way down, each with the operand that leads on; the last is the use's own.
        made_of: The leaves from which the operand is made.
        shapes: Of the operation's results.
        measured: The use as it was, but for its places in the graph.
    """

    start: int
    way: Way
    made_of: set[Tensor]
    shapes: list[tuple[int, ...]]
    measured: MeasuredUse

    def find(self, starts: Sequence[Node | None]) -> MeasuredUse | None:
        """The use in another pass's graph; None if something else is there."""
        node = starts[self.start] if self.start < len(starts) else None
        *above, (name, index) = self.way
        for step, operand in above:
            if node is None or node.name() != step or len(node.next_functions) <= operand:
                return None
            node = node.next_functions[operand][0]
        if node is None or node.name() != name or len(node.next_functions) <= index:
            return None
        old = self.measured.use
        child, k = node.next_functions[index]
        if child is None or leaves_below(child) != self.made_of:
            return None
        use = Use(node, index, (child, k), old.leaves, old.key)
        if use.result_shapes != self.shapes:
            return None
        return MeasuredUse(use, self.measured.layouts, self.measured.name)


class KnownGraphs:
    """What is remembered of a model's graphs."""

    def __init__(self) -> None:
        self._known: dict[Mark, list[_Place]] = {}

    def begin(self, forward_pass: ForwardPass) -> None:
        """Follow how a pass's graph comes about."""
        forward_pass.trace = Trace()

    def end(self, forward_pass: ForwardPass, *, trained: int) -> Mark | None:
        """What the graph of a pass is known by, as its forward ends.

        Args:
            forward_pass: The pass.
            trained: How many measured parameters train.

        Returns:
            None if the graph must be walked.
        """
        trace, forward_pass.trace = forward_pass.trace, None
        uses = forward_pass.uses
        if trace is None or not trace.marks or forward_pass.packed or uses.without_grad or uses.compiled:
            return None
        return (*trace.marks, trace.length, trained)

    def find(self, mark: Mark | None, forward_pass: ForwardPass, outputs: Sequence[Tensor]) -> list[MeasuredUse] | None:
        """The uses that no rule measures, without a walk.

        Args:
            mark: See `end`.
            forward_pass: The pass.
            outputs: What the model returned.

        Returns:
            None if the graph must be walked.
        """
        places = None if mark is None else self._known.get(mark)
        if places is None or mark is None:
            return None
        starts = _starts(forward_pass, outputs) if places else []
        found = [place.find(starts) for place in places]
        used = set(forward_pass.uses.times).union(*(m.use.leaves.values() for m in found if m is not None))
        return None if len(used) != mark[-1] or None in found else [m for m in found if m is not None]

    def add(
        self, mark: Mark, forward_pass: ForwardPass, outputs: Sequence[Tensor], found: Sequence[MeasuredUse]
    ) -> None:
        """A graph was walked.

        Args:
            mark: See `end`.
            forward_pass: The pass, whose uses are counted.
            outputs: What the model returned.
            found: What no rule measures.
        """
        if len(forward_pass.uses.times) != mark[-1]:
            return
        ways = _ways_down(forward_pass, outputs, {m.use.node for m in found}) if found else {}
        if len(ways) < len({m.use.node for m in found}):
            return
        if len(self._known) >= _MOST:
            self._known.clear()
        self._known[mark] = [_place(m, *ways[m.use.node]) for m in found]

    def forget(self) -> None:
        """Parameters or rules are others now."""
        self._known.clear()


def _place(measured: MeasuredUse, start: int, above: Way) -> _Place:
    use = measured.use
    nowhere: Any = None  # nothing of the graph is stored: of a use only what is the same in every pass
    stored = Use(nowhere, use.index, (nowhere, 0), use.leaves, use.key)
    way = (*above, (use.node.name(), use.index))
    leaves = leaves_below(use.child[0])
    return _Place(start, way, leaves, use.result_shapes, MeasuredUse(stored, measured.layouts, measured.name))


def _starts(forward_pass: ForwardPass, outputs: Sequence[Tensor]) -> list[Node | None]:
    """Where ways begin: the inputs of rules' calls, and what the model returned."""
    return [*(call.input_node for call in forward_pass.uses.rule_calls), *(t.grad_fn for t in outputs)]


def _ways_down(forward_pass: ForwardPass, outputs: Sequence[Tensor], wanted: set[Node]) -> dict[Node, tuple[int, Way]]:
    """The shortest way down to each node that can be reached without passing a rule's module."""
    modules = {edge.node for call in forward_pass.uses.rule_calls for edge in call.edges}
    found: dict[Node, tuple[int, Way]] = {}
    seen: set[Node] = set()
    level: list[tuple[Node, int, Way]] = [
        (node, i, ()) for i, node in enumerate(_starts(forward_pass, outputs)) if node is not None
    ]
    while level and len(found) < len(wanted):
        below = []
        for node, start, way in level:
            if node in seen or node in modules:
                continue
            seen.add(node)
            if node in wanted:
                found[node] = (start, way)
            name = node.name()
            below += [(c, start, (*way, (name, k))) for k, (c, _) in enumerate(node.next_functions) if c is not None]
        level = below
    return found
