"""The training loop of a study: passes accumulated to updates, no Trainer, nothing that waits for the device inside."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from hf_clars.models import build_model
from hf_clars.optim import LayerwiseOptimizer
from research.study.images import Images, Pass
from research.study.methods import Method, method_of
from research.study.rate_plan import RatePlan
from research.study.settings import RunSettings


@dataclass
class Outcome:
    """What a run came to; lists have one entry a finished epoch.

    Attributes:
        diverged_at: The update (from 0) whose loss was not finite, which ended the run; None: none.
        train_loss: Mean over the epoch's updates of the batch loss.
        eval_loss: Mean cross-entropy of the images evaluated on.
        accuracy: Share of them that is classified right.
        updates: Updates taken.
        parameters: Of the model.
        seconds: Of training alone, without evaluation.
    """

    diverged_at: int | None = None
    train_loss: list[float] = field(default_factory=list)
    eval_loss: list[float] = field(default_factory=list)
    accuracy: list[float] = field(default_factory=list)
    updates: int = 0
    parameters: int = 0
    seconds: float = 0.0


@dataclass
class Training:
    """A run's parts, ready to train."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    plan: RatePlan
    method: Method
    settings: RunSettings

    @classmethod
    def prepare(cls, settings: RunSettings, images: Images, device: torch.device) -> Training:
        """Make model and optimizer.

        Args:
            settings: Of the run.
            images: Of the run.
            device: Where to train.

        Returns:
            The parts.
        """
        method = method_of(settings)
        torch.manual_seed(settings.seed)
        model: nn.Module = build_model(
            settings.model,
            num_labels=len(images.label_names),
            label_names=images.label_names,
            image_size=settings.image_size,
            num_channels=settings.num_channels,
            model_kwargs=settings.model_kwargs,
        )
        model.to(device)
        optimizer = method.make(model, settings)
        plan = RatePlan(model, optimizer, settings, images.train_size // settings.batch_size)
        return cls(model, optimizer, plan, method, settings)

    def update(self, step: int, passes: Iterable[Pass]) -> Tensor:
        """Take one update.

        Args:
            step: From 0.
            passes: Which together are the batch.

        Returns:
            The mean loss of the batch, 0-dim, still on the device.
        """
        self.plan.before_step(step)
        self.optimizer.zero_grad()
        total: Tensor | None = None
        for x, y in self._fine(passes):
            with self.autocast(x):
                loss = functional.cross_entropy(self.model(x).logits, y) * (len(y) / self.settings.batch_size)
            loss.backward()
            total = loss.detach() if total is None else total + loss.detach()
        self.optimizer.step()
        assert total is not None
        return total

    def autocast(self, x: Tensor) -> torch.autocast:
        """The precision of a forward pass on the device of `x`."""
        return torch.autocast(x.device.type, torch.bfloat16, enabled=self.settings.precision == "bfloat16")

    def _fine(self, passes: Iterable[Pass]) -> Iterator[Pass]:
        """Split the first samples of a batch into the micro-batches that the method measures."""
        left = self.method.fine_samples
        for x, y in passes:
            if left <= 0:
                yield x, y
                continue
            fine = min(left, len(y))
            size = self.method.fine_micro_batch
            yield from zip(x[:fine].split(size), y[:fine].split(size), strict=True)
            if fine < len(y):
                yield x[fine:], y[fine:]
            left -= fine

    @torch.no_grad()
    def evaluate(self, images: Images) -> tuple[float, float]:
        """(accuracy, mean loss) of the images that are evaluated on."""
        self.model.eval()
        count, right, loss = 0, torch.zeros(()), torch.zeros(())
        for x, y in images.evaluation_passes():
            with self.autocast(x):
                logits = self.model(x).logits.float()
            right = right.to(logits.device) + (logits.argmax(1) == y).sum()
            loss = loss.to(logits.device) + functional.cross_entropy(logits, y, reduction="sum")
            count += len(y)
        self.model.train()
        return right.item() / count, loss.item() / count


def train(
    settings: RunSettings,
    images: Images,
    *,
    device: torch.device | str = "cpu",
    observer: Callable[[Training], Any] | None = None,
) -> Outcome:
    """Train once.

    Args:
        settings: Of the run.
        images: Of the run.
        device: Where to train.
        observer: Called with the run's parts; what it returns is called with the step (from 1) after each update.

    Returns:
        The outcome. A loss that is not finite ends the run at the end of its epoch.
    """
    training = Training.prepare(settings, images, torch.device(device))
    after_update = observer(training) if observer else None
    outcome = Outcome(parameters=sum(p.numel() for p in training.model.parameters()))
    for epoch in range(settings.epochs):
        begin = time.perf_counter()
        losses = []
        for passes in training_batches(settings, images, epoch):
            losses.append(training.update(outcome.updates, passes))
            outcome.updates += 1
            if after_update is not None:
                after_update(outcome.updates)
        finite = torch.stack(losses).cpu()
        outcome.seconds += time.perf_counter() - begin
        bad = torch.nonzero(~torch.isfinite(finite))
        if len(bad):
            outcome.diverged_at = outcome.updates - len(losses) + int(bad[0])
            break
        accuracy, loss = training.evaluate(images)
        outcome.train_loss.append(finite.mean().item())
        outcome.eval_loss.append(loss)
        outcome.accuracy.append(accuracy)
    if isinstance(training.optimizer, LayerwiseOptimizer):
        training.optimizer.remove_hooks()
    return outcome


def training_batches(settings: RunSettings, images: Images, epoch: int) -> Iterator[Iterator[Pass]]:
    """The epoch's batches, each as its passes; what does not fill a batch is dropped."""
    passes = images.training_passes(settings.pass_size, seed=settings.seed, epoch=epoch)
    a_batch = settings.batch_size // settings.pass_size
    for _ in range(images.train_size // settings.batch_size):
        yield itertools.islice(passes, a_batch)
