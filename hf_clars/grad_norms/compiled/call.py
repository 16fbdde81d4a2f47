"""One module in compiled code: what its hook does there. What comes in the backward pass is in `arithmetic.py`.

Everything here that is called while a compiler looks on must be what it understands: tensors, plain attributes, loops
over fixed things. It takes long over each call of a function, and a comprehension is one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from hf_clars.grad_norms.compiled.behind import Behind, behind, linked
from hf_clars.grad_norms.compiled.operations import refuse
from hf_clars.grad_norms.compiled.state import PATIENCE, PassState
from hf_clars.grad_norms.compiled.uses import BARE, HANDED, hook_is_alone, kind_of_use, note_bare, note_uses
from hf_clars.grad_norms.hooked_modules import HookedModule
from hf_clars.grad_norms.pytree import tensor_given
from hf_clars.grad_norms.torch_traces import rows_are_unknown

_LEARN = (
    "Run one forward and backward pass on a batch without torch.compile first (with the norms attached): the layout of "
    "the batch is learned there. A table of positions can be looked up at [1, T] in place of [T]: that is every "
    "sample's, and can be compiled."
)
_LEFT_OUT = "Passes without torch.compile have shown no way to tell: compile only parts of the model without it."


class CompiledCall(Behind):
    """One module in compiled code; a hook.

    Args:
        state: The tracker's.
        hooked: The module.
        row_numbers: The row of each of its parameters.

    Attributes:
        numbered: The names of its parameters with their numbers.
        kinds: What it does with each of its parameters, see `uses.py`.
        links: What the uses of its table share, if it has one that is looked up.
        where: The row of each of its parameters, on the rows' device.
        ran: Whether compiled code has called it.
    """

    state: PassState

    def __init__(self, state: PassState, hooked: HookedModule, row_numbers: list[int]) -> None:
        super().__init__(state, hooked, row_numbers)
        self.name = str(hooked)
        self.row_numbers = row_numbers
        self.numbered = list(enumerate(self.names))
        self.where = self.places
        self.kinds = [kind_of_use(self.rule, n) for n in self.names]
        used = list(zip(row_numbers, self.kinds, strict=True))
        state.uses.known[hooked.path] = dict(zip(self.names, used, strict=True))
        self.links = next((state.links.get(i) for i, kind in used if kind != "other"), None)
        self.ran = False

    def in_words(self) -> str:
        """How it is measured, for people."""
        return f"{type(self.rule).__name__} of {self.hooked}: in the compiled graph"

    def ready(self, *args: Any) -> bool:
        """Whether it can do its work in compiled code."""
        if not self.state.ready():
            self.state.expected = PATIENCE
            return False
        return True

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Tensor | None:
        """After the module's forward, while a compiler looks on. What is returned takes the output's place."""
        x, state = tensor_given(args, kwargs), self.state
        if not (state.measures and torch.is_grad_enabled()) or x is None:
            return None
        state.keep_rows()
        wanted, names, params, bare = self._wanted(module)
        if bare and hook_is_alone():
            return refuse(output, state.receiver, traced_apart(self.name), True)
        if not wanted:
            return None
        if state.within:
            self._note_uses(names)
        elif self.ran:
            return refuse(output, state.receiver, used_twice(self.name), False)
        else:  # where the whole model is compiled, checkpointing allows no change of attributes here
            self.ran = True
        rows, summed = self._rows(wanted)
        batch = rows[0].shape[0]
        if not self._layout_is_known(x, output, batch):
            if self.state.within:  # the uses are found in what is traced, where axes can be followed
                note_bare(self.state.uses.name, self.hooked.path, names)
            return refuse(output, self.state.receiver, self._unknown_rows(x, batch), True)
        spread = output.shape[0] == 1 != batch
        saved = self.rule.save(self.module, *_detached(args, kwargs), output.detach(), names)
        if spread:  # what is made of parameters, and added to every sample
            output = output.expand(batch, *output.shape[1:])
            saved = tuple(t.expand(batch, *t.shape[1:]) if t.shape[0] == 1 else t for t in saved)
        if self._is_linked(names):
            return self._linked(output, names, summed, rows, saved)
        given = None if spread else x
        if self.is_traced:
            return self.put(output, given, rows, params, saved, names, summed)
        return behind(output, given, rows, params, saved, self._checked_places(), self.known_as, names, summed)

    @property
    def is_traced(self) -> bool:
        """Whether a trace follows what is put behind it."""
        return not (self.state.within and self.known_as)

    def _checked_places(self) -> Tensor | None:
        return self.places if self.state.checked else None

    def _linked(
        self, y: Tensor, names: tuple[str, ...], summed: tuple[bool, ...], rows: list[Tensor], saved: tuple[Tensor, ...]
    ) -> Tensor:
        links = self.links
        assert links is not None
        tensors, earlier = [*rows, *links.zeros, *links.tokens, *saved], len(links.zeros)
        if self.is_traced:
            y, link = self.link(y, tensors, earlier, names, summed)
        else:
            y, link = linked(y, tensors, earlier, self._checked_places(), self.known_as, names, summed)
        if (tokens := self.tokens_of(saved, rows[0].shape[0])) is not None:
            links.tokens, links.zeros = (*links.tokens, tokens), (*links.zeros, link)
        return y

    def _wanted(self, module: nn.Module) -> tuple[list[int], tuple[str, ...], list[Tensor], bool]:
        """Which of its parameters are measured, their names, and themselves; whether others have bare uses."""
        wanted, names, params, bare = [], (), [], False  # type: list[int], tuple[str, ...], list[Tensor], bool
        for i, name in self.numbered:
            param = getattr(module, name)
            if not param.requires_grad:
                continue
            if self.state.within and self.state.uses.ways[self.row_numbers[i]] == BARE:
                bare = True
            else:
                wanted.append(i)
                names = (*names, name)
                params.append(param)
        return wanted, names, params, bare

    def _rows(self, wanted: list[int]) -> tuple[list[Tensor], tuple[bool, ...]]:
        """Rows of the parameters wanted, zeros [B], and counts [1]; and whether a row is shared, zeros [B, *shape]."""
        (rows, counts, each, used), shared = HANDED[self.state.receiver], self.state.shared
        mine, own, summed = [], [], ()  # type: list[Tensor], list[Tensor], tuple[bool, ...]
        if not self.state.within:  # one code serves blocks that are alike: which rows are theirs is known to a tensor
            each = rows.index_select(0, self.where).unbind(0)
            used = counts.index_select(0, self.where).unbind(0)
        for i in wanted:
            row = self.row_numbers[i] if self.state.within else i
            is_shared = self.state.within and row in shared
            mine.append(shared[row] if is_shared else each[row])
            own.append(used[row])
            summed = (*summed, is_shared)
        return mine + own, summed

    def _note_uses(self, names: tuple[str, ...]) -> None:
        uses = self.state.uses
        note_uses(uses.name, self.hooked.path, names)
        if uses.several and not self.state.shares:
            self.state.share()

    def _is_linked(self, names: tuple[str, ...]) -> bool:
        return self.links is not None and self.links.linked and "weight" in names

    def _layout_is_known(self, x: Tensor, output: Tensor, batch: int) -> bool:
        """Whether the first axis is the batch, or folds it as an uncompiled pass has shown."""
        hooked = self.hooked
        if rows_are_unknown(x) or not self.rule.has_batch_axis(self.module, x):
            return False
        if output.shape[0] != x.shape[0]:  # tables of positions may be looked up at [1, T], with tokens [B, T] beside
            return self.looks_up and output.shape[0] == 1 and x.shape[0] == batch
        if x.shape[0] == 1 != batch:
            if hooked.was_seen:
                return x.dim() in hooked.own_dims and x.dim() not in hooked.data_dims
            # What is looked up is every sample's; but the batch may be in another place.
            return not x.is_floating_point() and (batch not in x.shape[1:] or batch in self.state.given_axes)
        if x.shape[0] == batch:
            if "graph" in (hooked.calls.get((1, x.dim())), hooked.calls.get((0, x.dim()))):
                return False  # rows were given other places, or the batch was on another axis
            if hooked.was_seen:
                return x.dim() not in hooked.own_dims or x.dim() in hooked.data_dims
            return not self._may_be_table(x, batch)
        rows = x.shape[0] // batch
        known = hooked.calls.get((rows, *x.shape[1:])) if rows * batch == x.shape[0] else None
        return known in ("certain", "observed")

    def _may_be_table(self, x: Tensor, batch: int) -> bool:
        """Whether an input may be as long as the batch by chance: tokens of positions, T5's buckets [T, T], a table."""
        given = self.state.given
        if x.requires_grad or batch not in self.state.given_axes or any(x is t for t in given):
            return False
        return not x.is_floating_point() or (len(given) > 0 and x.numel() < given[0].numel())

    def _unknown_rows(self, x: Tensor, batch: int) -> str:
        return (
            f"{self.name} is called on {tuple(x.shape)} in compiled code, and the batch has {batch} samples: which "
            f"rows are whose is not known. {_LEFT_OUT if self.hooked.was_seen else _LEARN}"
        )


