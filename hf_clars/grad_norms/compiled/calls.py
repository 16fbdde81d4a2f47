"""A tracker's state in compiled code: which modules are measured there, and what a pass gives them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from hf_clars.grad_norms.compiled.bare_uses import BareUses
from hf_clars.grad_norms.compiled.call import PATIENCE, CompiledCall
from hf_clars.grad_norms.compiled.crossings import Crossings
from hf_clars.grad_norms.compiled.functions import Summed
from hf_clars.grad_norms.compiled.operations import begin_pass, keep_rows
from hf_clars.grad_norms.compiled.uses import (
    BARE,
    HANDED,
    LINKED,
    ONCE,
    SUMMED,
    Links,
    Uses,
    bare_ones,
    can_be_compiled,
    looks_up,
    measured,
    watch_trace,
)
from hf_clars.grad_norms.hooked_modules import HookedModule
from hf_clars.grad_norms.pytree import of_the_batch, tensors_in
from hf_clars.grad_norms.token_weights import label_counts


class CompiledCalls:
    """A tracker's state in compiled code.

    Args:
        receiver: Its number, see `operations.enlist`.
        hooked: The modules.

    Attributes:
        calls: One for each module with a rule, by its path.
        within: Whether compiled code has begun the pass, or refused it.
        measures: Whether the model is being called, and its calls have rows.
        shares: Whether what several uses share was made in this pass.
        shared: For each parameter whose uses share its row: zeros [B, *shape].
        number: Of the last pass. Kept so that a compiler lets a pass begin in the forward pass: what only the backward
            pass needs, it would put there.
        whole: Whether every measured parameter can be measured in a compiled graph, so that the model may be compiled
            as a whole.
        expected: In how many more calls outside compiled code to prepare rows, though none inside has used them.
        checked: Whether sums are checked in this batch.
        paused: As the tracker's.
        by_tokens: Whether the loss is a mean over tokens.
        beside: Rows of parameters whose bare uses compiled code measures.
        bystanders: Modules without measured parameters whose calls are to be told of, as no others may be called.
        reason: Which parameters stand in the way of `whole`, in words.
    """

    def __init__(self, model: nn.Module, receiver: int, hooked: list[HookedModule]) -> None:
        self.model = model
        self.receiver = receiver
        self.measures = self.within = self.shares = False
        self.number: Tensor | None = None
        self.shared: dict[int, Tensor] = {}
        self.given_axes: tuple[int, ...] = ()
        self.given: tuple[Tensor, ...] = ()
        self.checked = True
        self.expected = PATIENCE
        self.paused = self.by_tokens = False
        self.modules = [h.module for h in hooked]
        self.calls: dict[str, CompiledCall] = {}
        self.crossings = Crossings(receiver)
        owners: dict[nn.Parameter, list[HookedModule]] = {}
        for h in hooked:
            for p in h.params.values():
                owners.setdefault(p, []).append(h)
        with_rules = measured(owners)
        bare, missing = bare_ones(owners, with_rules)
        self.params = [*with_rules, *bare]
        self.shapes = [tuple(p.shape) for p in self.params]
        ways = [ONCE] * len(with_rules) + [BARE] * len(bare)
        self.beside: set[int] = set()
        self.uses = Uses(ways, [h for h in hooked if can_be_compiled(h)], self._measure_bare)
        rows = {p: i for i, p in enumerate(self.params)}
        self.links = {i: Links() for p, i in rows.items() if any(looks_up(h.rule) for h in owners[p])}
        for h in hooked:
            if can_be_compiled(h) and h.params and set(with_rules) >= set(h.params.values()):
                self.calls[h.path] = CompiledCall(self, h, [rows[p] for p in h.params.values()])
        self._owners = owners
        # What the model's own forward does is seen only if a module is called in it that tells of it.
        inside = [m for m in model.modules() if m is not model and type(m).forward is not nn.Module.forward]
        self.bystanders = [] if self.calls else [m for m in inside if m not in set(self.modules)]
        alone = [] if inside else bare
        self.whole = bool(self.params) and not missing and not alone
        self.reason = ", ".join(self._name_of(p) for p in owners if p in {*missing, *alone})
        wide = torch.float64 if any(p.dtype == torch.float64 for p in self.params) else torch.float32
        # Of one number, and not without axes: the compiler takes those for numbers of Python, and begins anew.
        self.leaf = torch.zeros(1, dtype=wide, requires_grad=True)
        self.place = torch.zeros(1)

    def begin(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The model is called: make rows. In compiled code and outside."""
        self.measures = self.shares = False
        self.shared = {}
        given = [t for t in tensors_in((args, kwargs)) if t.dim() > 0]
        batched = of_the_batch(given)
        if batched is None or self.paused or not torch.is_grad_enabled():
            return
        weights = label_counts(self.model, kwargs) if self.by_tokens else None
        rows, uses, number = begin_pass(self.leaf, batched, weights, self.receiver, len(self.params), self.checked)
        HANDED[self.receiver] = (rows, uses, rows.unbind(0), uses.unbind(0))
        self.measures, self.within = True, torch.compiler.is_compiling()
        if not self.within:
            self._hand_over(rows)
        self.number = number
        self.given_axes = tuple(batched.shape[1:])
        self.given = tuple(given) if self.within else ()

    def share(self) -> None:
        """Make what several uses of a parameter share, once in a pass and in the code that uses it."""
        self.shares = True
        _, _, each, used = HANDED[self.receiver]
        for call in self.calls.values():
            ways = [self.uses.ways[i] for i in call.row_numbers]
            if call.links is not None:
                call.links.linked = LINKED in ways
            for i, way in zip(call.row_numbers, ways, strict=True):
                if way == SUMMED and i not in self.shared:
                    self.shared[i] = Summed.apply(each[i], used[i], self.shapes[i])

    # ---- bare uses -------------------------------------------------------------------------------------------

    def keep_rows(self) -> None:
        """A module is called in a trace: let what measures bare uses find the rows there."""
        if watch_trace(self.uses.name) and self.within and self.measures:
            keep_rows(*HANDED[self.receiver][:2], self.receiver, list(self.given_axes))

    def bare_rows(self) -> list[int]:
        """The rows of parameters with bare uses."""
        return [i for i, way in enumerate(self.uses.ways) if way == BARE]

    def bare_params(self) -> set[nn.Parameter]:
        """The same parameters."""
        return {self.params[row] for row in self.bare_rows()}

    def _measure_bare(self, traced: Any) -> Any:
        return BareUses(self, traced).measure()

    def name_of_row(self, row: int) -> str:
        """A parameter's name in the model."""
        return self._name_of(self.params[row])

    def _name_of(self, param: nn.Parameter) -> str:
        owner = self._owners[param][0]
        return next(owner.full_name(n) for n, q in owner.params.items() if q is param)

    # ---- parts of the model ----------------------------------------------------------------------------------

    def expects_code(self) -> bool:
        """Whether compiled code may be met in a call outside of it."""
        return self.expected > 0 or any(m._compiled_call_impl is not None for m in self.modules)

    def met_code(self, met: bool) -> None:
        """Whether a call outside compiled code has met some."""
        self.expected = PATIENCE if met else max(0, self.expected - 1)

    def ready(self) -> bool:
        """Whether modules can do their work in compiled code, as far as it depends on the pass."""
        return self.measures or self.within or self.paused or not torch.is_grad_enabled()

    def end(self) -> None:
        """The model returns. In compiled code and outside."""
        self.measures = self.within = self.shares = False
        self.given = ()
        self.shared = {}
        HANDED.pop(self.receiver, None)
        for links in self.links.values():
            links.forget()

    def ran(self) -> list[CompiledCall]:
        """The calls that compiled code has made since `forget`."""
        return [call for call in self.calls.values() if call.ran]

    def forget(self) -> None:
        """A pass begins outside compiled code."""
        for call in self.calls.values():
            call.ran = False

    def _hand_over(self, rows: Tensor) -> None:
        """A pass begins outside compiled code: no module has run, and each finds its rows on their device."""
        self.forget()
        for call in self.calls.values():
            if call.where.device != rows.device:
                call.where = call.places.to(rows.device)
