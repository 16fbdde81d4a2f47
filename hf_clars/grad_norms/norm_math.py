"""Per-sample gradient norms as pure functions of activations and output gradients.

One layout throughout: `x` is a layer's input, `g` the gradient of the loss with respect to its output, both with the
batch axis B first; T counts positions that share the weight (tokens, pixels). Nothing here knows modules or hooks.

Sources: the outer-product form for T = 1 is Goodfellow, "Efficient per-example gradient computations" (2015); the Gram
form for T > 1 is Rochette, Manoel and Tramel (2019), also Li et al., "ghost clipping" (2022).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import cache

import torch
from torch import Tensor
from torch.nn.functional import pad, unfold

from hf_clars.grad_norms.torch_internals import convolution_weight_grad

# What is made per sample (gradients, Gram matrices) exists for at most this many elements at once: 64 MiB in float32.
MAX_ELEMENTS = 1 << 24
# Below this many numbers it is the number of operations that counts.
SMALL = 1 << 15
# On CUDA a slice may take this part of the memory that is free when the first one is cut.
FREE_PART = 64
_HALF = (torch.float16, torch.bfloat16)


def at_least_float32(t: Tensor) -> Tensor:
    """Floating-point tensors in float32 or better; others as they are."""
    return t.float() if t.dtype in (torch.float16, torch.bfloat16) else t


def squared_sum(x: Tensor) -> Tensor:
    """Squared 2-norm of every sample: [B, ...] -> [B]."""
    flat = x if x.dim() == 2 else x.flatten(1) if x.dim() > 2 else x.unsqueeze(1)
    if x.numel() < SMALL:
        return torch.linalg.vecdot(flat, flat)
    return torch.linalg.vector_norm(flat, dim=1).square()  # half the time of a dot product with itself


def product(a: Tensor, b: Tensor) -> Tensor:
    """The product a @ b; of half precision on CUDA in float32, so that nothing is rounded before it is squared."""
    if not on_cuda(a) or a.dtype not in _HALF or a.dim() != 3 or torch.compiler.is_compiling():
        return a @ b
    return float_product(a, b)


def float_product(a: Tensor, b: Tensor) -> Tensor:
    """The product a @ b, accumulated and given in float32: of matrices, or of stacks [B, ...] of them."""
    if a.dtype is torch.float32 or a.device.type != "cuda":
        return a.float() @ b.float()
    return (torch.mm if a.dim() == 2 else torch.bmm)(a, b, out_dtype=torch.float32)


def on_cuda(t: Tensor) -> bool:
    """Whether a tensor is on a CUDA device, where other forms are fast than on a CPU."""
    return t.device.type == "cuda"


def outer_squared_norm(x: Tensor, g: Tensor) -> Tensor:
    """Squared norm of g x^T for every sample: x [B, in], g [B, out] -> [B]."""
    return squared_sum(x) * squared_sum(g)


def gram_squared_norm(x: Tensor, g: Tensor) -> Tensor:
    """Squared norm of sum_t g_t x_t^T for every sample, without that matrix: x [B, T, in], g [B, T, out] -> [B]."""
    return in_slices(_gram_squared_norm, x, g, elements_per_sample=2 * x.shape[1] ** 2)


def _gram_squared_norm(x: Tensor, g: Tensor) -> Tensor:
    return torch.linalg.vecdot(product(x, x.mT).flatten(1), product(g, g.mT).flatten(1))


def linear_weight_grads(x: Tensor, g: Tensor) -> Tensor:
    """Each sample's weight gradient of y = x W^T: x [B, T, in], g [B, T, out] -> [B, out, in]."""
    return product(g.mT, x)


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
    batch, out_channels = x.shape[0], kernel_shape[0]
    grads = convolution_weight_grad(
        g.reshape(1, batch * out_channels, *g.shape[2:]),
        x.reshape(1, batch * x.shape[1], *x.shape[2:]),
        (batch * out_channels, *kernel_shape[1:]),
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=batch * groups,
    )
    return grads.reshape(batch, *kernel_shape)


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
    if torch.compiler.is_compiling():  # a compiler knows no strides
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
        return _gram_squared_norm(patches, outputs).unflatten(0, (-1, groups)).sum(1)

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


