"""The layer-wise gradient variance factor M_k over a whole training set, exactly, after each epoch (Figure 2)."""

from __future__ import annotations

import csv
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from hf_clars.grad_norms import PerSampleGradNorms
from hf_clars.layers import BATCH_NORM_MODULES, ParamLayer, param_layers
from hf_clars.models import build_model
from hf_clars.records.files import write_complete
from research.study.images import MemoryImages, Pass
from research.study.loop import Training, train
from research.study.settings import RunSettings


def variance_factors(model: nn.Module, passes: Iterable[Pass]) -> tuple[list[ParamLayer], Tensor]:
    """M_k = mean_i ||grad_k f_i||^2 / ||mean_i grad_k f_i||^2 over all samples of the passes.

    One ordinary pass over the data: norms come from the hooks, and the denominator from the gradients that add up
    meanwhile. In train mode BatchNorm couples the samples of a pass; grad_k f_i is then what reaches the weights
    through sample i's own use of the layer, see `PerSampleGradNorms`. The model's gradients are left cleared.

    Args:
        model: In the mode to measure it in.
        passes: (images, labels) of the samples, each once.

    Returns:
        (the K layers, M [K]); infinite where the mean gradient is zero.
    """
    layers = param_layers(model)
    model.zero_grad()
    count = 0
    with PerSampleGradNorms(model, layers=layers, keep_per_sample=False) as norms:
        for x, y in passes:
            functional.cross_entropy(model(x).logits, y, reduction="sum").backward()
            count += len(y)
        totals = norms.totals()
    assert totals is not None
    squares = torch.stack([_square_of_gradient(layer) for layer in layers])
    model.zero_grad()
    return layers, count * totals.squares / squares


def _square_of_gradient(layer: ParamLayer) -> Tensor:
    grads = [p.grad for p in layer.params if p.grad is not None]
    return torch.stack([torch.linalg.vector_norm(g) for g in grads]).square().sum()


@dataclass
class VarianceHistory:
    """M_k over the epochs of a run.

    Attributes:
        layers: Names of the K layers, from input to output.
        norm_or_bias: For each, whether it is a normalisation layer.
        epochs: When it was measured, [E]; 0 is before training.
        values: M, one [K] an epoch.
        measure_seconds: What each measurement took.
        train_seconds: What an epoch of training took.
        accuracy: Test accuracy after the last epoch.
    """

    layers: list[str] = field(default_factory=list)
    norm_or_bias: list[bool] = field(default_factory=list)
    epochs: list[int] = field(default_factory=list)
    values: list[NDArray[np.float64]] = field(default_factory=list)
    measure_seconds: list[float] = field(default_factory=list)
    train_seconds: float = float("nan")
    accuracy: float = float("nan")

    def stacked(self) -> NDArray[np.float64]:
        """M [E, K]."""
        return np.stack(self.values)


LARGE_PASS = 1000
"""Samples a pass where they are not coupled, so that the size of a pass changes nothing but the time."""


