"""Triton kernels for CUDA devices: weight gradients and every sample's squared norm out of the same pass over memory.

`operations.py` says what there is, and is what others call. Each is a pure function on tensors; `reference.py` has
the same functions in plain torch, which are the tests' truth. The kernels use no atomics, so results repeat bit for
bit. Operands stay in the precision that the module computed in; products accumulate in float32 (not in TF32), and
gradients and norms come out in float32.

None of them has run on a device as it stands here; all have gone through Triton's compiler for one. Earlier forms have
run on an H100: linear products and Gram forms, those of convolutions without groups, BatchNorm in channels_last, row
sums. What has only ever run in Triton's interpreter: groups and depthwise convolutions, norms of the first samples
only, GroupNorm, BatchNorm in other memory formats, the input's gradient of RMSNorm, tiles of float32. Nothing has run
on cards older than Hopper.
"""

from __future__ import annotations

import os
from functools import cache

import torch
from torch import Tensor

#: Below so many input channels of a group a convolution has one kernel, whose columns are (tap, channel) pairs.
FEW_CHANNELS = 16

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


def runs_kernels(t: Tensor) -> bool:
    """Whether kernels run on this tensor's device, in its precision."""
    return usable_on(t.device, t.dtype)


@torch.compiler.assume_constant_result
def usable_on(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the kernels run on this device in this precision: CUDA with tensor cores, or Triton's interpreter."""
    if dtype not in (torch.float32, torch.float16, torch.bfloat16) or not installed():
        return False
    if device.type != "cuda":
        return INTERPRETED and dtype is not torch.bfloat16  # whose bit patterns the interpreter multiplies
    oldest = (8, 0) if dtype is torch.bfloat16 else (7, 0)
    return torch.version.hip is None and _capability(device.index) >= oldest


def has_tensor_copies(device: torch.device) -> bool:
    """Whether the device copies tiles by descriptors (TMA: Hopper or newer); the interpreter has them too."""
    return INTERPRETED if device.type != "cuda" else _capability(device.index) >= (9, 0)
