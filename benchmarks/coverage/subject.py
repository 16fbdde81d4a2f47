"""What is swept: a model, a batch for it, and the outputs that its loss is made of."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

B = 3  # no other size in a tiny model is 3, so that no shape is right by chance


class NotRunnable(Exception):
    """The plain model does not run on a tiny batch here; the words say why."""


@dataclass
class Subject:
    """A model and a batch for it.

    Attributes:
        model: The model, in float32.
        batch: Keyword arguments of its forward; tensors have the batch first. A single key "" is given by position.
        outputs: Takes what the model returns; gives the tensors that the loss is made of, batch first.
        note: How it was made.
        samples: How many samples the batch holds.
    """

    model: nn.Module
    batch: dict[str, Any]
    outputs: Callable[[Any], list[Tensor]] = field(default=lambda out: tensors_of(out))
    note: str = ""
    samples: int = B

    def in_pass(self, number: int) -> Subject:
        """The same with the batch of a pass; that of the first is its own."""
        return replace(self, batch=moved_on(self.batch, self.samples, number - 1))

    def run(self, model: nn.Module, batch: Mapping[str, Any]) -> list[Tensor]:
        """One forward pass; random numbers are the same in each."""
        torch.manual_seed(1)
        out = model(*batch[""]) if "" in batch else model(**batch)
        found = self.outputs(out)
        for t in found:
            if t.dim() == 0 or t.shape[0] != self.samples:
                raise NotRunnable(
                    f"an output of shape {tuple(t.shape)} has not the {self.samples} samples as first axis"
                )
        return found

    def loss(self, model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
        """The batch's loss, of which the gradient is taken: the mean of `losses`."""
        return self.losses(model, batch).mean()

    def losses(self, model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
        """Every sample's loss [B]: a smooth function in which each element of the outputs counts differently."""
        total: Tensor | int = 0
        for out in self.run(model, batch):
            flat = out.flatten(1)
            flat = flat if flat.dtype == torch.float64 else flat.float()
            weights = torch.linspace(-1, 2, flat.shape[1], dtype=flat.dtype)
            total = total + (flat.sigmoid() * weights).mean(1) + (flat * weights.flip(0)).mean(1).sin()
        if not isinstance(total, Tensor):
            raise NotRunnable("returns no floating-point tensor with a gradient")
        return total


def tensors_of(out: Any) -> list[Tensor]:
    """Every floating-point tensor in what a model returns."""
    if isinstance(out, Tensor):
        return [out] if out.is_floating_point() else []
    values = out.values() if isinstance(out, Mapping) else out if isinstance(out, (list, tuple)) else ()
    return [t for value in values for t in tensors_of(value)]


def stir(model: nn.Module) -> None:
    """Move every parameter a little, so that nothing is zero because it was initialised to zero; drop nothing."""
    for module in model.modules():
        for name in ("p", "drop_prob", "drop_p"):
            if "drop" in type(module).__name__.lower() and isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in model.parameters():
            if p.is_floating_point():
                p.add_(0.05 * torch.randn(p.shape, generator=generator))


def to_float64(value: Any) -> Any:
    """The batch in float64."""
    if isinstance(value, Tensor):
        return value.double() if value.is_floating_point() else value
    if isinstance(value, dict):
        return {k: to_float64(v) for k, v in value.items()}
    return type(value)(to_float64(v) for v in value) if isinstance(value, (list, tuple)) else value


def moved_on(value: Any, samples: int, places: int) -> Any:
    """The batch of another pass: each sample some places further, and its numbers smaller."""
    if isinstance(value, Tensor):
        rows = value.shape[0] // samples if value.dim() and value.shape[0] % samples == 0 else 0
        moved = value.roll(rows * places, 0) if rows else value
        return moved * 0.9**places if value.is_floating_point() else moved
    if isinstance(value, dict):
        return {k: moved_on(v, samples, places) for k, v in value.items()}
    return type(value)(moved_on(v, samples, places) for v in value) if isinstance(value, (list, tuple)) else value


def other_sample(value: Any, samples: int) -> Any:
    """The batch with the last sample in the second place too."""
    if isinstance(value, Tensor):
        if value.dim() == 0 or value.shape[0] != samples or samples == 1:
            return value
        changed = value.detach().clone()
        changed[1] = 0.9 * value[-1] if value.is_floating_point() else value[-1]
        return changed
    if isinstance(value, dict):
        return {k: other_sample(v, samples) for k, v in value.items()}
    return type(value)(other_sample(v, samples) for v in value) if isinstance(value, (list, tuple)) else value
