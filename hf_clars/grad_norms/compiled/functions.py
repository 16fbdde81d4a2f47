"""The two functions that stand behind a module in a compiled graph.

Each takes a row of zeros [B] for every parameter as one more input, and the row's "gradient" is every sample's squared
norm. A zero beside it gets the "gradient" 1, so that two uses of a row can be told from one. So norms are a part of the
graph: nothing can be lost, or counted twice.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from hf_clars.grad_norms.torch_internals import no_autocast

if TYPE_CHECKING:
    from hf_clars.grad_norms.compiled.calls import CompiledCall

Way = Literal["torch", "kernels"]


class Watched(torch.autograd.Function):
    """Identity on a module's output, beside whose ordinary backward pass the norms are made."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, call: CompiledCall, names: tuple[str, ...], *rows_and_saved: Tensor) -> Tensor:
        """The forward pass; see the class."""
        ctx.call, ctx.names, ctx.batch = call, names, rows_and_saved[0].shape[0]
        ctx.save_for_backward(*rows_and_saved[2 * len(names) :])
        return y.clone()  # costs nothing in compiled code, and an in-place operation may follow

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        """The backward pass; see the class."""
        saved = ctx.saved_tensors
        with no_autocast(g.device.type):
            squares = ctx.call.squares(ctx.names, saved, g, ctx.batch)
        return g, None, None, *squares, *(t.new_ones(1) for t in squares), *(None for _ in saved)


class OneProduct(torch.autograd.Function):
    """A module's output, whose weight gradient comes with the norms: "torch" sums the samples' gradients."""

    @staticmethod
    def forward(
        ctx: Any, y: Tensor, call: CompiledCall, names: tuple[str, ...], way: Way, x: Tensor, *rows_and_params: Tensor
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
