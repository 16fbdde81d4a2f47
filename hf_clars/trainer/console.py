"""One line on the console for each log, in place of transformers' dict; progress bars stay whole."""

from __future__ import annotations

import time
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import TrackioCallback

_RATES = ("rate_smallest", "rate_median", "rate_largest")
_PLACED = {"loss", "learning_rate", "ratio_median", "signal_median", "images_per_second", "epoch", *_RATES}
_LEFT_OUT = {"total_flos", "grad_norm"}
"""Of a training log: what has its own place in the line, and what transformers always logs but nobody watches."""


class LogLine:
    """Turns logs into lines; knows the time since training began."""

    def __init__(self) -> None:
        self._begin: tuple[float, int] | None = None

    def begin(self, state: TrainerState) -> None:
        """Start the clock at the step that training begins or resumes from."""
        self._begin = (time.perf_counter(), state.global_step)

    def line(self, logs: Mapping[str, Any], state: TrainerState) -> str:
        """Return the line of one log.

        Args:
            logs: Name and value, as Trainer's `on_log` gets them.
            state: Of the run.

        Returns:
            Of a training step: step, epoch, loss, rate, smallest, median and largest layer rate, R_k and s_k of the
            median layer, images per second and the time that is left; what the log lacks is left out, what it has
            besides is appended. Of an evaluation: its metrics.
        """
        total = f"/{state.max_steps:,}" if state.max_steps > 0 else ""
        where = [f"step {state.global_step:,}{total}", *_part(logs, "epoch", "epoch {:.4g}")]
        if "loss" in logs:
            return "  ".join([*where, *self._training(logs, state)])
        if any(key.startswith("eval_") for key in logs):
            return "  ".join([*where, "evaluation:", *_metrics(logs, "eval_")])
        if "train_runtime" in logs:
            seconds = timedelta(seconds=round(logs["train_runtime"]))
            speed = _part(logs, "train_samples_per_second", "{:,.0f} images/s")
            return "  ".join([*where, f"trained for {seconds}", *_part(logs, "train_loss", "mean loss {:.4g}"), *speed])
        return "  ".join([*where, *_metrics(logs, "")])

    def _training(self, logs: Mapping[str, Any], state: TrainerState) -> list[str]:
        parts = [*_part(logs, "loss", "loss {:.4g}"), *_part(logs, "learning_rate", "lr {:.4g}")]
        if all(key in logs for key in _RATES):
            parts.append("rates " + " < ".join(f"{logs[key]:.2g}" for key in _RATES))
        parts += _part(logs, "ratio_median", "R {:.2g}") + _part(logs, "signal_median", "s {:.2g}")
        parts += _metrics({key: value for key, value in logs.items() if key not in _PLACED | _LEFT_OUT}, "")
        return [*parts, *_part(logs, "images_per_second", "{:,.0f} images/s"), *self._left(state)]

    def _left(self, state: TrainerState) -> list[str]:
        if self._begin is None or state.max_steps <= 0 or state.global_step <= self._begin[1]:
            return []
        begin, first = self._begin
        a_step = (time.perf_counter() - begin) / (state.global_step - first)
        return [f"ETA {timedelta(seconds=round(a_step * (state.max_steps - state.global_step)))}"]


class LineProgressCallback(ProgressCallback):
    """transformers' progress bars, with a line above them for each log."""

    def __init__(self) -> None:
        super().__init__()
        self._lines = LogLine()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start bar and clock."""
        super().on_train_begin(args, state, control, **kwargs)
        self._lines.begin(state)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any
    ) -> None:
        """Write the line above the bar."""
        if state.is_world_process_zero and self.training_bar is not None:
            self.training_bar.write(self._lines.line(logs or {}, state))


class LinePrinterCallback(PrinterCallback):
    """The lines alone, where progress bars are switched off (`disable_tqdm`)."""

    def __init__(self) -> None:
        self._lines = LogLine()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the clock."""
        self._lines.begin(state)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any
    ) -> None:
        """Print the line."""
        if state.is_local_process_zero:
            print(self._lines.line(logs or {}, state), flush=True)


def steps_for_trackio(trainer: Trainer) -> None:
    """Put the Trackio callback that knows the optimizer step in place of transformers' own."""
    found = trainer.pop_callback(TrackioCallback)
    if type(found) is TrackioCallback:
        from hf_clars.trainer.trackio_steps import StepTrackioCallback  # Trackio is an extra

        found = StepTrackioCallback()
    if found is not None:
        trainer.add_callback(found)


def print_lines(trainer: Trainer) -> None:
    """Put this project's reporters in place of transformers' own; a subclass that somebody else added is kept."""
    for plain, lines in ((ProgressCallback, LineProgressCallback), (PrinterCallback, LinePrinterCallback)):
        found = trainer.pop_callback(plain)
        if found is not None:
            trainer.add_callback(lines() if type(found) is plain else found)
    steps_for_trackio(trainer)


def _part(logs: Mapping[str, Any], key: str, form: str) -> list[str]:
    return [form.format(logs[key])] if isinstance(logs.get(key), int | float) else []


def _metrics(logs: Mapping[str, Any], prefix: str) -> list[str]:
    """Each value beside its name without the prefix; accuracies in percent, speeds left out."""
    parts = []
    for key, value in logs.items():
        name = key.removeprefix(prefix)
        if key in ("epoch", "total_flos") or name.endswith("_per_second"):
            continue
        if not isinstance(value, int | float):
            parts.append(f"{name} {value}"[:60])
        elif name.endswith("accuracy"):
            parts.append(f"{name} {value:.2%}")
        elif name == "runtime":
            parts.append(f"in {timedelta(seconds=round(value))}")
        else:
            parts.append(f"{name} {value:.4g}")
    return parts
