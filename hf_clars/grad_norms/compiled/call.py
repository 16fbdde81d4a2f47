"""One module in compiled code: what its hook does there, and the arithmetic of its backward pass.

Everything here that is called while a compiler looks on must be what it understands: tensors, plain attributes, loops
over fixed things.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hf_clars.distributed import is_split
from hf_clars.grad_norms.compiled.functions import Linked, OneProduct, Watched, Way
from hf_clars.grad_norms.compiled.operations import check_sum, refuse
from hf_clars.grad_norms.compiled.uses import BARE, HANDED, kind_of_use, looks_up, note_bare, note_uses
from hf_clars.grad_norms.hooked_modules import HookedModule
from hf_clars.grad_norms.norm_math import at_least_float32, linear_weight_rows, slices_of, squared_sum
from hf_clars.grad_norms.pytree import tensor_given
from hf_clars.grad_norms.registry import LayerRule, is_shipped
from hf_clars.grad_norms.rules.linear import positions

if TYPE_CHECKING:
    from hf_clars.grad_norms.compiled.calls import CompiledCalls

_LEARN = (
    "Run one forward and backward pass on a batch without torch.compile first (with the norms attached): the layout of "
    "the batch is learned there. A table of positions can be looked up at [1, T] in place of [T]: that is every "
    "sample's, and can be compiled."
)
_LEFT_OUT = "Passes without torch.compile have shown no way to tell: compile only parts of the model without it."

#: A model may be compiled in parts after some passes that were not: code that finds no rows must be left.
PATIENCE = 3


class CompiledCall:
    """One module in compiled code; a hook.

    Args:
        state: The tracker's.
        hooked: The module.
        row_numbers: The row of each of its parameters.

    Attributes:
        names: Of its parameters.
        kinds: What it does with each, see `uses.py`.
        looks_up: Whether it looks rows of a table up.
        links: What the uses of its table share, if it has one that is looked up.
        places: The row of each of its parameters.
        where: The same, on the rows' device.
        ran: Whether compiled code has called it.
    """

    def __init__(self, state: CompiledCalls, hooked: HookedModule, row_numbers: list[int]) -> None:
        assert hooked.rule is not None
        self.state = state
        self.hooked = hooked
        self.module = hooked.module
        self.rule = hooked.rule
        self.name = str(hooked)
        self.row_numbers = row_numbers
        self.places = self.where = torch.tensor(row_numbers)  # numbers would make different code of equal blocks
        self.names = tuple(hooked.params)
        self.kinds = [kind_of_use(self.rule, n) for n in self.names]
        self.looks_up = looks_up(self.rule)
        of_tables = zip(row_numbers, self.kinds, strict=True)
        self.links = next((state.links.get(i) for i, kind in of_tables if kind != "other"), None)
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
            wanted = [i for i in wanted if state.uses.ways[self.row_numbers[i]] != BARE]
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
                note_bare(self.state.uses.name, [self.row_numbers[i] for i in wanted])
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
        if (tokens := self._tokens(saved, rows[0].shape[0])) is not None:
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
        rows, kinds = [self.row_numbers[i] for i in wanted], [self.kinds[i] for i in wanted]
        note_uses(uses.name, self.hooked.path, rows, kinds)
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
        if not self.rule.has_batch_axis(self.module, x):
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

    # ---- arithmetic of the backward pass ---------------------------------------------------------------------

    def for_rows(
        self, names: tuple[str, ...], summed: tuple[bool, ...], saved: tuple[Tensor, ...], g: Tensor, batch: int
    ) -> list[Tensor]:
        """What each row gets: squared norms [B] of the parameter named, or gradients [B, *shape] where it is summed."""
        rule, module, dtype = self.rule, self.module, g.dtype
        saved, g, rows = self._wide(saved, g, batch)
        grads: dict[str, Tensor] = {}
        if any(summed) or rows > 1 or not rule.squares_without_grads:
            grads = rule.per_sample_grads(module, saved, g, set(names))
            grads = {n: t.unflatten(0, (batch, rows)).sum(1) if rows > 1 else t for n, t in grads.items()}
            found = {n: grads[n] if whole else squared_sum(grads[n]) for n, whole in zip(names, summed, strict=True)}
        else:
            found = rule.squared_norms(module, saved, g, set(names))
        if self.state.checked:
            for n in names:
                if n in grads:
                    total = grads[n].sum(0)
                else:
                    total = rule.summed_grad(module, saved, g, n, elements=getattr(module, n).numel())
                found[n] = self._checked(n, found[n], total, dtype)
        wide = self.state.leaf.dtype
        return [found[n] if found[n].dtype == wide else found[n].to(wide) for n in names]

    def _wide(self, saved: tuple[Tensor, ...], g: Tensor, batch: int) -> tuple[tuple[Tensor, ...], Tensor, int]:
        """In float32, [B, rows, ...] where positions share the weights; and how many rows a sample has else."""
        rows = g.shape[0] // batch
        saved, g = tuple([at_least_float32(t) for t in saved]), at_least_float32(g)
        if rows > 1 and self.rule.weight_sharing_axes:
            return tuple(t.unflatten(0, (batch, rows)) for t in saved), g.unflatten(0, (batch, rows)), 1
        return saved, g, rows

    def _tokens(self, saved: tuple[Tensor, ...], batch: int) -> Tensor | None:
        """What it has looked up, [B, T]."""
        tokens = self.rule.lookup_tokens(saved)
        return None if tokens is None else tokens.reshape(batch, -1)

    def link_shape(self, saved: tuple[Tensor, ...], y: Tensor, batch: int) -> tuple[int, ...]:
        """Of the link that it hands out: [B, T, width]; of nothing, if it looks nothing up."""
        tokens = self._tokens(saved, batch)
        return (0,) if tokens is None else (*tokens.shape, y.shape[-1])

    def row_grads(self, saved: tuple[Tensor, ...], g: Tensor, batch: int) -> Tensor:
        """What a look-up adds to the rows that it has looked up, [B, T, width]."""
        saved, g, _ = self._wide(saved, g, batch)
        return self.rule.row_grads(self.module, saved, g)

    def rows_at(self, tokens: Tensor, saved: tuple[Tensor, ...], g: Tensor, batch: int) -> Tensor:
        """What it adds to the rows that others have looked up: tokens [B, T] -> [B, T, width]."""
        mine = self._tokens(saved, batch)
        if mine is not None:
            rows = self.row_grads(saved, g, batch)
            return (tokens.unsqueeze(2) == mine.unsqueeze(1)).to(rows.dtype) @ rows
        (x,), g, _ = self._wide(saved, g, batch)
        return linear_weight_rows(positions(x), positions(g), tokens)

    def whole_backward(
        self, names: tuple[str, ...], x: Tensor, weight: Tensor, g: Tensor, *, input_wanted: bool
    ) -> tuple[Tensor | None, list[Tensor], list[Tensor]]:
        """By kernels: the input's gradient, each named parameter's, and every sample's squared norms [B] of these."""
        done = self.rule.whole_backward(self.module, (x,), weight, g, input_wanted=input_wanted)
        sums, squares = done.grads, done.squares
        if self.state.checked:
            squares = {n: self._checked(n, squares[n], sums[n], g.dtype) for n in names}
        return done.input_grad, [sums[n] for n in names], [squares[n].to(self.state.leaf.dtype) for n in names]

    def sums_and_squares(self, names: tuple[str, ...], x: Tensor, g: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """The gradient of each parameter named, and every sample's squared norms [B] of it."""
        size = sum(getattr(self.module, n).numel() for n in names)
        sums: dict[str, Tensor] = {}
        parts: dict[str, list[Tensor]] = {n: [] for n in names}
        for x_part, g_part in slices_of(x, g, elements_per_sample=size):
            grads = self.rule.per_sample_grads(self.module, (x_part,), g_part, set(names))
            for n in names:
                t = at_least_float32(grads[n])
                sums[n] = sums[n] + t.sum(0) if n in sums else t.sum(0)
                parts[n].append(squared_sum(t))
        squares = {n: part[0] if len(part) == 1 else torch.cat(part) for n, part in parts.items()}
        if self.state.checked:
            squares = {n: self._checked(n, t, sums[n], g.dtype) for n, t in squares.items()}
        return [sums[n] for n in names], [squares[n].to(self.state.leaf.dtype) for n in names]

    def _checked(self, name: str, found: Tensor, total: Tensor, dtype: torch.dtype) -> Tensor:
        return check_sum(found, total, self.places, self.names.index(name), self.state.receiver, dtype)


def used_outside(names: str) -> str:
    """What is wrong with parameters that compiled code uses without the modules that own them."""
    return (
        f"{names}: is used in compiled code without the module that owns it, where no layer rule measures it. Call the "
        "module, detach the parameter there, compile only parts of the model without that use (as "
        "model.layers[0].compile()), or run the model without torch.compile."
    )


def used_twice(names: str) -> str:
    """What is wrong with parameters that are used several times where no trace sees it."""
    return (
        f"{names} is called more than once in one pass, or shares parameters with what is, and some of it in compiled "
        "code that does not see the rest: compile the whole model with fullgraph=True, or compile none of it."
    )
