"""A call of a module without a rule: what is remembered of it while its gradient is on the way."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from hf_clars.grad_norms.adoption import Orphan
from hf_clars.grad_norms.graph_uses import GraphRegion, GraphUse
from hf_clars.grad_norms.hooked_modules import HookedModule
from hf_clars.grad_norms.passes import ForwardPass
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
        """Where the graph uses the module's own parameters, if it may be looked at and they are all that is wanted."""
        if self.adopted or saved_tensors_are_packed() or self.wanted.keys() != self.hooked.trainable().keys():
            return []
        return self.region.uses(self.hooked.leaves(self.wanted))


@dataclass(eq=False)
class Trial:
    """A pass in which both the fallback and the graph's uses are followed, to compare them.

    Attributes:
        waiting: Uses whose gradient has not come.
        expected: Per-sample gradients by the fallback.
        found: The same by the uses.
    """

    waiting: int
    expected: dict[str, Tensor] = field(default_factory=dict)
    found: dict[str, Tensor] = field(default_factory=dict)
