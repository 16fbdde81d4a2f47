"""A place of its own in the graph for what a module returned.

A hook sees the gradient that arrives at a tensor's place in the graph. That is not always the gradient of the module's
output: where one output is made from another (a hidden state, and what is pooled from it), the gradient of the first
includes what comes through the second; and the place of a view (a Linear layer's output over tokens is one) is lost
when an operation after it works in place.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def own_place(t: Tensor) -> Tensor:
    """The same values in the same memory; the gradient that arrives is that of later uses of the result alone."""
    return _OwnPlace.apply(t)


class _OwnPlace(torch.autograd.Function):
    """Identity."""

    @staticmethod
    def forward(ctx: Any, t: Tensor) -> Tensor:
        return t.detach()  # shares memory and version: a following in-place operation works, or fails, as before

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g
