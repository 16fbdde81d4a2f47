"""Per-sample gradient norms of convolutions, as pure functions on tensors; the layout is `norm_math.py`'s."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad, unfold

from hf_clars.grad_norms.norm_math import in_slices, on_cuda, product, unsliced_gram_squared_norm
from hf_clars.grad_norms.torch_kernels import convolution_weight_grad
from hf_clars.grad_norms.torch_traces import is_compiling

_LARGE = 25
"""Taps of a large kernel."""

_REWRITTEN = 1 << 20
"""Numbers that a kernel is given at once on a CPU: a library rewrites them, and for 4 MiB it finds memory in cache."""


def convolution_weight_grads(
    x: Tensor,
    g: Tensor,
    *,
    kernel_shape: tuple[int, ...],
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
    groups: int,
) -> Tensor:
    """Each sample's weight gradient of a convolution.

    The samples become groups of one convolution, so that the library's own weight-gradient kernel keeps them apart.

    Args:
        x: Inputs [B, in, *space].
        g: Output gradients [B, out, *space'].
        kernel_shape: The weight's shape (out, in / groups, *kernel).
        stride: Per spatial dimension, as are `padding` (zeros) and `dilation`.
        padding: Zeros added on both sides.
        dilation: Kernel spacing.
        groups: Groups of the layer itself.

    Returns:
        [B, out, in / groups, *kernel].
    """
    pixels_first = groups == x.shape[1] and _likes_pixels_first(x, kernel_shape[2:])

    def grads(x: Tensor, g: Tensor) -> Tensor:
        batch = x.shape[0]
        found = convolution_weight_grad(
            _as_one_sample(g, pixels_first),
            _as_one_sample(x, pixels_first),
            (batch * kernel_shape[0], *kernel_shape[1:]),
            stride=stride,
            padding=padding,
            dilation=dilation,
            groups=batch * groups,
        )
        return found.reshape(batch, *kernel_shape)

    return _in_cached_slices(grads, x, g)


def _in_cached_slices(fn: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """`fn(*tensors)`; on a CPU over slices of the batch, for a kernel that rewrites tensors in a layout of its own.

    Args:
        fn: Maps tensors [b, ...] to [b, ...].
        tensors: Arguments, batch axis first.

    Returns:
        [B, ...].
    """
    batch = tensors[0].shape[0]
    largest = max(t.numel() for t in tensors)
    if largest <= _REWRITTEN or tensors[0].device.type != "cpu" or is_compiling():
        return fn(*tensors)
    step = max(2, _REWRITTEN * batch // largest)
    return torch.cat([fn(*part) for part in zip(*(t.split(step) for t in tensors), strict=True)])


def _likes_pixels_first(x: Tensor, kernel: tuple[int, ...]) -> bool:
    """Whether a depthwise convolution is faster in channels_last memory, copies included: two to six times on a CPU.

    Large kernels are, but for images no larger than they; others only where the input has this layout already.
    """
    if x.dim() != 4 or on_cuda(x) or is_compiling():  # a compiler knows no strides
        return False
    is_so = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return (is_so or math.prod(kernel) >= _LARGE) and x.shape[2] > kernel[0] and x.shape[3] > kernel[1]


def _as_one_sample(t: Tensor, pixels_first: bool) -> Tensor:
    """The samples' channels side by side, [B, C, *space] -> [1, B * C, *space], if need be in channels_last memory."""
    channels = t.shape[0] * t.shape[1]
    if not pixels_first:
        return t.flatten().view(1, channels, *t.shape[2:])  # with strides that are not left from an axis of length 1
    return t.permute(2, 3, 0, 1).reshape(1, *t.shape[2:], channels).contiguous().permute(0, 3, 1, 2)


def thin_convolution_weight_grads(
    x: Tensor,
    g: Tensor,
    *,
    kernel_shape: tuple[int, ...],
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
) -> Tensor:
    """`convolution_weight_grads` of a 2-D convolution without groups by written-out patches: for very few inputs."""
    if is_compiling():  # a compiler knows no strides
        patches = unfold(x, kernel_shape[2:], dilation, padding, stride)
        return (g.flatten(2) @ patches.mT).view(-1, *kernel_shape)
    x = pad(x, (padding[1], padding[1], padding[0], padding[0]))
    batch, channel, row, column = x.stride()
    taps = (row * dilation[0], column * dilation[1])
    patches = x.as_strided(
        (*x.shape[:2], *kernel_shape[2:], *g.shape[2:]),
        (batch, channel, *taps, row * stride[0], column * stride[1]),
        x.storage_offset(),
    ).reshape(x.shape[0], math.prod(kernel_shape[1:]), -1)  # half the time of `unfold`
    return (g.flatten(2) @ patches.mT).view(-1, *kernel_shape)


def patches_of(
    x: Tensor,
    *,
    kernel: tuple[int, ...],
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
    groups: int,
) -> Tensor:
    """What each output position of a convolution sees, written out: [B * groups, T, in / groups * taps].

    Args:
        x: Inputs [B, in, *space].
        kernel: Kernel size per spatial dimension, as are the others.
        stride: Steps between output positions.
        padding: Zeros added on both sides.
        dilation: Kernel spacing.
        groups: Groups of the layer.
    """
    x = pad(x, [p for each in reversed(padding) for p in (each, each)])
    for axis, (k, s, d) in enumerate(zip(kernel, stride, dilation, strict=True), 2):
        x = x.unfold(axis, d * (k - 1) + 1, s)[..., ::d]
    axes = len(kernel)  # [B, in, *space', *kernel]
    x = x.unflatten(1, (groups, -1))
    order = (0, 1, *range(3, 3 + axes), 2, *range(3 + axes, 3 + 2 * axes))
    return x.permute(order).flatten(2 + axes).flatten(2, 1 + axes).flatten(0, 1)


def patch_weight_grads(
    x: Tensor,
    g: Tensor,
    *,
    kernel_shape: tuple[int, ...],
    groups: int,
    **steps: tuple[int, ...],
) -> Tensor:
    """`convolution_weight_grads` by products with the patches, written out in slices of the batch: for CUDA."""

    def grads(x: Tensor, g: Tensor) -> Tensor:
        patches = patches_of(x, kernel=kernel_shape[2:], groups=groups, **steps)
        outputs = g.flatten(2).unflatten(1, (groups, -1)).flatten(0, 1)
        return product(outputs, patches).reshape(-1, *kernel_shape)

    written = math.prod(g.shape[2:]) * math.prod(kernel_shape[1:]) * groups
    return in_slices(grads, x, g, elements_per_sample=written)


def patch_gram_squared_norm(
    x: Tensor, g: Tensor, *, kernel: tuple[int, ...], groups: int, **steps: tuple[int, ...]
) -> Tensor:
    """`convolution_gram_squared_norm` by products of the patches, written out in slices of the batch: for CUDA."""

    def squares(x: Tensor, g: Tensor) -> Tensor:
        patches = patches_of(x, kernel=kernel, groups=groups, **steps)
        outputs = g.flatten(2).unflatten(1, (groups, -1)).flatten(0, 1).mT
        return unsliced_gram_squared_norm(patches, outputs).unflatten(0, (-1, groups)).sum(1)

    positions = math.prod(g.shape[2:])
    written = positions * (x.shape[1] * math.prod(kernel) + 2 * groups * positions)
    return in_slices(squares, x, g, elements_per_sample=written)


def convolution_gram_squared_norm(
    x: Tensor,
    g: Tensor,
    *,
    kernel: tuple[int, ...],
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
    groups: int,
) -> Tensor:
    """Squared norm of each sample's convolution weight gradient, by the Gram form over output positions.

    The product of two patches is a sum over kernel taps of products of single pixels, and these are entries of one
    matrix over all pairs of pixels: no patch is ever written out. Each group has a matrix of its own; one over all
    would mix them and overstate depthwise norms.

    Args:
        x: Inputs [B, in, *space].
        g: Output gradients [B, out, *space'].
        kernel: Kernel size per spatial dimension, as are `stride`, `padding` (zeros) and `dilation`.
        stride: Steps between output positions.
        padding: Zeros added on both sides.
        dilation: Kernel spacing.
        groups: Groups of the layer.

    Returns:
        [B].
    """
    overlaps = [
        [_tap_overlap(tap * d - pad, s, x.shape[2 + i], g.shape[2 + i]) for tap in range(k)]
        for i, (k, s, pad, d) in enumerate(zip(kernel, stride, padding, dilation, strict=True))
    ]

    def pixel_products(t: Tensor) -> Tensor:
        """[b, groups, *space, *space]: products of all pairs of pixels."""
        flat = t.flatten(2).unflatten(1, (groups, -1))
        return (flat.mT @ flat).view(t.shape[0], groups, *t.shape[2:], *t.shape[2:])

    def squared_norms(x: Tensor, g: Tensor) -> Tensor:
        patches, outputs = pixel_products(x), pixel_products(g)
        for i in range(len(kernel)):  # a sum over the kernel's rows, then one over its columns
            patches = _sum_over_taps(patches, (2 + i, 2 + len(kernel) + i), g.shape[2 + i], overlaps[i])
        return torch.linalg.vecdot(patches.flatten(1), outputs.flatten(1))

    pairs = groups * (2 * math.prod(x.shape[2:]) ** 2 + 2 * math.prod(g.shape[2:]) ** 2)
    return in_slices(squared_norms, x, g, elements_per_sample=pairs)


def _sum_over_taps(
    pairs: Tensor, axes: tuple[int, int], out_size: int, overlaps: Sequence[tuple[slice, slice]]
) -> Tensor:
    """Products of pixels -> products of one-dimensional patches, along one spatial axis of both members of a pair."""
    shape = list(pairs.shape)
    everything: list[slice] = [slice(None)] * pairs.dim()
    for axis in axes:
        shape[axis] = out_size
    total = pairs.new_zeros(shape)
    for there, here in overlaps:
        source, target = list(everything), list(everything)
        for axis in axes:
            source[axis], target[axis] = there, here
        total[tuple(target)] += pairs[tuple(source)]
    return total


def _tap_overlap(shift: int, stride: int, size: int, out_size: int) -> tuple[slice, slice]:
    """Pixels that a kernel tap sees along one axis, and the outputs that see them: the rest falls on padding.

    Output i sees pixel i * stride + shift.
    """
    first = max(0, -(shift // stride))
    count = max(0, min(out_size - 1, (size - 1 - shift) // stride) - first + 1)
    start = first * stride + shift
    return slice(start, start + (count - 1) * stride + 1 if count else start, stride), slice(first, first + count)
