"""The functions that stand behind a module in a compiled graph.

Each takes a row of zeros [B] for every parameter as one more input, and the row's "gradient" is every sample's squared
norm. A zero beside it, the count, gets the "gradient" 1, so that two uses of a row can be told from one. So norms are a
part of the graph: nothing can be lost, or counted twice. Of parameters that are used several times see `uses.py`.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from hf_clars.grad_norms.compiled.arithmetic import Arithmetic
from hf_clars.grad_norms.compiled.operations import check_sum
from hf_clars.grad_norms.norm_math import squared_sum
from hf_clars.grad_norms.torch_internals import no_autocast

Way = Literal["torch", "kernels"]


class Watched(torch.autograd.Function):
    """Identity on a module's output, beside whose ordinary backward pass the norms are made."""

    @staticmethod
    def forward(
        ctx: Any, y: Tensor, call: Arithmetic, names: tuple[str, ...], summed: tuple[bool, ...], *tensors: Tensor
    ) -> Tensor:
        """The forward pass; `tensors` are rows, counts, and what the rule saved."""
        ctx.call, ctx.names, ctx.summed, ctx.batch = call, names, summed, tensors[0].shape[0]
        ctx.save_for_backward(*tensors[2 * len(names) :])
        return y.clone()  # costs nothing in compiled code, and an in-place operation may follow

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        """The backward pass; see the class."""
        saved = ctx.saved_tensors
        with no_autocast(g.device.type):
            found = ctx.call.for_rows(ctx.names, ctx.summed, saved, g, ctx.batch)
        one = found[0].new_ones(1)
        counts = [None if summed else one for summed in ctx.summed]
        return g, None, None, None, *found, *counts, *[None for _ in saved]


class Summed(torch.autograd.Function):
    """A row for several uses: zeros [B, *shape], to which each use gives its samples' gradients."""

    @staticmethod
    def forward(ctx: Any, row: Tensor, count: Tensor, shape: tuple[int, ...]) -> Tensor:
        """The forward pass; see the class."""
        return row.new_zeros(()).expand(row.shape[0], *shape)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        """The backward pass; see the class."""
        return squared_sum(g), g.new_ones(1), None


class Copies(torch.autograd.Function):
    """As `Summed`, for a parameter's bare uses: zeros [B, *shape], whose "gradient" is the parameter's, by sample."""

    @staticmethod
    def forward(
        ctx: Any,
        row: Tensor,
        count: Tensor,
        number: int,
        shape: tuple[int, ...],
        receiver: int,
        checked: bool,
        dtype: torch.dtype,
    ) -> Tensor:
        """The forward pass; `number` is the row's, and `dtype` the parameter's."""
        ctx.number, ctx.receiver, ctx.checked, ctx.dtype = number, receiver, checked, dtype
        return row.new_zeros(()).expand(row.shape[0], *shape)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        """The backward pass; see the class."""
        squares = squared_sum(g)
        if ctx.checked:
            place = torch.full((1,), ctx.number)
            squares = check_sum(squares, g.sum(0), place, 0, ctx.receiver, ctx.dtype)
        return squares, g.new_ones(1), None, None, None, None, None


class Beside(torch.autograd.Function):
    """A result y, beside which z was made for the samples' gradients: both get y's gradient."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, z: Tensor) -> Tensor:
        """The forward pass: y."""
        ctx.dtype = z.dtype
        return y.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor]:
        """The backward pass; see the class."""
        return g, g.to(ctx.dtype)


class Linked(torch.autograd.Function):
    """As `Watched`, for a use of a table: it takes the links of earlier look-ups, and a look-up hands out its own.

    Uses that take links are known to the first look-up, which alone delivers the row's count.
    """

    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,
        call: Arithmetic,
        names: tuple[str, ...],
        summed: tuple[bool, ...],
        earlier: int,
        *tensors: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """The forward pass; `tensors` are rows, counts, earlier links and their tokens, and what the rule saved."""
        row = tensors[0]
        ctx.call, ctx.names, ctx.summed, ctx.earlier, ctx.batch = call, names, summed, earlier, row.shape[0]
        kept = tensors[2 * len(names) + earlier :]
        ctx.save_for_backward(*kept)
        # With an axis more, so that what is traced cannot take it for what the module returns.
        return y.clone(), row.new_zeros(()).expand(*call.link_shape(kept[earlier:], y, row.shape[0]), 1)

    @staticmethod
    def backward(ctx: Any, g: Tensor, at_tokens: Tensor) -> tuple[Tensor | None, ...]:
        """The backward pass; see the class."""
        call, names, earlier = ctx.call, ctx.names, ctx.earlier
        tokens, saved = ctx.saved_tensors[:earlier], ctx.saved_tensors[earlier:]
        with no_autocast(g.device.type):
            found = call.for_rows(names, ctx.summed, saved, g, ctx.batch)
            links = [call.rows_at(t, saved, g, ctx.batch).to(found[0].dtype).unsqueeze(-1) for t in tokens]
            if call.looks_up:
                both = (call.row_grads(saved, g, ctx.batch) * at_tokens.squeeze(-1)).flatten(1).sum(1)
                found = [found[0] + 2 * both]
        once = (not summed and not (earlier and n == "weight") for n, summed in zip(names, ctx.summed, strict=True))
        counts = [t.new_ones(1) if alone else None for t, alone in zip(found, once, strict=True)]
        return g, None, None, None, None, *found, *counts, *links, *(None for _ in ctx.saved_tensors)


class OneProduct(torch.autograd.Function):
    """A module's output, whose weight gradient comes with the norms: "torch" sums the samples' gradients."""

    @staticmethod
    def forward(
        ctx: Any, y: Tensor, call: Arithmetic, names: tuple[str, ...], way: Way, x: Tensor, *rows_and_params: Tensor
    ) -> Tensor:
        """The forward pass; see the class."""
        params = rows_and_params[2 * len(names) :]
        ctx.call, ctx.names, ctx.way, ctx.dtype, ctx.x_dtype = call, names, way, y.dtype, x.dtype
        ctx.param_dtypes = [p.dtype for p in params]
        ctx.save_for_backward(x.to(y.dtype), params[names.index("weight")])
        return y.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        """The backward pass; see the class."""
        x, weight = ctx.saved_tensors
        call, x_grad = ctx.call, None
        weight, wanted = weight.to(ctx.dtype), ctx.needs_input_grad[4]
        with no_autocast(g.device.type):
            if ctx.way == "kernels":
                x_grad, sums, squares = call.whole_backward(ctx.names, x, weight, g, input_wanted=wanted)
            else:
                sums, squares = call.sums_and_squares(ctx.names, x, g)
                if wanted:
                    x_grad = call.rule.input_grad(call.module, x, weight, g)
            if x_grad is not None:
                x_grad = x_grad.to(ctx.x_dtype)
        grads = [total.to(dtype) for total, dtype in zip(sums, ctx.param_dtypes, strict=True)]
        return None, None, None, None, x_grad, *squares, *(t.new_ones(1) for t in squares), *grads


NODES = tuple(f"{function.__name__}Backward" for function in (Watched, Summed, Copies, Beside, Linked, OneProduct))
"""Names of their places in the graph, where a compiler leaves them as they are: torch 2.8 with `backend="eager"`."""
