"""Norms of the part of each layer that this process holds: whole tensors, or the local shards of DTensors (FSDP2).

A layer's squared norm is the sum of its shards' squared norms, so every process adds up what it holds, and one
all-reduce of a K-vector does the rest. What several processes hold alike (whole tensors beside shards, the replicated
axis of a 2-D mesh) counts in parts, so that the sum over processes counts it once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from hf_clars.distributed.collectives import sum_over_ranks, world_size


@dataclass(frozen=True)
class LocalNorms:
    """Norms [K] of what this process holds of each layer.

    Attributes:
        weights: ||w_k||, or its local part.
        grads: ||g_k||, or its local part.
        partial: Whether the squares must be summed over processes; False: the norms are complete.
    """

    weights: Tensor
    grads: Tensor
    partial: bool = False


@dataclass(frozen=True)
class _Held:
    """The local part of a tensor, and how many processes hold the same part (None: whole, on all of them)."""

    tensor: Tensor
    copies: int | None


def local_norms(
    weights: Sequence[Tensor],
    weight_layers: Sequence[int],
    grads: Sequence[Tensor],
    grad_layers: Sequence[int],
    layers: int,
    *,
    flat: bool = False,
    foreach: bool = True,
) -> LocalNorms:
    """Norms of the layers' weights and gradients, as far as this process holds them.

    Args:
        weights: Tensors or DTensors of all layers; none where their norms are not asked for.
        weight_layers: Layer index of each.
        grads: Likewise; layers without gradients are absent and get 0.
        grad_layers: Layer index of each.
        layers: Number of layers K.
        flat: The tensors are this process's disjoint pieces of the layers (DeepSpeed's flat partitions).
        foreach: Take all norms in one multi-tensor operation.

    Returns:
        In float32 at least.
    """
    held_weights, held_grads = [_held(t) for t in weights], [_held(t) for t in grads]
    partial = flat or any(h.copies is not None for h in (*held_weights, *held_grads))
    whole = 1 if flat else world_size()

    def norms(held: Sequence[_Held], of_layers: Sequence[int]) -> Tensor | None:
        if not held:
            return None
        if partial:
            return _partial_per_layer(held, of_layers, layers, whole, foreach)
        return _per_layer([h.tensor for h in held], of_layers, layers, foreach)

    of_weights, of_grads = norms(held_weights, weight_layers), norms(held_grads, grad_layers)
    some = of_grads if of_weights is None else of_weights
    if some is None:
        raise ValueError("There are neither weights nor gradients to take norms of.")
    none = torch.zeros_like(some)
    return LocalNorms(
        none if of_weights is None else of_weights, none if of_grads is None else of_grads, partial=partial
    )


def whole_norms(local: LocalNorms, beside: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Norms of whole layers, and the sum over ranks of what is needed beside them: one all-reduce at most.

    Args:
        local: What each process holds.
        beside: [n], to be summed over ranks in the same all-reduce; None: nothing.

    Returns:
        (||w_k||, ||g_k||), each [K]; and the sum [n].
    """
    layers = len(local.weights)
    parts = [local.weights.square(), local.grads.square()] if local.partial else []
    if beside is not None:
        parts.append(beside.to(local.weights))
    if not parts:
        return local.weights, local.grads, None
    summed = sum_over_ranks(torch.cat(parts))
    if not local.partial:
        return local.weights, local.grads, summed
    weights, grads = summed[: 2 * layers].sqrt().split(layers)
    return weights, grads, None if beside is None else summed[2 * layers :]


def tensor_norms(tensors: Sequence[Tensor], *, foreach: bool) -> Tensor:
    """2-norms of N tensors, [N], in float32 (float64 for float64 tensors)."""
    dtype = torch.promote_types(tensors[0].dtype, torch.float32)
    if foreach:
        # Private name: torch._foreach_norm, explained in `multi_tensor_update` of hf_clars/optim/update.py.
        return torch.stack(list(torch._foreach_norm(list(tensors), 2, dtype)))
    return torch.stack([torch.linalg.vector_norm(t, dtype=dtype) for t in tensors])


@lru_cache(maxsize=512)
def on_device(numbers: tuple[int, ...], device: torch.device) -> Tensor:
    """Host numbers on the device; copied there once, not at every step."""
    return torch.tensor(numbers, device=device)


def _per_layer(tensors: Sequence[Tensor], layer: Sequence[int], layers: int, foreach: bool) -> Tensor:
    norms = tensor_norms(tensors, foreach=foreach)
    if list(layer) == list(range(layers)):
        return norms
    return norms.new_zeros(layers).index_add_(0, on_device(tuple(layer), norms.device), norms.square()).sqrt()


def _partial_per_layer(held: Sequence[_Held], layer: Sequence[int], layers: int, whole: int, foreach: bool) -> Tensor:
    norms = tensor_norms([h.tensor for h in held], foreach=foreach)
    copies = [whole if h.copies is None else h.copies for h in held]
    squares = norms.square()
    if any(count != 1 for count in copies):
        squares = squares / on_device(tuple(copies), norms.device)
    return norms.new_zeros(layers).index_add_(0, on_device(tuple(layer), norms.device), squares).sqrt()


def is_split(tensor: Any) -> bool:
    """Whether FSDP2 has split a tensor over processes. A split parameter's gradient is averaged when it arrives."""
    return hasattr(tensor, "device_mesh")


def local_part(tensor: Any) -> Tensor:
    """What this process holds of a tensor: of one that is not split, all."""
    return tensor.to_local() if is_split(tensor) else tensor


def _held(tensor: Any) -> _Held:
    """The local part of a DTensor; other tensors are whole."""
    mesh = getattr(tensor, "device_mesh", None)
    if mesh is None:
        return _Held(tensor, None)
    copies = 1
    for axis, placement in enumerate(tensor.placements):
        if placement.is_replicate():
            copies *= mesh.size(axis)
    return _Held(tensor.to_local(), copies)
