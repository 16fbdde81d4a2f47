"""The arithmetic of a module's backward pass in compiled code: from its output's gradient to what its rows get."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_clars.grad_norms.compiled.operations import check_sum
from hf_clars.grad_norms.compiled.uses import looks_up
from hf_clars.grad_norms.hooked_modules import HookedModule
from hf_clars.grad_norms.norm_math import at_least_float32, linear_weight_rows, slices_of, squared_sum
from hf_clars.grad_norms.rules.linear import positions


class Delivery:
    """How norms are handed over.

    Args:
        receiver: To whom: a number, see `operations.enlist`.
        wide: Whether in float64, and not in float32.

    Attributes:
        checked: Whether sums are checked in this batch.
        leaf: Makes the rows a part of the graph; they have its type.
    """

    def __init__(self, receiver: int, *, wide: bool) -> None:
        self.receiver = receiver
        self.checked = True
        # Of one number, and not without axes: the compiler takes those for numbers of Python, and begins anew.
        self.leaf = torch.zeros(1, dtype=torch.float64 if wide else torch.float32, requires_grad=True)


class Arithmetic:
    """What the functions behind a module ask when its gradient comes; see `functions.py`.

    Args:
        state: How norms are handed over.
        hooked: The module.
        row_numbers: The row of each of its parameters.

    Attributes:
        names: Of its parameters.
        looks_up: Whether it looks rows of a table up.
        places: The row of each of its parameters.
    """

    def __init__(self, state: Delivery, hooked: HookedModule, row_numbers: list[int]) -> None:
        assert hooked.rule is not None
        self.state = state
        self.hooked = hooked
        self.module = hooked.module
        self.rule = hooked.rule
        self.places = torch.tensor(row_numbers)  # numbers would make different code of equal blocks
        self.names = tuple(hooked.params)
        self.looks_up = looks_up(self.rule)

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

    def tokens_of(self, saved: tuple[Tensor, ...], batch: int) -> Tensor | None:
        """What it has looked up, [B, T]."""
        tokens = self.rule.lookup_tokens(saved)
        return None if tokens is None else tokens.reshape(batch, -1)

    def link_shape(self, saved: tuple[Tensor, ...], y: Tensor, batch: int) -> tuple[int, ...]:
        """Of the link that it hands out: [B, T, width]; of nothing, if it looks nothing up."""
        tokens = self.tokens_of(saved, batch)
        return (0,) if tokens is None else (*tokens.shape, y.shape[-1])

    def row_grads(self, saved: tuple[Tensor, ...], g: Tensor, batch: int) -> Tensor:
        """What a look-up adds to the rows that it has looked up, [B, T, width]."""
        saved, g, _ = self._wide(saved, g, batch)
        return self.rule.row_grads(self.module, saved, g)

    def rows_at(self, tokens: Tensor, saved: tuple[Tensor, ...], g: Tensor, batch: int) -> Tensor:
        """What it adds to the rows that others have looked up: tokens [B, T] -> [B, T, width]."""
        mine = self.tokens_of(saved, batch)
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
