"""One call of a module that a rule knows: from the output's gradient to the layer's squared norms."""

from __future__ import annotations

from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node

from hf_clars.grad_norms.explanation import timed
from hf_clars.grad_norms.forward_pass import ForwardPass, differentiating, quietly, second_backward
from hf_clars.grad_norms.graph.layout import Layout
from hf_clars.grad_norms.hooked_modules import HookedModule
from hf_clars.grad_norms.norm_math import at_least_float32, slices_of, squared_sum
from hf_clars.grad_norms.pytree import tensors_in
from hf_clars.grad_norms.registry import LayerRule, is_shipped
from hf_clars.grad_norms.rule_results import compare_squares, given_by
from hf_clars.grad_norms.tied_tables import TiedTable, tied_table
from hf_clars.grad_norms.torch_internals import no_autocast, no_grad

FIRST_AXIS = Layout()
_EXACT = (torch.float32, torch.float64)


@dataclass(eq=False, slots=True)
class CallPlan:
    """How calls of a module that look alike are measured: decided at the first, and kept.

    Attributes:
        hooked: The module.
        rule: Its rule.
        wanted: Parameters to measure, by local name.
        rows_per_sample: Rows of the module's first axis that make up one sample; 1 unless the model folds something
            into it.
        key: What their layout is known by.
        axes: The batch axis of each result.
        layout: Which rows of the output should be whose.
        way: How the weight gradient comes from this engine; None where the ordinary backward pass is watched.
        x_depends_on_data: Whether the input is known to depend on what the model was called with.
        proven: Whether rows are known to belong to samples as `rows_per_sample` says.
        moved: Whether rows of the batch may be anywhere: each pass must prove anew whose they are.
        lasts: Whether calls that look alike may follow it too.
    """

    hooked: HookedModule
    rule: LayerRule
    wanted: dict[str, nn.Parameter]
    rows_per_sample: int
    key: tuple[int, ...] = ()
    axes: Sequence[int] = (0,)
    layout: Layout = FIRST_AXIS
    way: Callable[[RuleCall, Tensor, Tensor], Tensor] | None = None
    x_depends_on_data: bool = False
    proven: bool = True
    moved: bool = False
    lasts: bool = False

    @property
    def module(self) -> nn.Module:
        """The module."""
        return self.hooked.module


