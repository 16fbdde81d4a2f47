"""Whole backward passes by the kernels of `kernels/`; `choice/` says which form a shape takes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hf_clars.grad_norms.choice import form_choices
from hf_clars.grad_norms.kernels import FEW_CHANNELS, operations, runs_kernels
from hf_clars.grad_norms.norm_math import float_product
from hf_clars.grad_norms.registry import WholeBackward
from hf_clars.grad_norms.rules.costs import Form, Kind, WeightUse

Parts = tuple[dict[str, Tensor], dict[str, Tensor]]
"""Gradients and squared norms by parameter."""
Runs = dict[Form, Callable[[], Parts]]


def kernels_fit(output: Tensor) -> bool:
    """Whether kernels run where this output is, in its precision."""
    return runs_kernels(output)


def in_channels_last(t: Tensor) -> bool:
    """Whether an image tensor is dense with its channels next to each other."""
    return t.dim() == 4 and t.is_contiguous(memory_format=torch.channels_last)


def is_dense(t: Tensor) -> bool:
    """Whether a tensor [B, C, ...] is dense, channels next to each other or positions."""
    return t.is_contiguous() or in_channels_last(t)


def _parts(weight: Tensor, bias: Tensor | None, squares: Tensor) -> Parts:
    """Squared norms come in rows, the weight's first."""
    if bias is None:
        return {"weight": weight}, {"weight": squares[0]}
    return {"weight": weight, "bias": bias}, {"weight": squares[0], "bias": squares[1]}


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
    count = x.shape[0] if measured is None else measured
    use = WeightUse(x.shape[0], x.shape[1], x.shape[2], g.shape[2], element_size=x.element_size())
    runs: Runs = {
        "gram": partial(_linear_gram, x, g, bias, count),
        "product": partial(_linear_product, x, g, bias, count),
    }
    grads, squares = runs[form_choices.take("linear", use, runs)]()
    return WholeBackward(g @ weight.to(g.dtype) if input_wanted else None, grads, squares)


def _linear_gram(x: Tensor, g: Tensor, bias: bool, count: int) -> Parts:
    weight = float_product(g.flatten(0, 1).mT, x.flatten(0, 1))
    of_bias = g.sum((0, 1), dtype=torch.float32) if bias else None
    return _parts(weight, of_bias, operations.linear_gram(x[:count], g[:count]))


def _linear_product(x: Tensor, g: Tensor, bias: bool, count: int) -> Parts:
    weight, of_bias, squares = operations.linear_product(x, g, bias, count)
    return _parts(weight, of_bias if bias else None, squares)


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
    count = x.shape[0] if measured is None else measured
    memory = torch.channels_last if in_channels_last(x) else torch.contiguous_format
    g, weight = g.contiguous(memory_format=memory), weight.to(g.dtype, memory_format=memory)
    kind, use = convolution_shapes(x, weight, g, settings)
    runs: Runs = {"product": partial(_convolution_product, x, weight, g, settings, bias, count)}
    if use.width_in >= FEW_CHANNELS:
        runs["gram"] = partial(_convolution_gram, x, weight, g, settings, bias, count)
        if kind == "pointwise":
            runs["rows"] = partial(_pointwise_rows, x, g, bias, count)
    grads, squares = runs[form_choices.take(kind, use, runs) if len(runs) > 1 else "product"]()
    input_grad = _library(x, weight, g, settings, [True, False, False])[0] if input_wanted else None
    return WholeBackward(input_grad, grads, squares)


def convolution_shapes(x: Tensor, weight: Tensor, g: Tensor, settings: dict[str, Any]) -> tuple[Kind, WeightUse]:
    """What the form of a convolution is asked by; arguments as above."""
    kernel, groups = (int(weight.shape[2]), int(weight.shape[3])), int(settings["groups"])
    pixels = int(x.shape[2] * x.shape[3]) if kernel != (1, 1) else 0
    positions, width_out = g.shape[2] * g.shape[3], g.shape[1] // groups
    use = WeightUse(x.shape[0], positions, weight.shape[1], width_out, groups, pixels, kernel, g.element_size())
    plain = kernel == (1, 1) and groups == 1
    plain &= tuple(settings["stride"]) == (1, 1) and tuple(settings["padding"]) == (0, 0)
    return "pointwise" if plain else "convolution", use


def _library(x: Tensor, weight: Tensor, g: Tensor, settings: dict[str, Any], which: list[bool]) -> Any:
    steps = settings["stride"], settings["padding"], settings["dilation"]
    return torch.ops.aten.convolution_backward(g, x, weight, None, *steps, False, [0, 0], settings["groups"], which)


def _where(weight: Tensor, settings: dict[str, Any]) -> tuple[Any, ...]:
    """A convolution's settings as the kernels' operations take them."""
    kernel = (int(weight.shape[2]), int(weight.shape[3]))
    return kernel, settings["stride"], settings["padding"], settings["dilation"], settings["groups"]


def _convolution_gram(x: Tensor, weight: Tensor, g: Tensor, settings: dict[str, Any], bias: bool, count: int) -> Parts:
    grad = _library(x, weight, g, settings, [False, True, False])[1]
    of_bias = g.sum((0, 2, 3), dtype=torch.float32) if bias else None
    return _parts(grad, of_bias, operations.convolution_gram(x[:count], g[:count], *_where(weight, settings)))


def _pointwise_rows(x: Tensor, g: Tensor, bias: bool, count: int) -> Parts:
    rows, g_rows = (t.permute(0, 2, 3, 1).flatten(1, 2) for t in (x, g))
    grads, squares = _linear_product(rows, g_rows, bias, count)
    return grads | {"weight": grads["weight"][:, :, None, None]}, squares


def _convolution_product(
    x: Tensor, weight: Tensor, g: Tensor, settings: dict[str, Any], bias: bool, count: int
) -> Parts:
    grad, of_bias, squares = operations.convolution_product(x, g, *_where(weight, settings), bias, count)
    return _parts(grad.permute(0, 3, 1, 2), of_bias if bias else None, squares)


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
