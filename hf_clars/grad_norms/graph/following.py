"""The proof of whose rows are whose: gradients of one sample, or of all at once, are followed through the graph."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node
from torch.utils.hooks import RemovableHandle

from hf_clars.grad_norms.graph.layout import Arrival, Layout, Root, candidates, for_rows


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
    deepest = _deepest({edge.node for edge in edges})
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
        _look_on_the_way(roots, edges, deepest, starts, couplings, look)
    return left


def _look_on_the_way(
    roots: Sequence[Root],
    edges: Sequence[GradientEdge],
    deepest: set[Node],
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
    last = [i for node in deepest for i in numbers.pop(node)]

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
    above = above_some(nodes, nodes)
    return {node for node in nodes if not above[node]}


def above_some(nodes: set[Node], starts: Iterable[Node]) -> dict[Node, bool]:
    """Whether one of some operations can be reached, from each that can be reached from the starts."""
    above: dict[Node, bool] = {}
    stack = [(node, False) for node in starts]
    while stack:
        node, children_done = stack.pop()
        children = [child for child, _ in node.next_functions if child is not None]
        if children_done:
            above[node] = any(child in nodes or above[child] for child in children)
        elif node not in above:
            above[node] = False
            stack.append((node, True))
            stack += [(child, False) for child in children if child not in above]
    return above


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
            rows = rows * for_rows(factors, rows)
            if not torch.equal(rows, layout.samples_first(g, batch)) or not bool(g.isfinite().all()):
                return False
    return True


_POWERS = 16


def _follow(
    roots: Sequence[Root], edges: Sequence[GradientEdge], starts: Sequence[Tensor], couplings: Sequence[Node]
) -> tuple[Tensor | None, ...]:
    with _uncoupled(couplings):
        return torch.autograd.grad([r.edge for r in roots], edges, starts, retain_graph=True, allow_unused=True)


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
