"""Places in a pass's graph: what lies between two, and where values have rows."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from hf_clars.grad_norms.errors import WITHOUT_SAMPLES, BatchAxisError
from hf_clars.grad_norms.graph.layout import Arrival, Layout, Root
from hf_clars.grad_norms.graph.taint import MOVED, DataTaint
from hf_clars.grad_norms.hooked_modules import HookedModule
from hf_clars.grad_norms.pytree import tensors_in
from hf_clars.grad_norms.torch_internals import dtype_at, shape_at
from hf_clars.grad_norms.uses import RuleUse


@dataclass(eq=False)
class ContainerCall:
    """A call of a module without a rule: a possible gate.

    Attributes:
        hooked: The module.
        edges: Where its differentiable results come from.
        inputs: Where its inputs come from.
    """

    hooked: HookedModule
    edges: list[GradientEdge]
    inputs: set[Node]
    _inside: set[Node] | None = None

    @classmethod
    def of(cls, hooked: HookedModule, given: Any, output: Any, taint: DataTaint | None) -> ContainerCall:
        """A call; results whose rows may be anywhere are left out, unless the model itself returns them."""
        results = [t for t in tensors_in(output) if t.requires_grad]
        if taint is not None:
            hooked.moved_results.update(i for i, t in enumerate(results) if taint.moved(t) == MOVED)
        if hooked.path:
            results = [t for i, t in enumerate(results) if i not in hooked.moved_results]
        inputs = {t.grad_fn for t in tensors_in(given) if t.grad_fn is not None}
        edges = dict.fromkeys(torch.autograd.graph.get_gradient_edge(t) for t in results)  # some are returned twice
        return cls(hooked, list(edges), inputs)

    def batch_first(self, batch: int) -> list[GradientEdge]:
        """Results that are [B, ...]."""
        return [edge for edge in self.edges if place_of(edge)[1][:1] == (batch,)]

    def surrounds(self, node: Node, batch: int) -> bool:
        """Whether an operation lies between results [B, ...] and the inputs; the graph is looked through once."""
        if self._inside is None:
            stack = [edge.node for edge in self.batch_first(batch)]
            self._inside = set(stack)
            while stack:
                for child, _ in stack.pop().next_functions:
                    if child is not None and child not in self._inside and child not in self.inputs:
                        self._inside.add(child)
                        stack.append(child)
        return node in self._inside


def root_at(node: Node, output: int, device: torch.device, layout: Layout) -> Root:
    """A place as one to follow gradients from."""
    like = torch.empty(shape_at(node, output) or (), dtype=dtype_at(node, output), device=device)
    return Root(GradientEdge(node, output), like, layout)


def inner_roots(outputs: Sequence[Tensor], batch: int) -> list[Root]:
    """Below a loss that a model returns alone: the first values that have rows."""
    found: list[Root] = []
    device = outputs[0].device if outputs else torch.device("cpu")
    stack = [(t.grad_fn, t.output_nr) for t in outputs if t.grad_fn is not None]
    seen = set(stack)
    while stack:
        node, output = stack.pop()
        shape = shape_at(node, output)
        if shape and shape[0] and shape[0] % batch == 0:
            found.append(root_at(node, output, device, Layout()))
            continue
        for child, i in node.next_functions:
            if child is not None and (child, i) not in seen and child.next_functions:
                seen.add((child, i))
                stack.append((child, i))
    return found


def are_coupled(found: Arrival, moved: int | None, batch: int, axis: int = 0) -> bool:
    """Whether samples depend on each other, all, or some: then they touch more rows than there are to have alone."""
    some = not axis and moved is not None and found.touched > (batch if moved == MOVED else found.samples)
    return found.everywhere(axis) or some


def place_of(edge: GradientEdge) -> tuple[GradientEdge, tuple[int, ...]]:
    """A place in the graph, and the shape of the value there."""
    return edge, shape_at(edge.node, edge.output_nr) or ()


def announce(container: ContainerCall, names: Sequence[str]) -> None:
    """Say that a module is a gate."""
    warnings.warn(
        f"{container.hooked}: the gradient norms of {', '.join(sorted(names))} need a backward pass of this module for "
        "every sample, because rows inside belong to no sample. This is exact but slow: register a layer rule, freeze "
        "these parameters, or measure fewer samples.",
        stacklevel=2,
    )


def no_proof(call: RuleUse, batch: int) -> BatchAxisError:
    """The error for rows that cannot be proven to be a sample's."""
    return BatchAxisError(
        f"{call.hooked} is called on {batch * call.rows_per_sample} rows or more, and this model's graph does not tell "
        f"which of the {batch} samples they belong to: let the model return each sample's own outputs, as embeddings, "
        f"beside a loss or what else mixes samples, put the batch first, freeze the parameters, or {WITHOUT_SAMPLES}."
    )
