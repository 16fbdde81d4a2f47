"""Which rows of a tensor belong to which sample, and the proof of it.

A layer's output is [B, ...] as a rule. But models fold windows into the batch, [B * windows, ...], put time first,
[T, B, ...], or flatten that, [T * B, ...]. Where shapes leave it open, a gradient that starts from one sample of the
model's output is followed through the graph, once: the rows at which it arrives are that sample's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

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


def many_of(batch: int) -> Sequence[int]:
    """Samples that tell more, where two have reached so few rows that several layouts fit: at most 16."""
    return range(batch)[:: -(-batch // 16)]


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
        coupled: Whether it did arrive, and from nothing but what mixes samples.
        touched: How many rows of the first axis it reached, of each sample, added up.
        elsewhere: Whether what it could be followed from is other samples' rows.
        guessed: Whether it was followed from what has more rows than samples, of which nothing tells whose they are.
        rows: By sample which rows of each axis it reached.
    """

    layouts: list[Layout]
    missed: set[int] = field(default_factory=set)
    samples: int = 0
    mixed: bool = False
    coupled: bool = False
    touched: int = 0
    elsewhere: bool = False
    guessed: bool = False
    rows: dict[int, list[Tensor]] = field(default_factory=dict)

    @property
    def is_open(self) -> bool:
        """Whether several layouts fit, as where a few rows are reached: each says the same of these, now."""
        return len(self.layouts) > 1

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
        rows.mul_(for_rows(factors, rows))
        return start

    def _rows(self, t: Tensor, batch: int) -> Tensor:
        return self.layout.samples_first(t, batch)


def _numbers(like: Tensor) -> Tensor:
    """Numbers that are not drawn: the run's own random numbers must not change."""
    numbers = torch.arange(1, like.numel() + 1, dtype=torch.float32, device=like.device).mul(1.7).cos().add(1.5)
    return numbers.view(like.shape).to(like.dtype)


def for_rows(factors: Tensor, rows: Tensor) -> Tensor:
    """A factor for each row, in the rows' type."""
    return factors.to(rows).view(-1, *[1] * (rows.dim() - 1))
