"""Whose rows are whose where parameters are used: what is remembered of uses that look alike."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from torch.autograd.graph import Node

from hf_clars.grad_norms.graph.layout import Layout
from hf_clars.grad_norms.graph.taint import MOVED
from hf_clars.grad_norms.graph.walk import Use

Layouts = list[Layout | None]


class LayoutsOfUses:
    """The layouts of uses, by what they look like. Where some that look alike have others, each is asked every time."""

    def __init__(self) -> None:
        self._batch = 0
        self._known: dict[tuple[object, ...], Layouts] = {}
        self._now: dict[Node, Layouts] = {}
        self._several: set[tuple[object, ...]] = set()
        self._alike: Counter[tuple[object, ...]] = Counter()
        self._agreed: Counter[tuple[object, ...]] = Counter()
        self._doubted: set[tuple[object, ...]] = set()

    def look(self, uses: Iterable[Use], batch: int) -> None:
        """These were found in a pass of B samples; where more look alike than ever did, all of them are asked."""
        self._batch = batch
        self._alike = Counter(map(self._look_of, uses))
        self._doubted = {look for look, count in self._alike.items() if count > self._agreed[look]}

    def of(self, use: Use) -> Layouts | None:
        """Of a use's results, or None."""
        look = self._look_of(use)
        doubted = use.moved == MOVED or look in self._several or look in self._doubted
        return self._now.get(use.node) or (None if doubted else self._known.get(look))

    def keep(self, use: Use, layouts: Layouts) -> bool:
        """Remember what was found. Returns whether others that look alike have other layouts."""
        self._now[use.node] = layouts
        look = self._look_of(use)
        other = use.moved != MOVED and self._known.setdefault(look, layouts) != layouts
        self._several |= {look} if other else set()
        return other

    def trust(self) -> None:
        """All uses of a pass were asked."""
        self._agreed |= self._alike if self._batch > 1 else Counter()
        self._doubted.clear()

    def end(self) -> None:
        """The pass ends."""
        self._now.clear()

    def _look_of(self, use: Use) -> tuple[object, ...]:
        """One row a sample tells nothing of how several lie."""
        return (use.look, *(shape[:1] == (self._batch,) for shape in use.result_shapes))
