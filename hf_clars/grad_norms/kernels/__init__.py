"""Triton kernels for CUDA devices: weight gradients and every sample's squared norm out of the same pass over memory.

Each is a pure function on tensors; `reference.py` has the same functions in plain torch, which are the tests' truth.
The kernels use no atomics, so results repeat bit for bit. Operands stay in the precision that the module computed in;
products accumulate in float32, and gradients and norms come out in float32.
"""

from __future__ import annotations

import os
from functools import cache

import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"


@cache
def installed() -> bool:
    """Whether Triton can be imported."""
    try:
        import triton  # noqa: F401
    except ImportError:
        return False
    return True


@cache
def _capability(index: int | None) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


def usable_on(device: torch.device) -> bool:
    """Whether the kernels run on this device: CUDA with bfloat16 (Ampere or newer), or Triton's interpreter."""
    if device.type != "cuda":
        return INTERPRETED and installed()
    return installed() and torch.version.hip is None and _capability(device.index) >= (8, 0)


def has_tensor_copies(device: torch.device) -> bool:
    """Whether the device copies tiles by descriptors (TMA: Hopper or newer); the interpreter has them too."""
    return INTERPRETED if device.type != "cuda" else _capability(device.index) >= (9, 0)
