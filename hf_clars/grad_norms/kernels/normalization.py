"""Normalisation layers: BatchNorm's whole backward pass in channels_last; sums over a sample's rows for the others."""

# mypy: disable-error-code="no-untyped-def, valid-type"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_clars.grad_norms.kernels import INTERPRETED

_WAVE = 132  # multiprocessors of an H100


@triton.jit
def _channel_sums(X, G, MEAN, RSTD, SG, SGX, HW, C, splits, BR: tl.constexpr, BC: tl.constexpr):
    b, block, s = tl.cast(tl.program_id(0), tl.int64), tl.program_id(1), tl.program_id(2)
    c = block * BC + tl.arange(0, BC)
    live_c = c < C
    mean = tl.load(MEAN + c, mask=live_c, other=0.0)
    rstd = tl.load(RSTD + c, mask=live_c, other=0.0)
    rows = tl.arange(0, BR)
    ag = tl.zeros((BR, BC), tl.float32)
    ax = tl.zeros((BR, BC), tl.float32)
    for k in range(s * BR, HW, splits * BR):
        live = (k + rows < HW)[:, None] & live_c[None, :]
        at = (b * HW + k + rows)[:, None] * C + c[None, :]
        g = tl.load(G + at, mask=live, other=0.0).to(tl.float32)
        x = tl.load(X + at, mask=live, other=0.0).to(tl.float32)
        ag += g
        ax += g * (x - mean[None, :])
    out = (b * splits + s) * C + c
    tl.store(SG + out, tl.sum(ag, 0), mask=live_c)
    tl.store(SGX + out, tl.sum(ax, 0) * rstd, mask=live_c)


@triton.jit
def _batch_norm_dx(X, G, DX, MEAN, RSTD, WEIGHT, DB, DWT, ROWS, C, BR: tl.constexpr, BC: tl.constexpr):
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    rows = tl.cast(tl.program_id(0), tl.int64) * BR + tl.arange(0, BR)
    live_c = c < C
    mean = tl.load(MEAN + c, mask=live_c, other=0.0)
    rstd = tl.load(RSTD + c, mask=live_c, other=0.0)
    w = tl.load(WEIGHT + c, mask=live_c, other=0.0)
    mg = tl.load(DB + c, mask=live_c, other=0.0) / ROWS
    mgx = tl.load(DWT + c, mask=live_c, other=0.0) / ROWS
    live = (rows < ROWS)[:, None] & live_c[None, :]
    at = rows[:, None] * C + c[None, :]
    g = tl.load(G + at, mask=live, other=0.0).to(tl.float32)
    x = tl.load(X + at, mask=live, other=0.0).to(tl.float32)
    dx = (w * rstd)[None, :] * (g - mg[None, :] - (x - mean[None, :]) * (rstd * mgx)[None, :])
    tl.store(DX + at, dx.to(DX.dtype.element_ty), mask=live)


def batch_norm_backward(
    x: Tensor, g: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The whole backward pass of a BatchNorm in train mode: each sample's sums are partial sums that it needs anyway.

    Args:
        x: Input [B, C, H, W], dense in channels_last.
        g: Gradient of the output, likewise.
        weight: [C].
        mean: Of each channel over the batch, [C], float32.
        rstd: 1 / standard deviation, likewise.

    Returns:
        (gradient of the input, of the weight [C], of the bias [C], squared norms of the samples' weight gradients [B],
        and of their bias gradients [B]).
    """
    B, C, H, WD = x.shape
    hw, rows = H * WD, B * H * WD
    splits = 4 if H > 28 else 1
    br, bc = (16, 16) if INTERPRETED else (64 if H > 14 else 16, min(64, triton.next_power_of_2(C)))
    blocks = triton.cdiv(C, bc)
    sums = torch.empty(2, B, splits, C, device=x.device, dtype=torch.float32)
    _channel_sums[(B, blocks, splits)](x, g, mean, rstd, sums[0], sums[1], hw, C, splits, BR=br, BC=bc, num_warps=4)
    per_sample = sums.sum(2) if splits > 1 else sums[:, :, 0]
    totals, squares = per_sample.sum(1), per_sample.square().sum(2)
    dx = torch.empty_like(x)
    grid = (triton.cdiv(rows, br), blocks)
    _batch_norm_dx[grid](x, g, dx, mean, rstd, weight, totals[0], totals[1], rows, C, BR=br, BC=bc, num_warps=4)
    return dx, totals[1], totals[0], squares[1], squares[0]


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


def row_sums(x: Tensor, g: Tensor, mean: Tensor | None, rstd: Tensor) -> tuple[Tensor, Tensor]:
    """Sums over a sample's rows of g and of g * x_hat, x_hat = (x - mean) * rstd with statistics of each row.

    Args:
        x: Input [B, T, C], dense.
        g: Gradient of the output, likewise.
        mean: [B, T], float32; None: nothing is taken off (RMSNorm).
        rstd: [B, T], float32.

    Returns:
        (sums of g [B, C], sums of g * x_hat [B, C]), float32.
    """
    B, T, C = x.shape
    br, bc = (16, 16) if INTERPRETED else (32, 128)
    blocks = triton.cdiv(C, bc)
    splits = max(1, min(triton.cdiv(T, br), -(-4 * _WAVE // (B * blocks))))
    sums = torch.empty(2, B, splits, C, device=x.device, dtype=torch.float32)
    _row_sums[(B, blocks, splits)](
        x, g, rstd if mean is None else mean, rstd, sums[0], sums[1], T, C, splits,
        STATS=mean is not None, BR=br, BC=bc, num_warps=4,
    )  # fmt: skip
    plain, weighted = (sums.sum(2) if splits > 1 else sums[:, :, 0]).unbind()
    return plain, weighted