class _Measure:
    """An observer of `train` that measures before training and after each epoch, on a copy of the model."""

    def __init__(self, images: MemoryImages, progress: Callable[[int], None]) -> None:
        self.images = images
        self.progress = progress
        self.history = VarianceHistory()

    def __call__(self, training: Training) -> Callable[[int], None]:
        a_epoch = self.images.train_size // training.settings.batch_size
        self._measure(training, 0)

        def after_update(step: int) -> None:
            if step % a_epoch == 0:
                self._measure(training, step // a_epoch)

        return after_update

    def _measure(self, training: Training, epoch: int) -> None:
        begin = time.perf_counter()
        # A copy, because a pass in train mode moves the running statistics of BatchNorm.
        copy = _new_model(training.settings, self.images)
        device = self.images.train.labels.device
        copy.to(device).load_state_dict(training.model.state_dict())
        everything = torch.arange(self.images.train_size, device=device)
        coupled = any(isinstance(module, BATCH_NORM_MODULES) for module in copy.modules())
        size = training.settings.batch_size if coupled else LARGE_PASS
        passes = (self.images.train.batch(part) for part in everything.split(size))
        layers, factors = variance_factors(copy.train(), passes)
        history = self.history
        history.layers = [layer.name for layer in layers]
        history.norm_or_bias = [layer.norm_or_bias for layer in layers]
        history.epochs.append(epoch)
        history.values.append(factors.double().cpu().numpy())
        history.measure_seconds.append(time.perf_counter() - begin)
        self.progress(epoch)


def _new_model(settings: RunSettings, images: MemoryImages) -> nn.Module:
    return build_model(
        settings.model,
        num_labels=len(images.label_names),
        image_size=settings.image_size,
        num_channels=settings.num_channels,
        model_kwargs=settings.model_kwargs,
    )


def measure_run(
    settings: RunSettings, images: MemoryImages, *, progress: Callable[[int], None] = lambda epoch: None
) -> VarianceHistory:
    """Train, and measure M_k of every layer over the whole training set before training and after each epoch.

    Args:
        settings: Of the run.
        images: Its images; the run is on their device.
        progress: Called after each measurement with the epoch.

    Returns:
        The history.
    """
    measure = _Measure(images, progress)
    # Weights are drawn in training's own way; drawing them again for the copies must not change the order of samples,
    # which has a generator of its own.
    outcome = train(settings, images, device=images.train.labels.device, observer=measure)
    history = measure.history
    history.train_seconds = (outcome.seconds - sum(history.measure_seconds[1:])) / max(1, len(outcome.accuracy))
    history.accuracy = outcome.accuracy[-1] if outcome.accuracy else float("nan")
    return history


def depth_correlation(history: VarianceHistory) -> float:
    """Spearman's rank correlation of M_k (geometric mean over the epochs after the first) with the layer's position.

    Args:
        history: Of a run; normalisation layers are left out.

    Returns:
        1: M_k rises from each layer to the next, from input to output; -1: it falls.
    """
    weighted = ~np.array(history.norm_or_bias)
    means = np.exp(np.log(history.stacked()[1:, weighted]).mean(0))
    ranks = means.argsort().argsort()
    return float(np.corrcoef(np.arange(len(ranks)), ranks)[0, 1])


def sentence(name: str, history: VarianceHistory) -> str:
    """Whether top layers have the larger M_k here, in one sentence.

    Args:
        name: Of the network.
        history: Of its run.

    Returns:
        The sentence.
    """
    weighted = ~np.array(history.norm_or_bias)
    means = np.exp(np.log(history.stacked()[1:, weighted]).mean(0))
    rho = depth_correlation(history)
    names = np.array(history.layers)[weighted]
    verdict = "do" if rho > 0.5 else "do not" if rho < -0.5 else "neither do nor do not clearly"
    return (
        f"{name}: top layers {verdict} have the larger M_k here: rank correlation of M_k with depth {rho:+.2f}, M_k "
        f"{means[0]:.3g} in the first layer, {means[-1]:.3g} in the last, largest ({means.max():.3g}) in "
        f"{names[means.argmax()]} (geometric means over the epochs)."
    )


def write_csv(history: VarianceHistory, path: Path) -> None:
    """One row an epoch and layer.

    Args:
        history: Of a run.
        path: The file to make or replace.
    """

    def write(temporary: Path) -> None:
        with temporary.open("w", newline="", encoding="utf-8") as file:
            rows = csv.writer(file, lineterminator="\n")
            rows.writerow(["epoch", "position", "layer", "norm_layer", "M"])
            for epoch, values in zip(history.epochs, history.values, strict=True):
                for k, (layer, norm) in enumerate(zip(history.layers, history.norm_or_bias, strict=True)):
                    rows.writerow([epoch, k, layer, int(norm), f"{values[k]:.6g}"])

    write_complete(path, write)
