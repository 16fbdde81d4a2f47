"""Parameters that go through some operations of their own before the graph spreads the result over the samples.

A table of relative positions is indexed and permuted before it is added to every sample's attention; Gemma's norms use
1 + w; a vision transformer resizes its positions. Up to that addition nothing belongs to any sample. The gradient that
arrives there does, and each sample's own goes back through these few operations, all samples in one call. Without this,
the module around would be differentiated for each sample. As for bare parameters, whether it is right is seen by
comparing both once.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node

from hf_clars.grad_norms.graph_uses import GraphUse, Operand, is_spread
from hf_clars.grad_norms.norm_math import at_least_float32
from hf_clars.grad_norms.torch_internals import dtype_at, may_spread, shape_at
from hf_clars.grad_norms.without_rule.batched_grads import batched_grads

Leaves = Mapping[str, tuple[nn.Parameter, nn.Parameter]]
LONGEST_WAY = 32
"""Operations; what takes more is left to the fallback."""


@dataclass(frozen=True, eq=False)
class BatchFree(Operand):
    """What some operations made of a parameter.

    Attributes:
        edge: Where it comes from in the graph.
        leaf: The tensor that is computed with in the parameter's place.
        dtype: Of the operand.
    """

    edge: GradientEdge
    leaf: nn.Parameter
    dtype: torch.dtype

    def grads(self, g: Tensor) -> Tensor:
        """See `Operand`."""
        (found,) = batched_grads([self.edge], [self.leaf], [g.to(self.dtype)])
        return g.new_zeros(len(g), *self.leaf.shape) if found is None else at_least_float32(found)


class BatchFreeSearch:
    """Follows parameters to where the batch comes in.

    Args:
        nodes: The operations between a module's inputs and its outputs.
        ends: Those whose results the module returns.
        batch_size: B.
    """

    def __init__(self, nodes: Iterable[Node], ends: Iterable[Node | None], batch_size: int) -> None:
        self._nodes, self._ends, self._batch_size = set(nodes), set(ends), batch_size
        self._consumers: dict[Node, list[tuple[Node, int, int]]] = {}
        for node in self._nodes:
            for index, (before, output) in enumerate(node.next_functions):
                if before is not None:
                    self._consumers.setdefault(before, []).append((node, index, output))
        self._own: dict[Node, bool] = {}

    def uses(self, params: Leaves, *, bare_only: bool = False) -> list[GraphUse] | None:
        """Every operation that spreads something made of these parameters over the batch.

        Args:
            params: By name, each parameter and the tensor that the module computes with in its place.
            bare_only: Only where a parameter is spread as it is: an engine's tensors must not be differentiated by.

        Returns:
            The uses; None if one of the parameters meets a sample in any other way.
        """
        found: list[GraphUse] = []
        for name, (param, leaf) in params.items():
            of_one = self._uses_of(name, param, leaf) if leaf.requires_grad else []
            if of_one is None or (bare_only and any(use.way for use in of_one)):
                return None
            found += of_one
        return found

    def _uses_of(self, name: str, param: nn.Parameter, leaf: nn.Parameter) -> list[GraphUse] | None:
        found: list[GraphUse] = []
        start = torch.autograd.graph.get_gradient_edge(leaf).node
        stack: list[tuple[Node, tuple[str, ...]]] = [(start, ())]
        seen = {start}
        while stack:
            node, way = stack.pop()
            if node in self._ends or len(way) > LONGEST_WAY:
                return None
            for consumer, index, output in self._consumers.get(node, ()):
                shape = tuple(param.shape) if node is start else shape_at(node, output)
                if shape is None:
                    return None
                spread = is_spread(shape_at(consumer) or (), shape, self._batch_size)
                if spread and may_spread(consumer):
                    operand = (
                        Operand(name, param, shape)
                        if node is start
                        else BatchFree(name, param, shape, GradientEdge(node, output), leaf, dtype_at(node, output))
                    )
                    found.append(GraphUse(operand, consumer, index, way))
                elif not self._is_own(consumer):
                    return None
                elif consumer not in seen:
                    seen.add(consumer)
                    stack.append((consumer, (*way, consumer.name())))
        return found

    def _is_own(self, node: Node) -> bool:
        """Whether an operation takes nothing that depends on the module's inputs, as far as the graph shows."""
        stack = [node]
        while stack:
            last = stack[-1]
            if last in self._own:
                stack.pop()
                continue
            before = [n for n, _ in last.next_functions if n is not None and n.next_functions]
            unknown = [n for n in before if n in self._nodes and n not in self._own]
            if unknown:
                stack += unknown
            else:
                self._own[last] = all(self._own.get(n, False) for n in before)
        return self._own[node]
