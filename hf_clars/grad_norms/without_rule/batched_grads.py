"""Gradients for a stack of output gradients through one graph, which stays."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge


def batched_grads(
    edges: Sequence[GradientEdge], params: Sequence[nn.Parameter], stacks: Sequence[Tensor]
) -> list[Tensor | None]:
    """Differentiate once for every entry of the stacks, together where the operations allow it.

    Args:
        edges: Places in the graph.
        params: What to differentiate by.
        stacks: For each place [b, *its shape].

    Returns:
        For each parameter [b, *its shape]; None where the places do not depend on it.
    """

    def grads(outputs: list[Tensor], batched: bool) -> tuple[Tensor | None, ...]:
        return torch.autograd.grad(
            edges, params, grad_outputs=outputs, retain_graph=True, allow_unused=True, is_grads_batched=batched
        )

    try:
        return list(grads(list(stacks), True))
    except RuntimeError:  # an operation without a batching rule: one after the other
        rows = [grads([m[i] for m in stacks], False) for i in range(len(stacks[0]))]
        return [None if each[0] is None else torch.stack(each) for each in zip(*rows, strict=True)]
