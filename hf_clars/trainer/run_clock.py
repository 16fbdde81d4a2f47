"""What a run has done before it was resumed, so that its figures at the end are of the whole run."""

from __future__ import annotations

import time
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

SPEEDS = ("train_runtime", "train_samples_per_second", "train_steps_per_second")


class RunClockCallback(TrainerCallback, ExportableState):
    """Count a run's seconds of training, over its resumes: they are part of each checkpoint's `trainer_state.json`."""

    def __init__(self) -> None:
        self.began_at = 0
        self._before: float | None = 0.0  # None: the checkpoint does not say
        self._start = time.monotonic()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Begin, or go on where the checkpoint was taken."""
        self.began_at, self._start = state.global_step, time.monotonic()
        stored: Any = state.stateful_callbacks.get(type(self).__name__, {})
        attributes = stored.get("attributes", {}) if isinstance(stored, dict) else {}
        self._before = attributes.get("seconds") if self.began_at else 0.0
        state.stateful_callbacks[type(self).__name__] = self.state()  # Trainer asks for it, also after old checkpoints

    def state(self) -> dict[str, Any]:
        """The seconds so far, for a checkpoint."""
        seconds = None if self._before is None else self._before + time.monotonic() - self._start
        return {"args": {}, "attributes": {"seconds": seconds}}

    def complete(self, logs: dict[str, float], state: TrainerState, batch: int) -> None:
        """Make the figures at the end of training those of the whole run.

        Without this they are of the part since the resume. What cannot be known, as after a checkpoint of the plain
        Trainer, stays so, or is left out where that part had no step.

        Args:
            logs: What Trainer logs last; changed in place.
            state: Trainer's, with the log so far.
            batch: Samples of one step.
        """
        steps = state.global_step
        if not self.began_at or not steps:
            return
        now = steps - self.began_at
        logs["train_loss"] = (_summed_loss(state.log_history, self.began_at) + logs["train_loss"] * now) / steps
        if self._before is not None:
            seconds = self._before + logs["train_runtime"]
            logs["train_runtime"] = round(seconds, 4)
            logs["train_samples_per_second"] = round(steps * batch / max(seconds, 1e-9), 3)
            logs["train_steps_per_second"] = round(steps / max(seconds, 1e-9), 3)
        elif not now:
            for name in SPEEDS:
                logs.pop(name, None)


def _summed_loss(history: list[dict[str, Any]], until: int) -> float:
    """The sum over steps of what was logged as means between two logs; each checkpoint has a log of its own step."""
    total, last, mean = 0.0, 0, 0.0
    for entry in history:
        if "loss" in entry and last < entry["step"] <= until:
            mean = entry["loss"]
            total += mean * (entry["step"] - last)
            last = entry["step"]
    return total + mean * (until - last)
