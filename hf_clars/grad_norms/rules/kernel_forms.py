"""Whole backward passes by the kernels of `kernels/`, and for which shapes they are taken.

The choice follows what was measured on an H100 in ResNet-50, ViT-B and a Llama: the Gram form where a weight is shared
by few positions, the one product where it is shared by many.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hf_clars.grad_norms.kernels import INTERPRETED, usable_on
from hf_clars.grad_norms.registry import WholeBackward

#: Up to so many positions the Gram form wins on an H100: tokens of a Linear layer; pixels of a convolution.
GRAM_TOKENS, GRAM_PIXELS = 512, 196
_TYPES = (torch.float32, torch.float16, torch.bfloat16)


def kernels_fit(output: Tensor) -> bool:
    """Whether kernels run where this output is, in its precision."""
    if INTERPRETED and output.dtype is torch.bfloat16:
        return False  # Triton's interpreter multiplies bit patterns of bfloat16
    return output.dtype in _TYPES and usable_on(output.device)


def in_channels_last(t: Tensor) -> bool:
    """Whether an image tensor is dense with its channels next to each other."""
    return t.dim() == 4 and t.is_contiguous(memory_format=torch.channels_last)


def linear_backward(x: Tensor, weight: Tensor, g: Tensor, *, bias: bool, input_wanted: bool) -> WholeBackward:
    """A Linear layer's backward pass: x [B, T, in] and g [B, T, out] in the precision of the forward pass."""
    from hf_clars.grad_norms.kernels import linear

    x, g = x.contiguous(), g.contiguous()
    grads: dict[str, Tensor] = {}
    squares: dict[str, Tensor] = {}
    if x.shape[1] <= GRAM_TOKENS:
        grads["weight"] = _float_product(g.flatten(0, 1).mT, x.flatten(0, 1))
        squares["weight"], of_bias = linear.linear_gram(x, g)
        if bias:
            grads["bias"], squares["bias"] = g.sum((0, 1), dtype=torch.float32), of_bias
    else:
        grads["weight"], bias_grad, squares["weight"], bias_squares = linear.linear_product(x, g, bias=bias)
        if bias_grad is not None and bias_squares is not None:
            grads["bias"], squares["bias"] = bias_grad, bias_squares
    return WholeBackward(g @ weight.to(g.dtype) if input_wanted else None, grads, squares)


def _float_product(a: Tensor, b: Tensor) -> Tensor:
    """A @ b, accumulated and given in float32: nothing is rounded in between."""
    if a.dtype is torch.float32 or a.device.type != "cuda":
        return a.float() @ b.float()
    return torch.mm(a, b, out_dtype=torch.float32)


def convolution_backward(
    x: Tensor, weight: Tensor, g: Tensor, settings: dict[str, Any], *, bias: bool, input_wanted: bool
) -> WholeBackward:
    """A convolution's backward pass in channels_last, without groups.

    Args:
        x: Input [B, in, H, W].
        weight: [out, in, *kernel].
        g: Gradient of the output.
        settings: `stride`, `padding`, `dilation`.
        bias: Whether there is one.
        input_wanted: Whether the input's gradient is asked for.
    """
    from hf_clars.grad_norms.kernels import convolution, linear

    g = g.contiguous(memory_format=torch.channels_last)
    kernel = (int(weight.shape[2]), int(weight.shape[3]))
    weight = weight.to(g.dtype, memory_format=torch.channels_last)
    library = lambda which: torch.ops.aten.convolution_backward(  # noqa: E731
        g, x, weight, None, settings["stride"], settings["padding"], settings["dilation"], False, [0, 0], 1, which
    )
    grads: dict[str, Tensor] = {}
    squares: dict[str, Tensor] = {}
    positions = g.shape[2] * g.shape[3]
    pointwise = kernel == (1, 1) and settings["stride"] == (1, 1) and settings["padding"] == (0, 0)
    input_grad = None
    if positions <= GRAM_PIXELS and x.shape[1] >= 16 and not (pointwise and positions > 64):
        input_grad, grads["weight"], _ = library([input_wanted, True, False])
        squares["weight"], of_bias = convolution.convolution_gram(x, g, kernel=kernel, **settings)
        if bias:
            grads["bias"], squares["bias"] = g.sum((0, 2, 3), dtype=torch.float32), of_bias
        return WholeBackward(input_grad if input_wanted else None, grads, squares)
    if input_wanted:
        input_grad = library([True, False, False])[0]
    if pointwise and x.shape[1] >= 16:
        rows, g_rows = (t.permute(0, 2, 3, 1).flatten(1, 2) for t in (x, g))
        weight_grad, bias_grad, squares["weight"], bias_squares = linear.linear_product(rows, g_rows, bias=bias)
        grads["weight"] = weight_grad[:, :, None, None]
        if bias_grad is not None and bias_squares is not None:
            grads["bias"], squares["bias"] = bias_grad, bias_squares
        return WholeBackward(input_grad, grads, squares)
    grads["weight"], squares["weight"] = convolution.convolution_product(x, g, kernel=kernel, **settings)
    if bias:
        sums = g.sum((2, 3), dtype=torch.float32)
        grads["bias"], squares["bias"] = sums.sum(0), sums.square().sum(1)
    return WholeBackward(input_grad, grads, squares)


def batch_norm_backward(x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor, g: Tensor) -> WholeBackward:
    """BatchNorm's backward pass with the batch's own statistics, in channels_last."""
    from hf_clars.grad_norms.kernels import normalization

    g = g.contiguous(memory_format=torch.channels_last)
    dx, dw, db, w2, b2 = normalization.batch_norm_backward(x, g, weight, mean, rstd)
    return WholeBackward(dx, {"weight": dw, "bias": db}, {"weight": w2, "bias": b2})


def layer_norm_backward(
    x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor, g: Tensor, *, input_wanted: bool
) -> WholeBackward:
    """LayerNorm's backward pass over the last axis; x and g [B, T, C], mean and rstd [B, T]."""
    from hf_clars.grad_norms.kernels import normalization

    g = g.contiguous()
    plain, weighted = normalization.row_sums(x, g, mean, rstd)
    dx = None
    if input_wanted:
        at = (*x.shape[:2], 1)
        dx = torch.ops.aten.native_layer_norm_backward(
            g, x, x.shape[-1:], mean.view(at), rstd.view(at), weight, weight, [True, False, False]
        )[0]
    return WholeBackward(
        dx,
        {"weight": weighted.sum(0), "bias": plain.sum(0)},
        {"weight": weighted.square().sum(1), "bias": plain.square().sum(1)},
    )
