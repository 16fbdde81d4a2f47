"""One call of a module that a rule knows: from the output's gradient to the layer's squared norms."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge

from hf_clars.grad_norms.forward_pass import ForwardPass, differentiating, quietly, second_backward
from hf_clars.grad_norms.graph.layout import Layout
from hf_clars.grad_norms.hooked_modules import HookedModule
from hf_clars.grad_norms.norm_math import at_least_float32, slices_of, squared_sum
from hf_clars.grad_norms.registry import LayerRule
from hf_clars.grad_norms.tied_tables import TiedTable, tied_table
from hf_clars.grad_norms.torch_internals import no_autocast

FIRST_AXIS = Layout()
_EXACT = (torch.float32, torch.float64)


@dataclass(eq=False, slots=True)
class RuleCall:
    """What is known when a module has run, and what to do when its gradient comes.

    Attributes:
        hooked: The module.
        rule: Its rule.
        current: The pass that the call belongs to.
        wanted: Parameters to measure, by local name.
        rows: Rows of the module's first axis that make up one sample; 1 unless the model folds something into it.
        repeats: Whether activation checkpointing makes a call again that is measured already.
        tokens: The rows of its weight that an embedding looked up, [B, T].
        edges: Where its results come from in the graph, until the forward pass ends.
        input_node: Where its input comes from.
        key: What its layout is known by.
        layout: Which rows of its output should be whose.
        taken_over: Whether its weight gradient comes from this engine.
        on_given: Whether its input is what the model was called with.
        x_depends_on_data: Whether its input is known to depend on that.
        proven: Whether its rows are known to belong to samples as `rows` says.
        cancelled: Whether they turned out not to.
        fired: Whether its gradient has come.
        autocast: The precision of the autocast region that a module with several results ran in: a GRU's products may
            be in bf16, and its output in float32 all the same.
    """

    hooked: HookedModule
    rule: LayerRule
    current: ForwardPass
    wanted: dict[str, nn.Parameter]
    rows: int
    repeats: bool = False
    tokens: Tensor | None = None
    edges: list[GradientEdge] = field(default_factory=list)
    input_node: torch.autograd.graph.Node | None = None
    key: tuple[int, ...] = ()
    layout: Layout = FIRST_AXIS
    proven: bool = True
    taken_over: bool = False
    on_given: bool = False
    x_depends_on_data: bool = False
    cancelled: bool = False
    fired: bool = field(default=False)
    autocast: torch.dtype | None = None

    @property
    def module(self) -> nn.Module:
        """The module."""
        return self.hooked.module

    def in_words(self) -> str:
        """How it is measured, for people."""
        how = "with the weight gradient, from one product" if self.taken_over else "beside the ordinary backward pass"
        rows = f", {self.rows} rows a sample" if self.rows > 1 else ""
        return f"{type(self.rule).__name__} of {self.hooked}: {how}{rows}"

    def leave_graph(self) -> None:
        """Let go of its places in the graph."""
        self.edges, self.input_node = [], None

    def arrived(self) -> bool:
        """Note that the gradient has come; False if it is to be left unmeasured.

        Raises:
            SecondBackwardError: If it had come already.
        """
        if self.repeats or self.cancelled or differentiating():
            return False
        self.current.mark(self.current)
        if self.fired:
            raise second_backward(self.hooked)
        self.fired = True
        self.leave_graph()
        return True

    @property
    def shared(self) -> set[str]:
        """Parameters with several uses in the pass: those add up before they are squared."""
        several = self.current.several
        return {n for n, p in self.wanted.items() if p in several} if several else set()

    def measure(self, saved: tuple[Tensor, ...], g: Tensor | tuple[Tensor | None, ...]) -> None:
        """Add the norms of an ordinary backward pass.

        Args:
            saved: What the rule saved.
            g: Gradient of the module's output; a tuple for a module with several results.
        """
        grads = g if isinstance(g, tuple) else (g,)
        some = next(t for t in grads if t is not None)
        dtype = self.autocast or some.dtype
        count = self.current.kept * self.rows
        if count < some.shape[0]:
            saved, grads = self.rule.take(saved, count), tuple(None if t is None else t[:count] for t in grads)
        with torch.no_grad(), no_autocast(some.device.type):
            if any(t is not None and t.dtype not in _EXACT for t in (*grads, *saved)):
                saved = tuple(at_least_float32(t) for t in saved)
                grads = tuple(None if t is None else at_least_float32(t) for t in grads)
            if self.rows > 1 and self.rule.positions_in_the_middle:
                split = (self.current.kept, self.rows)
                saved = tuple(t.unflatten(0, split) for t in saved)
                grads = tuple(None if t is None else t.unflatten(0, split) for t in grads)
            with quietly():
                self._add(saved, grads if isinstance(g, tuple) else grads[0], dtype)

    def _tables(self) -> dict[str, TiedTable]:
        """Those of the shared parameters that are tables looked up by some of their uses."""
        found = {n: tied_table(self.current, self.wanted[n]) for n in self.shared}
        return {n: table for n, table in found.items() if table is not None}

    def _add(self, saved: tuple[Tensor, ...], g: Any, dtype: torch.dtype) -> None:
        names: Collection[str] = self.wanted.keys()
        tables = self._tables() if self.current.several else {}
        for name, table in tables.items():
            table.measure(self, name, saved, g)
        if tables:
            names = self.wanted.keys() - tables.keys()
        by_grads: Collection[str] = names
        folded = self.rows > 1 and not self.rule.positions_in_the_middle
        if not folded and self.rule.squares_without_grads:
            by_grads = self.shared.intersection(names)
            single = set(names) - by_grads if by_grads else names
            for name, squares in self.rule.squared_norms(self.module, saved, g, single).items() if single else ():
                self.current.add_squares(self.hooked.layers[name], squares)
                self._check_by_sum(name, saved, g, squares, dtype)
        for name in tables:
            self._check_by_sum(name, saved, g, None, dtype)
        grads = self.rule.per_sample_grads(self.module, saved, g, by_grads) if by_grads else {}
        for name, t in grads.items():
            t = t.unflatten(0, (self.current.kept, self.rows)).sum(1) if folded else t
            if self.current.check is not None:
                self.current.check.add_grads(self.wanted[name], t, dtype)
            self._add_grads(name, t)

    def _check_by_sum(
        self, name: str, saved: tuple[Tensor, ...], g: Tensor, squares: Tensor | None, dtype: torch.dtype
    ) -> None:
        """In a pass that is checked, make the gradients of which only the norm was taken."""
        if self.current.check is not None and self.current.check.wants(self.wanted[name]):
            total = self.rule.summed_grad(self.module, saved, g, name, elements=self.wanted[name].numel())
            size = total.norm() if squares is None else squares.clamp(min=0).sqrt().sum()
            self.current.check.add(self.wanted[name], total, size, dtype)

    def _add_grads(self, name: str, grads: Tensor) -> None:
        """Add per-sample gradients [kept, *shape]."""
        self.current.add_grads(self.wanted[name], self.hooked.layers[name], grads)

    def add_squares(self, squares: dict[str, Tensor], sums: dict[str, Tensor], dtype: torch.dtype) -> None:
        """Add the squared norms that the rule's own backward pass gave, {local parameter name: [kept]}.

        Args:
            squares: These.
            sums: The gradients that it gave.
            dtype: The precision of the output's gradient.
        """
        if self.arrived():
            for name, t in squares.items():
                if name in self.wanted:
                    self.current.add_squares(self.hooked.layers[name], t)
            self._check_taken_over({n: t for n, t in sums.items() if n in self.wanted}, dtype, True)

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
        for x_part, g_part in slices_of(x, g, elements_per_sample=size):
            grads = self.rule.per_sample_grads(self.module, (x_part,), g_part, self.wanted.keys())
            for name, t in grads.items():
                t = at_least_float32(t)
                sums[name] = sums[name] + t.sum(0) if name in sums else t.sum(0)
                if not measured:
                    continue
                if name in tables:
                    tables[name].add_grads(t.detach())
                elif x_part is x:
                    self._add_grads(name, t.detach())
                else:
                    parts.setdefault(name, []).append(t.detach() if name in shared else squared_sum(t.detach()))
        for name, part in parts.items():
            if name in shared:
                self._add_grads(name, torch.cat(part))
            else:
                self.current.add_squares(self.hooked.layers[name], torch.cat(part))
        self._check_taken_over(sums, g.dtype, measured)
        return sums

    def _check_taken_over(self, sums: dict[str, Tensor], dtype: torch.dtype, measured: bool) -> None:
        if self.current.check is not None and measured:
            for name, total in sums.items():
                if self.current.check.wants(self.wanted[name]):
                    self.current.check.add(self.wanted[name], total, total.norm(), dtype)
