"""Who uses which parameter in one forward pass."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from hf_clars.grad_norms.graph.measured_uses import Arrival, Gate
    from hf_clars.grad_norms.hooked_modules import HookedModule
    from hf_clars.grad_norms.rule_call import RuleCall


class Uses:
    """The uses of parameters, and the places in the graph at which they are measured.

    Attributes:
        times: How often each parameter is used.
        several: Parameters with more than one use.
        rule_calls: Calls of modules that rules measure.
        in_graph: Hooks on the operations that other uses are measured at.
        gates: Modules around some of them.
        compiled: Parameters that compiled code measures.
        without_grad: How often a module was called without gradients: reentrant checkpointing will call it again.
        moved_without_grad: Those that were called so on rows that were given other places.
        recomputed: How often a module is still to be called again. Its parameters are counted already.
        returned: Parameters whose gradient an operation of somebody's own returned, where modules will be called again.
    """

    def __init__(self) -> None:
        self.times: Counter[nn.Parameter] = Counter()
        self.several: set[nn.Parameter] = set()
        self.rule_calls: list[RuleCall] = []
        self.in_graph: list[Arrival] = []
        self.gates: list[Gate] = []
        self.compiled: set[nn.Parameter] = set()
        self.without_grad: Counter[HookedModule] = Counter()
        self.moved_without_grad: set[HookedModule] = set()
        self.recomputed: Counter[HookedModule] = Counter()
        self.returned: set[nn.Parameter] = set()

    def add(self, param: nn.Parameter) -> None:
        """Count a use of a parameter."""
        times = self.times[param] = self.times.get(param, 0) + 1
        if times > 1:
            self.several.add(param)

    def forget(self, param: nn.Parameter) -> None:
        """Take back a use that was counted."""
        self.times[param] -= 1
        if self.times[param] < 2:
            self.several.discard(param)

    def note_recomputation(self) -> None:
        """The forward pass ends: what was called without gradients will be called again, and is counted now."""
        for hooked, times in self.without_grad.items():
            self.recomputed[hooked] += times
            for param in list(hooked.trainable().values()) * times:
                self.add(param)

    def free_graph(self) -> bool:
        """Drop what no gradient came through, so that the graph and its hooks do not keep each other.

        Returns:
            Whether a use in the graph was waiting.
        """
        waiting = any(arrival.waits for arrival in self.in_graph)
        for arrival in self.in_graph:
            arrival.free_graph()
        for gate in self.gates:
            gate.free_graph()
        self.in_graph.clear()
        self.gates.clear()
        self.leave_graph()
        return waiting

    def leave_graph(self) -> None:
        """Let go of the places at which rules measure: they were needed to look through the graph."""
        for call in self.rule_calls:
            call.leave_graph()
