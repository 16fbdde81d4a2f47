"""How fast the study's loop is beside a bare PyTorch loop with the same model, data and optimizer arithmetic."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import cycle

import torch
from torch import Tensor
from torch.nn import functional

from hf_clars.bench.timing import Ratio, alternate, ratio
from research.study.images import MemoryImages
from research.study.loop import Training, training_batches
from research.study.settings import RunSettings


def bare_update(model: torch.nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor, size: int) -> None:
    """One update of a loop as one would write it: passes over tensors that are normalised already.

    Args:
        model: To train.
        optimizer: Of its parameters.
        x: float32 [B, C, H, W].
        y: [B].
        size: Samples a pass.
    """
    optimizer.zero_grad()
    for images, labels in zip(x.split(size), y.split(size), strict=True):
        (functional.cross_entropy(model(images).logits, labels) * (len(labels) / len(y))).backward()
    optimizer.step()


def speed_against_bare_loop(settings: RunSettings, images: MemoryImages, *, rounds: int) -> Ratio:
    """Speed of the study's loop for mNAG, as a share of a bare loop's with torch's Nesterov SGD; updates in turn.

    The bare loop is given its images as normalised floats; the study's loop shuffles, gathers and normalises them, sets
    the rate by its schedule, and measures layer norms for the log.

    Args:
        settings: Of a run; its method is not used.
        images: Of the run.
        rounds: Updates that are timed of each.

    Returns:
        Bare seconds over the study's: 1 is as fast.
    """
    device = images.train.labels.device
    own = Training.prepare(settings.replace(method="nag", eta=None, method_kwargs={}), images, device)
    bare = Training.prepare(settings.replace(method="nag", eta=None, method_kwargs={}), images, device)
    bare.optimizer.remove_hooks()  # type: ignore[attr-defined]
    sgd = torch.optim.SGD(bare.model.parameters(), lr=settings.rate, momentum=settings.momentum, nesterov=True)
    x, y = images.train.batch(torch.arange(settings.batch_size, device=device))
    batches: Iterator[int] = cycle(range(images.train_size // settings.batch_size))
    source = training_batches(settings, images, 0)

    def study_update() -> None:
        nonlocal source
        step = next(batches)
        if step == 0:
            source = training_batches(settings, images, 0)
        own.update(step, next(source))

    steps = {
        "bare": lambda: bare_update(bare.model, sgd, x, y, settings.pass_size),
        "study": study_update,
    }
    seconds = alternate(steps, rounds, warmup=2, label="speed")
    return ratio(seconds["bare"], seconds["study"])
