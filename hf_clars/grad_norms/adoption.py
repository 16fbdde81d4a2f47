"""Modules whose own tensors do not show which sample is which, and the modules around them that do.

A position table is looked up once for the whole batch; a window attention sees [batch * windows, ...]. The gradient of
such a call cannot be told apart by sample there, but in a module around it that takes and returns the batch as first
axis it can: that one adopts the parameters, and the general fallback differentiates it.

Where the batch is only folded with another axis, or its length may be a coincidence, the rule could do the work if a
sample's rows lie together. That is proven once, by a gradient that starts from one sample of the adopting module's
output and must arrive in that sample's rows alone; from the next pass on, the rule does it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node

from hf_clars.grad_norms.errors import BatchAxisError
from hf_clars.grad_norms.graph_uses import GraphRegion
from hf_clars.grad_norms.hooked_modules import HookedModule, folded_rows
from hf_clars.grad_norms.torch_internals import inside_backward

# Stands for the input of a module that takes no tensor, such as a table of position biases.
NO_INPUT = torch.empty(0)


@dataclass(eq=False)
class Orphan:
    """A call that waits for a module around it.

    Attributes:
        hooked: The module that was called.
        params: Its parameters.
        error: What to raise if no module around it can adopt them.
        nodes: Where its outputs come from in the graph: the module that adopts it must have them inside.
        edge: Where its output comes from in the graph, if the batch may be folded into its first axis.
        rows: Rows a sample then.
        x: Its detached input, if a rule serves it.
        output: Its detached output then.
    """

    hooked: HookedModule
    params: tuple[nn.Parameter, ...]
    error: BatchAxisError
    nodes: tuple[Node, ...] = ()
    edge: GradientEdge | None = None
    rows: int = 0
    x: Tensor | None = None
    output: Tensor | None = None

    def is_inside(self, region: GraphRegion) -> bool:
        """Whether the call was made between a module's inputs and outputs, and not on the way to its inputs."""
        if not self.nodes:  # nothing is known of what it returned
            own = {id(p) for p in self.params}
            named = {**self.hooked.params, **self.hooked.inner}
            return bool(region.uses(self.hooked.leaves({n: p for n, p in named.items() if id(p) in own})))
        # A view that was then modified in place has lost its own place in the graph, but not that of what it views.
        before = {b for node in self.nodes for b, _ in node.next_functions if b is not None and b.next_functions}
        return not region.nodes.isdisjoint({*self.nodes, *before})

    def learn(self, outputs: Sequence[Tensor], batch_size: int) -> bool:
        """Prove, if it is so, that a sample's rows lie together, for later passes.

        Args:
            outputs: Differentiable outputs of the adopting module, batch axis first.
            batch_size: Samples in the pass.

        Returns:
            Whether it is so.
        """
        if self.edge is None or self.x is None:
            return False
        try:
            if not rows_lie_together(outputs, self.edge, self.rows, batch_size):
                return False
        except RuntimeError:  # reentrant checkpointing on the way: only backward() can differentiate that
            return False
        self.hooked.learn_rows(self.rows, self.x)
        return True


def rows_lie_together(outputs: Sequence[Tensor], edge: GradientEdge, rows: int, batch_size: int) -> bool:
    """Whether rows [i * rows, (i + 1) * rows) of an inner tensor serve sample i and no other.

    Looked at for the first, a middle and the last sample.

    Args:
        outputs: Outer tensors [B, ...].
        edge: The inner tensor's place in the graph.
        rows: Rows a sample.
        batch_size: B.
    """
    for sample in {0, batch_size // 2, batch_size - 1}:
        starts = [torch.zeros_like(t) for t in outputs]
        for start in starts:
            start[sample].normal_()
        (g,) = torch.autograd.grad(outputs, [edge], starts, retain_graph=True, allow_unused=True)
        if g is None:
            return False
        touched = g.unflatten(0, (batch_size, rows)).flatten(1).ne(0).any(1)
        if not touched[sample] or touched.sum() != 1:
            return False
    return True


def orphan_of(
    hooked: HookedModule, batch_size: int, params: Iterable[nn.Parameter], x: Tensor, outputs: Sequence[Tensor]
) -> Orphan:
    """A call that its own tensors do not tell apart by sample.

    Args:
        hooked: The module.
        batch_size: Samples in the pass.
        params: The parameters to measure.
        x: Its input, or `NO_INPUT`.
        outputs: Its differentiable outputs.
    """
    taken = "no tensor" if x is NO_INPUT else str(tuple(x.shape))
    error = hooked.no_batch_axis(taken, outputs, batch_size, recomputed=inside_backward())
    orphan = Orphan(
        hooked, tuple(params), error, tuple(torch.autograd.graph.get_gradient_edge(t).node for t in outputs)
    )
    if hooked.rule is None or not outputs or x is NO_INPUT:
        return orphan
    orphan.x, orphan.output = x.detach(), outputs[0].detach()
    rows = folded_rows(x, outputs[0], batch_size) if hooked.rule.has_batch_axis(hooked.module, x) else None
    if rows:
        orphan.edge, orphan.rows = torch.autograd.graph.get_gradient_edge(outputs[0]), rows
    return orphan
