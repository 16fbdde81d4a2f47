"""Convolutions in channels_last, with groups: no patch is written out, and no sample's gradient of a whole layer."""

# mypy: disable-error-code="no-untyped-def, valid-type"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_clars.grad_norms.kernels import FEW_CHANNELS, INTERPRETED
from hf_clars.grad_norms.kernels.linear import BATCH, bias_and_squares

_WAVE = 132  # multiprocessors of an H100


@triton.jit(do_not_specialize=BATCH)
def _product(
    X, G, W, N, B, J, H, WD, C, HO, WO, P, groups, n_c, splits,
    KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
    DH: tl.constexpr, DW: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """A tile is a block of a group's outputs by a block of its inputs that one tap of the kernel sees.

    C inputs and P outputs a group.
    """
    tile, split, group = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    tap = (tile % (n_c * KH * KW)) // n_c
    c = (tile % n_c) * BC + tl.arange(0, BC)
    p = (tile // (n_c * KH * KW)) * BP + tl.arange(0, BP)
    r, q = (tap // KW) * DH - PH, (tap % KW) * DW - PW
    t = tl.arange(0, BT)
    total = tl.zeros((BP, BC), tl.float32)
    T = HO * WO
    for b in range(split, B, splits):
        sample = tl.zeros((BP, BC), tl.float32)
        b64 = tl.cast(b, tl.int64)
        x_of = X + b64 * H * WD * groups * C + group * C
        g_of = G + b64 * T * groups * P + group * P
        for k in range(0, T, BT):
            pos = k + t
            i, j = (pos // WO) * SH + r, (pos % WO) * SW + q
            live = (pos < T) & (i >= 0) & (i < H) & (j >= 0) & (j < WD)
            g_live = (pos < T)[:, None] & (p < P)[None, :]
            g = tl.load(g_of + pos[:, None] * (groups * P) + p[None, :], mask=g_live, other=0.0)
            x_live = live[:, None] & (c < C)[None, :]
            x = tl.load(x_of + (i * WD + j)[:, None] * (groups * C) + c[None, :], mask=x_live, other=0.0)
            sample = tl.dot(tl.trans(g), x, sample, input_precision="ieee")
        total += sample
        if b < J:
            tl.store(N + (group * tl.num_programs(0) + tile) * J + b, tl.sum(tl.sum(sample * sample, 1), 0))
    K = KH * KW * C
    row = (tl.cast(split, tl.int64) * groups + group) * P + p
    tl.store(W + row[:, None] * K + (tap * C + c)[None, :], total, mask=(p < P)[:, None] & (c < C)[None, :])


@triton.jit(do_not_specialize=BATCH)
def _product_flat(
    X, G, W, N, B, J, H, WD, C, HO, WO, P, groups, n_c, splits,
    KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
    DH: tl.constexpr, DW: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """For few input channels a group: a tile's columns are (tap, channel) pairs."""
    tile, split, group = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    K = KH * KW * C
    col = (tile % n_c) * BC + tl.arange(0, BC)
    p = (tile // n_c) * BP + tl.arange(0, BP)
    tap, c = col // C, col % C
    r, q = (tap // KW) * DH - PH, (tap % KW) * DW - PW
    t = tl.arange(0, BT)
    total = tl.zeros((BP, BC), tl.float32)
    T = HO * WO
    for b in range(split, B, splits):
        sample = tl.zeros((BP, BC), tl.float32)
        b64 = tl.cast(b, tl.int64)
        x_of = X + b64 * H * WD * groups * C + group * C
        g_of = G + b64 * T * groups * P + group * P
        for k in range(0, T, BT):
            pos = k + t
            i, j = (pos // WO)[:, None] * SH + r[None, :], (pos % WO)[:, None] * SW + q[None, :]
            live = (pos < T)[:, None] & (i >= 0) & (i < H) & (j >= 0) & (j < WD) & (col < K)[None, :]
            g_live = (pos < T)[:, None] & (p < P)[None, :]
            g = tl.load(g_of + pos[:, None] * (groups * P) + p[None, :], mask=g_live, other=0.0)
            x = tl.load(x_of + (i * WD + j) * (groups * C) + c[None, :], mask=live, other=0.0)
            sample = tl.dot(tl.trans(g), x, sample, input_precision="ieee")
        total += sample
        if b < J:
            tl.store(N + (group * tl.num_programs(0) + tile) * J + b, tl.sum(tl.sum(sample * sample, 1), 0))
    row = (tl.cast(split, tl.int64) * groups + group) * P + p
    tl.store(W + row[:, None] * K + col[None, :], total, mask=(p < P)[:, None] & (col < K)[None, :])


@triton.jit
def _depthwise(
    X, G, W, SB, H, WD, C, HO, WO, P,
    KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
    DH: tl.constexpr, DW: tl.constexpr, BP: tl.constexpr, BT: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """One input a group: a sample's gradient is as small as the layer, and a tap of it is a sum of products."""
    tap, block, b = tl.program_id(0) % (KH * KW), tl.program_id(1), tl.cast(tl.program_id(0) // (KH * KW), tl.int64)
    p = block * BP + tl.arange(0, BP)
    c = p // (P // C)
    r, q = (tap // KW) * DH - PH, (tap % KW) * DW - PW
    t = tl.arange(0, BT)
    total = tl.zeros((BT, BP), tl.float32)
    bias = tl.zeros((BT, BP), tl.float32)
    T = HO * WO
    for k in range(0, T, BT):
        pos = k + t
        i, j = (pos // WO) * SH + r, (pos % WO) * SW + q
        live = (pos < T) & (i >= 0) & (i < H) & (j >= 0) & (j < WD)
        g_live = (pos < T)[:, None] & (p < P)[None, :]
        g = tl.load(G + b * T * P + pos[:, None] * P + p[None, :], mask=g_live, other=0.0).to(tl.float32)
        x_live = live[:, None] & (p < P)[None, :]
        x = tl.load(X + b * H * WD * C + (i * WD + j)[:, None] * C + c[None, :], mask=x_live, other=0.0)
        total += g * x.to(tl.float32)
        if BIAS:
            bias += g
    tl.store(W + (b * KH * KW + tap) * P + p, tl.sum(total, 0), mask=p < P)
    if BIAS:
        if tap == 0:
            tl.store(SB + b * P + p, tl.sum(bias, 0), mask=p < P)


def _constants(kernel: list[int], stride: list[int], padding: list[int], dilation: list[int]) -> dict[str, int]:
    names = "KH", "KW", "SH", "SW", "PH", "PW", "DH", "DW"
    return dict(zip(names, (*kernel, *stride, *padding, *dilation), strict=True))


def convolution_product(
    x: Tensor, g: Tensor, kernel: list[int], stride: list[int], padding: list[int], dilation: list[int],
    groups: int, bias: bool, measured: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """See `operations.convolution_product`."""
    x, g = (t.contiguous(memory_format=torch.channels_last) for t in (x, g))
    constants = _constants(kernel, stride, padding, dilation)
    if x.shape[1] == groups:
        return _depthwise_product(x, g, constants, bias, measured)
    (B, C, H, WD), (P, HO, WO) = x.shape, g.shape[1:]
    C, P = C // groups, P // groups
    taps, flat = kernel[0] * kernel[1], C < FEW_CHANNELS
    if INTERPRETED:
        bp, bc, bt, warps = 16, 16, 16, 4
    else:
        bp = 128 if P >= 128 else 64 if P > 32 else 32 if P > 16 else 16
        bc = 64 if flat else 128 if C >= 128 else 64 if C > 32 else 32 if C > 16 else 16
        wide = x.element_size() == 4  # float32: short sums stay in registers
        bt, warps = (16 if wide else 64), (8 if bp * bc >= 128 * (64 if wide else 128) else 4)
    n_p, n_c = triton.cdiv(P, bp), triton.cdiv(taps * C if flat else C, bc)
    tiles = n_p * n_c * (1 if flat else taps)
    splits = max(1, min(B, -(-4 * _WAVE // (groups * tiles))))
    w = torch.empty(splits, groups * P, *kernel, C, device=x.device, dtype=torch.float32)
    n = torch.empty(groups * tiles, measured, device=x.device, dtype=torch.float32)
    (_product_flat if flat else _product)[(tiles, splits, groups)](
        x, g, w, n, B, measured, H, WD, C, HO, WO, P, groups, n_c, splits,
        **constants, BP=bp, BC=bc, BT=bt, num_warps=warps, num_stages=3,
    )  # fmt: skip
    sums = g.sum((2, 3), dtype=torch.float32) if bias else None  # see `linear.py`
    return w.sum(0) if splits > 1 else w[0], *bias_and_squares(n, sums)


def _depthwise_product(
    x: Tensor, g: Tensor, constants: dict[str, int], bias: bool, measured: int
) -> tuple[Tensor, Tensor, Tensor]:
    (B, C, H, WD), (P, HO, WO) = x.shape, g.shape[1:]
    kernel = constants["KH"], constants["KW"]
    bp, bt = (16, 16) if INTERPRETED else (min(64, triton.next_power_of_2(P)), 64)
    each = torch.empty(B, *kernel, P, device=x.device, dtype=torch.float32)
    sb = torch.empty(B, P if bias else 0, device=x.device, dtype=torch.float32)
    grid = (B * kernel[0] * kernel[1], triton.cdiv(P, bp))
    _depthwise[grid](x, g, each, sb, H, WD, C, HO, WO, P, **constants, BP=bp, BT=bt, BIAS=bias, num_warps=4)
    weight = each.sum(0).permute(2, 0, 1).contiguous().unsqueeze(3)
    squares = each[:measured].square().sum((1, 2, 3)).unsqueeze(0)
    return weight, *bias_and_squares(squares, sb if bias else None)


@triton.jit
def _gram(
    X, G, N, NB, H, WD, C, HO, WO, P, groups, n_t,
    KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
    DH: tl.constexpr, DW: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """<X X^T, G G^T> over output positions, X a group's patches: one a sample, group and tile."""
    at = tl.program_id(0)
    tile, of = at % (n_t * n_t), at // (n_t * n_t)
    group, b = of % groups, tl.cast(of // groups, tl.int64)
    ti, tj = tile // n_t, tile % n_t
    if ti <= tj:
        T = HO * WO
        k = tl.arange(0, BK)
        u, v = ti * BT + tl.arange(0, BT), tj * BT + tl.arange(0, BT)
        xx = tl.zeros((BT, BT), tl.float32)
        gg = tl.zeros((BT, BT), tl.float32)
        ui, uj = (u // WO) * SH - PH, (u % WO) * SW - PW
        vi, vj = (v // WO) * SH - PH, (v % WO) * SW - PW
        x_of = X + b * H * WD * groups * C + group * C
        g_of = G + b * T * groups * P + group * P
        n_c = tl.cdiv(C, BK)
        for step in range(0, KH * KW * n_c):
            tap, c = step // n_c, (step % n_c) * BK + k
            r, q = (tap // KW) * DH, (tap % KW) * DW
            mu = (u < T) & (ui + r >= 0) & (ui + r < H) & (uj + q >= 0) & (uj + q < WD)
            mv = (v < T) & (vi + r >= 0) & (vi + r < H) & (vj + q >= 0) & (vj + q < WD)
            live = (c < C)[None, :]
            u_at, v_at = (ui + r) * WD + uj + q, (vi + r) * WD + vj + q
            a = tl.load(x_of + u_at[:, None] * (groups * C) + c[None, :], mask=mu[:, None] & live, other=0.0)
            e = tl.load(x_of + v_at[:, None] * (groups * C) + c[None, :], mask=mv[:, None] & live, other=0.0)
            xx = tl.dot(a, tl.trans(e), xx, input_precision="ieee")
        for o in range(0, P, BK):
            live = (o + k < P)[None, :]
            a = tl.load(g_of + u[:, None] * (groups * P) + (o + k)[None, :], mask=(u < T)[:, None] & live, other=0.0)
            e = tl.load(g_of + v[:, None] * (groups * P) + (o + k)[None, :], mask=(v < T)[:, None] & live, other=0.0)
            gg = tl.dot(a, tl.trans(e), gg, input_precision="ieee")
        twice = tl.where(ti == tj, 1.0, 2.0)
        tl.store(N + at, twice * tl.sum(tl.sum(xx * gg, 1), 0))
        tl.store(NB + at, twice * tl.sum(tl.sum(gg, 1), 0))
    else:
        tl.store(N + at, 0.0)
        tl.store(NB + at, 0.0)


def convolution_gram(
    x: Tensor, g: Tensor, kernel: list[int], stride: list[int], padding: list[int], dilation: list[int], groups: int
) -> Tensor:
    """See `operations.convolution_gram`."""
    x, g = (t.contiguous(memory_format=torch.channels_last) for t in (x, g))
    (B, C, H, WD), (P, HO, WO) = x.shape, g.shape[1:]
    T = HO * WO
    half = x.element_size() == 2
    bt, bk, warps = (16, 16, 4) if INTERPRETED else (128, 64, 8) if half and T > 64 else (64, 64 if half else 32, 4)
    n_t = triton.cdiv(T, bt)
    n = torch.empty(2, B, groups * n_t * n_t, device=x.device, dtype=torch.float32)
    _gram[(B * groups * n_t * n_t,)](
        x, g, n[0], n[1], H, WD, C // groups, HO, WO, P // groups, groups, n_t,
        **_constants(kernel, stride, padding, dilation), BT=bt, BK=bk, num_warps=warps, num_stages=3,
    )  # fmt: skip
    return n.sum(2).clamp(min=0)
