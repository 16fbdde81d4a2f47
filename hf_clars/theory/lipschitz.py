"""Estimates of L_k and L_g (Assumption 1): spectral norms of the Hessian, whole and by layer, by power iteration.

L_k of the theory holds at every w; what can be measured is ||H_kk(w)||_2 at one w, the smallest constant that would do
in its neighbourhood. That is an estimate from below twice over: another w may be worse, and power iteration approaches
the norm from below.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

from hf_clars.errors import ConfigError
from hf_clars.layers import LayerMode, param_layers
from hf_clars.theory.measuring import Loss, check_not_empty, copy_to_measure, count_rows, model_loss


@dataclass(frozen=True)
class SpectralNorm:
    """Result of one power iteration.

    Attributes:
        value: ||H||_2 from below.
        iterations: Hessian-vector products taken.
        converged: Whether the last one changed the value by less than the tolerance. A change can be small while two
            eigenvalues are close: then the value is between them.
    """

    value: float
    iterations: int
    converged: bool


@dataclass(frozen=True)
class LipschitzEstimate:
    """L_k and L_g at the present weights.

    Attributes:
        layers: L_k by layer name, in the order of `param_layers`.
        whole: L_g.
    """

    layers: dict[str, SpectralNorm]
    whole: SpectralNorm

    @property
    def converged(self) -> bool:
        """Whether all of them have."""
        return self.whole.converged and all(found.converged for found in self.layers.values())


def estimate_lipschitz(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    loss: Loss = model_loss,
    layers: LayerMode = "module",
    tolerance: float = 1e-3,
    max_iterations: int = 100,
    generator: torch.Generator | None = None,
    progress: bool = False,
) -> LipschitzEstimate:
    """Estimate L_k of every layer and L_g, at the model's present weights and in its present mode.

    Each product with the Hessian of f, the mean loss over all batches, takes one forward and two backward passes over
    them; each layer needs some 5 to 50 of those. A few hundred samples do for an estimate. Use eval mode: dropout gives
    a new function at each product, and train-mode BatchNorm another function for other batches. Attention runs in its
    plain form, since fused kernels have no second derivative.

    Args:
        model: Any twice differentiable module. Measured is a copy of it: the model itself stays as it is.
        batches: The data; read many times, so a list or a DataLoader without shuffling, not an iterator.
        loss: (model, batch) -> mean loss of the batch. Default: `model(**batch)["loss"]`.
        layers: `"module"` (default) or `"tensor"`.
        tolerance: Stop when a product changes the value by less than this share. Default 1e-3.
        max_iterations: Stop after so many products. Default 100.
        generator: Of the first vectors, on the CPU. Default: one with seed 0, so that the result can be repeated.
        progress: Show a bar over layers. Default False.

    Returns:
        The estimates, with iterations and whether they converged.

    Raises:
        ConfigError: If `tolerance` or `max_iterations` is out of range.
        DataError: If there are no samples.
    """
    if not tolerance > 0 or max_iterations < 1:
        raise ConfigError(
            f"tolerance={tolerance:g} and max_iterations={max_iterations} cannot work: give a tolerance above 0 and at "
            "least 1 iteration."
        )
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    model = copy_to_measure(model)
    partition = param_layers(model, layers=layers)
    everything = [p for layer in partition for p in layer.params]
    blocks: list[tuple[str, Sequence[nn.Parameter]]] = [(layer.name, layer.params) for layer in partition]
    found = {}
    with sdpa_kernel(SDPBackend.MATH):
        for name, params in tqdm([*blocks, ("all layers", everything)], desc="L_k", disable=not progress):
            hessian = _HessianBlock(model, batches, loss, params)
            found[name] = _power_iteration(hessian, tolerance, max_iterations, generator)
    whole = found.pop("all layers")
    return LipschitzEstimate(found, whole)


@dataclass(frozen=True)
class _HessianBlock:
    """The Hessian of the mean loss over all batches, restricted to some parameters."""

    model: nn.Module
    batches: Iterable[Any]
    loss: Loss
    params: Sequence[nn.Parameter]

    def times(self, vector: list[Tensor]) -> list[Tensor]:
        """H v, one tensor a parameter."""
        total = [torch.zeros_like(p) for p in self.params]
        samples = 0
        for batch in self.batches:
            rows = count_rows(batch)
            samples += rows
            for added, part in zip(total, self._batch_product(batch, vector), strict=True):
                added.add_(part, alpha=rows)
        check_not_empty(samples, self.batches)
        return [part / samples for part in total]

    def _batch_product(self, batch: Any, vector: list[Tensor]) -> Sequence[Tensor]:
        with torch.enable_grad():
            gradients = torch.autograd.grad(
                self.loss(self.model, batch), self.params, create_graph=True, materialize_grads=True
            )
        # A gradient that does not depend on the weights (a linear loss) has no graph to differentiate.
        curved = [(g, v) for g, v in zip(gradients, vector, strict=True) if g.requires_grad]
        if not curved:
            return [torch.zeros_like(p) for p in self.params]
        outputs, directions = zip(*curved, strict=True)
        return torch.autograd.grad(outputs, self.params, directions, materialize_grads=True)


def _power_iteration(
    hessian: _HessianBlock, tolerance: float, max_iterations: int, generator: torch.Generator
) -> SpectralNorm:
    """||H v|| for unit v grows from product to product up to ||H||_2, also when the signs of eigenvalues differ."""
    vector = [torch.randn(p.shape, generator=generator).to(p) for p in hessian.params]
    vector = _unit(vector, _norm(vector))
    value = 0.0
    for iteration in range(1, max_iterations + 1):
        product = hessian.times(vector)
        norm = _norm(product)
        if norm == 0 or abs(norm - value) <= tolerance * norm:
            return SpectralNorm(norm, iteration, True)
        value, vector = norm, _unit(product, norm)
    return SpectralNorm(value, max_iterations, False)


def _norm(vector: list[Tensor]) -> float:
    return float(torch.stack([torch.linalg.vector_norm(part.double()) for part in vector]).norm())


def _unit(vector: list[Tensor], norm: float) -> list[Tensor]:
    return [part / norm for part in vector]
