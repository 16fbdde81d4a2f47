"""One call of a module that a rule knows: from the output's gradient to the layer's squared norms."""

from __future__ import annotations

from collections.abc import Callable, Collection
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from hf_clars.grad_norms.hooked_modules import HookedModule
from hf_clars.grad_norms.norm_math import at_least_float32, slices_of, squared_sum
from hf_clars.grad_norms.passes import ForwardPass
from hf_clars.grad_norms.registry import LayerRule
from hf_clars.grad_norms.tied_tables import TiedTable, tied_table

_EXACT = (torch.float32, torch.float64)
_NOTHING = nullcontext()


@dataclass(eq=False, slots=True)
class RuleCall:
    """What is known when a module has run, and what to do when its gradient comes.

    Attributes:
        hooked: The module.
        rule: Its rule.
        current: The pass that the call belongs to.
        wanted: Parameters to measure, by local name.
        rows: Rows of the module's first axis that make up one sample; 1 unless the model folds something into it.
        arrived: Called when the gradient comes; False says to leave it unmeasured.
        superseded: Parameters that a module around this one is measured for as a whole.
        tokens: The rows of its weight that an embedding looked up, [B, T].
    """

    hooked: HookedModule
    rule: LayerRule
    current: ForwardPass
    wanted: dict[str, nn.Parameter]
    rows: int
    arrived: Callable[[], bool]
    superseded: set[str] = field(default_factory=set)
    tokens: Tensor | None = None

    @property
    def module(self) -> nn.Module:
        """The module."""
        return self.hooked.module

    @property
    def shared(self) -> set[str]:
        """Parameters with several uses in the pass: those add up before they are squared."""
        several = self.current.several
        return {n for n, p in self.wanted.items() if p in several} if several else set()

    def measure(self, saved: tuple[Tensor, ...], g: Tensor) -> None:
        """Add the norms of an ordinary backward pass.

        Args:
            saved: What the rule saved.
            g: Gradient of the module's output.
        """
        if torch.is_grad_enabled():  # create_graph=True
            with torch.no_grad():
                self.measure(saved, g)
            return
        count = self.current.kept * self.rows
        if count < g.shape[0]:
            saved, g = self.rule.take(saved, count), g[:count]
        with no_autocast(g.device.type):
            if g.dtype not in _EXACT or any(t.dtype not in _EXACT for t in saved):
                saved, g = tuple(at_least_float32(t) for t in saved), at_least_float32(g)
            if self.rows > 1 and self.rule.positions_in_the_middle:
                saved = tuple(t.unflatten(0, (self.current.kept, self.rows)) for t in saved)
                g = g.unflatten(0, (self.current.kept, self.rows))
            self._add(saved, g)

    def _tables(self) -> dict[str, TiedTable]:
        """Those of the shared parameters that are tables looked up by some of their uses."""
        found = {n: tied_table(self.current, self.wanted[n]) for n in self.shared if n not in self.superseded}
        return {n: table for n, table in found.items() if table is not None}

    def _add(self, saved: tuple[Tensor, ...], g: Tensor) -> None:
        names = self.wanted.keys() - self.superseded if self.superseded else self.wanted.keys()
        tables = self._tables() if self.current.several else {}
        for name, table in tables.items():
            table.measure(self, name, saved, g)
        if tables:
            names = names - tables.keys()
        by_grads: Collection[str] = names
        folded = self.rows > 1 and not self.rule.positions_in_the_middle
        if not folded and self.rule.squares_without_grads:
            by_grads = self.shared & names
            single = names - by_grads if by_grads else names
            for name, squares in self.rule.squared_norms(self.module, saved, g, single).items() if single else ():
                self.current.add_squares(self.hooked.layers[name], squares)
        grads = self.rule.per_sample_grads(self.module, saved, g, by_grads) if by_grads else {}
        for name, t in grads.items():
            self._add_grads(name, t.unflatten(0, (self.current.kept, self.rows)).sum(1) if folded else t)

    def _add_grads(self, name: str, grads: Tensor) -> None:
        """Add per-sample gradients [kept, *shape]; those of several uses add up before they are squared."""
        several = self.current.several
        if several and self.wanted[name] in several:
            self.current.add_pending(self.wanted[name], grads)
        else:
            self.current.add_grads(self.hooked.layers[name], grads)

    def add_squares(self, squares: dict[str, Tensor]) -> None:
        """Add the squared norms that the rule's own backward pass gave, {local parameter name: [kept]}."""
        if self.arrived():
            for name, t in squares.items():
                if name in self.wanted and name not in self.superseded:
                    self.current.add_squares(self.hooked.layers[name], t)

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
                if not measured or name in self.superseded:
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
        return sums


def no_autocast(device: str) -> AbstractContextManager[Any]:
    """Outside any autocast region that backward() may have been called in: norms are in float32 at least."""
    on = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return torch.autocast(device, enabled=False) if on else _NOTHING
