"""Which rows of a tensor belong to which sample, and the proof of it.

A layer's output is [B, ...] as a rule. But models fold windows into the batch, [B * windows, ...], put time first,
[T, B, ...], or flatten that, [T * B, ...]. Where shapes leave it open, a gradient that starts from one sample of the
model's output is followed through the graph, once: the rows at which it arrives are that sample's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node
from torch.utils.hooks import RemovableHandle

Shape = Sequence[int]


@dataclass(frozen=True)
class Layout:
    """An axis of length outer * B * inner; the middle one is the sample.

    Attributes:
        axis: Which axis.
        outer: How many times the batch is repeated along it: 1 where each sample's rows lie together; -1 where they lie
            farthest apart (inner is 1), as in [T * B, ...].
    """

    axis: int = 0
    outer: int = 1

    def sizes(self, shape: Shape, batch: int) -> tuple[int, int] | None:
        """(outer, inner) for a tensor of this shape; None if it cannot be laid out so."""
        if self.axis >= len(shape) or batch == 0 or shape[self.axis] % batch:
            return None
        rows = shape[self.axis] // batch
        outer = rows if self.outer < 0 else self.outer
        return None if outer == 0 or rows % outer else (outer, rows // outer)

    def samples_first(self, t: Tensor, batch: int) -> Tensor:
        """[B, *axes before, outer, inner, *axes after]."""
        if t.dim() == 0:
            return t.reshape(1, 1, 1)
        sizes = self.sizes(t.shape, batch)
        assert sizes is not None
        return t.unflatten(self.axis, (sizes[0], batch, sizes[1])).movedim(self.axis + 1, 0)

    def one_sample_each(self, t: Tensor, batch: int, samples: slice) -> Tensor:
        """[b, *shape]: a copy of `t` for each of some samples, in which all other samples are zero."""
        count = len(range(*samples.indices(batch)))
        if batch == 1 or t.dim() == 0:
            return t.unsqueeze(0).expand(count, *t.shape)
        sizes = self.sizes(t.shape, batch)
        assert sizes is not None
        split = t.unflatten(self.axis, (sizes[0], batch, sizes[1]))
        mine = torch.eye(batch, dtype=torch.bool, device=t.device)[samples]
        shape = [count] + [1] * split.dim()
        shape[self.axis + 2] = batch
        return split.unsqueeze(0).where(mine.view(shape), 0).flatten(self.axis + 1, self.axis + 3)


def is_open(shape: Shape, batch: int) -> bool:
    """Whether the batch could as well be in an axis between the first and the last."""
    return len(shape) > 2 and batch > 1 and any(n and n % batch == 0 for n in shape[1:-1])


def two_of(batch: int) -> tuple[int, int]:
    """Samples that tell one layout from another: the last, and one that moves where two halves are mixed."""
    return batch - 1, int(batch > 2)


def candidates(shape: Shape, batch: int) -> list[Layout]:
    """Every layout that a shape allows, the likeliest first."""
    found: list[Layout] = []
    for axis, size in enumerate(shape):
        if not size or size % batch:
            continue
        rows = size // batch
        outers = [1, -1, *(n for n in range(2, rows) if rows % n == 0)]
        found += [Layout(axis, outer) for outer in outers[:rows]]
    return sorted(found, key=lambda layout: (layout.outer != 1, layout.axis))


@dataclass
class Arrival:
    """Where the gradient of some samples, each by itself, arrived in a tensor.

    Attributes:
        layouts: Those that are right, the likeliest first.
        missed: Axes of which it left rows out. Where there are none, samples are coupled, or the rows belong to none.
        samples: Of how many samples it arrived: what belongs to one alone, as `x[i]`, is coupled to no other.
        mixed: Whether all that it could be followed from mixes samples: it arrives everywhere, and that tells nothing.
        touched: How many rows of the first axis it reached, of each sample, added up.
        elsewhere: Whether what it could be followed from is other samples' rows.
        guessed: Whether it was followed from what has more rows than samples, of which nothing tells whose they are.
        rows: By sample which rows of each axis it reached.
    """

    layouts: list[Layout]
    missed: set[int] = field(default_factory=set)
    samples: int = 0
    mixed: bool = False
    touched: int = 0
    elsewhere: bool = False
    guessed: bool = False
    rows: dict[int, list[Tensor]] = field(default_factory=dict)

    def is_anyones(self) -> bool:
        """Whether each of several samples touched every row of every axis."""
        return not self.layouts and not self.missed and self.samples > 1

    def is_elsewhere(self, layout: Layout) -> bool:
        """Whether each sample has rows to itself, although they are not its own."""
        return layout not in self.layouts and 0 < self.touched <= self.samples

    def is_shared(self, shape: Shape, batch: int, axis: int = 0) -> bool:
        """Whether samples reach rows of each other, or more than there are for each."""
        reached = torch.stack([rows[axis] for rows in self.rows.values()] or [torch.zeros(1)]).sum(0)
        return int(reached.max()) > 1 or int(reached.sum()) > len(self.rows) * (shape[axis] // batch)

    def is_hidden(self, shape: Shape, batch: int) -> bool:
        """Whether nothing tells which axis is the samples', although the first looks so."""
        return self.mixed and shape[:1] == (batch,) and is_open(shape, batch)

    def everywhere(self, axis: int = 0) -> bool:
        """Whether each of several samples touched every row of an axis."""
        return axis not in self.missed and self.samples > 1