def _detached(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    given = []
    for a in args:
        given.append(a.detach() if isinstance(a, Tensor) else a)
    if kwargs:
        kwargs = {k: a.detach() if isinstance(a, Tensor) else a for k, a in kwargs.items()}
    return tuple(given), kwargs


def used_outside(names: str) -> str:
    """What is wrong with parameters that compiled code uses without the modules that own them."""
    return (
        f"{names}: is used in compiled code without the module that owns it, where no layer rule measures it. Call the "
        "module, detach the parameter there, compile only parts of the model without that use (as "
        "model.layers[0].compile()), or run the model without torch.compile."
    )


def traced_apart(name: str) -> str:
    """What is wrong with a module whose rows only what is traced could tell, where its hook is traced without it."""
    return (
        f"{name} is called where torch.compile traces one call at a time, as in a loop with a branch that the data "
        "decide, and nothing tells there which rows belong to which sample. Compile the parts of the model that can be "
        "compiled, one by one (as model.layers[0].compile()), or run the model without torch.compile."
    )


def used_twice(names: str) -> str:
    """What is wrong with parameters that are used several times where no trace sees it."""
    return (
        f"{names} is called more than once in one pass, or shares parameters with what is, and some of it in compiled "
        "code that does not see the rest: compile the whole model with fullgraph=True, or compile none of it."
    )
