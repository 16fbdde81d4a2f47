"""What a run shows while it goes on: each layer to TensorBoard, Trackio and other reporters, a few numbers in logs."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import TensorBoardCallback, get_reporting_integration_callbacks

from hf_clars.optim import LayerMeasures, LayerwiseOptimizer
from hf_clars.records import QUANTITIES, SIGNAL_QUANTITIES
from hf_clars.trainer.optimizers import layerwise

SCALARS = ("rate", "ratio", "signal")
"""The quantities that are reported layer by layer; the others only as histograms over layers, where there are such."""

SHARE = 0.01
"""Of the training time, what reports may take unless their interval was given."""

Values = NDArray[np.float32]


def rate_summary(optimizer: Any) -> dict[str, float]:
    """Return the last step's rates and agreement in a few numbers, for Trainer's log.

    Args:
        optimizer: The layer-wise optimizer, in a launcher's wrapper or not; anything else has no summary.

    Returns:
        `rate_smallest`, `rate_median` and `rate_largest` over the layers, and `ratio_median` (R_k) and `signal_median`
        (s_k) where they are measured; only finite numbers.
    """
    found = layerwise(optimizer)
    if found is None or found.last_step is None:
        return {}
    values = on_host(found.last_step)
    found_values = {name: row[np.isfinite(row)] for name, row in values.items()}
    rate = found_values["rate"]
    summary: dict[str, float] = {}
    if len(rate):
        smallest, median, largest = float(rate.min()), float(np.median(rate)), float(rate.max())
        summary = {"rate_smallest": smallest, "rate_median": median, "rate_largest": largest}
    for name in ("ratio", "signal"):
        if len(found_values.get(name, ())):
            summary[f"{name}_median"] = float(np.median(found_values[name]))
    return summary


def on_host(measures: LayerMeasures) -> dict[str, Values]:
    """Return each quantity that a log would have as an array [K], by one copy from the device."""
    rows = measures.stacked().float().cpu().numpy()
    return dict(zip((QUANTITIES + SIGNAL_QUANTITIES)[: len(rows)], rows, strict=True))


def reporters_of(trainer: Trainer) -> list[TrainerCallback]:
    """Return the trainer's callbacks that report to TensorBoard, Trackio or what else `report_to` names."""
    kinds = (TensorBoardCallback, *get_reporting_integration_callbacks(trainer.args.report_to))
    return [callback for callback in trainer.callback_handler.callbacks if isinstance(callback, kinds)]


class LayerReportCallback(TrainerCallback):
    """Send what each layer does to the reporters of a run.

    TensorBoard gets the scalars `rate/LAYER`, `ratio/LAYER` (R_k) and `signal/LAYER` (s_k) where they are measured and,
    of all quantities, histograms over the layers of the decimal logarithm. Every other reporter gets the scalars,
    through its own `on_log`, which names them `train/rate/LAYER` and so on. A report costs one copy of [5, K] or [7, K]
    from the device and the reporters' own time. They do not enter Trainer's log history, which every checkpoint stores.

    Args:
        reporters: From `reporters_of`.
        every: Optimizer steps between two reports. None (default): at each log of the loss, but a report is left out
            while all reports so far took more than 1 % of the training time.
        optimizer: The layer-wise optimizer; None: found in what Trainer passes to callbacks.
    """

    def __init__(
        self,
        reporters: Sequence[TrainerCallback],
        every: int | None = None,
        *,
        optimizer: LayerwiseOptimizer | None = None,
    ) -> None:
        self.reporters = list(reporters)
        self.every = every
        self.seconds = 0.0
        self._latest = 0.0
        self._begin = 0.0
        self._optimizer = optimizer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Find the optimizer and start the clock."""
        self._optimizer = self._optimizer or layerwise(kwargs.get("optimizer"))
        self._begin, self.seconds, self._latest = time.perf_counter(), 0.0, 0.0

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Report at the chosen interval."""
        if self.every and state.global_step % self.every == 0:
            self._report(args, state, control, kwargs.get("model"))

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Report beside the loss, if no interval was chosen and the time allows."""
        if self.every is None and "loss" in (kwargs.get("logs") or {}) and self._affordable():
            self._report(args, state, control, kwargs.get("model"))

    def _affordable(self) -> bool:
        return self.seconds + self._latest <= SHARE * (time.perf_counter() - self._begin)

    def _report(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any) -> None:
        if self._optimizer is None or self._optimizer.last_step is None or not state.is_world_process_zero:
            return
        begin = time.perf_counter()
        values = on_host(self._optimizer.last_step)
        scalars = layer_scalars(self._optimizer.layer_names, values)
        for reporter in self.reporters:
            if isinstance(reporter, TensorBoardCallback):
                write_to_tensorboard(reporter.tb_writer, state.global_step, scalars, values)
            else:
                reporter.on_log(args, state, control, model=model, logs=dict(scalars))
        self._latest = time.perf_counter() - begin
        self.seconds += self._latest


def layer_scalars(layers: Sequence[str], values: Mapping[str, Values]) -> dict[str, float]:
    """Return the finite values of `SCALARS` as {"rate/LAYER": value, ...}."""
    return {
        f"{quantity}/{layer}": float(value)
        for quantity in SCALARS
        if quantity in values
        for layer, value in zip(layers, values[quantity], strict=True)
        if np.isfinite(value)
    }


def write_to_tensorboard(writer: Any, step: int, scalars: Mapping[str, float], values: Mapping[str, Values]) -> None:
    """Write the scalars, and a histogram over layers of each quantity.

    Args:
        writer: torch's SummaryWriter, or tensorboardX's.
        step: The optimizer step.
        scalars: Value by tag.
        values: Each quantity, [K].
    """
    try:
        from tensorboard.compat.proto.summary_pb2 import Summary
    except ImportError:  # tensorboardX alone is installed
        for tag, value in scalars.items():
            writer.add_scalar(tag, value, step)
    else:
        # All in one record: 322 calls of add_scalar (161 layers) take 70 times as long.
        summary = Summary(value=[Summary.Value(tag=tag, simple_value=value) for tag, value in scalars.items()])
        writer.file_writer.add_summary(summary, step)
    for quantity, row in values.items():
        usable = row[np.isfinite(row) & (row > 0)]
        if len(usable):
            writer.add_histogram(f"layers/log10_{quantity}", np.log10(usable), step, bins="auto")
