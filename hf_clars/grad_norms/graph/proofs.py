"""Asks a pass's graph whose rows are whose: one sample after the other, or all at once what is believed already.

Gradients are followed from what the model returned. Where that mixes samples, as the products of every text with every
image, they arrive everywhere, and nothing is told. What layers made of the model's own inputs shows it: there the first
axis is the samples'. Then each output is asked by itself, and below those that mix the first values that do not.
"""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from hf_clars.grad_norms.errors import TIME_FIRST
from hf_clars.grad_norms.forward_pass import ForwardPass
from hf_clars.grad_norms.graph.following import above_some, prove, stay
from hf_clars.grad_norms.graph.layout import Arrival, Layout, Root, candidates
from hf_clars.grad_norms.graph.places import inner_roots, place_of, root_at
from hf_clars.grad_norms.graph.taint import DataTaint
from hf_clars.grad_norms.graph.walk import GraphWalk
from hf_clars.grad_norms.torch_internals import shape_at
from hf_clars.grad_norms.undisturbed import looking

Place = tuple[GradientEdge, tuple[int, ...]]
_MOST, _MOST_BELOW_ZEROS = 64, 4
"""Values that are tried as roots below outputs that mix samples, or from which no gradient comes."""


@dataclass
class _Question:
    """What is asked of a graph.

    Attributes:
        places: What to look at.
        given: What layers made of the model's own inputs, where it is known whose rows are whose.
        batch: B.
        samples: Whose gradients are followed.
        couplings: See `prove`.
        elsewhere: Whether what was asked last is other samples' rows, as what is returned in an order of its own.
    """

    places: Sequence[Place]
    given: Sequence[tuple[Place, Layout]]
    batch: int
    samples: Sequence[int]
    couplings: Sequence[Node]
    elsewhere: bool = False

    def ask(self, roots: Sequence[Root], most: int | None = None) -> tuple[list[Arrival | None], bool | None]:
        """Where gradients of so many samples arrive; whether at what was given only in own rows (None: nowhere)."""
        asked = [*self.places, *(place for place, _ in self.given)]
        found = prove(roots, asked, self.batch, self.samples[:most], self.couplings)
        pairs = [(f, la) for f, (_, la) in zip(found[len(self.places) :], self.given, strict=True) if f is not None]
        own = [layout in f.layouts for f, layout in pairs]
        self.elsewhere = any(f.is_elsewhere(layout) for f, layout in pairs)
        return found[: len(self.places)], all(own) if own else None


