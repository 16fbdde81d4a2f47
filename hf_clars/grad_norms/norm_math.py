"""Per-sample gradient norms as pure functions of activations and output gradients.

One layout throughout: `x` is a layer's input, `g` the gradient of the loss with respect to its output, both with the
batch axis B first; T counts positions that share the weight (tokens, pixels). Nothing here knows modules or hooks.

Sources: the outer-product form for T = 1 is Goodfellow, "Efficient per-example gradient computations" (2015); the Gram
form for T > 1 is Rochette, Manoel and Tramel (2019), also Li et al., "ghost clipping" (2022).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache

import torch
from torch import Tensor

from hf_clars.grad_norms.torch_traces import is_compiling

# What is made per sample (gradients, Gram matrices) exists for at most this many elements at once: 64 MiB in float32.
MAX_ELEMENTS = 1 << 24
# On a CPU for no more than this many, or two samples: 8 MiB stay in cache, and are not asked of the system each time.
CACHED_ELEMENTS = 1 << 21
# Below this many numbers it is the number of operations that counts.
SMALL = 1 << 15
# On CUDA a slice may take this part of the memory that is free when the first one is cut.
FREE_PART = 64
_HALF = (torch.float16, torch.bfloat16)


def at_least_float32(t: Tensor) -> Tensor:
    """Floating-point tensors in float32 or better; others as they are."""
    return t.float() if t.dtype in _HALF else t


def squared_sum(x: Tensor) -> Tensor:
    """Squared 2-norm of every sample: [B, ...] -> [B]."""
    x = torch.view_as_real(x.resolve_conj()) if x.is_complex() else x
    if x.dim() != 2:
        x = x.flatten(1) if x.dim() > 2 else x.unsqueeze(1)
    if x.numel() < SMALL:
        return torch.linalg.vecdot(x, x)
    return torch.linalg.vector_norm(x, dim=1).square()  # half the time of a dot product with itself


def product(a: Tensor, b: Tensor) -> Tensor:
    """The product a @ b; of half precision on CUDA in float32, so that nothing is rounded before it is squared."""
    if a.dim() != 3 or b.dim() != 3:
        return a @ b
    if on_cuda(a) and a.dtype in _HALF and not is_compiling():
        return float_product(a, b)
    return torch.bmm(a, b)  # half of what `@` takes to find that out


def float_product(a: Tensor, b: Tensor) -> Tensor:
    """The product a @ b, accumulated and given in float32: of matrices, or of stacks [B, ...] of them."""
    if a.dtype is torch.float32 or a.device.type != "cuda":
        return a.float() @ b.float()
    return (torch.mm if a.dim() == 2 else torch.bmm)(a, b, out_dtype=torch.float32)


def on_cuda(t: Tensor) -> bool:
    """Whether a tensor is on a CUDA device, where other forms are fast than on a CPU."""
    return t.is_cuda


def outer_squared_norm(x: Tensor, g: Tensor) -> Tensor:
    """Squared norm of g x^T for every sample: x [B, in], g [B, out] -> [B]."""
    return squared_sum(x) * squared_sum(g)


def gram_squared_norm(x: Tensor, g: Tensor) -> Tensor:
    """Squared norm of sum_t g_t x_t^T for every sample, without that matrix: x [B, T, in], g [B, T, out] -> [B]."""
    return in_slices(unsliced_gram_squared_norm, x, g, elements_per_sample=2 * x.shape[1] ** 2)


def unsliced_gram_squared_norm(x: Tensor, g: Tensor) -> Tensor:
    """`gram_squared_norm` of all samples at once, for who has cut slices already."""
    return torch.linalg.vecdot(product(x, x.mT).flatten(1), product(g, g.mT).flatten(1))


def linear_weight_grads(x: Tensor, g: Tensor) -> Tensor:
    """Each sample's weight gradient of y = x W^T: x [B, T, in], g [B, T, out] -> [B, out, in]."""
    return product(g.mT, x)


def linear_weight_rows(x: Tensor, g: Tensor, rows: Tensor) -> Tensor:
    """Some rows of each sample's `linear_weight_grads`, by their numbers: rows [B, S] -> [B, S, in]."""
    return g.gather(2, rows.unsqueeze(1).expand(-1, g.shape[1], -1)).mT @ x


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
    if tensors[0].shape[0] <= _samples_at_once(tensors[0], elements_per_sample):
        return norms_of(*tensors)
    return torch.cat([norms_of(*part) for part in slices_of(*tensors, elements_per_sample=elements_per_sample)])


def slices_of(*tensors: Tensor, elements_per_sample: int) -> Iterator[tuple[Tensor, ...]]:
    """Slices of the batch axis of several tensors: of `samples_at_once` each, on CUDA of as many as have `_room`."""
    step = _samples_at_once(tensors[0], elements_per_sample)
    if tensors[0].shape[0] <= step:
        return iter([tensors])
    return zip(*(t.split(step) for t in tensors), strict=True)


def _samples_at_once(t: Tensor, elements_per_sample: int) -> int:
    if is_compiling():  # each slice would be code of its own
        return max(1, MAX_ELEMENTS // max(1, elements_per_sample))
    if on_cuda(t):
        return max(1, _room(t.device) // max(1, elements_per_sample))
    return samples_at_once(elements_per_sample)


def samples_at_once(elements_per_sample: int) -> int:
    """Samples in a slice on a CPU, where each needs so many numbers."""
    each = max(1, elements_per_sample)
    return max(1, min(MAX_ELEMENTS // each, max(2, CACHED_ELEMENTS // each)))


@cache
def _room(device: torch.device) -> int:
    """How many numbers of float32 a slice may have on a CUDA device: a power of two, of the memory free at first."""
    free, _ = torch.cuda.mem_get_info(device)
    return 1 << max(10, (free // FREE_PART // 4).bit_length() - 1)
