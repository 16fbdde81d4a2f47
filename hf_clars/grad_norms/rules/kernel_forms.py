"""Whole backward passes by the kernels of `kernels/`, and for which shapes they are taken.

The choice follows what was measured on an H100 in ResNet-50, ViT-B and a Llama: the Gram form where a weight is shared
by few positions, the one product where it is shared by many.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hf_clars.grad_norms.kernels import operations, runs_kernels
from hf_clars.grad_norms.registry import WholeBackward

#: Up to so many positions the Gram form wins on an H100: tokens of a Linear layer; pixels of a convolution.
GRAM_TOKENS, GRAM_PIXELS = 512, 196


def kernels_fit(output: Tensor) -> bool:
    """Whether kernels run where this output is, in its precision."""
    return runs_kernels(output)


def in_channels_last(t: Tensor) -> bool:
    """Whether an image tensor is dense with its channels next to each other."""
    return t.dim() == 4 and t.is_contiguous(memory_format=torch.channels_last)


def is_dense(t: Tensor) -> bool:
    """Whether a tensor [B, C, ...] is dense, channels next to each other or positions."""
    return t.is_contiguous() or in_channels_last(t)


def linear_backward(
    x: Tensor, weight: Tensor, g: Tensor, *, bias: bool, input_wanted: bool, measured: int | None = None
) -> WholeBackward:
    """A Linear layer's backward pass.

    Args:
        x: Input [B, T, in] in the precision of the forward pass.
        weight: [out, in].
        g: Gradient of the output [B, T, out].
        bias: Whether there is one.
        input_wanted: Whether the input's gradient is asked for.
        measured: How many of the first samples get norms. Default: all.
    """
    x, g = x.contiguous(), g.contiguous()
    measured = x.shape[0] if measured is None else measured
    grads: dict[str, Tensor] = {}
    if x.shape[1] <= GRAM_TOKENS:
        grads["weight"] = _float_product(g.flatten(0, 1).mT, x.flatten(0, 1))
        squares = operations.linear_gram(x[:measured], g[:measured])
        if bias:
            grads["bias"] = g.sum((0, 1), dtype=torch.float32)
    else:
        grads["weight"], bias_grad, squares = operations.linear_product(x, g, bias, measured)
        if bias:
            grads["bias"] = bias_grad
    return WholeBackward(g @ weight.to(g.dtype) if input_wanted else None, grads, _by_name(grads, squares))


def _by_name(grads: dict[str, Tensor], squares: Tensor) -> dict[str, Tensor]:
    """Rows of squared norms, by the parameters that have a gradient: the weight first."""
    return {name: squares[i] for i, name in enumerate(grads)}


def _float_product(a: Tensor, b: Tensor) -> Tensor:
    """A @ b, accumulated and given in float32: nothing is rounded in between."""
    if a.dtype is torch.float32 or a.device.type != "cuda":
        return a.float() @ b.float()
    return torch.mm(a, b, out_dtype=torch.float32)


def convolution_backward(
    x: Tensor,
    weight: Tensor,
    g: Tensor,
    settings: dict[str, Any],
    *,
    bias: bool,
    input_wanted: bool,
    measured: int | None = None,
) -> WholeBackward:
    """A convolution's backward pass over images.

    Args:
        x: Input [B, in, H, W]. Kernels read channels_last; a copy of `x` and `g` in another format is made for them.
        weight: [out, in / groups, *kernel].
        g: Gradient of the output.
        settings: `stride`, `padding`, `dilation`, `groups`.
        bias: Whether there is one.
        input_wanted: Whether the input's gradient is asked for.
        measured: How many of the first samples get norms. Default: all.
    """
    measured = x.shape[0] if measured is None else measured
    memory = torch.channels_last if in_channels_last(x) else torch.contiguous_format
    g = g.contiguous(memory_format=memory)
    weight = weight.to(g.dtype, memory_format=memory)
    kernel = (int(weight.shape[2]), int(weight.shape[3]))
    where = settings["stride"], settings["padding"], settings["dilation"]
    groups, inputs = settings["groups"], weight.shape[1]
    library = lambda which: torch.ops.aten.convolution_backward(  # noqa: E731
        g, x, weight, None, *where, False, [0, 0], groups, which
    )
    grads: dict[str, Tensor] = {}
    positions = g.shape[2] * g.shape[3]
    pointwise = kernel == (1, 1) and where[:2] == ((1, 1), (0, 0)) and groups == 1
    if positions <= GRAM_PIXELS and inputs >= 16 and not (pointwise and positions > 64):
        input_grad, grads["weight"], _ = library([input_wanted, True, False])
        squares = operations.convolution_gram(x[:measured], g[:measured], kernel, *where, groups)
        if bias:
            grads["bias"] = g.sum((0, 2, 3), dtype=torch.float32)
        return WholeBackward(input_grad if input_wanted else None, grads, _by_name(grads, squares))
    input_grad = library([True, False, False])[0] if input_wanted else None
    if pointwise and inputs >= 16:
        rows, g_rows = (t.permute(0, 2, 3, 1).flatten(1, 2) for t in (x, g))
        weight_grad, bias_grad, squares = operations.linear_product(rows, g_rows, bias, measured)
        grads["weight"] = weight_grad[:, :, None, None]
    else:
        product = operations.convolution_product(x, g, kernel, *where, groups, bias, measured)
        weight_grad, bias_grad, squares = product
        grads["weight"] = weight_grad.permute(0, 3, 1, 2)
    if bias:
        grads["bias"] = bias_grad
    return WholeBackward(input_grad, grads, _by_name(grads, squares))


def channel_norm_backward(
    x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor, g: Tensor, *, measured: int | None = None
) -> WholeBackward:
    """The backward pass of BatchNorm with the batch's own statistics [C], or of GroupNorm with [B, groups]."""
    dx, sums, squares = operations.channel_norm_backward(x, g, weight, mean, rstd)
    squares = squares[:, :measured]
    return WholeBackward(dx, {"weight": sums[1], "bias": sums[0]}, {"weight": squares[1], "bias": squares[0]})


def layer_norm_backward(
    x: Tensor,
    weight: Tensor,
    mean: Tensor | None,
    rstd: Tensor,
    g: Tensor,
    *,
    bias: bool,
    input_wanted: bool,
    measured: int | None = None,
) -> WholeBackward:
    """The backward pass of LayerNorm over the last axis, or of RMSNorm: `mean` is None.

    Args:
        x: Input [B, T, C].
        weight: [C].
        mean: [B, T].
        rstd: [B, T].
        g: Gradient of the output.
        bias: Whether there is one.
        input_wanted: Whether the input's gradient is asked for.
        measured: How many of the first samples get norms. Default: all.
    """
    g = g.contiguous()
    sums = operations.row_sums(x, g, mean, rstd)
    dx = None
    if input_wanted and mean is None:
        dx = operations.root_mean_square_dx(x, g, weight, rstd)
    elif input_wanted and mean is not None:
        at = (*x.shape[:2], 1)
        dx = torch.ops.aten.native_layer_norm_backward(
            g, x, x.shape[-1:], mean.view(at), rstd.view(at), weight, weight, [True, False, False]
        )[0]
    names = ("weight", "bias") if bias else ("weight",)
    each = {"weight": sums[1], "bias": sums[0]}
    squares = sums[:, :measured].square().sum(2)
    of = {"weight": squares[1], "bias": squares[0]}
    return WholeBackward(dx, {n: each[n].sum(0) for n in names}, {n: of[n] for n in names})
