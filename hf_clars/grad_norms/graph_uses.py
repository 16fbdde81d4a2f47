"""Bare parameters (class tokens, position embeddings, layer scales) measured where the graph uses them.

Modules without a rule mostly just expand, add or multiply their parameters. There the gradient that arrives at the
operation still has the batch axis that the parameter does not have: it is the per-sample gradient, but for a sum over
other broadcast axes. That costs nothing, where the general fallback runs the module once more. Whether it is right for
a module (the batch first, nothing but such operations) is seen by comparing both in its first backward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node

from hf_clars.grad_norms.torch_internals import broadcast_factor

Receiver = Callable[[str, nn.Parameter, Tensor | None], None]


@dataclass(frozen=True, eq=False)
class GraphUse:
    """One operation that takes a parameter.

    Attributes:
        name: The parameter's name in its module.
        param: The parameter.
        node: The operation's place in the graph.
        index: Which of its operands the parameter is.
    """

    name: str
    param: nn.Parameter
    node: Node
    index: int

    def watch(self, batch_size: int, count: int, active: Callable[[], bool], deliver: Receiver) -> None:
        """Have the per-sample gradients [count, *shape] delivered when they come; None if they cannot be told.

        Args:
            batch_size: Samples in the pass.
            count: How many of the first are wanted.
            active: False while the graph is differentiated for other purposes.
            deliver: Called with the parameter's name, the parameter and its gradients.
        """
        # The hook lives as long as the node: it must not hold the node, nor the factor longer than needed.
        name, param, factor = self.name, self.param, [broadcast_factor(self.node, self.index)]

        @torch.no_grad()
        def before_backward(grads: tuple[Tensor, ...]) -> None:
            if not active():
                return
            by = factor.pop() if factor else None
            found = None if by is None else unbroadcast(grads[0] * by, tuple(param.shape), batch_size)
            deliver(name, param, None if found is None else found[:count])

        self.node.register_prehook(before_backward)


class GraphRegion:
    """The part of the graph between a module's inputs and its outputs; walked when it is first asked for.

    Args:
        outputs: Differentiable tensors that the module returned.
        inputs: Tensors that it was given.
    """

    def __init__(self, outputs: Iterable[Tensor], inputs: Iterable[Tensor]) -> None:
        self._ends = [t.grad_fn for t in outputs]
        self._starts = {t.grad_fn for t in inputs}

    @cached_property
    def nodes(self) -> set[Node]:
        """Every operation in it."""
        seen = {node for node in self._ends if node is not None} - self._starts
        stack = list(seen)
        while stack:
            for node, _ in stack.pop().next_functions:
                if node is not None and node not in seen and node not in self._starts:
                    seen.add(node)
                    stack.append(node)
        return seen

    def uses(self, params: Mapping[str, tuple[nn.Parameter, nn.Parameter]]) -> list[GraphUse]:
        """Every operation in it that takes one of some parameters.

        Args:
            params: By name, each parameter and the tensor that the module computes with in its place.
        """
        edge = torch.autograd.graph.get_gradient_edge
        leaves = {edge(used).node: (n, p) for n, (p, used) in params.items() if used.requires_grad}
        return [
            GraphUse(*leaves[before], node, index)
            for node in self.nodes
            for index, (before, _) in enumerate(node.next_functions)
            if before in leaves
        ]


def unbroadcast(spread: Tensor, shape: tuple[int, ...], batch_size: int) -> Tensor | None:
    """Sum a gradient over all axes that an operand was broadcast along, but the batch.

    Args:
        spread: Gradient of the broadcast operand.
        shape: The operand's own shape.
        batch_size: B.

    Returns:
        [B, *shape]; None unless the operand was broadcast along a first axis of length B.
    """
    own = (1,) * (spread.dim() - len(shape)) + shape
    if spread.dim() == 0 or spread.shape[0] != batch_size or own[0] != 1:
        return None
    summed = [i for i in range(1, spread.dim()) if own[i] == 1 and spread.shape[i] > 1]
    return (spread.sum(summed, keepdim=True) if summed else spread).reshape(batch_size, *shape)
