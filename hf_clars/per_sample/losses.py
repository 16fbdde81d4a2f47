"""The loss of each sample, from what a model returns: exact, or refused by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from hf_clars.errors import DataError, HfClarsError, name_list

IGNORED = -100  # labels that transformers' losses leave out

LossesOf = Callable[[nn.Module, Mapping[str, Any]], Tensor]
"""Takes the model and a batch; returns each sample's own loss, [B], with its graph."""


class UnknownLossError(HfClarsError, ValueError):
    """The loss of each sample cannot be told from what the model returns."""


def sample_losses(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """Cross-entropy of each sample, checked against the model's own loss.

    For logits [B, classes] and labels [B] that of the sample; for logits [B, T, vocabulary] and labels [B, T] the mean
    over the sample's own tokens whose label is not -100. Labels are shifted by one for causal language models.

    Args:
        model: A model of transformers, or one that returns `logits` and `loss` as they do.
        batch: What to call it with, `labels` included.

    Returns:
        [B].

    Raises:
        DataError: If the model cannot be called with the batch.
        UnknownLossError: If the model computes another loss than that.
    """
    labels = batch.get("labels")
    logits = own = None
    if isinstance(labels, Tensor) and not labels.is_floating_point():
        outputs = _called(model, batch)
        logits, own = _entry(outputs, "logits"), _entry(outputs, "loss")
    if not isinstance(labels, Tensor) or logits is None:
        raise UnknownLossError(
            f"{type(model).__name__}: its batches need whole-numbered `labels` and its outputs `logits` for each "
            "sample's cross-entropy. For another loss give losses=, a function of model and batch that returns [B]."
        )
    causal = _is_causal(model, logits, labels)
    found, weights = _cross_entropies(logits, labels, shifted=causal)
    if own is None or own.dim() or not weights.any():
        return found
    fits = _is_mean(own, found, weights)
    if not causal and labels.dim() == 2 and logits.dim() == 3 and labels.shape[1] > 1:
        # The name does not say whether position t predicts token t + 1. The loss does.
        others = _cross_entropies(logits, labels, shifted=True)
        if _is_mean(own, *others) != fits:
            return found if fits else others[0]
        fits = False  # neither, or both
    if not fits:
        raise UnknownLossError(
            f"{type(model).__name__} has the loss {own.item():.5g} on a batch whose mean cross-entropy is "
            f"{float(_mean(found, weights)):.5g}: it smooths labels, weighs classes or computes something else, or "
            "nothing tells whether it shifts labels. Give losses=, a function of model and batch that returns each "
            "sample's own loss, [B]."
        )
    return found


def _called(model: nn.Module, batch: Mapping[str, Any]) -> Any:
    """What a model returns; what its code says of a batch that it cannot take is no sentence for users."""
    try:
        return model(**batch)
    except HfClarsError:
        raise
    except (TypeError, ValueError, IndexError, KeyError, AttributeError) as error:
        raise DataError(
            f"{type(model).__name__} cannot be called with the batch's {name_list(list(batch))} "
            f"({type(error).__name__}: {error}): give a data set of what it takes, or a collate= that makes it."
        ) from error


def _mean(losses: Tensor, weights: Tensor) -> Tensor:
    return (losses.detach().double() * weights).sum() / weights.sum().clamp(min=1)


def _is_mean(own: Tensor, losses: Tensor, weights: Tensor) -> bool:
    """Whether a loss is the mean of samples' losses, as near as its precision lets it be."""
    near = 2e-2 if own.dtype in (torch.float16, torch.bfloat16) else 1e-4
    return bool(torch.isclose(_mean(losses, weights), own.detach().double(), rtol=near, atol=1e-5))


def _cross_entropies(logits: Tensor, labels: Tensor, *, shifted: bool) -> tuple[Tensor, Tensor]:
    """Each sample's mean cross-entropy, [B], and the number of labels that it is the mean of."""
    if shifted:
        logits, labels = logits[:, :-1], labels[:, 1:]
    if logits.dim() != labels.dim() + 1 or logits.shape[:-1] != labels.shape:
        raise UnknownLossError(
            f"Logits of shape {tuple(logits.shape)} do not belong to labels of shape {tuple(labels.shape)}: give "
            "losses=, a function of model and batch that returns each sample's own loss, [B]."
        )
    flat = cross_entropy(
        logits.reshape(-1, logits.shape[-1]).float(), labels.reshape(-1), reduction="none", ignore_index=IGNORED
    )
    counts = (labels != IGNORED).reshape(len(labels), -1).sum(1)
    return flat.reshape(len(labels), -1).sum(1) / counts.clamp(min=1), counts


def _is_causal(model: nn.Module, logits: Tensor, labels: Tensor) -> bool:
    """Whether position t predicts token t + 1."""
    wrapped: Any = model
    inner = wrapped.get_base_model() if hasattr(model, "get_base_model") else model  # a PEFT model's
    name = type(inner).__name__
    return labels.dim() == 2 and logits.dim() == 3 and ("CausalLM" in name or "LMHead" in name)


def _entry(outputs: Any, name: str) -> Tensor | None:
    found = outputs.get(name) if isinstance(outputs, Mapping) else getattr(outputs, name, None)
    return found if isinstance(found, Tensor) else None
