"""Convolutions in channels_last: no patch is written out, and no sample's gradient."""

# mypy: disable-error-code="no-untyped-def, valid-type"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_clars.grad_norms.kernels import INTERPRETED

_WAVE = 132  # multiprocessors of an H100
_FEW_CHANNELS = 16


@triton.jit
def _product(
    X, G, W, N, B, H, WD, C, HO, WO, P, n_c, splits,
    KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
    DH: tl.constexpr, DW: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """A tile is a block of outputs by a block of the inputs that one tap of the kernel sees."""
    tile, split = tl.program_id(0), tl.program_id(1)
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
        for k in range(0, T, BT):
            pos = k + t
            i, j = (pos // WO) * SH + r, (pos % WO) * SW + q
            live = (pos < T) & (i >= 0) & (i < H) & (j >= 0) & (j < WD)
            g_live = (pos < T)[:, None] & (p < P)[None, :]
            g = tl.load(G + (b64 * T + pos)[:, None] * P + p[None, :], mask=g_live, other=0.0)
            x_live = live[:, None] & (c < C)[None, :]
            x = tl.load(X + ((b64 * H + i) * WD + j)[:, None] * C + c[None, :], mask=x_live, other=0.0)
            sample = tl.dot(tl.trans(g), x, sample, input_precision="ieee")
        total += sample
        tl.store(N + tile * B + b, tl.sum(tl.sum(sample * sample, 1), 0))
    K = KH * KW * C
    out = W + tl.cast(split, tl.int64) * P * K + p[:, None] * K + (tap * C + c)[None, :]
    tl.store(out, total, mask=(p < P)[:, None] & (c < C)[None, :])


@triton.jit
def _product_flat(
    X, G, W, N, B, H, WD, C, HO, WO, P, K, n_c, splits,
    KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
    DH: tl.constexpr, DW: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """For few input channels: a tile's columns are (tap, channel) pairs."""
    tile, split = tl.program_id(0), tl.program_id(1)
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
        for k in range(0, T, BT):
            pos = k + t
            i, j = (pos // WO)[:, None] * SH + r[None, :], (pos % WO)[:, None] * SW + q[None, :]
            live = (pos < T)[:, None] & (i >= 0) & (i < H) & (j >= 0) & (j < WD) & (col < K)[None, :]
            g_live = (pos < T)[:, None] & (p < P)[None, :]
            g = tl.load(G + (b64 * T + pos)[:, None] * P + p[None, :], mask=g_live, other=0.0)
            x = tl.load(X + ((b64 * H + i) * WD + j) * C + c[None, :], mask=live, other=0.0)
            sample = tl.dot(tl.trans(g), x, sample, input_precision="ieee")
        total += sample
        tl.store(N + tile * B + b, tl.sum(tl.sum(sample * sample, 1), 0))
    out = W + tl.cast(split, tl.int64) * P * K + p[:, None] * K + col[None, :]
    tl.store(out, total, mask=(p < P)[:, None] & (col < K)[None, :])


def convolution_product(
    x: Tensor,
    g: Tensor,
    *,
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
) -> tuple[Tensor, Tensor]:
    """Weight gradient and every sample's squared norm of its own, out of one product.

    Args:
        x: Inputs [B, C, H, W], dense in channels_last.
        g: Output gradients [B, P, H', W'], likewise.
        kernel: Height and width of the kernel, as are the others.
        stride: Steps between outputs.
        padding: Zeros added on both sides.
        dilation: Spacing of the taps.

    Returns:
        (weight gradient [P, C, *kernel] in channels_last, squared norms [B]), float32.
    """
    (B, C, H, WD), (P, HO, WO) = x.shape, g.shape[1:]
    taps, flat = kernel[0] * kernel[1], C < _FEW_CHANNELS
    columns = taps * C
    if INTERPRETED:
        bp, bc, bt, warps = 16, 16, 16, 4
    else:
        bp = 128 if P >= 128 else 64 if P > 32 else 32 if P > 16 else 16
        bc = 64 if flat else 128 if C >= 128 else 64 if C > 32 else 32 if C > 16 else 16
        bt, warps = 64, 8 if bp * bc >= 128 * 128 else 4
    n_p, n_c = triton.cdiv(P, bp), triton.cdiv(columns if flat else C, bc)
    tiles = n_p * n_c * (1 if flat else taps)
    splits = max(1, min(B, -(-4 * _WAVE // tiles)))
    w = torch.empty(splits, P, columns, device=x.device, dtype=torch.float32)
    n = torch.empty(tiles, B, device=x.device, dtype=torch.float32)
    common = {
        "KW": kernel[1], "SH": stride[0], "SW": stride[1], "PH": padding[0], "PW": padding[1], "DH": dilation[0],
        "DW": dilation[1], "BP": bp, "BC": bc, "BT": bt, "num_warps": warps,
        "num_stages": 3,
    }  # fmt: skip
    if flat:
        _product_flat[(tiles, splits)](x, g, w, n, B, H, WD, C, HO, WO, P, columns, n_c, splits, **common)
    else:
        _product[(tiles, splits)](x, g, w, n, B, H, WD, C, HO, WO, P, n_c, splits, KH=kernel[0], **common)
    total = w.sum(0) if splits > 1 else w[0]
    return total.view(P, *kernel, C).permute(0, 3, 1, 2), n.sum(0)


@triton.jit
def _gram(
    X, G, N, NB, H, WD, C, HO, WO, P, n_t,
    KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
    DH: tl.constexpr, DW: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """<X X^T, G G^T> over output positions, X the patches: one program a sample and tile of the upper triangle."""
    tile, b = tl.program_id(0), tl.cast(tl.program_id(1), tl.int64)
    ti, tj = tile // n_t, tile % n_t
    at = b * n_t * n_t + tile
    if ti <= tj:
        T = HO * WO
        k = tl.arange(0, BK)
        u, v = ti * BT + tl.arange(0, BT), tj * BT + tl.arange(0, BT)
        xx = tl.zeros((BT, BT), tl.float32)
        gg = tl.zeros((BT, BT), tl.float32)
        ui, uj = (u // WO) * SH - PH, (u % WO) * SW - PW
        vi, vj = (v // WO) * SH - PH, (v % WO) * SW - PW
        n_c = tl.cdiv(C, BK)
        for step in range(0, KH * KW * n_c):
            tap, c = step // n_c, (step % n_c) * BK + k
            r, q = (tap // KW) * DH, (tap % KW) * DW
            mu = (u < T) & (ui + r >= 0) & (ui + r < H) & (uj + q >= 0) & (uj + q < WD)
            mv = (v < T) & (vi + r >= 0) & (vi + r < H) & (vj + q >= 0) & (vj + q < WD)
            live = (c < C)[None, :]
            a = tl.load(
                X + ((b * H + ui + r) * WD + uj + q)[:, None] * C + c[None, :], mask=mu[:, None] & live, other=0.0
            )
            e = tl.load(
                X + ((b * H + vi + r) * WD + vj + q)[:, None] * C + c[None, :], mask=mv[:, None] & live, other=0.0
            )
            xx = tl.dot(a, tl.trans(e), xx, input_precision="ieee")
        for o in range(0, P, BK):
            live = (o + k < P)[None, :]
            a = tl.load(G + (b * T + u)[:, None] * P + (o + k)[None, :], mask=(u < T)[:, None] & live, other=0.0)
            e = tl.load(G + (b * T + v)[:, None] * P + (o + k)[None, :], mask=(v < T)[:, None] & live, other=0.0)
            gg = tl.dot(a, tl.trans(e), gg, input_precision="ieee")
        twice = tl.where(ti == tj, 1.0, 2.0)
        tl.store(N + at, twice * tl.sum(tl.sum(xx * gg, 1), 0))
        tl.store(NB + at, twice * tl.sum(tl.sum(gg, 1), 0))
    else:
        tl.store(N + at, 0.0)
        tl.store(NB + at, 0.0)


def convolution_gram(
    x: Tensor,
    g: Tensor,
    *,
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
) -> tuple[Tensor, Tensor]:
    """Every sample's squared norms of its weight and bias gradient, without these. Arguments as above.

    Returns:
        (squared norms of the weight gradients [B], of the bias gradients [B]), float32.
    """
    (B, C, H, WD), (P, HO, WO) = x.shape, g.shape[1:]
    T = HO * WO
    half = x.element_size() == 2
    bt, bk, warps = (16, 16, 4) if INTERPRETED else (128, 64, 8) if half and T > 64 else (64, 64 if half else 32, 4)
    n_t = triton.cdiv(T, bt)
    n = torch.empty(2, B, n_t * n_t, device=x.device, dtype=torch.float32)
    _gram[(n_t * n_t, B)](
        x, g, n[0], n[1], H, WD, C, HO, WO, P, n_t,
        KH=kernel[0], KW=kernel[1], SH=stride[0], SW=stride[1], PH=padding[0], PW=padding[1],
        DH=dilation[0], DW=dilation[1], BT=bt, BK=bk, num_warps=warps, num_stages=3,
    )  # fmt: skip
    weight, bias = n.sum(2).clamp(min=0).unbind()
    return weight, bias
