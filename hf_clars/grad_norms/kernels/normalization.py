"""Normalisation layers: sums over a sample's positions, and the whole backward pass of BatchNorm and GroupNorm."""

# mypy: disable-error-code="no-untyped-def, valid-type"
from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_clars.grad_norms.kernels import INTERPRETED

_WAVE = 132  # multiprocessors of an H100
_SMALL_IMAGE = 14 * 14  # of so many pixels: taller blocks would stay empty


@triton.jit
def _channel_sums(
    X, G, MEAN, RSTD, SG, SGX, HW, C, step, per, sp, sc, splits, BR: tl.constexpr, BC: tl.constexpr
):  # fmt: skip
    """Statistics: `step` a sample, one for `per` channels. sp and sc: from position to position, channel to channel."""
    b, block, s = tl.cast(tl.program_id(0), tl.int64), tl.program_id(1), tl.program_id(2)
    c = block * BC + tl.arange(0, BC)
    live_c = c < C
    mean = tl.load(MEAN + b * step + c // per, mask=live_c, other=0.0).to(tl.float32)
    rstd = tl.load(RSTD + b * step + c // per, mask=live_c, other=0.0).to(tl.float32)
    rows = tl.arange(0, BR)
    ag = tl.zeros((BR, BC), tl.float32)
    ax = tl.zeros((BR, BC), tl.float32)
    for k in range(s * BR, HW, splits * BR):
        live = (k + rows < HW)[:, None] & live_c[None, :]
        at = b * HW * C + (k + rows)[:, None] * sp + c[None, :] * sc
        g = tl.load(G + at, mask=live, other=0.0).to(tl.float32)
        x = tl.load(X + at, mask=live, other=0.0).to(tl.float32)
        ag += g
        ax += g * (x - mean[None, :])
    out = (b * splits + s) * C + c
    tl.store(SG + out, tl.sum(ag, 0), mask=live_c)
    tl.store(SGX + out, tl.sum(ax, 0) * rstd, mask=live_c)


@triton.jit
def _channel_dx(
    X, G, DX, MEAN, RSTD, WEIGHT, MG, MGX, ROWS, C, count, step, per, sp, sc, n_r,
    WEIGHTED: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """MG, MGX: sums that belong to each statistic over `count` numbers; WEIGHTED: of w * g and w * g * x_hat."""
    image = tl.cast(tl.program_id(0) // n_r, tl.int64)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    rows = tl.cast(tl.program_id(0) % n_r, tl.int64) * BR + tl.arange(0, BR)
    live_c = c < C
    at = image * step + c // per
    mean = tl.load(MEAN + at, mask=live_c, other=0.0).to(tl.float32)
    rstd = tl.load(RSTD + at, mask=live_c, other=0.0).to(tl.float32)
    w = tl.load(WEIGHT + c, mask=live_c, other=0.0).to(tl.float32)
    mg = tl.load(MG + at, mask=live_c, other=0.0) / count
    mgx = tl.load(MGX + at, mask=live_c, other=0.0) / count
    if not WEIGHTED:
        mg, mgx = w * mg, w * mgx
    live = (rows < ROWS)[:, None] & live_c[None, :]
    at = image * ROWS * C + rows[:, None] * sp + c[None, :] * sc
    g = tl.load(G + at, mask=live, other=0.0).to(tl.float32)
    x = tl.load(X + at, mask=live, other=0.0).to(tl.float32)
    dx = rstd[None, :] * (w[None, :] * g - mg[None, :] - (x - mean[None, :]) * (rstd * mgx)[None, :])
    tl.store(DX + at, dx.to(DX.dtype.element_ty), mask=live)


def _dense_alike(x: Tensor, g: Tensor) -> tuple[Tensor, Tensor, bool]:
    """Both in the same dense memory format, and whether that is channels_last."""
    last = x.dim() == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
    memory = torch.channels_last if last else torch.contiguous_format
    return x.contiguous(memory_format=memory), g.contiguous(memory_format=memory), last


def _channel_blocks(C: int, positions: int, last: bool) -> tuple[int, int]:
    """Rows and channels of a block, which is read along what lies together in memory."""
    if INTERPRETED:
        return 16, 16
    if last:
        return (64 if positions > _SMALL_IMAGE else 16), min(64, triton.next_power_of_2(C))
    return min(1024, max(16, triton.next_power_of_2(positions))), 4


def channel_sums(x: Tensor, g: Tensor, mean: Tensor, rstd: Tensor) -> Tensor:
    """See `operations.channel_sums`."""
    x, g, last = _dense_alike(x, g)
    (B, C), hw = x.shape[:2], math.prod(x.shape[2:])
    splits = 4 if hw > 28 * 28 else 1
    br, bc = _channel_blocks(C, hw, last)
    step, per = (mean.shape[1], C // mean.shape[1]) if mean.dim() == 2 else (0, 1)
    sums = torch.empty(2, B, splits, C, device=x.device, dtype=torch.float32)
    _channel_sums[(B, triton.cdiv(C, bc), splits)](
        x, g, mean.contiguous(), rstd.contiguous(), sums[0], sums[1], hw, C, step, per,
        C if last else 1, 1 if last else hw, splits, BR=br, BC=bc, num_warps=4,
    )  # fmt: skip
    return sums.sum(2) if splits > 1 else sums[:, :, 0]


def channel_norm_backward(
    x: Tensor, g: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """See `operations.channel_norm_backward`."""
    x, g, last = _dense_alike(x, g)
    (B, C), hw = x.shape[:2], math.prod(x.shape[2:])
    per_sample = channel_sums(x, g, mean, rstd)
    totals, squares = per_sample.sum(1), per_sample.square().sum(2)
    of_batch = mean.dim() == 1
    if of_batch:
        of_statistics, step, per, count = totals, 0, 1, B * hw
    else:
        step, per = mean.shape[1], C // mean.shape[1]
        of_statistics, count = (per_sample * weight).view(2, B, step, per).sum(3), per * hw
    # The batch is one tall image where neither memory nor statistics tell its samples apart.
    images, rows = (1, B * hw) if of_batch and last else (B, hw)
    br, bc = _channel_blocks(C, hw, last)
    n_r = triton.cdiv(rows, br)
    dx = torch.empty_like(x)
    _channel_dx[(images * n_r, triton.cdiv(C, bc))](
        x, g, dx, mean.contiguous(), rstd.contiguous(), weight.contiguous(), of_statistics[0], of_statistics[1],
        rows, C, count, step, per, C if last else 1, 1 if last else hw, n_r,
        WEIGHTED=not of_batch, BR=br, BC=bc, num_warps=4,
    )  # fmt: skip
    return dx, totals, squares


@triton.jit
def _row_sums(X, G, MEAN, RSTD, SG, SGX, T, C, splits, STATS: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr):
    b, block, s = tl.cast(tl.program_id(0), tl.int64), tl.program_id(1), tl.program_id(2)
    c = block * BC + tl.arange(0, BC)
    live_c = c < C
    rows = tl.arange(0, BR)
    ag = tl.zeros((BR, BC), tl.float32)
    ax = tl.zeros((BR, BC), tl.float32)
    for k in range(s * BR, T, splits * BR):
        live_r = k + rows < T
        live = live_r[:, None] & live_c[None, :]
        at = (b * T + k + rows)[:, None] * C + c[None, :]
        g = tl.load(G + at, mask=live, other=0.0).to(tl.float32)
        x = tl.load(X + at, mask=live, other=0.0).to(tl.float32)
        rstd = tl.load(RSTD + b * T + k + rows, mask=live_r, other=0.0)
        if STATS:
            x = x - tl.load(MEAN + b * T + k + rows, mask=live_r, other=0.0)[:, None]
        ag += g
        ax += g * x * rstd[:, None]
    out = (b * splits + s) * C + c
    tl.store(SG + out, tl.sum(ag, 0), mask=live_c)
    tl.store(SGX + out, tl.sum(ax, 0), mask=live_c)


def row_sums(x: Tensor, g: Tensor, mean: Tensor | None, rstd: Tensor) -> Tensor:
    """See `operations.row_sums`."""
    B, T, C = x.shape
    br, bc = (16, 16) if INTERPRETED else (32, 128)
    blocks = triton.cdiv(C, bc)
    splits = max(1, min(triton.cdiv(T, br), -(-4 * _WAVE // (B * blocks))))
    sums = torch.empty(2, B, splits, C, device=x.device, dtype=torch.float32)
    x, g, rstd = x.contiguous(), g.contiguous(), rstd.contiguous()
    _row_sums[(B, blocks, splits)](
        x, g, rstd if mean is None else mean.contiguous(), rstd, sums[0], sums[1], T, C, splits,
        STATS=mean is not None, BR=br, BC=bc, num_warps=4,
    )  # fmt: skip
    return sums.sum(2) if splits > 1 else sums[:, :, 0].contiguous()


@triton.jit
def _root_mean_square_dx(X, G, DX, RSTD, WEIGHT, C, BC: tl.constexpr):
    row, c = tl.cast(tl.program_id(0), tl.int64), tl.arange(0, BC)
    at, live = row * C + c, c < C
    x_hat = tl.load(X + at, mask=live, other=0.0).to(tl.float32) * tl.load(RSTD + row)
    wg = tl.load(WEIGHT + c, mask=live, other=0.0).to(tl.float32) * tl.load(G + at, mask=live, other=0.0).to(tl.float32)
    dx = (wg - x_hat * (tl.sum(wg * x_hat, 0) / C)) * tl.load(RSTD + row)
    tl.store(DX + at, dx.to(DX.dtype.element_ty), mask=live)


def root_mean_square_dx(x: Tensor, g: Tensor, weight: Tensor, rstd: Tensor) -> Tensor:
    """See `operations.root_mean_square_dx`."""
    B, T, C = x.shape
    x, bc = x.contiguous(), triton.next_power_of_2(C)
    dx = torch.empty_like(x)
    _root_mean_square_dx[(B * T,)](
        x, g.contiguous(), dx, rstd.contiguous(), weight.contiguous(), C, BC=bc, num_warps=max(4, min(16, bc // 512))
    )
    return dx
