"""Torch's own kernels that have no Python name but their operator's: parts of backward passes, one by one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hf_clars.grad_norms.torch_traces import is_compiling


def affine_sums(x: Tensor, g: Tensor, mean: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    """Sums over positions of g * x_hat and of g, x_hat = (x - mean) * rstd, in one pass over both tensors.

    The kernel of BatchNorm's own backward does this for each channel of a batch; with every sample's channel as a
    channel of its own it does it for each sample.

    Args:
        x: Input [B, C, ...].
        g: Gradient [B, C, ...].
        mean: [B, C] or [C]; or [B, G] for G groups of channels.
        rstd: As `mean`.

    Returns:
        Two tensors [B, C].
    """
    channels = x.shape[:2]
    mean, rstd = _for_each_channel(mean, channels), _for_each_channel(rstd, channels)
    if x.dim() == 2:
        return g * (x - mean) * rstd, g
    compiling = is_compiling()
    if compiling or not (x.is_contiguous() and g.is_contiguous()) or x.numel() == 0:
        # Channels last: no kernel to borrow; the mean goes first, for g * x - mean * g would cancel.
        centred = (x.flatten(2) - mean.unsqueeze(-1)).mul_(g.flatten(2))
        return centred.sum(2) * rstd, g.flatten(2).sum(2)
    rows = (1, channels[0] * channels[1], -1)
    mean, rstd = (t.repeat(channels[0]) if t.dim() == 1 else t.reshape(-1) for t in (mean, rstd))  # takes no strides
    _, weighted, plain = torch.ops.aten.native_batch_norm_backward.default(
        g.view(rows),
        x.view(rows),
        mean,  # a weight is no factor in these sums; but CUDA's kernel reads its device and type
        None,
        None,
        mean,
        rstd,
        True,
        0.0,
        [False, True, True],
    )
    return weighted.view(channels), plain.view(channels)


def _for_each_channel(statistic: Tensor, channels: Sequence[int]) -> Tensor:
    """[B, groups] -> [B, C]; others as they are."""
    if statistic.dim() == 1 or statistic.shape[1] == channels[1]:
        return statistic
    groups = statistic.shape[1]
    return statistic.unsqueeze(2).expand(channels[0], groups, channels[1] // groups).reshape(tuple(channels))


def convolution_input_grad(g: Tensor, x: Tensor, weight: Tensor, **settings: Any) -> Tensor:
    """Gradient of a convolution's input.

    `torch.nn.grad` has it too, but puts an expanded number in the place of `x`, which costs a copy or a slower kernel.

    Args:
        g: Gradient of the output.
        x: The input; only what it is like matters.
        weight: The weight.
        settings: `stride`, `padding`, `dilation` and `groups`.
    """
    return _convolution_backward(g, x, weight, settings, [True, False, False])[0]


def convolution_weight_grad(g: Tensor, x: Tensor, shape: tuple[int, ...], **settings: Any) -> Tensor:
    """Gradient of a convolution's weight of this shape; arguments as for `convolution_input_grad`."""
    return _convolution_backward(g, x, x.new_empty(shape), settings, [False, True, False])[1]


def _convolution_backward(
    g: Tensor, x: Tensor, weight: Tensor, settings: dict[str, Any], which: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    stride, padding, dilation, groups = (settings[name] for name in ("stride", "padding", "dilation", "groups"))
    no_output_padding = (0,) * (x.dim() - 2)
    return torch.ops.aten.convolution_backward.default(  # an operator with its overload is called in half the time
        g, x, weight, None, stride, padding, dilation, False, no_output_padding, groups, which
    )
