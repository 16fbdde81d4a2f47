"""Graphs that need not be walked again, as one like them was, and rules measured all of it.

A walk looks at every operation, and costs more than a rule. A graph is known by which modules were called how, and by
how many operations torch had recorded by each call and by the end: an operation more, or a call in another order, is
another graph. It is only known if every parameter that trains is measured by a rule. What this cannot see is an
operation that takes such a parameter a second time, in the place of a constant; the sum check does.
"""

from __future__ import annotations

from typing import Any

from hf_clars.grad_norms.forward_pass import ForwardPass
from hf_clars.grad_norms.torch_internals import operations_recorded

_MOST = 256
"""Graphs that are remembered. A model that makes more of them (by dropping layers at random) is walked again."""


class KnownGraphs:
    """What is remembered of a model's graphs."""

    def __init__(self) -> None:
        self._known: set[tuple[Any, ...]] = set()

    def begin(self, current: ForwardPass) -> None:
        """Follow how a pass's graph comes about."""
        current.trace, current.begun_at = [], operations_recorded()

    def end(self, current: ForwardPass, *, trained: int) -> tuple[Any, ...] | None:
        """What the graph of a pass is known by, as its forward ends.

        Args:
            current: The pass.
            trained: How many measured parameters train.

        Returns:
            None if the graph must be walked.
        """
        trace, current.trace = current.trace, None
        by_rules = not (current.packed or current.without_grad or current.compiled)
        if not trace or not by_rules or len(current.uses) != trained:
            return None
        return (*trace, operations_recorded() - current.begun_at)

    def __contains__(self, mark: tuple[Any, ...] | None) -> bool:
        return mark in self._known

    def add(self, mark: tuple[Any, ...]) -> None:
        """A graph was walked, and nothing was found beside the rules."""
        if len(self._known) >= _MOST:
            self._known.clear()
        self._known.add(mark)

    def forget(self) -> None:
        """Parameters or rules are others now."""
        self._known.clear()
