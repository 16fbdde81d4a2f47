"""Linear layers over T positions: one product for gradient and norms, or the Gram form for the norms alone.

A tile that is copied for a product must have no other use in the same loop. On Hopper a product is still read while
later tiles are copied, for which Triton keeps one buffer more, but not for a tile with a second use (triton #6691, seen
in the code that 3.6 and 3.8 make): the product is then wrong, now and then. So a bias, which is a sum of the same g, is
not summed here: torch sums g, as it does in an ordinary backward pass. The Gram form has a bias's norms at no cost.
"""

# mypy: disable-error-code="no-untyped-def, valid-type"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_clars.grad_norms.kernels import INTERPRETED, has_tensor_copies

BATCH = ["B", "J", "splits"]
"""Arguments that depend on the number of samples: a last batch, or one of one sample, is not compiled for anew."""

_WAVE = 132  # multiprocessors of an H100: fewer tiles than this leave some idle, and the batch is split


@triton.jit(do_not_specialize=BATCH)
def _product(
    X, G, W, N, B, J, T, P, D, sxb, sxt, sgb, sgt, n_d, splits,
    BP: tl.constexpr, BD: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    tile, split = tl.program_id(0), tl.program_id(1)
    p = (tile // n_d) * BP + tl.arange(0, BP)
    d = (tile % n_d) * BD + tl.arange(0, BD)
    t = tl.arange(0, BT)
    total = tl.zeros((BP, BD), tl.float32)
    for b in range(split, B, splits):
        sample = tl.zeros((BP, BD), tl.float32)
        g_at = G + tl.cast(b, tl.int64) * sgb + t[:, None] * sgt + p[None, :]
        x_at = X + tl.cast(b, tl.int64) * sxb + t[:, None] * sxt + d[None, :]
        for k in range(0, T, BT):
            live = (k + t < T)[:, None]
            g = tl.load(g_at, mask=live & (p < P)[None, :], other=0.0)
            x = tl.load(x_at, mask=live & (d < D)[None, :], other=0.0)
            sample = tl.dot(tl.trans(g), x, sample, input_precision="ieee")
            g_at += BT * sgt
            x_at += BT * sxt
        total += sample
        if b < J:
            tl.store(N + tile * J + b, tl.sum(tl.sum(sample * sample, 1), 0))
    out = W + tl.cast(split, tl.int64) * P * D + tl.cast(p, tl.int64)[:, None] * D + d[None, :]
    tl.store(out, total, mask=(p < P)[:, None] & (d < D)[None, :])


@triton.jit(do_not_specialize=BATCH)
def _product_tma(
    XD, GD, W, N, B, J, T, P, D, n_d, splits,
    BP: tl.constexpr, BD: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """The same, with tiles copied by descriptors; what lies outside a tensor reads as zero."""
    tile, split = tl.program_id(0), tl.program_id(1)
    p0, d0 = (tile // n_d) * BP, (tile % n_d) * BD
    p, d = p0 + tl.arange(0, BP), d0 + tl.arange(0, BD)
    total = tl.zeros((BP, BD), tl.float32)
    for b in range(split, B, splits):
        sample = tl.zeros((BP, BD), tl.float32)
        for k in range(0, T, BT):
            g = GD.load([b, k, p0]).reshape(BT, BP)
            x = XD.load([b, k, d0]).reshape(BT, BD)
            sample = tl.dot(tl.trans(g), x, sample, input_precision="ieee")
        total += sample
        if b < J:
            tl.store(N + tile * J + b, tl.sum(tl.sum(sample * sample, 1), 0))
    out = W + tl.cast(split, tl.int64) * P * D + tl.cast(p, tl.int64)[:, None] * D + d[None, :]
    tl.store(out, total, mask=(p < P)[:, None] & (d < D)[None, :])


def _product_tiles(P: int, D: int, *, wide: bool, tma: bool) -> tuple[int, int, int]:
    """(outputs, inputs and positions of a tile). `wide`: float32, which short sums keep in registers."""
    if INTERPRETED:
        return 16, 16, 16
    return (128 if P >= 128 else 64), (256 if tma and min(P, D) >= 256 else 128), (16 if wide else 64)


def _copied_by_descriptors(x: Tensor, g: Tensor) -> bool:
    """Whether the device can copy tiles of both by descriptors: rows of 16 bytes' multiples, from such an address."""
    if x.element_size() != 2 or not has_tensor_copies(x.device):
        return False
    # The strides of a batch of one sample are whatever they are.
    steps = [step for t in (x, g) for step in (*t.stride()[:2], t.shape[2])]
    return all(t.stride(2) == 1 and t.data_ptr() % 16 == 0 for t in (x, g)) and not any(step % 8 for step in steps)


def linear_product(x: Tensor, g: Tensor, bias: bool, measured: int) -> tuple[Tensor, Tensor, Tensor]:
    """See `operations.linear_product`."""
    (B, T, D), P = x.shape, g.shape[2]
    tma = _copied_by_descriptors(x, g)
    bp, bd, bt = _product_tiles(P, D, wide=x.element_size() == 4, tma=tma)
    n_p, n_d = triton.cdiv(P, bp), triton.cdiv(D, bd)
    tiles = n_p * n_d
    splits = max(1, min(B, -(-2 * _WAVE // tiles))) if tiles < 2 * _WAVE else 1
    w = torch.empty(splits, P, D, device=x.device, dtype=torch.float32)
    n = torch.empty(tiles, measured, device=x.device, dtype=torch.float32)
    shapes = B, measured, T, P, D
    tile = {"BP": bp, "BD": bd, "BT": bt, "num_warps": 4 if INTERPRETED else 8, "num_stages": 3}
    if tma:
        from triton.tools.tensor_descriptor import TensorDescriptor

        xd, gd = TensorDescriptor.from_tensor(x, [1, bt, bd]), TensorDescriptor.from_tensor(g, [1, bt, bp])
        _product_tma[(tiles, splits)](xd, gd, w, n, *shapes, n_d, splits, **tile)
    else:
        strides = x.stride(0), x.stride(1), g.stride(0), g.stride(1)
        _product[(tiles, splits)](x, g, w, n, *shapes, *strides, n_d, splits, **tile)
    return w.sum(0) if splits > 1 else w[0], *bias_and_squares(n, g.sum(1, dtype=torch.float32) if bias else None)


def bias_and_squares(n: Tensor, sums: Tensor | None) -> tuple[Tensor, Tensor]:
    """(bias gradient [P] or [0], squared norms [1 or 2, measured]).

    Args:
        n: Each tile's part of the weight's squares, [tiles, measured].
        sums: Each sample's bias gradient [B, P]; None if there is no bias.
    """
    if sums is None:
        return n.new_empty(0), n.sum(0, keepdim=True)
    return sums.sum(0), torch.stack((n.sum(0), sums[: n.shape[1]].square().sum(1)))


@triton.jit
def _gram(X, G, N, NB, T, D, P, sxb, sxt, sgb, sgt, n_t, BT: tl.constexpr, BK: tl.constexpr):
    """One program a sample and tile of the upper triangle of the [T, T] products; nothing of them is written."""
    at = tl.program_id(0)
    tile, b = at % (n_t * n_t), tl.cast(at // (n_t * n_t), tl.int64)
    i, j = tile // n_t, tile % n_t
    if i <= j:
        k, t = tl.arange(0, BK), tl.arange(0, BT)
        row, column = tl.cast(i, tl.int64) * BT, tl.cast(j, tl.int64) * BT
        live_r, live_c = (row + t < T)[:, None], (column + t < T)[:, None]
        xx = tl.zeros((BT, BT), tl.float32)
        gg = tl.zeros((BT, BT), tl.float32)
        x_r, x_c = X + b * sxb + row * sxt, X + b * sxb + column * sxt
        g_r, g_c = G + b * sgb + row * sgt, G + b * sgb + column * sgt
        for q in range(0, D, BK):
            live = (q + k < D)[None, :]
            u = tl.load(x_r + t[:, None] * sxt + (q + k)[None, :], mask=live_r & live, other=0.0)
            v = tl.load(x_c + t[:, None] * sxt + (q + k)[None, :], mask=live_c & live, other=0.0)
            xx = tl.dot(u, tl.trans(v), xx, input_precision="ieee")
        for q in range(0, P, BK):
            live = (q + k < P)[None, :]
            u = tl.load(g_r + t[:, None] * sgt + (q + k)[None, :], mask=live_r & live, other=0.0)
            v = tl.load(g_c + t[:, None] * sgt + (q + k)[None, :], mask=live_c & live, other=0.0)
            gg = tl.dot(u, tl.trans(v), gg, input_precision="ieee")
        twice = tl.where(i == j, 1.0, 2.0)
        tl.store(N + at, twice * tl.sum(tl.sum(xx * gg, 1), 0))
        tl.store(NB + at, twice * tl.sum(tl.sum(gg, 1), 0))  # <1 1^T, G G^T>: the bias
    else:
        tl.store(N + at, 0.0)
        tl.store(NB + at, 0.0)


def linear_gram(x: Tensor, g: Tensor) -> Tensor:
    """See `operations.linear_gram`."""
    (B, T, D), P = x.shape, g.shape[2]
    half = x.element_size() == 2
    bt, bk, warps = (16, 16, 4) if INTERPRETED else (128, 64, 8) if half and T > 64 else (64, 64 if half else 32, 4)
    n_t = triton.cdiv(T, bt)
    n = torch.empty(2, B, n_t * n_t, device=x.device, dtype=torch.float32)
    _gram[(B * n_t * n_t,)](
        x, g, n[0], n[1], T, D, P, x.stride(0), x.stride(1), g.stride(0), g.stride(1), n_t,
        BT=bt, BK=bk, num_warps=warps, num_stages=3,
    )  # fmt: skip
    return n.sum(2).clamp(min=0)
