"""A call of a module without a rule: what is remembered of it while its gradient is on the way."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor, nn

from hf_clars.grad_norms.adoption import Orphan
from hf_clars.grad_norms.graph_uses import GraphRegion, GraphUse, Signature
from hf_clars.grad_norms.hooked_modules import HookedModule
from hf_clars.grad_norms.passes import ForwardPass
from hf_clars.grad_norms.torch_internals import saved_tensors_are_packed
from hf_clars.grad_norms.without_rule.batch_free import BatchFreeSearch
from hf_clars.grad_norms.without_rule.shared_results import shared_uses

Call = tuple[tuple[Any, ...], dict[str, Any]]
Key = tuple[HookedModule, bool, tuple[str, ...], tuple[Signature, ...]]


@dataclass(frozen=True, eq=False)
class WatchedCall:
    """A call that will be measured.

    Attributes:
        hooked: The module.
        current: The pass.
        x: Its first tensor, or `NO_INPUT`.
        call: Arguments and keyword arguments.
        outputs: Its differentiable outputs with the batch first, by their place among all tensors it returned.
        wanted: The parameters, by their name in the module.
        adopted: Calls inside that it is measured for too.
        region: The graph between inputs and outputs.
    """

    hooked: HookedModule
    current: ForwardPass
    x: Tensor
    call: Call
    outputs: dict[int, Tensor]
    wanted: dict[str, nn.Parameter]
    adopted: Sequence[Orphan]
    region: GraphRegion

    @property
    def key(self) -> Key:
        """What calls have in common that are measured in the same way."""
        signatures = sorted((use.signature(self.current.batch_size) for use in self.direct_uses), key=repr)
        return self.hooked, self.hooked.module.training, tuple(self.wanted), tuple(signatures)

    @cached_property
    def direct_uses(self) -> list[GraphUse]:
        """Where the graph spreads what the wanted parameters come to over the samples; none unless that is all."""
        leaves = self.hooked.leaves(self.wanted)
        plain = all(used is p and not hasattr(p, "ds_id") for p, used in leaves.values())
        if not self.wanted or saved_tensors_are_packed():
            return []
        batch_size = self.current.batch_size
        uses = shared_uses(self.adopted, {p: n for n, p in self.wanted.items()}, self.region, batch_size)
        shared = {use.name for use in uses}
        search = BatchFreeSearch(self.region.nodes, self.region.ends, batch_size)
        others = search.uses({n: leaf for n, leaf in leaves.items() if n not in shared}, bare_only=not plain)
        if others is None:
            return []
        uses += others
        return uses if {use.name for use in uses} == self.wanted.keys() else []
