"""One module in compiled code: what its hook does there. What comes in the backward pass is in `arithmetic.py`.

Everything here that is called while a compiler looks on must be what it understands: tensors, plain attributes, loops
over fixed things.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from hf_clars.distributed import is_split
from hf_clars.grad_norms.compiled.arithmetic import Arithmetic
from hf_clars.grad_norms.compiled.functions import Linked, OneProduct, Watched, Way
from hf_clars.grad_norms.compiled.operations import refuse
from hf_clars.grad_norms.compiled.state import PATIENCE, PassState
from hf_clars.grad_norms.compiled.uses import BARE, HANDED, hook_is_alone, kind_of_use, note_bare, note_uses
from hf_clars.grad_norms.hooked_modules import HookedModule
from hf_clars.grad_norms.pytree import tensor_given
from hf_clars.grad_norms.registry import LayerRule, is_shipped
from hf_clars.grad_norms.torch_traces import rows_are_unknown

_LEARN = (
    "Run one forward and backward pass on a batch without torch.compile first (with the norms attached): the layout of "
    "the batch is learned there. A table of positions can be looked up at [1, T] in place of [T]: that is every "
    "sample's, and can be compiled."
)
_LEFT_OUT = "Passes without torch.compile have shown no way to tell: compile only parts of the model without it."


class CompiledCall(Arithmetic):
    """One module in compiled code; a hook.

    Args:
        state: The tracker's.
        hooked: The module.
        row_numbers: The row of each of its parameters.

    Attributes:
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
        wanted = [i for i, n in enumerate(self.names) if getattr(module, n).requires_grad]
        if state.within:
            bare, wanted = wanted, [i for i in wanted if state.uses.ways[self.row_numbers[i]] != BARE]
            if len(wanted) < len(bare) and hook_is_alone():
                return refuse(output, state.receiver, traced_apart(self.name), True)
        if not wanted:
            return None
        if state.within:
            self._note_uses(wanted)
        elif self.ran:
            return refuse(output, state.receiver, used_twice(self.name), False)
        else:  # where the whole model is compiled, checkpointing allows no change of attributes here
            self.ran = True
        names = tuple([self.names[i] for i in wanted])  # of a list: a compiler follows each step of a generator
        rows, summed = self._rows(wanted)
        batch = rows[0].shape[0]
        if not self._layout_is_known(x, output, batch):
            if self.state.within:  # the uses are found in what is traced, where axes can be followed
                note_bare(self.state.uses.name, self.hooked.path, names)
            return refuse(output, self.state.receiver, self._unknown_rows(x, batch), True)
        spread = output.shape[0] == 1 != batch
        way = None if spread or any(summed) or not self._is_first() else self._way(names, x, output, batch)
        if way is not None:
            params = [getattr(self.module, n) for n in names]
            return OneProduct.apply(output.detach(), self, names, way, x, *rows, *params)
        args = tuple([a.detach() if isinstance(a, Tensor) else a for a in args])
        kwargs = {k: a.detach() if isinstance(a, Tensor) else a for k, a in kwargs.items()}
        saved = self.rule.save(self.module, args, kwargs, output.detach(), names)
        if spread:  # what is made of parameters, and added to every sample
            output = output.expand(batch, *output.shape[1:])
            saved = tuple(t.expand(batch, *t.shape[1:]) if t.shape[0] == 1 else t for t in saved)
        return self._watched(output, names, summed, rows, saved)

    def _watched(
        self, y: Tensor, names: tuple[str, ...], summed: tuple[bool, ...], rows: list[Tensor], saved: tuple[Tensor, ...]
    ) -> Tensor:
        if not self._is_linked(names):
            return Watched.apply(y, self, names, summed, *rows, *saved)
        links = self.links
        assert links is not None
        y, link = Linked.apply(y, self, names, summed, len(links.zeros), *rows, *links.zeros, *links.tokens, *saved)
        if (tokens := self.tokens_of(saved, rows[0].shape[0])) is not None:
            links.tokens, links.zeros = (*links.tokens, tokens), (*links.zeros, link)
        return y

    def _rows(self, wanted: list[int]) -> tuple[list[Tensor], tuple[bool, ...]]:
        """Rows of the parameters wanted, zeros [B], and counts [1]; and whether a row is shared, zeros [B, *shape]."""
        (rows, counts, each, used), shared = HANDED[self.state.receiver], self.state.shared
        if self.state.within:
            numbers = [self.row_numbers[i] for i in wanted]
            alone = [shared.get(i, each[i]) for i in numbers] + [used[i] for i in numbers]
            return alone, tuple([i in shared for i in numbers])
        # One code serves blocks that are alike: which rows are theirs is known to a tensor.
        mine, own = rows.index_select(0, self.where).unbind(0), counts.index_select(0, self.where).unbind(0)
        return [mine[i] for i in wanted] + [own[i] for i in wanted], (False,) * len(wanted)

    def _note_uses(self, wanted: list[int]) -> None:
        uses = self.state.uses
        note_uses(uses.name, self.hooked.path, [self.names[i] for i in wanted])
        if uses.several and not self.state.shares:
            self.state.share()

    def _is_linked(self, names: tuple[str, ...]) -> bool:
        return self.links is not None and self.links.linked and "weight" in names

    def _way(self, names: tuple[str, ...], x: Tensor, output: Tensor, batch: int) -> Way | None:
        """How the weight gradient comes from this engine; None: from autograd, as always with a rule of the user's."""
        if self._is_linked(names) or "weight" not in names or x.shape[0] != batch or is_split(self.module.weight):
            return None
        if not is_shipped(self.rule):
            return None  # the sum check would compare what it gives with itself, and its input_grad with nothing
        # Sums, as of normalisation layers, a compiler joins with what is around them; products it cannot.
        products = type(self.rule).fuses_weight_grad is not LayerRule.fuses_weight_grad
        if products and self.rule.gives_whole_backward and self.rule.supplies_backward(self.module, x, output):
            return "kernels"
        return "torch" if self.rule.gives_input_grad and self.rule.fuses_weight_grad(self.module, x, output) else None

    def _is_first(self) -> bool:
        """Whether no other tracker's call of this module comes before: it would be cut off."""
        for hook in self.module._forward_hooks.values():
            traced = getattr(hook, "traced", None)
            if isinstance(traced, CompiledCall):
                return traced is self
        return True

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
        return not x.is_floating_point() or (bool(given) and x.numel() < given[0].numel())

    def _unknown_rows(self, x: Tensor, batch: int) -> str:
        return (
            f"{self.name} is called on {tuple(x.shape)} in compiled code, and the batch has {batch} samples: which "
            f"rows are whose is not known. {_LEFT_OUT if self.hooked.was_seen else _LEARN}"
        )


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