@dataclass(eq=False, slots=True)
class RuleCall:
    """What is known when a module has run, and what to do when its gradient comes.

    Attributes:
        plan: How it is measured.
        forward_pass: The pass that the call belongs to.
        repeats: Whether activation checkpointing makes a call again that is measured already.
        tokens: The rows of its weight that an embedding looked up, [B, T].
        places: Where its results come from in the graph, until the forward pass ends: (operation, which result).
        input_node: Where its input comes from.
        fused: Whether its weight gradient comes from this engine.
        given_rows: Whose rows are whose in its results, if that is known from what the model was called with.
        proven: Whether its rows are known to belong to samples as the plan says.
        cancelled: Whether they turned out not to.
        fired: Whether its gradient has come.
        autocast: The precision of the autocast region that a module with several results ran in: a GRU's products may
            be in bf16, and its output in float32 all the same. Also of one whose rule's error must not end the pass.
        given: What the module was called with, for such a pass; see `plain_backward.py`.
    """

    plan: CallPlan
    forward_pass: ForwardPass
    repeats: bool = False
    tokens: Tensor | None = None
    places: list[tuple[Node, int]] = field(default_factory=list)
    input_node: Node | None = None
    proven: bool = True
    fused: bool = False
    given_rows: Layout | None = None
    cancelled: bool = False
    fired: bool = False
    autocast: torch.dtype | None = None
    given: Any = None

    @property
    def hooked(self) -> HookedModule:
        """The module, and what is known of it."""
        return self.plan.hooked

    @property
    def rule(self) -> LayerRule:
        """The module's rule."""
        return self.plan.rule

    @property
    def wanted(self) -> dict[str, nn.Parameter]:
        """Parameters to measure, by local name."""
        return self.plan.wanted

    @property
    def rows_per_sample(self) -> int:
        """Rows of the module's first axis that make up one sample."""
        return self.plan.rows_per_sample

    @property
    def module(self) -> nn.Module:
        """The module."""
        return self.plan.hooked.module

    def place(self, output: Any, x: Tensor) -> None:
        """Note where its results and its input are in the graph."""
        if self.places:
            pass  # it is watched at a place of its own
        elif isinstance(output, Tensor):
            self.places = [(output.grad_fn, output.output_nr)] if output.grad_fn is not None else []
        else:
            self.places = [(t.grad_fn, t.output_nr) for t in tensors_in(output) if t.grad_fn is not None]
        self.input_node = x.grad_fn

    @property
    def edges(self) -> list[GradientEdge]:
        """Where its results come from in the graph, until the forward pass ends."""
        return [GradientEdge(*place) for place in self.places]

    def in_words(self) -> str:
        """How it is measured, for people."""
        how = "with the weight gradient, from one product" if self.fused else "beside the ordinary backward pass"
        rows = f", {self.rows_per_sample} rows a sample" if self.rows_per_sample > 1 else ""
        proof = ""
        if self.hooked.calls.get(self.plan.key) == "observed":
            proof = ", proven by following one sample's gradient"
        return f"{type(self.rule).__name__} of {self.hooked}: {how}{rows}{proof}"

    def leave_graph(self) -> None:
        """Let go of its places in the graph."""
        self.places, self.input_node = [], None

    def arrived(self) -> bool:
        """Note that the gradient has come; False if it is to be left unmeasured.

        Raises:
            SecondBackwardError: If it had come already.
        """
        if self.repeats or self.cancelled or differentiating():
            return False
        self.forward_pass.mark(self.forward_pass)
        if self.fired:
            raise second_backward(self.hooked)
        self.fired = True
        self.leave_graph()
        return True

    @property
    def is_looked_at(self) -> bool:
        """Whether the form of what the rule gives is looked at: always that of a user's rule."""
        forward_pass = self.forward_pass
        return forward_pass.check is not None or forward_pass.keeps_errors or not is_shipped(self.rule)

    @property
    def shared(self) -> set[str]:
        """Parameters with several uses in the pass: those add up before they are squared."""
        several = self.forward_pass.several
        return {n for n, p in self.wanted.items() if p in several} if several else set()

    def measure(self, saved: tuple[Tensor, ...], g: Tensor | tuple[Tensor | None, ...]) -> None:
        """Add the norms of an ordinary backward pass.

        Args:
            saved: What the rule saved.
            g: Gradient of the module's output; a tuple for a module with several results.
        """
        plan, grads = self.plan, g if isinstance(g, tuple) else (g,)
        some = next(t for t in grads if t is not None)
        count = self.forward_pass.measured * plan.rows_per_sample
        if count < some.shape[0]:
            saved, grads = plan.rule.take(saved, count), tuple(None if t is None else t[:count] for t in grads)
        time = timed(self.forward_pass.times, self.wanted.values(), some.device)
        with no_grad(), no_autocast(some.device.type), quietly(), time:
            if any(t is not None and t.dtype not in _EXACT for t in (*grads, *saved)):
                saved = tuple(at_least_float32(t) for t in saved)
                grads = tuple(None if t is None else at_least_float32(t) for t in grads)
            if plan.rows_per_sample > 1 and plan.rule.weight_sharing_axes:
                split = (self.forward_pass.measured, plan.rows_per_sample)
                saved = tuple(t.unflatten(0, split) for t in saved)
                grads = tuple(None if t is None else t.unflatten(0, split) for t in grads)
            self._add(saved, grads if isinstance(g, tuple) else grads[0], self.autocast or some.dtype)

    def _tables(self) -> dict[str, TiedTable]:
        """Those of the shared parameters that are tables looked up by some of their uses."""
        found = {n: tied_table(self.forward_pass, self.wanted[n]) for n in self.shared}
        return {n: table for n, table in found.items() if table is not None}

    def _add(self, saved: tuple[Tensor, ...], g: Any, dtype: torch.dtype) -> None:
        plan, forward_pass = self.plan, self.forward_pass
        names: Set[str] = plan.wanted.keys()
        tables = self._tables() if forward_pass.several else {}
        for name, table in tables.items():
            table.measure(self, name, saved, g)
            self._check_by_sum(name, saved, g, None, dtype)
        if tables:
            names = names - tables.keys()
        folded = plan.rows_per_sample > 1 and not plan.rule.weight_sharing_axes
        by_grads: Set[str] = names
        if not folded and plan.rule.squares_without_grads:
            by_grads = self.shared.intersection(names)
            single = names - by_grads if by_grads else names
            for name, squares in self._ask("squared_norms", saved, g, single).items() if single else ():
                forward_pass.add_squares(plan.hooked.layers[name], squares)
                self._check_by_sum(name, saved, g, squares, dtype)
        grads = self._ask("per_sample_grads", saved, g, by_grads) if by_grads else {}
        for name, t in grads.items():
            t = t.unflatten(0, (forward_pass.measured, plan.rows_per_sample)).sum(1) if folded else t
            if forward_pass.check is not None:
                forward_pass.check.add_grads(plan.wanted[name], t, dtype)
            self._add_grads(name, t)

    def _ask(
        self, method: Literal["per_sample_grads", "squared_norms"], saved: tuple[Tensor, ...], g: Any, names: Set[str]
    ) -> dict[str, Tensor]:
        """What the rule's method gives for some parameters."""
        found = getattr(self.rule, method)(self.module, saved, g, names)
        if not self.is_looked_at:
            return found if found.keys() == names else {name: found[name] for name in names}
        found = given_by(self.rule, method, found, self.hooked, names, len(next(iter(tensors_in(g)))))
        if method == "squared_norms" and self.forward_pass.check is not None and not is_shipped(self.rule):
            compare_squares(self.rule, self.hooked, found, self._ask("per_sample_grads", saved, g, names))
        return found

    def _check_by_sum(
        self, name: str, saved: tuple[Tensor, ...], g: Tensor, squares: Tensor | None, dtype: torch.dtype
    ) -> None:
        """In a pass that is checked, make the gradients of which only the norm was taken."""
        if self.forward_pass.check is not None and self.forward_pass.check.wants(self.wanted[name]):
            total = self.rule.summed_grad(self.module, saved, g, name, elements=self.wanted[name].numel())
            size = total.norm() if squares is None else squares.clamp(min=0).sqrt().sum()
            self.forward_pass.check.add(self.wanted[name], total, size, dtype)

    def _add_grads(self, name: str, grads: Tensor) -> None:
        """Add per-sample gradients [measured, *shape]."""
        self.forward_pass.add_grads(self.wanted[name], self.hooked.layers[name], grads)

    def add_squares(self, squares: dict[str, Tensor], sums: dict[str, Tensor], dtype: torch.dtype) -> None:
        """Add the squared norms that the rule's own backward pass gave, {local parameter name: [measured]}.

        Args:
            squares: These.
            sums: The gradients that it gave.
            dtype: The precision of the output's gradient.
        """
        if self.arrived():
            for name, t in squares.items():
                if name in self.wanted:
                    self.forward_pass.add_squares(self.hooked.layers[name], t)
            self._check_fused({n: t for n, t in sums.items() if n in self.wanted}, dtype, True)

    def summed_grads(self, x: Tensor, g: Tensor) -> dict[str, Tensor]:
        """The batch gradient as the sum of the per-sample ones, whose norms are added on the way.

        Args:
            x: Input of the module.
            g: Gradient of its output, all samples of the pass.

        Returns:
            {local parameter name: Tensor of its shape}, in float32 at least.
        """
        measured = self.arrived()
        shared = self.shared
        tables = self._tables() if shared and measured else {}
        sums: dict[str, Tensor] = {}
        parts: dict[str, list[Tensor]] = {}
        size = sum(p.numel() for p in self.wanted.values())
        left = self.forward_pass.measured if measured else 0
        for x_part, g_part in slices_of(x, g, elements_per_sample=size):
            grads = self._ask("per_sample_grads", (x_part,), g_part, self.wanted.keys())
            for name, t in grads.items():
                t = at_least_float32(t)
                sums[name] = sums[name] + t.sum(0) if name in sums else t.sum(0)
                if not left:
                    continue
                mine = t.detach()[:left]
                if name in tables:
                    tables[name].add_grads(mine)
                elif x_part is x:
                    self._add_grads(name, mine)
                else:
                    parts.setdefault(name, []).append(mine if name in shared else squared_sum(mine))
            left = max(0, left - len(x_part))
        for name, part in parts.items():
            if name in shared:
                self._add_grads(name, torch.cat(part))
            else:
                self.forward_pass.add_squares(self.hooked.layers[name], torch.cat(part))
        self._check_fused(sums, g.dtype, measured)
        return sums

    def _check_fused(self, sums: dict[str, Tensor], dtype: torch.dtype, measured: bool) -> None:
        if self.forward_pass.check is not None and measured:
            for name, total in sums.items():
                if self.forward_pass.check.wants(self.wanted[name]):
                    total = total.detach()
                    self.forward_pass.check.add(self.wanted[name], total, total.norm(), dtype)
