"""Whose rows are whose where parameters are used: what is remembered of uses that look alike."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable

from torch.autograd.graph import Node

from hf_clars.grad_norms.graph.layout import Layout
from hf_clars.grad_norms.graph.taint import MOVED
from hf_clars.grad_norms.graph.walk import Use

Layouts = list[Layout | None]
Look = tuple[object, ...]

FOLLOWED = 3
"""Passes in which the data are followed where rows are given other places: then the operations on them are known."""


class LayoutsOfUses:
    """The layouts of uses, by what they look like. Where some that look alike have others, each is asked every time."""

    def __init__(self) -> None:
        self._batch = 0
        self._known: dict[Look, Layouts] = {}
        self._rows: dict[Look, set[tuple[int, ...]]] = defaultdict(set)
        self._now: dict[Node, Layouts] = {}
        self._several: set[Look] = set()
        self._alike: Counter[Look] = Counter()
        self._agreed: Counter[Look] = Counter()
        self._doubted: set[Look] = set()
        self._mixed: Counter[Look] = Counter()
        self._parted: set[Look] = set()
        self._asked: set[Look] = set()
        self._lasting: set[Look] = set()

    def look(self, uses: Iterable[Use], batch: int) -> None:
        """These were found in a pass of B samples; where more look alike than ever did, all of them are asked."""
        self._batch = batch
        self._alike = Counter(self._look_of(use)[0] for use in uses)
        self._doubted = {look for look, count in self._alike.items() if count > self._agreed[look]}

    def of(self, use: Use) -> Layouts | None:
        """Of a use's results, or None. Two views of one token lie as two tokens do: other lengths tell."""
        look, rows = self._look_of(use)
        if look in self._parted:
            return [None for _ in use.result_shapes]
        seen = self._rows[look]
        if self._mixed[look] >= FOLLOWED:
            return [Layout() for _ in use.result_shapes]
        doubted = use.moved == MOVED or look in self._several or look in self._doubted
        known = None if doubted or (rows not in seen and len(seen) < 2) else self._known.get(look)
        return self._now.get(use.node) or known

    def keep(self, use: Use, layouts: Layouts, *, lasts: bool = True, mixed: bool = False) -> bool:
        """Remember what was found; for this pass alone, if it does not last. Returns whether its likes have others.

        What came of mixed samples has no rows of its own to be given other places: after some passes it is not asked.
        """
        self._now[use.node] = layouts
        look, rows = self._look_of(use)
        self._mixed[look] += mixed
        self._asked |= {look} if use.moved != MOVED else set()
        self._lasting |= {look} if lasts else set()
        if not lasts:
            return False
        self._rows[look].add(rows)
        other = self._known.setdefault(look, layouts) != layouts
        self._several |= {look} if other else set()
        return other

    def part(self, uses: Iterable[Use]) -> None:
        """Rows of these, and of all that look like them, are other samples' too: they belong to none from now on."""
        self._parted |= {self._look_of(use)[0] for use in uses}

    def trust(self) -> None:
        """All uses of a pass were asked."""
        self._agreed |= self._alike if self._batch > 1 else Counter()
        self._doubted.clear()

    def end(self) -> bool:
        """The pass ends. Returns whether uses are left of which it has told too little to be remembered."""
        self._now.clear()
        return not self._asked <= self._lasting

    def _look_of(self, use: Use) -> tuple[Look, tuple[int, ...]]:
        """And rows a sample: one alone tells nothing of how several lie."""
        rows = tuple(shape[0] // self._batch if shape else 0 for shape in use.result_shapes)
        return (use.look, *(shape[:1] == (self._batch,) for shape in use.result_shapes)), rows
