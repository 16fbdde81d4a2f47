"""Bare parameters (class tokens, position embeddings, layer scales) measured where the graph uses them.

Modules without a rule mostly just expand, add or multiply their parameters. There the gradient that arrives at the
operation still has the batch axis that the parameter does not have: it is the per-sample gradient, but for a sum over
other broadcast axes. That costs nothing, where the general fallback runs the module once more. Whether it is right for
a module (the batch first, nothing but such operations) is seen by comparing both in its first backward pass.

The same holds for what a module made of its parameters for all samples at once: see `shared_results.py` and
`batch_free.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node

from hf_clars.grad_norms.norm_math import at_least_float32, squared_sum
from hf_clars.grad_norms.torch_internals import broadcast_factor, shape_at


@dataclass(frozen=True, eq=False)
class Operand:
    """What an operation of the graph takes, and how its per-sample gradients become a parameter's: here, they are.

    Attributes:
        name: The parameter's name in the module that is measured.
        param: The parameter.
        shape: Of the operand.
    """

    name: str
    param: nn.Parameter
    shape: tuple[int, ...]

    def grads(self, g: Tensor) -> Tensor:
        """The operand's per-sample gradients [b, *shape] -> the parameter's [b, *shape of the parameter]."""
        return g

    def squares(self, g: Tensor) -> Tensor:
        """The operand's per-sample gradients [b, *shape] -> the parameter's squared norms [b]."""
        return squared_sum(self.grads(g))


Receiver = Callable[[Operand, Tensor | None], None]
Signature = tuple[object, ...]


@dataclass(frozen=True, eq=False)
class GraphUse:
    """One operation that takes an operand.

    Attributes:
        operand: What it takes.
        node: The operation's place in the graph.
        index: Which of its operands that is.
        way: The names of the operations between the parameter and this one.
    """

    operand: Operand
    node: Node
    index: int
    way: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The parameter's name in the module that is measured."""
        return self.operand.name

    @property
    def param(self) -> nn.Parameter:
        """The parameter."""
        return self.operand.param

    def signature(self, batch_size: int) -> Signature:
        """What uses have in common that are measured in the same way."""
        folded = (shape_at(self.node) or (0,))[0] > batch_size
        return (self.name, type(self.operand).__name__, *self.way, self.node.name(), self.index, folded)

    def watch(self, batch_size: int, count: int, active: Callable[[], bool], deliver: Receiver) -> None:
        """Have the operand's per-sample gradients [count, *shape] delivered when they come; None if they can't be told.

        Args:
            batch_size: Samples in the pass.
            count: How many of the first are wanted.
            active: False while the graph is differentiated for other purposes.
            deliver: Called with the operand and its gradients, in float32 at least.
        """
        # The hook lives as long as the node: it must not hold the node, nor the factor longer than needed.
        operand, factor = self.operand, [broadcast_factor(self.node, self.index)]

        @torch.no_grad()
        def before_backward(grads: tuple[Tensor, ...]) -> None:
            if not active():
                return
            by = factor.pop() if factor else None
            found = None if by is None else unbroadcast(at_least_float32(grads[0]) * by, operand.shape, batch_size)
            deliver(operand, None if found is None else found[:count])

        self.node.register_prehook(before_backward)


class GraphRegion:
    """The part of the graph between a module's inputs and its outputs; walked when it is first asked for.

    Args:
        outputs: Differentiable tensors that the module returned.
        inputs: Tensors that it was given.

    Attributes:
        ends: Where the outputs come from.
    """

    def __init__(self, outputs: Iterable[Tensor], inputs: Iterable[Tensor]) -> None:
        self.ends = [t.grad_fn for t in outputs]
        self._starts = {t.grad_fn for t in inputs}

    @cached_property
    def nodes(self) -> set[Node]:
        """Every operation in it."""
        seen = {node for node in self.ends if node is not None} - self._starts
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
        used = {n: (p, leaf) for n, (p, leaf) in params.items() if leaf.requires_grad}
        return self.uses_of({edge(leaf).node: [Operand(n, p, tuple(p.shape))] for n, (p, leaf) in used.items()})

    def uses_of(self, operands: Mapping[Node, Sequence[Operand]]) -> list[GraphUse]:
        """Every operation in it that takes one of some operands.

        Args:
            operands: By the place in the graph that they come from.
        """
        return [
            GraphUse(operand, node, index)
            for node in self.nodes
            for index, (before, _) in enumerate(node.next_functions)
            if before is not None and before in operands
            for operand in operands[before]
        ]


def unbroadcast(spread: Tensor, shape: tuple[int, ...], batch_size: int) -> Tensor | None:
    """Sum a gradient over all axes that an operand was broadcast along, but the batch.

    Other axes may be folded into the first, behind the batch, as windows of an image are.

    Args:
        spread: Gradient of the broadcast operand.
        shape: The operand's own shape.
        batch_size: B.

    Returns:
        [B, *shape]; None unless the operand was broadcast along a first axis of length B, or a multiple of it.
    """
    if not is_spread(spread.shape, shape, batch_size):
        return None
    own = (1,) * (spread.dim() - len(shape)) + shape
    summed = [i for i in range(1, spread.dim()) if own[i] == 1 and spread.shape[i] > 1]
    kept = spread.sum(summed, keepdim=True) if summed else spread
    if kept.shape[0] > batch_size:
        kept = kept.unflatten(0, (batch_size, -1)).sum(1)
    return kept.reshape(batch_size, *shape)


def is_spread(result: Sequence[int], shape: Sequence[int], batch_size: int) -> bool:
    """Whether an operand was broadcast along the batch.

    Args:
        result: Shape of the operation's result.
        shape: Of the operand.
        batch_size: B.
    """
    if not result or len(shape) > len(result) or batch_size == 0 or result[0] == 0 or result[0] % batch_size:
        return False
    return len(shape) < len(result) or shape[0] == 1
