"""Proof that the batch is a call's first axis, where shapes leave it open.

A layer of a time-first block takes [T, B, width]. When T happens to equal B, its first axis looks like the batch, and
norms of time steps would pass for norms of samples. So where another axis could be the batch too, a gradient that
starts from one sample of the model's output is followed, once: if it arrives at one place of that other axis, and at
more than the sample's place of the first, the batch is there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from hf_clars.grad_norms.errors import WITHOUT_SAMPLES, BatchAxisError
from hf_clars.grad_norms.hooked_modules import HookedModule


@dataclass(frozen=True, eq=False)
class OpenCall:
    """A call whose first axis has the batch's length, and perhaps not by right.

    Attributes:
        hooked: The module.
        edge: Where its output comes from in the graph.
        shape: Of its output.
    """

    hooked: HookedModule
    edge: GradientEdge
    shape: tuple[int, ...]


def is_open(output: Tensor, batch_size: int) -> bool:
    """Whether the batch could as well be in an axis between the first and the last."""
    return output.dim() > 2 and batch_size > 1 and any(n and n % batch_size == 0 for n in output.shape[1:-1])


def check_batch_axis(outputs: Sequence[Tensor], calls: Sequence[OpenCall], batch_size: int) -> None:
    """Raise if the batch of a call is in another axis than the first.

    Looked at for the first, a middle and the last sample. Where samples are coupled, a gradient arrives everywhere and
    tells nothing: such calls are taken for what they look like.

    Args:
        outputs: What the model returned.
        calls: The calls to look at.
        batch_size: Samples in the pass.

    Raises:
        BatchAxisError: Naming the module and its shape.
    """
    outputs = [t for t in outputs if t.dim() and t.shape[0] == batch_size and not t.is_meta]
    if not outputs:
        return
    samples = sorted({0, batch_size // 2, batch_size - 1})
    try:
        arrived = [_arrivals(outputs, calls, sample) for sample in samples]
    except RuntimeError:  # a graph that can be differentiated only once: compiled, or recomputed in the backward pass
        return
    for call, *grads in zip(calls, *arrived, strict=True):
        if all(_only(g, 0, s, batch_size) for g, s in zip(grads, samples, strict=True)):
            continue
        for axis in range(1, len(call.shape) - 1):
            if all(_only(g, axis, s, batch_size) for g, s in zip(grads, samples, strict=True)):
                raise BatchAxisError(
                    f"{call.hooked} returns {call.shape}: its first axis is as long as the batch of {batch_size} "
                    f"samples, but the samples are along axis {axis}. Put the batch first there (batch_first=True in "
                    "torch's recurrent and attention modules), use a batch of another size than that axis, freeze its "
                    f"parameters, or {WITHOUT_SAMPLES}."
                )


def _arrivals(outputs: list[Tensor], calls: Sequence[OpenCall], sample: int) -> tuple[Tensor | None, ...]:
    starts = [torch.zeros_like(t) for t in outputs]
    for start in starts:
        start[sample].normal_()
    return torch.autograd.grad(outputs, [c.edge for c in calls], starts, retain_graph=True, allow_unused=True)


def _only(g: Tensor | None, axis: int, sample: int, batch_size: int) -> bool:
    """Whether a gradient is zero but for one sample, if an axis (or what is folded into it) is the batch."""
    if g is None:
        return True
    if g.shape[axis] % batch_size:
        return False
    touched = g.movedim(axis, 0).flatten(1).ne(0).any(1)
    elsewhere = torch.arange(batch_size, device=g.device) != sample
    folded = (touched.unflatten(0, (batch_size, -1)).any(1), touched.unflatten(0, (-1, batch_size)).any(0))
    return any(not bool((places & elsewhere).any()) for places in folded)
