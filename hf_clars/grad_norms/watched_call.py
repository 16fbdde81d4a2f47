"""A call of a module without a rule: what is remembered of it while its gradient is on the way."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from hf_clars.grad_norms.adoption import Orphan
from hf_clars.grad_norms.graph_uses import GraphRegion, GraphUse
from hf_clars.grad_norms.hooked_modules import HookedModule
from hf_clars.grad_norms.passes import ForwardPass
from hf_clars.grad_norms.shared_results import shared_results
from hf_clars.grad_norms.torch_internals import saved_tensors_are_packed

Call = tuple[tuple[Any, ...], dict[str, Any]]
Key = tuple[HookedModule, bool, tuple[str, ...]]


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
        return self.hooked, self.hooked.module.training, tuple(self.wanted)

    def direct_uses(self) -> list[GraphUse]:
        """Where the graph uses bare parameters and shared results, if it may be looked at and these are all wanted."""
        if saved_tensors_are_packed():
            return []
        shared = shared_results(self.adopted, {p: n for n, p in self.wanted.items()})
        if shared is None:
            return []
        adopted = {operand.name for operands in shared.values() for operand in operands}
        bare = {n: p for n, p in self.wanted.items() if n not in adopted}
        if bare.keys() != self.hooked.trainable().keys():
            return []
        uses = [*self.region.uses(self.hooked.leaves(bare)), *self.region.uses_of(shared)]
        return uses if {use.name for use in uses} == self.wanted.keys() else []
