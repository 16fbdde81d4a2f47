"""How many tokens of each sequence a language model's mean loss counts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

IGNORED = -100
"""The label that transformers' and torch's losses leave out."""


def label_counts(model: nn.Module, kwargs: Mapping[str, Any]) -> Tensor | None:
    """Labels that are counted, for each sequence.

    Args:
        model: The model. One that predicts the next token does not count the first label.
        kwargs: What it was called with.

    Returns:
        [B], or None if there are no `labels` [B, T].
    """
    labels = kwargs.get("labels")
    if not isinstance(labels, Tensor) or labels.dim() < 2:
        return None
    loss = getattr(getattr(model, "loss_function", None), "__name__", "")
    counted = labels[:, 1:] if loss == "ForCausalLMLoss" else labels
    return (counted != IGNORED).flatten(1).sum(1)
