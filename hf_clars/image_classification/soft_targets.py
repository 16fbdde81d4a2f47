"""The loss of mixed or smoothed labels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy


class SoftTargetLoss:
    """Cross entropy with class numbers or mixed labels: Trainer's `compute_loss_func`.

    Labels are smoothed in training only, so that losses of evaluations compare with those of other runs.

    Args:
        smoothing: Share of each label that is spread over all classes.
    """

    def __init__(self, smoothing: float = 0.0) -> None:
        self.smoothing = smoothing

    def __call__(self, outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        """Compute the loss of one pass.

        Args:
            outputs: With `logits` [B, classes].
            labels: int64 [B], or float [B, classes].
            num_items_in_batch: What to divide the sum by; None: the samples of the pass.

        Returns:
            0-dim.
        """
        smoothing = self.smoothing if torch.is_grad_enabled() else 0.0
        logits = outputs["logits"]
        if num_items_in_batch is None:
            return cross_entropy(logits, labels, label_smoothing=smoothing)
        return cross_entropy(logits, labels, label_smoothing=smoothing, reduction="sum") / num_items_in_batch