class Proofs:
    """Where samples' gradients arrive.

    Args:
        is_split: Whether an engine gathers weights for the backward pass, which one of our own would confuse.
    """

    def __init__(self, is_split: Callable[[], bool]) -> None:
        self._is_split = is_split
        self._all_at_once = True
        self._own_rows: bool | None = None
        self._returned: dict[tuple[str, int], Layout] = {}

    def layouts(
        self,
        forward_pass: ForwardPass,
        outputs: Sequence[Tensor],
        walk: GraphWalk,
        places: Sequence[Place],
        samples: Sequence[int],
        believed: Sequence[Layout | None],
    ) -> list[Arrival | None] | None:
        """The layouts of some places.

        Args:
            forward_pass: The pass.
            outputs: What the model returned.
            walk: What was found in its graph.
            places: What to look at.
            samples: Whose gradients are followed.
            believed: What to ask first, of all samples at once; empty to leave that out.

        Returns:
            For each place where the gradients arrived; None if the graph cannot be asked.
        """
        batch = forward_pass.batch_size
        if batch < 2 or walk.once or self._is_split() or any(t.is_meta for t in outputs):
            return None
        whole = [t for t in outputs if t.shape[:1] == (batch,)]
        roots = [Root(torch.autograd.graph.get_gradient_edge(t), t.detach()) for t in whole]
        given = [(place_of(c.edges[0]), c.given_rows) for c in forward_pass.uses.rule_calls if c.edges and c.given_rows]
        question = _Question(places, given, batch, samples, walk.couplings)
        known = {edge.node for (edge, _), _ in given}
        above = above_some(known, [root.edge.node for root in roots])
        # Features of one image look as the batch does, if they are as many: what is known to tell goes before.
        roots = [root for root in roots if root.edge.node in known or above[root.edge.node]] or roots
        if not roots and question.given:
            roots = inner_roots(outputs, batch)
        if not roots:
            return [_nothing_told(()) for _ in places]
        try:
            with looking(), forward_pass.undisturbed():
                return self._layouts(question, roots, outputs, believed, returned=bool(whole))
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:
            return None  # a graph that can be differentiated only once

    def _layouts(
        self,
        question: _Question,
        roots: Sequence[Root],
        outputs: Sequence[Tensor],
        believed: Sequence[Layout | None],
        *,
        returned: bool,
    ) -> list[Arrival | None]:
        """Arguments as above; `returned`: whether the roots are what the model returned."""
        batch, places = question.batch, question.places
        wanted = [*zip(places, believed, strict=False), *question.given]
        sure = [(edge, la) for (edge, shape), la in wanted if la and la.sizes(shape, batch)]
        reached = _below(roots)
        missed = {i for i, (edge, _) in enumerate(places) if edge.node not in reached}
        at_once = self._all_at_once and len(believed) > 0 and len(sure) == len(places) + len(question.given)
        if at_once and not missed and stay(roots, sure, batch, question.couplings):
            return [Arrival([layout]) for _, layout in sure[: len(places)]]
        found, own = question.ask(roots)
        if question.given and len(missed) < len(places) and not any(found):
            below = _below_zeros(question, outputs)
            found, own = (found, own) if below is None else (below, True)
        self._own_rows = own if returned else None
        if own is False or (own is None and (not returned or any(f and f.is_anyones() for f in found))):
            return _apart(question, outputs, found, missed, self._returned, returned=returned)
        ends = {(root.edge.node, root.edge.output_nr) for root in roots}
        others = [t for t in outputs if (t.grad_fn, t.output_nr) not in ends]
        asked = missed | {i for i, f in enumerate(found) if f is not None and f.is_open and others}
        if asked:
            nothing = [None for _ in found]
            apart = _apart(question, others, nothing, asked, self._returned, returned=returned)
            return [f if f and not (a and a.layouts) else a for f, a in zip(found, apart, strict=True)]
        if at_once and all(f is None or la in f.layouts for f, (_, la) in zip(found, sure, strict=False)):
            self._all_at_once = False  # this model's gradients come out in other digits each time
        return found

    def look_at_the_second_axis(
        self, forward_pass: ForwardPass, outputs: Sequence[Tensor], walk: GraphWalk, taint: DataTaint
    ) -> None:
        """Warn if the model seems to be called with time first, [T, B, ...]: steps are taken for samples then.

        So it is where rows of the first axis depend on each other, from what the first layers give to what the model
        returns, and those of the second do not. BatchNorm's coupling counts for none.

        Args:
            forward_pass: The model's first pass.
            outputs: What it returned.
            walk: What was found in its graph.
            taint: Where no function has left the samples' axis unknown up to the outputs, there is nothing to look for.
        """
        batch, couplings = forward_pass.batch_size, walk.couplings
        calls = [c for c in forward_pass.uses.rule_calls if c.edges and c.given_rows == Layout()]
        places = [place for place in (place_of(c.edges[0]) for c in calls) if place[1][:1] == (batch,)]
        widths = {shape[1] for _, shape in places if len(shape) > 2 and shape[1] > 1}
        whole = [t for t in outputs if t.dim() > 1 and t.shape[0] == batch and t.shape[1] in widths]
        whole = [t for t in whole if taint.layout_of(t) != Layout()]
        if batch < 2 or not whole or self._own_rows or walk.once or self._is_split() or any(t.is_meta for t in outputs):
            return
        width = whole[0].shape[1]
        asked = [place for place in places if place[1][1:2] == (width,)]
        edge, like = torch.autograd.graph.get_gradient_edge(whole[0]), whole[0].detach()

        def own(axis: int, count: int) -> bool | None:
            there = [(place, Layout(axis)) for place in asked]
            return _Question((), there, count, (count - 1, 0), couplings).ask([Root(edge, like, Layout(axis))])[1]

        try:
            with looking(), forward_pass.undisturbed():
                time_first = own(0, batch) is False and own(1, width)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:
            return
        if time_first:
            coupled = "Rows of the first axis depend on each other here, and those of the second do not."
            warnings.warn(f"{coupled} {TIME_FIRST}.", stacklevel=2)


