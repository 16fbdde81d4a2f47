"""One forward pass and what its backward pass has delivered so far."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hf_clars.grad_norms.adoption import Orphan
from hf_clars.grad_norms.batch_axis import OpenCall, is_open
from hf_clars.grad_norms.graph_uses import GraphUse
from hf_clars.grad_norms.hooked_modules import HookedModule
from hf_clars.grad_norms.module_call import ModuleCall
from hf_clars.grad_norms.norm_math import SMALL, squared_sum
from hf_clars.grad_norms.trees import memory_of

if TYPE_CHECKING:
    from hf_clars.grad_norms.rule_call import RuleCall
    from hf_clars.grad_norms.tied_tables import TiedTable


@dataclass(eq=False)
class ForwardPass:
    """The bookkeeping of one forward pass.

    Attributes:
        batch_size: Samples in the pass.
        kept: How many of its first samples are measured.
        implicit: True when the pass was opened by a submodule rather than by the model's own forward.
        captured: Modules whose calls are waiting for their gradients.
        without_grad: How often a module was called without gradients: reentrant checkpointing will call it again.
        orphans: Calls that wait for a module around them.
        open_calls: Calls that have yet to be proven to have the batch first; they hold on to the graph until then.
        learned: Uses by calls that were adopted, but that the rule will measure from the next pass on.
        device: Where the first captured call took place.
        uses: How often each parameter was used by a captured module call.
        uses_inside: Further uses that one call of the fallback is for; counted where coverage will be proven.
        uses_by_fallback: Where in the graph all of these are, until coverage is proven.
        tied_uses: Of parameters that a module shares with one around it: who has been captured with each.
        rule_calls: Calls that rules measure.
        several: Parameters with more than one use.
        small: Layer index and per-sample gradients of small parameters, which are squared together in the end.
        squares: {layer index: Tensor [kept]}, squared norms added up over the layer's parameters.
        pending: Per-sample gradients of parameters used more than once: those add up before they are squared.
        tables: Parameters used more than once that are tables looked up; see `tied_tables.py`.
        fallback_calls: Calls remembered for the fallback; each holds on to its graph until its gradient has come.
        calls: Number of captured module calls.
        fired: Calls whose gradient has arrived.
        backward_seen: Whether a gradient has reached this pass.
        closed: Whether its norms have been taken.
        given: What the model was called with: (memory, shape) of tensors with the batch as one of several axes.
        own_results: Where the results of calls on the model's own tensors come from in the graph; see `own_inputs.py`.
    """

    batch_size: int
    kept: int
    implicit: bool = False
    captured: set[HookedModule] = field(default_factory=set)
    without_grad: Counter[HookedModule] = field(default_factory=Counter)
    orphans: list[Orphan] = field(default_factory=list)
    open_calls: list[OpenCall] = field(default_factory=list)
    learned: Counter[nn.Parameter] = field(default_factory=Counter)
    device: torch.device | None = None
    uses: Counter[nn.Parameter] = field(default_factory=Counter)
    uses_inside: Counter[nn.Parameter] = field(default_factory=Counter)
    uses_by_fallback: list[tuple[nn.Parameter, torch.autograd.graph.Node]] = field(default_factory=list)
    tied_uses: dict[nn.Parameter, list[HookedModule]] = field(default_factory=dict)
    rule_calls: list[RuleCall] = field(default_factory=list)
    several: set[nn.Parameter] = field(default_factory=set)
    small: list[tuple[int, Tensor]] = field(default_factory=list)
    squares: dict[int, Tensor] = field(default_factory=dict)
    pending: dict[nn.Parameter, Tensor] = field(default_factory=dict)
    tables: dict[nn.Parameter, TiedTable | None] = field(default_factory=dict)
    fallback_calls: list[ModuleCall] = field(default_factory=list)
    calls: int = 0
    fired: set[int] = field(default_factory=set)
    backward_seen: bool = False
    closed: bool = False
    given: set[tuple[int, tuple[int, ...]]] = field(default_factory=set)
    own_results: set[torch.autograd.graph.Node] = field(default_factory=set)

    def let_go(self) -> None:
        """Drop the graphs that no gradient came through, so that the graph and its hooks do not keep each other."""
        for call in self.fallback_calls:
            call.edges.clear()
        self.fallback_calls.clear()
        self.orphans.clear()
        self.open_calls.clear()
        self.own_results.clear()
        self.uses_by_fallback.clear()

    def note_given(self, tensors: Iterable[Tensor]) -> None:
        """Remember what the model was called with: the first axis of that is the batch by contract."""
        found = [(t, memory_of(t)) for t in tensors if t.dim() > 1 and t.shape[0] == self.batch_size]
        self.given = {(place, t.shape) for t, place in found if place is not None}

    def was_given(self, x: Tensor) -> bool:
        """Whether a module's input is what the model was called with."""
        return bool(self.given) and x.dim() > 1 and (memory_of(x), x.shape) in self.given

    def leave(self, orphans: Iterable[Orphan]) -> None:
        """A module around these calls has seen to them."""
        for orphan in orphans:
            self.orphans.remove(orphan)

    def check_adopted(self) -> None:
        """Raise if a call was left to no one, so that its norms would be missing.

        Raises:
            BatchAxisError: Naming the module and its shapes.
        """
        self.own_results.clear()
        if self.orphans:
            error = self.orphans[0].error
            self.orphans.clear()
            raise error

    def note_if_open(self, hooked: HookedModule, output: Tensor) -> None:
        """Keep a call for the proof that the batch is its first axis, if its shape leaves that open."""
        if output.dim() in hooked.proven_dims or self.implicit or not is_open(output, self.batch_size):
            return
        edge = torch.autograd.graph.get_gradient_edge(output)
        self.open_calls.append(OpenCall(hooked, edge, tuple(output.shape)))

    def next_call(self) -> int:
        """A number for a captured module call."""
        self.calls += 1
        return self.calls

    def add_use(self, param: nn.Parameter) -> None:
        """Count a captured use of a parameter."""
        uses = self.uses[param] = self.uses.get(param, 0) + 1
        if uses > 1:
            self.several.add(param)

    def tied_inside(self, hooked: HookedModule, param: nn.Parameter, uses: int) -> list[HookedModule]:
        """The captured calls with a tied parameter inside a call that has just ended; they count as this one's then.

        Args:
            hooked: The module that was called.
            param: One of its own parameters.
            uses: Operations between its inputs and outputs that take the parameter.
        """
        calls = self.tied_uses.get(param, [])
        inside = [h for h in calls if hooked.contains(h)]
        if inside:
            self.tied_uses[param] = [h for h in calls if h not in inside] + [hooked] * uses
        return inside

    def count_inside(self, params: Iterable[nn.Parameter], used: Sequence[GraphUse]) -> None:
        """Count the uses that one call of the fallback is for, all but the one that `add_use` counts.

        Args:
            params: The call's parameters.
            used: Their uses in the module's graph.
        """
        inside = Counter(use.param for use in used)
        self.uses_inside.update({p: inside[p] - 1 for p in params if inside[p] > 1})
        self.uses_by_fallback.extend((use.param, use.node) for use in used)

    def captured_uses(self) -> Counter[nn.Parameter]:
        """Uses that are measured, now or by rules from the next pass on."""
        counted = self.uses + self.uses_inside
        if self.learned:
            by_rules = Counter(p for call in self.rule_calls for p in call.wanted.values() if p in self.learned)
            counted.update({p: max(self.uses[p], self.learned[p] + by_rules[p]) - counted[p] for p in self.learned})
        return counted

    def measured_by_rules(self, params: Iterable[nn.Parameter]) -> set[nn.Parameter]:
        """Those of some parameters of which every captured use, if any, is a rule's: `supersede` can call them off."""
        by_rules = Counter(p for call in self.rule_calls for n, p in call.wanted.items() if n not in call.superseded)
        return {p for p in params if self.uses[p] == by_rules[p]}

    def supersede(self, hooked: HookedModule, params: Iterable[nn.Parameter]) -> None:
        """A module is differentiated as a whole for these parameters: uses inside it must not count once more."""
        for param in params:
            for call in self.rule_calls:
                names = [n for n, p in call.wanted.items() if p is param and n not in call.superseded]
                if names and hooked.contains(call.hooked):
                    call.superseded.update(names)
                    self.uses[param] -= 1
            if self.uses[param] < 2:
                self.several.discard(param)

    def add_squares(self, layer: int, squares: Tensor) -> None:
        """Add one parameter's squared norms [kept] to its layer."""
        held = self.squares.get(layer)
        self.squares[layer] = squares if held is None else held + squares

    def add_grads(self, layer: int, grads: Tensor) -> None:
        """Add one parameter's per-sample gradients [kept, *shape] to its layer."""
        if grads.numel() < SMALL:
            self.small.append((layer, grads))
        else:
            self.add_squares(layer, squared_sum(grads))

    def _square_small(self) -> None:
        """Square all gradients of one shape at once: there are many of them, and each operation takes its time."""
        by_shape: dict[tuple[Any, ...], list[tuple[int, Tensor]]] = {}
        for layer, grads in self.small:
            by_shape.setdefault((grads.shape, grads.dtype), []).append((layer, grads))
        self.small.clear()
        for group in by_shape.values():
            stacked = torch.stack([grads.flatten(1) for _, grads in group])
            for (layer, _), squares in zip(group, torch.linalg.vecdot(stacked, stacked).unbind(), strict=True):
                self.add_squares(layer, squares)

    def add_pending(self, param: nn.Parameter, grads: Tensor) -> None:
        """Add one use's per-sample gradients [kept, *shape] of a parameter that has several uses."""
        held = self.pending.get(param)
        self.pending[param] = grads if held is None else held + grads

    def norms(self, layer_of: dict[nn.Parameter, int], layers: int) -> Tensor | None:
        """Close the pass: its norms, once.

        Args:
            layer_of: Layer index of every parameter.
            layers: Number of layers K.

        Returns:
            Norms [K, kept], zero for layers that got no gradient; None when no layer got any.
        """
        self.closed = True
        self.check_adopted()
        for param, grads in self.pending.items():
            self.add_squares(layer_of[param], squared_sum(grads))
        self.pending.clear()
        for param, table in self.tables.items():
            squares = None if table is None else table.squares()
            if squares is not None:
                self.add_squares(layer_of[param], squares)
        self.tables.clear()
        self._square_small()
        if not self.squares:
            return None
        zeros = torch.zeros_like(next(iter(self.squares.values())))
        norms = torch.stack([self.squares.get(k, zeros) for k in range(layers)]).sqrt()
        self.squares.clear()
        return norms


@dataclass(frozen=True)
class NormTotals:
    """Sums over the measured samples of one accumulated batch, in the units of the local `p.grad`.

    Attributes:
        norms: [K], sum of ||c g_i|| where c g_i is what sample i adds to `p.grad`.
        squares: [K], sum of ||c g_i||^2.
        captured: Samples (or micro-batches) measured.
        total: Samples that went into `p.grad`, in the unit of `captured` (samples, or micro-batches of the measured
            size).
    """

    norms: Tensor
    squares: Tensor
    captured: int
    total: float
