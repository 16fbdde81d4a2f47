"""The one collective that the rates need: sums over data-parallel ranks."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor


def world_size() -> int:
    """Number of processes in the default group; 1 outside of distributed runs."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def sum_over_ranks(vector: Tensor) -> Tensor:
    """Sum a small vector over all ranks: one all-reduce, none in a single process.

    Args:
        vector: Any shape, the same on every rank.

    Returns:
        The sum; `vector` itself in a single process, otherwise a new tensor.
    """
    if world_size() == 1:
        return vector
    total = vector.clone()
    dist.all_reduce(total)
    return total