@dataclass(frozen=True)
class Root:
    """A place in the graph from which samples' gradients are followed.

    Attributes:
        edge: The place.
        like: A tensor of its shape, type and device.
        layout: Which rows are whose there.
    """

    edge: GradientEdge
    like: Tensor
    layout: Layout = field(default_factory=Layout)

    def of_one(self, sample: int, batch: int) -> Tensor:
        """Numbers for one sample, zeros for the others."""
        start = torch.zeros_like(self.like, memory_format=torch.contiguous_format)
        rows = self._rows(start, batch)
        rows[sample] = _numbers(rows[sample])
        return start

    def of_all(self, factors: Tensor) -> Tensor:
        """Numbers for all samples, each sample's times its factor."""
        start = _numbers(self.like)
        rows = self._rows(start, len(factors))
        rows.mul_(_for_rows(factors, rows))
        return start

    def _rows(self, t: Tensor, batch: int) -> Tensor:
        return self.layout.samples_first(t, batch)


def prove(
    roots: Sequence[Root],
    places: Sequence[tuple[GradientEdge, tuple[int, ...]]],
    batch: int,
    samples: Iterable[int],
    couplings: Sequence[Node],
) -> list[Arrival | None]:
    """Follow one sample's gradient, for some samples.

    Args:
        roots: Where to begin.
        places: What to look at, with its shape.
        batch: B > 1.
        samples: Which: two tell one layout from another, all that the data have moved no rows.
        couplings: BatchNorm's operations, through which a sample would touch all others.

    Returns:
        For each place, where the gradient arrived; None if it did not.

    Raises:
        RuntimeError: From torch, if the graph can be differentiated only once.
    """
    left: list[Arrival | None] = [None] * len(places)
    edges = [edge for edge, _ in places]
    for sample in samples:

        def look(i: int, g: Tensor | None, sample: int = sample) -> None:
            rows = None if g is None else _rows_touched(g)
            if rows is not None:
                before = left[i] or Arrival(candidates(places[i][1], batch))
                right = [la for la in before.layouts if _holds_only(rows[la.axis], la, sample, batch)]
                missed = {k for k, touched in enumerate(rows) if not touched.all()}
                count = before.touched + (int(rows[0].sum()) if rows else 0)
                all_rows = before.rows | {sample: rows}
                left[i] = Arrival(right, before.missed | missed, before.samples + 1, touched=count, rows=all_rows)

        starts = [root.of_one(sample, batch) for root in roots]
        _look_on_the_way(roots, edges, starts, couplings, look)
    return left


def _look_on_the_way(
    roots: Sequence[Root],
    edges: Sequence[GradientEdge],
    starts: Sequence[Tensor],
    couplings: Sequence[Node],
    look: Callable[[int, Tensor | None], None],
) -> None:
    """Follow gradients, and look at each as it comes: together they are as large as the model's activations.

    What autograd is asked for it holds to the end. So it is asked for the deepest alone, and passes by the others.
    """
    numbers: dict[Node, list[int]] = {}
    for i, edge in enumerate(edges):
        numbers.setdefault(edge.node, []).append(i)
    last = [i for node in _deepest(set(numbers)) for i in numbers.pop(node)]

    def watch(node: Node, here: Sequence[int]) -> RemovableHandle:
        def passing(grads: Sequence[Tensor | None]) -> None:
            for i in here:
                look(i, grads[edges[i].output_nr])

        return node.register_prehook(passing)

    handles = [watch(node, here) for node, here in numbers.items()]
    try:
        for i, g in zip(last, _follow(roots, [edges[i] for i in last], starts, couplings), strict=True):
            look(i, g)
    finally:
        for handle in handles:
            handle.remove()


