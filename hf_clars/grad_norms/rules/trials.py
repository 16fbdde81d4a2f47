"""Trials of modules that are known by their names: what one makes of random numbers is compared with a formula."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def trial_numbers(device: torch.device, *shapes: Sequence[int]) -> list[Tensor]:
    """Numbers of these shapes, the same each time, in float32, whatever torch's default type and device are."""
    generator = torch.Generator("cpu").manual_seed(0)
    drawn = [torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu") for shape in shapes]
    return [t.to(device) for t in drawn]


def are_close(y: object, right: Tensor, *, rtol: float = 1e-5, atol: float = 1e-8) -> bool:
    """Whether a module's result is what a formula gives; its type may be another."""
    return isinstance(y, Tensor) and y.shape == right.shape and torch.allclose(y.float(), right.float(), rtol, atol)
