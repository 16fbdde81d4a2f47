"""Whole backward passes by the kernels of `kernels/`; `choice/` says which form a shape takes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hf_clars.grad_norms.choice import form_choices
from hf_clars.grad_norms.kernels import INTERPRETED, usable_on
from hf_clars.grad_norms.norm_math import float_product
from hf_clars.grad_norms.registry import WholeBackward
from hf_clars.grad_norms.rules.costs import Form, Kind, WeightUse

Parts = tuple[dict[str, Tensor], dict[str, Tensor]]
"""Gradients and squared norms by parameter."""
Runs = dict[Form, Callable[[], Parts]]

#: Below so many input channels a convolution has one kernel, whose columns are (tap, channel) pairs.
FEW_CHANNELS = 16
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
    x, g = x.contiguous(), g.contiguous()
    use = WeightUse(x.shape[0], x.shape[1], x.shape[2], g.shape[2], element_size=x.element_size())
    runs: Runs = {"gram": partial(_linear_gram, x, g, bias), "product": partial(_linear_product, x, g, bias)}
    grads, squares = runs[form_choices.take("linear", use, runs)]()
    return WholeBackward(g @ weight.to(g.dtype) if input_wanted else None, grads, squares)


def _linear_gram(x: Tensor, g: Tensor, bias: bool) -> Parts:
    from hf_clars.grad_norms.kernels import linear

    grads = {"weight": float_product(g.flatten(0, 1).mT, x.flatten(0, 1))}
    weight, of_bias = linear.linear_gram(x, g)
    if not bias:
        return grads, {"weight": weight}
    return grads | {"bias": g.sum((0, 1), dtype=torch.float32)}, {"weight": weight, "bias": of_bias}


def _linear_product(x: Tensor, g: Tensor, bias: bool) -> Parts:
    from hf_clars.grad_norms.kernels import linear

    weight, of_bias, squares, bias_squares = linear.linear_product(x, g, bias=bias)
    if of_bias is None or bias_squares is None:
        return {"weight": weight}, {"weight": squares}
    return {"weight": weight, "bias": of_bias}, {"weight": squares, "bias": bias_squares}


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
    g = g.contiguous(memory_format=torch.channels_last)
    weight = weight.to(g.dtype, memory_format=torch.channels_last)
    kind, use = convolution_shapes(x, weight, g, settings)
    runs: Runs = {"product": partial(_convolution_product, x, weight, g, settings, bias)}
    if use.width_in >= FEW_CHANNELS:
        runs["gram"] = partial(_convolution_gram, x, weight, g, settings, bias)
        if kind == "pointwise":
            runs["rows"] = partial(_pointwise_rows, x, g, bias)
    grads, squares = runs[form_choices.take(kind, use, runs) if len(runs) > 1 else "product"]()
    input_grad = _library(x, weight, g, settings, [True, False, False])[0] if input_wanted else None
    return WholeBackward(input_grad, grads, squares)


def convolution_shapes(x: Tensor, weight: Tensor, g: Tensor, settings: dict[str, Any]) -> tuple[Kind, WeightUse]:
    """What the form of a convolution is asked by; arguments as above."""
    kernel = (int(weight.shape[2]), int(weight.shape[3]))
    pixels = int(x.shape[2] * x.shape[3]) if kernel != (1, 1) else 0
    positions = g.shape[2] * g.shape[3]
    use = WeightUse(x.shape[0], positions, x.shape[1], g.shape[1], 1, pixels, kernel, g.element_size())
    plain = kernel == (1, 1) and tuple(settings["stride"]) == (1, 1) and tuple(settings["padding"]) == (0, 0)
    return "pointwise" if plain else "convolution", use


def _library(x: Tensor, weight: Tensor, g: Tensor, settings: dict[str, Any], which: list[bool]) -> Any:
    steps = settings["stride"], settings["padding"], settings["dilation"]
    return torch.ops.aten.convolution_backward(g, x, weight, None, *steps, False, [0, 0], 1, which)


def _convolution_gram(x: Tensor, weight: Tensor, g: Tensor, settings: dict[str, Any], bias: bool) -> Parts:
    from hf_clars.grad_norms.kernels import convolution

    grads = {"weight": _library(x, weight, g, settings, [False, True, False])[1]}
    kernel = (int(weight.shape[2]), int(weight.shape[3]))
    squares, of_bias = convolution.convolution_gram(x, g, kernel=kernel, **settings)
    if not bias:
        return grads, {"weight": squares}
    return grads | {"bias": g.sum((0, 2, 3), dtype=torch.float32)}, {"weight": squares, "bias": of_bias}


def _pointwise_rows(x: Tensor, g: Tensor, bias: bool) -> Parts:
    rows, g_rows = (t.permute(0, 2, 3, 1).flatten(1, 2) for t in (x, g))
    grads, squares = _linear_product(rows, g_rows, bias)
    return grads | {"weight": grads["weight"][:, :, None, None]}, squares


def _convolution_product(x: Tensor, weight: Tensor, g: Tensor, settings: dict[str, Any], bias: bool) -> Parts:
    from hf_clars.grad_norms.kernels import convolution

    kernel = (int(weight.shape[2]), int(weight.shape[3]))
    grad, squares = convolution.convolution_product(x, g, kernel=kernel, **settings)
    if not bias:
        return {"weight": grad}, {"weight": squares}
    sums = g.sum((2, 3), dtype=torch.float32)
    return {"weight": grad, "bias": sums.sum(0)}, {"weight": squares, "bias": sums.square().sum(1)}


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