def _deepest(nodes: set[Node]) -> set[Node]:
    """Those from which none of the others can be reached."""
    above: dict[Node, bool] = {}
    stack = [(node, False) for node in nodes]
    while stack:
        node, children_done = stack.pop()
        children = [child for child, _ in node.next_functions if child is not None]
        if children_done:
            above[node] = any(child in nodes or above[child] for child in children)
        elif node not in above:
            above[node] = False
            stack.append((node, True))
            stack += [(child, False) for child in children if child not in above]
    return {node for node in nodes if not above[node]}


def stay(
    roots: Sequence[Root], places: Sequence[tuple[GradientEdge, Layout]], batch: int, couplings: Sequence[Node]
) -> bool:
    """Whether the rows of some places are laid out as they are believed to be; of all samples in a few passes.

    Each sample's gradient is multiplied by a power of two of its own. That changes no digit, so that it can be found in
    its rows again, if nothing of another sample is in them.

    Args:
        roots: See `prove`.
        places: What to look at, with what is believed of it.
        batch: B > 1.
        couplings: See `prove`.

    Returns:
        False if any is not, or may be not: as where sums are in another order each time.

    Raises:
        RuntimeError: From torch, if the graph can be differentiated only once.
    """
    plain: Sequence[Tensor | None] = ()
    for digit in range(-1, math.ceil(math.log(batch, _POWERS) - 1e-9)):
        exact = [1.0 if digit < 0 else 2.0 ** (i // _POWERS**digit % _POWERS) for i in range(batch)]
        factors = torch.tensor(exact, device=roots[0].like.device)
        starts = [root.of_all(factors) for root in roots]
        arrived = _follow(roots, [edge for edge, _ in places], starts, couplings)
        plain = plain or arrived
        for before, g, (_, layout) in zip(plain, arrived, places, strict=True):
            if before is None or g is None:
                continue
            rows = layout.samples_first(before, batch)
            rows = rows * _for_rows(factors, rows)
            if not torch.equal(rows, layout.samples_first(g, batch)) or not bool(g.isfinite().all()):
                return False
    return True


_POWERS = 16


def _for_rows(factors: Tensor, rows: Tensor) -> Tensor:
    """A factor for each row, in the rows' type."""
    return factors.to(rows).view(-1, *[1] * (rows.dim() - 1))


def _follow(
    roots: Sequence[Root], edges: Sequence[GradientEdge], starts: Sequence[Tensor], couplings: Sequence[Node]
) -> tuple[Tensor | None, ...]:
    with _uncoupled(couplings):
        return torch.autograd.grad([r.edge for r in roots], edges, starts, retain_graph=True, allow_unused=True)


def _numbers(like: Tensor) -> Tensor:
    """Numbers that are not drawn: the run's own random numbers must not change."""
    numbers = torch.arange(1, like.numel() + 1, device=like.device).mul(1.7).cos().add(1.5)
    return numbers.view(like.shape).to(like.dtype)


def _holds_only(touched: Tensor, layout: Layout, sample: int, batch: int) -> bool:
    """Whether of an axis [n] only rows of one sample are touched."""
    samples = Layout(0, layout.outer).samples_first(touched, batch).flatten(1).any(1)
    samples[sample] = False
    return not bool(samples.any())


def _rows_touched(g: Tensor) -> list[Tensor] | None:
    """For each axis which of its rows hold a number that is not zero; None if there is no such number."""
    touched = g.abs() > 0  # what is not a number, as zero times infinity, came from nobody
    if not g.numel() or not g.dim():
        return [] if g.numel() and bool(touched) else None
    found: list[Tensor] = []
    left = touched.view(torch.uint8)  # whose maximum torch finds in a tenth of the time of `any`
    while left.dim() > 1:
        found.insert(0, left.flatten(0, -2).amax(0))
        left = left.amax(-1)
    rows = [t.bool().cpu() for t in (left, *found)]
    return rows if bool(rows[0].any()) else None


@contextmanager
def _uncoupled(nodes: Sequence[Node]) -> Iterator[None]:
    """BatchNorm lets a sample's gradient reach the other samples. Here it must not: only rows matter."""
    handles = [node.register_hook(_keep_rows) for node in nodes]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _keep_rows(inputs: Sequence[Tensor | None], outputs: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    g, x = outputs[0], inputs[0]
    if g is None or x is None:
        return tuple(inputs)
    return (g.to(x.dtype), *inputs[1:])
