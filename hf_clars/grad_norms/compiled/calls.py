"""The modules that are measured in compiled code, and what a pass gives them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from hf_clars.grad_norms.compiled.bare_uses import BareUses
from hf_clars.grad_norms.compiled.call import CompiledCall
from hf_clars.grad_norms.compiled.operations import begin_pass
from hf_clars.grad_norms.compiled.state import PATIENCE, PassState
from hf_clars.grad_norms.compiled.uses import BARE, HANDED, Uses, bare_ones, can_be_compiled, expected_way, measured
from hf_clars.grad_norms.hooked_modules import HookedModule
from hf_clars.grad_norms.pytree import of_the_batch, tensors_in
from hf_clars.grad_norms.token_weights import label_counts


class CompiledCalls(PassState):
    """A tracker's modules in compiled code.

    Args:
        model: The model.
        receiver: Its number, see `operations.enlist`.
        hooked: The modules.

    Attributes:
        calls: One for each module with a rule, by its path.
        whole: Whether every measured parameter can be measured in a compiled graph, so that the model may be compiled
            as a whole.
        by_tokens: Whether the loss is a mean over tokens.
        bystanders: Modules without measured parameters whose calls are to be told of, as no others may be called.
        reason: Which parameters stand in the way of `whole`, in words.
    """

    def __init__(self, model: nn.Module, receiver: int, hooked: list[HookedModule]) -> None:
        owners: dict[nn.Parameter, list[HookedModule]] = {}
        for h in hooked:
            for p in h.params.values():
                owners.setdefault(p, []).append(h)
        with_rules = measured(owners)
        bare, missing = bare_ones(owners, with_rules)
        ways = [expected_way(p, owners[p]) for p in with_rules] + [BARE] * len(bare)
        uses = Uses(ways, [h for h in hooked if can_be_compiled(h)], self._measure_bare)
        super().__init__(model, receiver, [*with_rules, *bare], owners, uses)
        self.by_tokens = False
        self.place = torch.zeros(1)
        self.modules = [h.module for h in hooked]
        self.calls: dict[str, CompiledCall] = {}
        rows = {p: i for i, p in enumerate(self.params)}
        for h in hooked:
            if can_be_compiled(h) and h.params and set(with_rules) >= set(h.params.values()):
                self.calls[h.path] = CompiledCall(self, h, [rows[p] for p in h.params.values()])
        # What the model's own forward does is seen only if a module is called in it that tells of it.
        inside = [m for m in model.modules() if m is not model and type(m).forward is not nn.Module.forward]
        self.bystanders = [] if self.calls else [m for m in inside if m not in set(self.modules)]
        alone = [] if inside else bare
        self.whole = bool(self.params) and not missing and not alone
        self.reason = ", ".join(self.name_of(p) for p in owners if p in {*missing, *alone})

    def begin(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The model is called: make rows. In compiled code and outside."""
        self.measures = self.shares = False
        self.shared = {}
        given = []
        for t in tensors_in((args, kwargs)):  # torch 2.8 traces no generator inside a comprehension
            if t.dim() > 0:
                given.append(t)
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

    def _measure_bare(self, traced: Any) -> Any:
        return BareUses(self, traced).measure()

    # ---- parts of the model ----------------------------------------------------------------------------------

    def expects_code(self) -> bool:
        """Whether compiled code may be met in a call outside of it."""
        return self.expected > 0 or any(m._compiled_call_impl is not None for m in self.modules)

    def met_code(self, met: bool) -> None:
        """Whether a call outside compiled code has met some."""
        self.expected = PATIENCE if met else max(0, self.expected - 1)

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
