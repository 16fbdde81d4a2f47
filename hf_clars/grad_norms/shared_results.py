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
from torch.autograd.graph import Node

from hf_clars.grad_norms.adoption import Orphan
from hf_clars.grad_norms.graph_uses import Operand
from hf_clars.grad_norms.norm_math import at_least_float32
from hf_clars.grad_norms.registry import LayerRule


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


def shared_results(
    orphans: Iterable[Orphan], names: Mapping[nn.Parameter, str]
) -> dict[Node, list[SharedResult]] | None:
    """The results of calls that were made once for all samples, by their places in the graph.

    Args:
        orphans: The calls.
        names: The name of each of their parameters in the module that adopts them.

    Returns:
        The results; None if any of the calls is not of a kind that can be measured where its result is used: the rule
        has to take any number of axes between the batch and the last.
    """
    found: dict[Node, list[SharedResult]] = {}
    for orphan in orphans:
        rule = orphan.hooked.rule
        if rule is None or not rule.positions_in_the_middle or orphan.x is None or orphan.output is None:
            return None
        own = {p: n for n, p in orphan.hooked.params.items()}
        found[orphan.nodes[0]] = [
            SharedResult(
                names[p], p, tuple(orphan.output.shape), orphan.hooked.module, rule, own[p], orphan.x, orphan.output
            )
            for p in orphan.params
        ]
    return found
