"""An operand of an operation, once gradients of the operation's results have come: what its samples' gradients need."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import Node

from hf_clars.grad_norms.graph.layout import Layout
from hf_clars.grad_norms.norm_math import MAX_ELEMENTS, at_least_float32
from hf_clars.grad_norms.torch_internals import dtype_at, saved, shape_at

Grads = Sequence[Tensor | None]


@dataclass(eq=False, slots=True)
class Operand:
    """One operand, and the gradients of its operation's results.

    Attributes:
        node: The operation's place in the graph, not yet run backward.
        index: Which operand.
        shape: Of the operand.
        grads: Gradients of the operation's results; None where there is none.
        layouts: Which rows of each are whose; None where they are no sample's.
        batch: B.
        measured: How many of the first samples are measured.
    """

    node: Node
    index: int
    shape: tuple[int, ...]
    grads: Grads
    layouts: Sequence[Layout | None]
    batch: int
    measured: int

    def saved(self, name: str) -> Any:
        """What the operation saved under a name; None if it did not."""
        return saved(self.node, name)

    def kind(self, kinds: dict[str, Kind]) -> Kind | None:
        """The function that serves the operation, by the beginning of its name; none for complex numbers."""
        known = () if self.g.is_complex() else kinds.items()
        return next((fn for name, fn in known if self.node.name().startswith(name)), None)

    @property
    def has_one_gradient(self) -> bool:
        """Whether the first result has a gradient whose rows are samples', and no other has one."""
        first, *rest = self.grads
        return first is not None and self.layouts[0] is not None and all(t is None for t in rest)

    @property
    def g(self) -> Tensor:
        """Gradient of the first result, where it is the only one."""
        g = self.grads[0]
        assert g is not None
        return g

    @property
    def layout(self) -> Layout:
        """Which of its rows are whose."""
        layout = self.layouts[0]
        assert layout is not None
        return layout

    @property
    def is_batch_first(self) -> bool:
        """Whether its first axis is the samples', as in [B, ...]."""
        return self.layout == Layout() and len(self.g) == self.batch

    def mine(self, t: Tensor) -> Tensor:
        """The measured samples of [B, ...], in float32 at least."""
        return at_least_float32(t[: self.measured])

    def rows(self, t: Tensor) -> Tensor | None:
        """[measured, T, width] of a matrix [N, width] whose rows are laid out by samples."""
        if self.layout.axis != 0 or t.dim() != 2 or self.layout.sizes(t.shape, self.batch) is None:
            return None
        return self.mine(self.layout.samples_first(t, self.batch).flatten(1, 2))

    def one_by_one(self, differentiate: Callable[[Grads], Tensor] | None = None) -> Tensor:
        """Each sample's gradient [measured, *shape], with the gradients of all others set to zero.

        Args:
            differentiate: From stacks of gradients, [b, *shape of the result] or None for each result, to the
                operand's [b, *shape]. Default: `call_for_each`.
        """
        step = max(1, MAX_ELEMENTS // max(1, sum(g.numel() for g in self.grads if g is not None)))
        each, parts = differentiate or self.of_each, []
        for start in range(0, self.measured, step):
            parts.append(each(self.stacks(slice(start, min(start + step, self.measured)))))
        some = next(g for g in self.grads if g is not None)
        return torch.cat(parts) if parts else some.new_zeros(0, *self.shape)

    def stacks(self, samples: slice) -> Grads:
        """The results' gradients of some samples, each by itself; zeros stand for all others."""
        return [
            None if g is None or layout is None else layout.one_sample_each(g, self.batch, samples)
            for g, layout in zip(self.grads, self.layouts, strict=True)
        ]

    def of_each(self, stacks: Grads) -> Tensor:
        """The operation's backward function for each entry of a stack."""
        return call_for_each(self.node, self.index, stacks, self.shape)


Kind = Callable[[Operand], Tensor | None]


def call(node: Node, grads: Grads) -> tuple[Tensor | None, ...]:
    """An operation's backward function: from its results' gradients to its operands'."""
    if isinstance(node, BackwardCFunction):
        return _call_own(node, grads)
    result = node(*grads)  # type: ignore[operator]
    return result if isinstance(result, tuple) else (result,)


def _call_own(node: Any, grads: Grads) -> tuple[Tensor | None, ...]:
    """As `call`, of somebody's own `torch.autograd.Function`, whose backward has a result for every argument.

    The graph has a place for each argument that is a tensor, and leads on from those that need a gradient. autograd may
    promise zeros in the place of gradients that are not there, and so do we.
    """
    given = []
    for i, g in enumerate(grads):
        shape = shape_at(node, i) if g is None else None
        fill = shape is not None and dtype_at(node, i).is_floating_point
        some = next(t for t in grads if t is not None)
        given.append(some.new_zeros(shape or (), dtype=dtype_at(node, i)) if fill else g)
    result = node.apply(*given)
    results = result if isinstance(result, tuple) else (result,)
    wanted = iter([t for t, needed in zip(results, node.needs_input_grad, strict=False) if needed])
    return tuple(None if before is None else next(wanted) for before, _ in node.next_functions)


def call_for_each(node: Node, index: int, stacks: Grads, shape: Sequence[int]) -> Tensor:
    """An operation's backward function for a stack of gradients: [b, *shape] of one operand.

    Args:
        node: The operation.
        index: Which operand.
        stacks: [b, *shape of the result] for each result, None where there is no gradient.
        shape: Of the operand.
    """
    given = [t for t in stacks if t is not None]

    def one(*grads: Tensor) -> Tensor:
        rest = iter(grads)
        found = call(node, [None if t is None else next(rest) for t in stacks])[index]
        return grads[0].new_zeros(tuple(shape)) if found is None else found.sum_to_size(tuple(shape))

    # Own functions may look at values, write in place or start kernels; distances of a stack are wrong in torch 2.14.
    if isinstance(node, BackwardCFunction) or node.name().startswith("CdistBackward"):
        return torch.stack([one(*(t[i] for t in given)) for i in range(len(given[0]))])
    try:
        return torch.vmap(one)(*given)
    except (RuntimeError, ValueError, NotImplementedError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        return torch.stack([one(*(t[i] for t in given)) for i in range(len(given[0]))])
