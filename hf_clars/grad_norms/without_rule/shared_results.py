"""What a module made once for all samples, measured where the graph spreads it over them.

A language model looks its positions up once, [1, T] or [T], and adds them to the tokens of every sample. The gradient
that arrives at that addition is each sample's own; with it the rule of the lookup goes on, as if every sample had
looked up for itself. Without this, the module around the lookup, often the whole model, would be differentiated for
each sample. As for bare parameters, whether it is right is seen by comparing both once.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from hf_clars.grad_norms.adoption import Orphan
from hf_clars.grad_norms.graph_uses import GraphRegion, GraphUse, Operand, is_spread
from hf_clars.grad_norms.norm_math import at_least_float32
from hf_clars.grad_norms.registry import LayerRule
from hf_clars.grad_norms.torch_internals import may_spread, shape_at


@dataclass(frozen=True, eq=False)
class SharedResult(Operand):
    """The result of one call for all samples, for one of the module's parameters.

    Attributes:
        module: The module that was called.
        rule: Its rule.
        local: The parameter's name in that module.
        x: What it was called with, detached.
        output: What it returned, detached.
    """

    module: nn.Module
    rule: LayerRule
    local: str
    x: Tensor
    output: Tensor

    def grads(self, g: Tensor) -> Tensor:
        """See `Operand`."""
        return self.rule.per_sample_grads(self.module, self._saved(len(g)), g, {self.local})[self.local]

    def squares(self, g: Tensor) -> Tensor:
        """See `Operand`."""
        return self.rule.squared_norms(self.module, self._saved(len(g)), g, {self.local})[self.local]

    def _saved(self, count: int) -> tuple[Tensor, ...]:
        """What the rule would have saved if every sample had made the call."""
        x, output = (t.expand(count, *t.shape) for t in (self.x, self.output))
        return tuple(at_least_float32(t) for t in self.rule.save(self.module, x, output, {self.local}))


def shared_uses(
    orphans: Iterable[Orphan], names: Mapping[nn.Parameter, str], region: GraphRegion, batch_size: int
) -> list[GraphUse]:
    """Where the graph spreads the results of calls that were made once for all samples.

    Args:
        orphans: The calls.
        names: The name of each of their parameters in the module that adopts them.
        region: The graph of that module.
        batch_size: B.

    Returns:
        The uses of those results that are all spread at once, and whose rule takes any number of axes between the batch
        and the last.
    """
    found: list[GraphUse] = []
    for orphan in orphans:
        rule = orphan.hooked.rule
        if rule is None or not rule.positions_in_the_middle or orphan.x is None or orphan.output is None:
            continue
        own = {p: n for n, p in orphan.hooked.params.items()}
        shape = tuple(orphan.output.shape)
        operands = [
            SharedResult(names[p], p, shape, orphan.hooked.module, rule, own[p], orphan.x, orphan.output)
            for p in orphan.params
        ]
        uses = region.uses_of({orphan.nodes[0]: operands})
        if all(is_spread(shape_at(u.node) or (), shape, batch_size) and may_spread(u.node) for u in uses):
            found += uses
    return found