def embedding_weight_squared_norm(tokens: Tensor, g: Tensor) -> Tensor:
    """Squared norm of each sample's gradient of an embedding table.

    Rows that a sample looks up several times add up before they are squared: equal tokens of a sample are summed into
    one slot, without the [B, vocabulary, width] table.

    Args:
        tokens: Row numbers [B, T].
        g: Output gradients [B, T, width].

    Returns:
        [B].
    """
    order = tokens.argsort(dim=1, stable=True)
    ordered = tokens.gather(1, order)
    changes = torch.ones_like(ordered)
    changes[:, 1:] = (ordered[:, 1:] != ordered[:, :-1]).to(changes.dtype)
    slots = changes.cumsum(1) - 1
    index = slots.unsqueeze(-1).expand_as(g)
    summed = torch.zeros_like(g).scatter_add_(1, index, g.gather(1, order.unsqueeze(-1).expand_as(g)))
    return squared_sum(summed)


def ragged_lookup_squared_norm(samples: Tensor, tokens: Tensor, g: Tensor, batch: int) -> Tensor:
    """`embedding_weight_squared_norm` of lookups that are not equally many for each sample.

    Args:
        samples: The sample of each lookup, [N].
        tokens: Its row number, [N].
        g: What it adds to its row, [N, width].
        batch: B.

    Returns:
        [B].
    """
    order = tokens.argsort()
    order = order[samples[order].argsort(stable=True)]
    samples, tokens = samples[order], tokens[order]
    slots = torch.zeros_like(samples)
    slots[1:] = ((samples[1:] != samples[:-1]) | (tokens[1:] != tokens[:-1])).cumsum(0)
    squares = squared_sum(torch.zeros_like(g).index_add_(0, slots, g[order]))
    return g.new_zeros(batch).index_add_(0, torch.zeros_like(samples).scatter_(0, slots, samples), squares)


def embedding_weight_grads(tokens: Tensor, g: Tensor, rows: int) -> Tensor:
    """Each sample's gradient of an embedding table: tokens [B, T], g [B, T, width] -> [B, rows, width]."""
    grads = g.new_zeros(g.shape[0], rows, g.shape[2])
    return grads.scatter_add_(1, tokens.unsqueeze(-1).expand_as(g), g)


def in_slices(norms_of: Callable[..., Tensor], *tensors: Tensor, elements_per_sample: int) -> Tensor:
    """`norms_of(*tensors)` over slices of the batch, so that at most `MAX_ELEMENTS` exist at once.

    Args:
        norms_of: Maps tensors [b, ...] to [b].
        tensors: Arguments, batch axis first.
        elements_per_sample: Size of what it makes for one sample.

    Returns:
        [B].
    """
    parts = [norms_of(*part) for part in slices_of(*tensors, elements_per_sample=elements_per_sample)]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def slices_of(*tensors: Tensor, elements_per_sample: int) -> Iterator[tuple[Tensor, ...]]:
    """Slices of the batch axis of several tensors, at most `MAX_ELEMENTS` elements each; on CUDA `_room`."""
    there = on_cuda(tensors[0]) and not torch.compiler.is_compiling()
    step = max(1, (_room(tensors[0].device) if there else MAX_ELEMENTS) // max(1, elements_per_sample))
    if tensors[0].shape[0] <= step:
        return iter([tensors])
    return zip(*(t.split(step) for t in tensors), strict=True)


@cache
def _room(device: torch.device) -> int:
    """How many numbers of float32 a slice may have on a CUDA device: a power of two, of the memory free at first."""
    free, _ = torch.cuda.mem_get_info(device)
    return 1 << max(10, (free // FREE_PART // 4).bit_length() - 1)
