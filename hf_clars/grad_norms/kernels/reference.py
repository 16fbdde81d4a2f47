"""The same functions in plain torch: each is the truth that a kernel is tested against, and says what it computes."""

from __future__ import annotations

import torch
from torch import Tensor


def linear_product(x: Tensor, g: Tensor, *, bias: bool) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
    """See `linear.linear_product`."""
    per_sample = g.float().mT @ x.float()
    weight = per_sample.sum(0), per_sample.square().sum((1, 2))
    if not bias:
        return weight[0], None, weight[1], None
    sums = g.float().sum(1)
    return weight[0], sums.sum(0), weight[1], sums.square().sum(1)


def linear_gram(x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """See `linear.linear_gram`."""
    _, _, weight, bias = linear_product(x, g, bias=True)
    assert bias is not None
    return weight, bias


def convolution_product(
    x: Tensor,
    g: Tensor,
    *,
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
) -> tuple[Tensor, Tensor]:
    """See `convolution.convolution_product`."""
    patches = torch.nn.functional.unfold(x.float(), kernel, dilation, padding, stride)
    per_sample = g.float().flatten(2) @ patches.mT
    return per_sample.sum(0).view(-1, x.shape[1], *kernel), per_sample.square().sum((1, 2))


def convolution_gram(
    x: Tensor,
    g: Tensor,
    *,
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
) -> tuple[Tensor, Tensor]:
    """See `convolution.convolution_gram`."""
    squares = convolution_product(x, g, kernel=kernel, stride=stride, padding=padding, dilation=dilation)[1]
    return squares, g.float().flatten(2).sum(2).square().sum(1)


def batch_norm_backward(
    x: Tensor, g: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See `normalization.batch_norm_backward`."""
    channel = (1, -1, 1, 1)
    x_hat = (x.float() - mean.view(channel)) * rstd.view(channel)
    plain, weighted = g.float().sum((2, 3)), (g.float() * x_hat).sum((2, 3))
    db, dw, rows = plain.sum(0), weighted.sum(0), x.numel() // x.shape[1]
    inner = g.float() - db.view(channel) / rows - x_hat * dw.view(channel) / rows
    dx = (weight.float() * rstd).view(channel) * inner
    return dx.to(x.dtype), dw, db, weighted.square().sum(1), plain.square().sum(1)


def row_sums(x: Tensor, g: Tensor, mean: Tensor | None, rstd: Tensor) -> tuple[Tensor, Tensor]:
    """See `normalization.row_sums`."""
    x_hat = (x.float() if mean is None else x.float() - mean.unsqueeze(2)) * rstd.unsqueeze(2)
    return g.float().sum(1), (g.float() * x_hat).sum(1)