def _apart(
    question: _Question,
    outputs: Sequence[Tensor],
    together: Sequence[Arrival | None],
    missed: Collection[int],
    known: dict[tuple[str, int], Layout],
    *,
    returned: bool,
) -> list[Arrival | None]:
    """The same with one root after the other; what mixes samples gives way to what it was made of.

    Args:
        question: What to ask.
        outputs: What the model returned.
        together: What all roots together have told.
        missed: Places that lie below none of these.
        known: Whose rows are whose in these, by operation and number of axes, as far as a pass has shown it.
        returned: Whether these were what the model returned.
    """
    settled: dict[int, Arrival] = {}
    mixing: set[int] = set()
    elsewhere = False
    wanted = {i for i, f in enumerate(together) if f is not None} | set(missed)
    queue = deque((t.grad_fn, t.output_nr) for t in outputs if t.grad_fn is not None)
    ends = set(queue)
    seen = set(queue)
    tries = 0
    while queue and tries < _MOST and not wanted <= settled.keys():
        node, output = queue.popleft()
        shape = shape_at(node, output) or ()
        found: list[Arrival | None] = []
        own: bool | None = False
        for layout in sorted(_likely(shape, question.batch), key=lambda la: la != known.get((node.name(), len(shape)))):
            tries += 1
            root = root_at(node, output, outputs[0].device, layout)
            found, own = question.ask([root], 2)  # which tell what mixes
            if own is not False:
                found, own = question.ask([root]) if len(question.samples) > 2 else (found, own)
                break
        if own and (node, output) in ends:
            known[node.name(), len(shape)] = layout
        elsewhere |= question.elsewhere and (node, output) in ends
        mixing |= {i for i, f in enumerate(found) if f is not None and own is False}
        if own or (own is None and (node, output) in ends):
            guess = own is None and shape[:1] != (question.batch,) and (node.name(), len(shape)) not in known
            here = ((i, f) for i, f in enumerate(found) if f is not None and (own or not f.is_anyones()))
            told = {i: replace(f, guessed=guess) for i, f in here}
            settled = told | {i: f for i, f in settled.items() if i not in told or not f.is_anyones()}
        elif question.given:
            below = [
                (c, k) for c, k in node.next_functions if c is not None and c.next_functions and (c, k) not in seen
            ]
            seen.update(below)
            queue += below
    asked = ((i, f) for i, f in enumerate(together) if f is not None and returned)
    mixed = {i: replace(f, mixed=f.is_anyones(), elsewhere=elsewhere) for i, f in asked}
    unsettled = {i: _nothing_told(question.samples) for i in wanted} | mixed
    coupled = {i: replace(f, coupled=f.mixed and i in mixing) for i, f in unsettled.items()}
    return [(coupled | settled).get(i) for i in range(len(together))]


def _below_zeros(question: _Question, outputs: Sequence[Tensor]) -> list[Arrival | None] | None:
    """From what a head of zeros returns no gradient comes. What it was made of is asked, if that is known to tell."""
    queue = deque((t.grad_fn, t.output_nr) for t in outputs if t.grad_fn is not None)
    tries = 0
    while queue and tries < _MOST_BELOW_ZEROS:
        for child, k in queue.popleft()[0].next_functions:
            if child is None or not child.next_functions:
                continue
            queue.append((child, k))
            shape = shape_at(child, k) or ()
            for layout in _likely(shape, question.batch)[:1] if shape else ():
                tries += 1
                found, own = question.ask([root_at(child, k, outputs[0].device, layout)])
                if own:
                    return found
    return None


def _below(roots: Sequence[Root]) -> set[Node]:
    """All operations from which values came to these."""
    stack = [root.edge.node for root in roots]
    found = set(stack)
    while stack:
        below = {child for child, _ in stack.pop().next_functions if child is not None} - found
        found |= below
        stack += below
    return found


def _nothing_told(samples: Sequence[int]) -> Arrival:
    return Arrival([], samples=len(samples), mixed=True)


def _likely(shape: Sequence[int], batch: int) -> list[Layout]:
    """Layouts to try of a value: of one axis the outermost rows, or the innermost."""
    return [layout for layout in candidates(shape, batch) if layout.outer in (1, -1)]
