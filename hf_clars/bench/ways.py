"""Ways to get the batch gradient and every sample's gradient norms: none at all, this package's, and one by one.

Each way does the full work in `step()`: it leaves the gradient of the mean loss in every `p.grad`, and returns squared
norms of the samples' own gradients. `hf_clars.bench.peers` has those of other libraries.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor, nn

from hf_clars.bench.networks import mean_loss
from hf_clars.grad_norms import PerSampleGradNorms

SquaredNorms = dict[str, Tensor]
"""{name of a parameter or layer: Tensor [B]}."""


class Way(ABC):
    """One way, set up for one model and one batch.

    Args:
        model: Belongs to the way from now on: it may be hooked or changed.
        x: Images [B, C, H, W], or tokens [B, T].
        y: Class numbers [B], or [B, T].
    """

    name: ClassVar[str]
    first_seconds: float = 0.0
    """What `try_way` has found that the first step takes, which learns what later ones know."""

    def __init__(self, model: nn.Module, x: Tensor, y: Tensor) -> None:
        self.model, self.x, self.y = model, x, y

    @abstractmethod
    def step(self) -> SquaredNorms:
        """Clear the gradients, run one forward and backward pass, and return the squared norms."""

    def tensors_of(self, name: str) -> tuple[str, ...]:
        """The parameters that an entry of the result is about."""
        return (name,)

    def close(self) -> None:  # noqa: B027 - most ways have nothing to do here
        """Take hooks off the model."""

    def backward(self, model: nn.Module) -> None:
        """The ordinary part of a training step: the gradient of the mean loss."""
        self.model.zero_grad(set_to_none=True)
        mean_loss(model(self.x), self.y).backward()


class Plain(Way):
    """Forward and backward pass, and no norms: what every other way is compared with."""

    name = "plain"

    def step(self) -> SquaredNorms:
        """As `Way.step`; the result is empty."""
        self.backward(self.model)
        return {}


class HfClars(Way):
    """`PerSampleGradNorms` as it comes: hooks on the unchanged model, one entry a module that owns parameters."""

    name = "hf_clars"

    def __init__(self, model: nn.Module, x: Tensor, y: Tensor) -> None:
        super().__init__(model, x, y)
        self.norms = PerSampleGradNorms(model)
        self._tensors = {layer.name: layer.param_names for layer in self.norms.layers}

    def step(self) -> SquaredNorms:
        """As `Way.step`."""
        self.backward(self.model)
        squares = {name: norms.square() for name, norms in self.norms.per_sample.items()}
        self.norms.reset()
        return squares

    def tensors_of(self, name: str) -> tuple[str, ...]:
        """As `Way.tensors_of`: all parameters of the module."""
        return self._tensors[name]

    def close(self) -> None:
        """As `Way.close`."""
        self.norms.remove()


class OneByOne(Way):
    """A backward pass for each sample alone, by autograd itself: slow, and what the norms of the others must equal.

    Only for models that do not couple the samples of a batch. It is not timed.
    """

    name = "one by one"

    def step(self) -> SquaredNorms:
        """As `Way.step`."""
        params = dict(self.model.named_parameters())
        found: dict[str, list[Tensor]] = {name: [] for name in params}
        for x, y in zip(self.x.split(1), self.y.split(1), strict=True):
            grads = torch.autograd.grad(mean_loss(self.model(x), y), list(params.values()))
            for name, grad in zip(params, grads, strict=True):
                found[name].append(grad.square().sum())
        self.backward(self.model)
        return {name: torch.stack(squares) for name, squares in found.items()}
