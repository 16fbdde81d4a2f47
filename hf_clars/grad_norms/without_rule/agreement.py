"""Whether two ways gave the same, at the precision in which the model ran; undecided where something is not finite."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

#: How far two sums of the same numbers may differ, relative to their size: by the precision of what was summed.
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 6e-2}


def precision_now(tensors: Sequence[Tensor]) -> torch.dtype:
    """The lowest precision that a module computes in now: autocast's, or that of its tensors.

    Args:
        tensors: Its outputs and parameters.
    """
    lowest = torch.float64
    for t in tensors:
        if t.is_floating_point() and torch.finfo(t.dtype).eps > torch.finfo(lowest).eps:
            lowest = t.dtype
    kind = tensors[0].device.type if tensors else "cpu"
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        low = torch.get_autocast_dtype(kind)
        lowest = low if torch.finfo(low).eps > torch.finfo(lowest).eps else lowest
    return lowest


def agree(found: Tensor, expected: Tensor, precision: torch.dtype) -> bool | None:
    """Whether per-sample values [B, ...] are the same for every sample, as far as the precision tells.

    A difference counts relative to the largest sample's norm: gradients that cancel leave rounding noise alone.

    Args:
        found: By one way.
        expected: By the other.
        precision: What the model computed in, see `precision_now`.

    Returns:
        None where a number is not finite: nothing can be said then, and nothing must be learned.
    """
    if found.shape != expected.shape:
        return False
    if not found.numel():
        return True
    a, b = (t.detach().float().reshape(len(t), -1) for t in (found, expected))
    difference, size = (a - b).norm(dim=1).max(), b.norm(dim=1).max()
    if not bool(difference.isfinite() & size.isfinite()):
        return None
    return bool(difference <= _TOLERANCE[precision] * size + torch.finfo(torch.float32).tiny)
