"""What changes over a run: the global rate by step, frozen layers and layer rates by epoch."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.optim import Optimizer

from hf_clars.errors import ConfigError
from hf_clars.optim import LayerwiseOptimizer, schedules
from hf_clars.optim.freeze import head_layer_names, set_frozen
from hf_clars.optim.groups import ADAPTIVE
from research.study.settings import RunSettings


class RatePlan:
    """Sets an optimizer's groups before each step.

    Args:
        model: The model that is trained.
        optimizer: Its optimizer.
        settings: Of the run.
        steps_an_epoch: Updates in an epoch.

    Raises:
        ConfigError: If layers are to be frozen, or to lose their rates, and the optimizer has no layers.
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer, settings: RunSettings, steps_an_epoch: int) -> None:
        self.optimizer = optimizer
        self.settings = settings
        self.steps_an_epoch = steps_an_epoch
        self.head: list[str] = []
        if settings.freeze_epochs or settings.layer_rate_epochs is not None:
            if not isinstance(optimizer, LayerwiseOptimizer):
                raise ConfigError(f"freeze_epochs and layer_rate_epochs do not work with {settings.method}.")
            self.head = head_layer_names(model, optimizer)

    def before_step(self, step: int) -> None:
        """Set the groups for a step.

        Args:
            step: From 0.
        """
        rate = self.settings.rate * self.relative_rate(step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        if not isinstance(self.optimizer, LayerwiseOptimizer):
            return
        epoch = step / self.steps_an_epoch
        if self.settings.freeze_epochs:
            set_frozen(self.optimizer, self.head, epoch < self.settings.freeze_epochs)
        if self.settings.layer_rate_epochs is not None and epoch >= self.settings.layer_rate_epochs:
            for group in self.optimizer.param_groups:
                group[ADAPTIVE] = False

    def relative_rate(self, step: int) -> float:
        """The factor of gamma_scale at a step."""
        settings, an_epoch = self.settings, self.steps_an_epoch
        warmup_steps = round(settings.warmup_epochs * an_epoch)
        more: dict[str, Any] = dict(settings.schedule_kwargs)
        if settings.schedule == "polynomial":
            total = settings.epochs * an_epoch
            return schedules.polynomial(step, total_steps=total, warmup_steps=warmup_steps, **more)
        if settings.schedule == "steps":
            boundaries = sorted(epoch * an_epoch for epoch in more.pop("epochs"))
            return schedules.steps_down(step, boundaries=boundaries, warmup_steps=warmup_steps, **more)
        if settings.schedule == "tvlars":
            delay = more.pop("delay_epochs") * an_epoch
            return schedules.time_varying(step, delay_steps=delay, **more)
        return schedules.warmup(step, warmup_steps=warmup_steps)
