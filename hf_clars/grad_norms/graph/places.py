"""Places in a pass's graph: what lies between two, and where values have rows."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from hf_clars.grad_norms.torch_internals import dtype_at, shape_at


def reaches(starts: Sequence[Node], node: Node, ends: set[Node]) -> bool:
    """Whether a node lies between some results and the inputs."""
    stack, seen = list(starts), set(starts)
    while stack:
        here = stack.pop()
        if here is node:
            return True
        for child, _ in here.next_functions:
            if child is not None and child not in seen and child not in ends:
                seen.add(child)
                stack.append(child)
    return False


def inner_roots(outputs: Sequence[Tensor], batch: int) -> list[tuple[GradientEdge, Tensor]]:
    """Below a loss that a model returns alone: the first values that have rows."""
    found: list[tuple[GradientEdge, Tensor]] = []
    device = outputs[0].device if outputs else torch.device("cpu")
    stack = [(t.grad_fn, t.output_nr) for t in outputs if t.grad_fn is not None]
    seen = set(stack)
    while stack:
        node, output = stack.pop()
        shape = shape_at(node, output)
        if shape and shape[0] and shape[0] % batch == 0:
            like = torch.empty(batch, shape[0] // batch, *shape[1:], dtype=dtype_at(node, output), device=device)
            found.append((GradientEdge(node, output), like))
            continue
        for child, i in node.next_functions:
            if child is not None and (child, i) not in seen and child.next_functions:
                seen.add((child, i))
                stack.append((child, i))
    return found
