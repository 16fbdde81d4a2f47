"""One call of a module that a rule knows: from the output's gradient to the layer's squared norms."""

from __future__ import annotations

from collections.abc import Callable, Set
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from hf_clars.grad_norms.explanation import timed
from hf_clars.grad_norms.forward_pass import ForwardPass
from hf_clars.grad_norms.norm_math import at_least_float32, slices_of, squared_sum
from hf_clars.grad_norms.pytree import tensors_in
from hf_clars.grad_norms.rule_results import compare_squares, given_by
from hf_clars.grad_norms.tied_tables import TiedTable
from hf_clars.grad_norms.torch_internals import NOTHING, no_autocast, no_grad
from hf_clars.grad_norms.undisturbed import differentiating, quietly
from hf_clars.grad_norms.uses import RuleUse

_EXACT = (torch.float32, torch.float64)


def _each(fn: Callable[[Tensor], Tensor], tensors: Any) -> Any:
    """A function of a tensor, or of each in a tuple that has them; the other entries are None."""
    return fn(tensors) if isinstance(tensors, Tensor) else tuple(None if t is None else fn(t) for t in tensors)


@dataclass(eq=False, slots=True)
class RuleCall(RuleUse):
    """What to do when the gradient of a module's call comes.

    Attributes:
        forward_pass: The pass that the call belongs to.
        autocast: The precision of the autocast region that a module with several results ran in: a GRU's products may
            be in bf16, and its output in float32 all the same. Also of one whose rule's error must not end the pass.
        given: What the module was called with, for such a pass; see `plain_backward.py`.
    """

    forward_pass: ForwardPass = field(kw_only=True)
    autocast: torch.dtype | None = None
    given: Any = None

    def arrived(self) -> bool:
        """Note that the gradient has come; False if it is to be left unmeasured.

        Raises:
            SecondBackwardError: If it had come already, or the norms of the pass were taken.
        """
        if self.repeats or self.cancelled or differentiating():
            return False
        if not self.forward_pass.asked():
            self.fired |= torch.is_grad_enabled()  # else it is differentiated again, and that shows no samples
            return False
        again, self.fired = self.fired, True
        self.forward_pass.gradient_comes(self.hooked, again=again)
        self.leave_graph()
        return True

    @property
    def is_looked_at(self) -> bool:
        """Whether the form of what the rule gives is looked at: always that of a user's rule."""
        forward_pass = self.forward_pass
        return forward_pass.sums.check is not None or forward_pass.keeps_errors or not self.plan.shipped

    @property
    def shared(self) -> set[str]:
        """Parameters with several uses in the pass: those add up before they are squared."""
        several = self.forward_pass.uses.several
        return {n for n, p in self.wanted.items() if p in several} if several else set()

    def measure(self, saved: tuple[Tensor, ...], g: Tensor | tuple[Tensor | None, ...]) -> None:
        """Add the norms of an ordinary backward pass.

        Args:
            saved: What the rule saved.
            g: Gradient of the module's output; a tuple for a module with several results.
        """
        plan, forward_pass = self.plan, self.forward_pass
        some = next(t for t in g if t is not None) if isinstance(g, tuple) else g
        measured, rows = forward_pass.measured, plan.rows_per_sample
        if measured * rows < some.shape[0]:
            saved, g = plan.rule.take(saved, measured * rows), _each(lambda t: t[: measured * rows], g)
        with self._aside(some.device):
            given = (*g, *saved) if isinstance(g, tuple) else (g, *saved)
            if any(t is not None and t.dtype not in _EXACT for t in given):
                saved, g = _each(at_least_float32, saved), _each(at_least_float32, g)
            if rows > 1 and not plan.folded:
                saved, g = (_each(lambda t: t.unflatten(0, (measured, rows)), each) for each in (saved, g))
            self._add(saved, g, self.autocast or some.dtype)

    def _aside(self, device: torch.device) -> AbstractContextManager[Any]:
        """Where norms are taken: no graph, no autocast, and unnoticed by trackers if it is a user's code that runs."""
        around = no_grad(), no_autocast(device.type), timed(self.forward_pass.times, self.wanted.values(), device)
        if self.plan.shipped and around == (NOTHING, NOTHING, NOTHING):
            return NOTHING  # as it nearly always is
        stack = ExitStack()
        for context in (*around, quietly()):
            stack.enter_context(context)
        return stack

    def _tables(self) -> dict[str, TiedTable]:
        """Those of the shared parameters that are tables looked up by some of their uses."""
        found = {n: self.forward_pass.table_of(self.wanted[n]) for n in self.shared}
        return {n: table for n, table in found.items() if table is not None}

    def _add(self, saved: tuple[Tensor, ...], g: Any, dtype: torch.dtype) -> None:
        plan, sums = self.plan, self.forward_pass.sums
        names: Set[str] = plan.wanted.keys()
        shared: Set[str] = set()
        if self.forward_pass.uses.several:
            tables = self._tables()
            for name, table in tables.items():
                table.measure(self, name, saved, g)
                self._check_by_sum(name, saved, g, None, dtype)
            names = names - tables.keys()
            shared = self.shared & names
        by_squares = names - shared if shared else names
        if not plan.by_squares:
            by_squares, shared = set(), names
        if by_squares:
            for name, squares in self._ask("squared_norms", saved, g, by_squares).items():
                sums.add_squares(plan.hooked.layers[name], squares)
                if sums.check is not None:
                    self._check_by_sum(name, saved, g, squares, dtype)
        if shared:
            for name, t in self._ask("per_sample_grads", saved, g, shared).items():
                t = t.unflatten(0, (self.forward_pass.measured, plan.rows_per_sample)).sum(1) if plan.folded else t
                sums.take(plan.wanted[name], t, dtype)

    def _ask(
        self, method: Literal["per_sample_grads", "squared_norms"], saved: tuple[Tensor, ...], g: Any, names: Set[str]
    ) -> dict[str, Tensor]:
        """What the rule's method gives for some parameters."""
        rule = self.plan.rule
        found = getattr(rule, method)(self.module, saved, g, names)
        if not self.is_looked_at:
            return found if found.keys() == names else {name: found[name] for name in names}
        found = given_by(rule, method, found, self.hooked, names, len(next(iter(tensors_in(g)))))
        if method == "squared_norms" and self.forward_pass.sums.check is not None and not self.plan.shipped:
            compare_squares(rule, self.hooked, found, self._ask("per_sample_grads", saved, g, names))
        return found

    def _check_by_sum(
        self, name: str, saved: tuple[Tensor, ...], g: Tensor, squares: Tensor | None, dtype: torch.dtype
    ) -> None:
        """In a pass that is checked, make the gradients of which only the norm was taken."""
        check = self.forward_pass.sums.check
        if check is not None and check.wants(self.wanted[name]):
            total = self.rule.summed_grad(self.module, saved, g, name, elements=self.wanted[name].numel())
            size = total.norm() if squares is None else squares.clamp(min=0).sqrt().sum()
            check.add(self.wanted[name], total, size, dtype)

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
                    self.forward_pass.sums.add_squares(self.hooked.layers[name], t)
            self._check_fused({n: t for n, t in sums.items() if n in self.wanted}, dtype)

    def summed_grads(self, x: Tensor, g: Tensor) -> dict[str, Tensor]:
        """The batch gradient as the sum of the per-sample ones, whose norms are added on the way.

        Args:
            x: Input of the module.
            g: Gradient of its output, all samples of the pass.

        Returns:
            {local parameter name: Tensor of its shape}, in float32 at least.
        """
        plan, forward_pass = self.plan, self.forward_pass
        measured = self.arrived()
        shared = self.shared
        tables = self._tables() if shared and measured else {}
        sums: dict[str, Tensor] = {}
        parts: dict[str, list[Tensor]] = {}
        left = forward_pass.measured if measured else 0
        for x_part, g_part in slices_of(x, g, elements_per_sample=plan.size):
            for name, t in self._ask("per_sample_grads", (x_part,), g_part, plan.wanted.keys()).items():
                t = at_least_float32(t)
                sums[name] = sums[name] + t.sum(0) if name in sums else t.sum(0)
                if not left:
                    continue
                mine = t.detach() if t.requires_grad else t
                mine = mine[:left] if left < len(mine) else mine
                if name in tables:
                    tables[name].add_grads(mine)
                elif x_part is x:
                    forward_pass.sums.add_grads(plan.wanted[name], mine)
                else:
                    parts.setdefault(name, []).append(mine if name in shared else squared_sum(mine))
            left = max(0, left - len(x_part))
        for name, part in parts.items():
            if name in shared:
                forward_pass.sums.add_grads(plan.wanted[name], torch.cat(part))
            else:
                forward_pass.sums.add_squares(plan.hooked.layers[name], torch.cat(part))
        if measured:
            self._check_fused(sums, g.dtype)
        return sums

    def _check_fused(self, sums: dict[str, Tensor], dtype: torch.dtype) -> None:
        check = self.forward_pass.sums.check
        if check is None:
            return
        for name, total in sums.items():
            if check.wants(self.wanted[name]):
                total = total.detach()
                check.add(self.wanted[name], total, total.norm(), dtype)
