"""One mean over the whole accumulated batch, whatever the model's head does with the number of items.

Trainer divides the loss by the number of accumulated passes for a model whose forward takes no `**kwargs`, and leaves
it to the model otherwise (passing `num_items_in_batch`). Many image heads take `**kwargs` and ignore that number: their
gradient comes out k times too large. Here no model is asked: its own mean loss is weighted by the share of the batch's
items that the pass holds, which also is exact when the last pass is smaller.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

IGNORED_LABEL = -100


def count_items(inputs: Mapping[str, Any]) -> Tensor:
    """Items that a pass's mean loss is over: labels other than -100, or samples where labels are no class numbers.

    Args:
        inputs: The model's inputs.

    Returns:
        0-dim float tensor on the labels' device, so that nothing waits for it.
    """
    labels = inputs.get("labels")
    if isinstance(labels, Tensor) and not labels.is_floating_point() and labels.dim() > 0:
        return (labels != IGNORED_LABEL).sum().float()
    first = next((t for t in inputs.values() if isinstance(t, Tensor) and t.dim() > 0), None)
    return torch.tensor(float(1 if first is None else first.shape[0]))


def count_all_items(batches: Sequence[Mapping[str, Any]], device: torch.device) -> Tensor:
    """Items of all passes of one accumulated batch, on this process."""
    return sum((count_items(b).to(device) for b in batches), torch.zeros((), device=device))
