"""The same functions in plain torch: each is the truth that a kernel is tested against, and says what it computes.

They run where Triton does not. Then no more of the samples' gradients exist at once than elsewhere (`slices_of`).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from hf_clars.grad_norms.norm_math import slices_of


def _sum_and_squares(of: Callable[[Tensor, Tensor], Tensor], x: Tensor, g: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """The sum of the samples' gradients `of(x, g)`, each of so many numbers, and every one's squared norm."""
    sums, squares = [], []
    for x_part, g_part in slices_of(x, g, elements_per_sample=size):
        each = of(x_part.float(), g_part.float())
        sums.append(each.sum(0))
        squares.append(each.flatten(1).square().sum(1))
    return torch.stack(sums).sum(0), torch.cat(squares)


def _with_bias(
    weight: Tensor, squares: Tensor, bias_sums: Tensor | None, measured: int
) -> tuple[Tensor, Tensor, Tensor]:
    if bias_sums is None:
        return weight, weight.new_empty(0), squares[None, :measured].clone()
    return weight, bias_sums.sum(0), torch.stack((squares, bias_sums.square().sum(1)))[:, :measured].contiguous()


def linear_product(x: Tensor, g: Tensor, bias: bool, measured: int) -> tuple[Tensor, Tensor, Tensor]:
    """See `operations.linear_product`."""
    found = _sum_and_squares(lambda a, b: b.mT @ a, x, g, x.shape[2] * g.shape[2])
    return _with_bias(*found, g.float().sum(1) if bias else None, measured)


def linear_gram(x: Tensor, g: Tensor) -> Tensor:
    """See `operations.linear_gram`."""
    return linear_product(x, g, True, x.shape[0])[2]


def convolution_product(
    x: Tensor, g: Tensor, kernel: list[int], stride: list[int], padding: list[int], dilation: list[int],
    groups: int, bias: bool, measured: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """See `operations.convolution_product`."""
    channels, outputs, taps = x.shape[1] // groups, g.shape[1], kernel[0] * kernel[1]

    def gradients(x: Tensor, g: Tensor) -> Tensor:
        patches = torch.nn.functional.unfold(x, *map(tuple, (kernel, dilation, padding, stride)))
        patches = patches.unflatten(1, (groups, channels, taps)).transpose(2, 3).flatten(2, 3)
        each = g.flatten(2).unflatten(1, (groups, -1)) @ patches.mT
        return each.view(-1, outputs, *kernel, channels)

    # a sample's patches count too: they may be larger than its gradient
    size = outputs * taps * channels + groups * channels * taps * g.shape[2] * g.shape[3]
    found = _sum_and_squares(gradients, x, g, size)
    return _with_bias(*found, g.float().sum((2, 3)) if bias else None, measured)


def convolution_gram(
    x: Tensor, g: Tensor, kernel: list[int], stride: list[int], padding: list[int], dilation: list[int], groups: int
) -> Tensor:
    """See `operations.convolution_gram`."""
    return convolution_product(x, g, kernel, stride, padding, dilation, groups, True, x.shape[0])[2]


def _normalised(x: Tensor, mean: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    """(x_hat, 1 / the standard deviation of each channel), [B, C, HW] and [1 or B, C, 1]."""
    mean, rstd = (t.float().view(-1, t.shape[-1]) for t in (mean, rstd))
    mean, rstd = (t.repeat_interleave(x.shape[1] // t.shape[1], 1).unsqueeze(2) for t in (mean, rstd))
    return (x.float().flatten(2) - mean) * rstd, rstd


def channel_sums(x: Tensor, g: Tensor, mean: Tensor, rstd: Tensor) -> Tensor:
    """See `operations.channel_sums`."""
    g = g.float().flatten(2)
    return torch.stack((g.sum(2), (g * _normalised(x, mean, rstd)[0]).sum(2)))


def channel_norm_backward(
    x: Tensor, g: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """See `operations.channel_norm_backward`."""
    per_sample = channel_sums(x, g, mean, rstd)
    x_hat, scale = _normalised(x, mean, rstd)
    x_hat_grad = weight.float()[:, None] * g.float().flatten(2)
    shared = x_hat.transpose(0, 1) if mean.dim() == 1 else x_hat.unflatten(1, (mean.shape[1], -1))
    grad = x_hat_grad.transpose(0, 1) if mean.dim() == 1 else x_hat_grad.view_as(shared)
    over = (1, 2) if mean.dim() == 1 else (2, 3)
    inner = grad - grad.mean(over, keepdim=True) - shared * (grad * shared).mean(over, keepdim=True)
    inner = inner.transpose(0, 1) if mean.dim() == 1 else inner.reshape(x_hat.shape)
    dx = torch.empty_like(x).copy_((scale * inner).view(x.shape))
    return dx, per_sample.sum(1), per_sample.square().sum(2)


def row_sums(x: Tensor, g: Tensor, mean: Tensor | None, rstd: Tensor) -> Tensor:
    """See `operations.row_sums`."""
    x_hat = (x.float() if mean is None else x.float() - mean.unsqueeze(2)) * rstd.unsqueeze(2)
    return torch.stack((g.float().sum(1), (g.float() * x_hat).sum(1)))


def root_mean_square_dx(x: Tensor, g: Tensor, weight: Tensor, rstd: Tensor) -> Tensor:
    """See `operations.root_mean_square_dx`."""
    x_hat, wg = x.float() * rstd.unsqueeze(2), weight.float() * g.float()
    dx = (wg - x_hat * (wg * x_hat).mean(2, keepdim=True)) * rstd.unsqueeze(2)
    return dx.to(x.dtype).contiguous()
