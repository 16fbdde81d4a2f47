"""Callbacks of `ClarsTrainer`; they work with the plain Trainer too."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_clars.extras import MissingExtraError
from hf_clars.grad_norms.choice import form_choices
from hf_clars.optim import LayerMeasures, LayerwiseOptimizer
from hf_clars.optim.freeze import set_frozen
from hf_clars.records import LayerRateLog, RecordError, checkpoints
from hf_clars.trainer.optimizers import layerwise

PICTURE = "layer_rates.png"

logger = logging.getLogger(__name__)


class LayerRateCallback(TrainerCallback):
    """Keep the layer-rate log of a run, and draw it at the end.

    Writes `layer_rates/` into the output folder while training goes on, and `layer_rates.safetensors`,
    `layer_rates.png` and the interactive `layer_rates.html` when it ends. Values stay on the device until the log
    flushes.

    Args:
        settings: What a reader of the log should know of the run; JSON-able. Or a function that tells it when training
            begins, as in a search over settings.
        flush_every: Steps between two pieces of the log. Default 50.
        optimizer: The layer-wise optimizer; None: found in what Trainer passes to callbacks.
        on_save_error: When the log cannot be written, `"stop"` (default), or `"continue"`: steps stay in memory, 20
            or 28 bytes a layer each, until it can.
    """

    def __init__(
        self,
        settings: dict[str, Any] | Callable[[], dict[str, Any]] | None = None,
        *,
        flush_every: int = 50,
        optimizer: LayerwiseOptimizer | None = None,
        on_save_error: str = "stop",
    ) -> None:
        self.on_save_error = on_save_error
        self.settings = settings or {}
        self.folder: Path | None = None  # None: the output folder of the arguments
        self.flush_every = flush_every
        self._given = self._optimizer = optimizer
        self._log: LayerRateLog | None = None
        self._last: LayerMeasures | None = None
        self._layers = 0
        self._said = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Begin the log, or continue that of the run that is resumed."""
        self._optimizer, self._log = self._given or layerwise(kwargs.get("optimizer")), None
        if self._optimizer is None or not state.is_world_process_zero:
            return
        self._last = self._optimizer.last_step  # that of a training before
        names, folder = self._optimizer.layer_names, self.folder or Path(str(args.output_dir))
        self._layers = len(names)
        goes_on = state.global_step > 0 or bool(args.resume_from_checkpoint)
        if goes_on and LayerRateLog.is_in(folder):
            self._log = LayerRateLog.resume(folder, state.global_step, layers=names, flush_every=self.flush_every)
            return
        self._make_room(folder)
        settings = self.settings if isinstance(self.settings, dict) else self.settings()
        signal = self._optimizer.measures_signal
        self._log = LayerRateLog.create(
            folder, layers=names, settings=settings, signal=signal, flush_every=self.flush_every
        )

    def _make_room(self, folder: Path) -> None:
        """A run that begins anew where another was: what cannot be resumed is of no use, the rest is kept aside."""
        if checkpoints.newest_checkpoint(folder) is None:
            LayerRateLog.discard(folder)
        kept = LayerRateLog.set_aside(folder)
        if kept is not None:
            logger.warning("The layer-rate log of the run before is %s now; this run begins its own.", kept)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Log the step that was just taken; a skipped step has none."""
        if self._log is None or self._optimizer is None or self._optimizer.last_step is self._last:
            return
        self._last = self._optimizer.last_step
        if self._last is not None:
            try:
                self._log.append(state.global_step, self._of_logged_layers(self._last.stacked()))
            except RecordError as error:  # the step itself is in memory
                self._not_written(error)
        self._flush_before_save(control)

    def _of_logged_layers(self, values: Tensor) -> Tensor:
        """[5, K] of the layers that trained when the log began; those that were unfrozen since come after them."""
        assert self._optimizer is not None
        later = self._optimizer.layer_names[self._layers :]
        if later and not self._said:
            self._said = True
            logger.warning("The layer-rate log began without layers that were frozen then: %s.", ", ".join(later))
        return values[:, : self._layers]

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The log is on disk before a checkpoint at the epoch's end is."""
        self._flush_before_save(control)

    def _flush_before_save(self, control: TrainerControl) -> None:
        """A checkpoint never is ahead of the log: a run that is killed right after it resumes without a gap."""
        if control.should_save:
            try:
                self.flush()
            except RecordError as error:
                self._not_written(error)

    def flush(self) -> None:
        """Write what is in memory.

        Raises:
            RecordError: It could not be written, and stays in memory.
        """
        if self._log is not None:
            self._log.flush()

    def _not_written(self, error: RecordError) -> None:
        if self.on_save_error == "stop":
            raise error
        logger.warning("%s Training goes on (on_save_error=continue).", error)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Merge the log into one file and draw it: a picture, and a page for the browser.

        What cannot be drawn is a warning: the model of a run of days is still to be saved.
        """
        if self._log is None:
            return
        log, self._log = self._log, None
        try:
            log.close()
        except RecordError as error:
            self._not_written(error)
            return
        try:  # matplotlib is an extra: training needs none, its end draws if it is there
            from hf_clars.plots import Run
            from hf_clars.plots.products import RATES, draw_run
        except MissingExtraError as error:
            logger.warning("Not drawn: %s", error)
            return

        folder = self.folder or Path(str(args.output_dir))
        run = Run(folder.resolve().name, log, state.log_history)
        for product in draw_run(run, folder, pictures=[RATES], page=True):
            if product.problem is not None and not product.missing:
                logger.warning("Not drawn: %s", product.problem)


class LogAtCheckpointCallback(TrainerCallback):
    """Log at each checkpoint too: the loss that Trainer has summed since its last log is in no checkpoint."""

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Before the checkpoint of a step."""
        control.should_log = control.should_log or control.should_save

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Before the checkpoint of an epoch."""
        control.should_log = control.should_log or control.should_save


class HooksCallback(TrainerCallback):
    """Let the optimizer's hooks work from the begin of a step to its last backward pass, and at no other time.

    So evaluation, prediction and other callbacks meet a model without hooks, and nothing of theirs is measured.

    Args:
        attach: Place hooks again that the end of the training before has taken off. Default True; False for an
            optimizer that the user made, whose hooks are the user's.
    """

    def __init__(self, attach: bool = True) -> None:
        self.attach = attach

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """Place the hooks, if they are not in place; the first step is still to come."""
        optimizer = layerwise(kwargs.get("optimizer"))
        if optimizer is not None:
            if self.attach and model is not None:
                optimizer.attach_hooks(model)
            optimizer.pause_hooks()

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Forward and backward passes follow."""
        if (optimizer := layerwise(kwargs.get("optimizer"))) is not None:
            optimizer.pause_hooks(False)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """All backward passes of the step are done."""
        if (optimizer := layerwise(kwargs.get("optimizer"))) is not None:
            optimizer.pause_hooks()


class SharedFormsCallback(TrainerCallback):
    """On GPUs all processes take rank 0's forms of the layers' norms, as training begins and after the first step."""

    def __init__(self) -> None:
        self._due = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """What rank 0 knows from a checkpoint or from its disk."""
        self._due = torch.cuda.is_available()
        if self._due:
            form_choices.share()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """What rank 0 measured."""
        if self._due:
            form_choices.share()
            self._due = False


class FreezeHeadCallback(TrainerCallback):
    """FC freeze (Gotmare et al., 2018): hold some layers for the first epochs, then let them train.

    Args:
        epochs: For how long.
        names: The layers.
    """

    def __init__(self, epochs: float, names: list[str]) -> None:
        self.epochs = epochs
        self.names = names

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Hold or release, by the epoch that this step belongs to."""
        optimizer = layerwise(kwargs.get("optimizer"))
        if optimizer is not None:
            set_frozen(optimizer, self.names, (state.epoch or 0.0) < self.epochs)
