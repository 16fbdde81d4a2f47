"""What compiled code knows of the pass that it is in, and shares with the modules that are called in it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from hf_clars.grad_norms.compiled.arithmetic import Delivery
from hf_clars.grad_norms.compiled.crossings import Crossings
from hf_clars.grad_norms.compiled.functions import Summed
from hf_clars.grad_norms.compiled.operations import keep_rows
from hf_clars.grad_norms.compiled.uses import BARE, HANDED, LINKED, SUMMED, Links, Uses, looks_up, watch_trace
from hf_clars.grad_norms.hooked_modules import HookedModule

#: A model may be compiled in parts after some passes that were not: code that finds no rows must be left.
PATIENCE = 3


class PassState(Delivery):
    """A tracker's state in compiled code.

    Args:
        model: The model.
        receiver: Its number, see `operations.enlist`.
        params: The parameters that compiled code can measure; a parameter's number is its row's.
        owners: The modules that have each of these, and of the others.
        uses: How each is used, as traces have shown it.

    Attributes:
        links: What the uses of each table share, by its row.
        crossings: What pieces of compiled code hand each other.
        within: Whether compiled code has begun the pass, or refused it.
        measures: Whether the model is being called, and its calls have rows.
        shares: Whether what several uses share was made in this pass.
        shared: For each parameter whose uses share its row: zeros [B, *shape].
        number: Of the last pass. Kept so that a compiler lets a pass begin in the forward pass: what only the backward
            pass needs, it would put there.
        given: What the model was called with, where compiled code has begun the pass.
        given_axes: Lengths of the axes after the batch's.
        expected: In how many more calls outside compiled code to prepare rows, though none inside has used them.
        paused: As the tracker's.
        beside: Rows of parameters whose bare uses compiled code measures.
    """

    def __init__(
        self,
        model: nn.Module,
        receiver: int,
        params: Sequence[nn.Parameter],
        owners: Mapping[nn.Parameter, Sequence[HookedModule]],
        uses: Uses,
    ) -> None:
        super().__init__(receiver, wide=any(p.dtype == torch.float64 for p in params))
        self.model = model
        self.params = list(params)
        self.owners = owners
        self.uses = uses
        self.shapes = [tuple(p.shape) for p in params]
        self.links = {i: Links() for i, p in enumerate(params) if any(looks_up(h.rule) for h in owners[p])}
        self.crossings = Crossings(receiver)
        self.measures = self.within = self.shares = self.paused = False
        self.number: Tensor | None = None
        self.shared: dict[int, Tensor] = {}
        self.given_axes: tuple[int, ...] = ()
        self.given: tuple[Tensor, ...] = ()
        self.expected = PATIENCE
        self.beside: set[int] = set()

    def ready(self) -> bool:
        """Whether modules can do their work in compiled code, as far as it depends on the pass."""
        return self.measures or self.within or self.paused or not torch.is_grad_enabled()

    def share(self) -> None:
        """Make what several uses of a parameter share, once in a pass and in the code that uses it."""
        self.shares = True
        _, _, each, used = HANDED[self.receiver]
        for i, way in enumerate(self.uses.ways):
            if i in self.links:
                self.links[i].linked = way == LINKED
            if way == SUMMED and i not in self.shared:
                self.shared[i] = Summed.apply(each[i], used[i], self.shapes[i])

    def keep_rows(self) -> None:
        """A module is called in a trace: let what measures bare uses find the rows there."""
        if watch_trace(self.uses.name) and self.measures:  # parts of a model serve any number of steps
            keep_rows(*HANDED[self.receiver][:2], self.receiver, list(self.given_axes) if self.within else [])

    def bare_rows(self) -> list[int]:
        """The rows of parameters with bare uses."""
        return [i for i, way in enumerate(self.uses.ways) if way == BARE]

    def bare_params(self) -> set[nn.Parameter]:
        """The same parameters."""
        return {self.params[row] for row in self.bare_rows()}

    def seen_rows(self) -> set[int]:
        """The rows of parameters whose modules were called outside compiled code, which has shown their layouts."""
        return {i for i, p in enumerate(self.params) if any(h.was_seen for h in self.owners[p])}

    def name_of_row(self, row: int) -> str:
        """A parameter's name in the model."""
        return self.name_of(self.params[row])

    def name_of(self, param: nn.Parameter) -> str:
        """A parameter's name in the model."""
        owner = self.owners[param][0]
        return next(owner.full_name(n) for n, q in owner.params.items() if q is param)
