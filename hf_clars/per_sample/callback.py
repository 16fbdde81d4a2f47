"""`PerSampleNormsCallback`: exact per-sample gradient norms in any `transformers.Trainer`, with any optimizer."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import wraps
from pathlib import Path
from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_clars.distributed import is_zeros
from hf_clars.errors import HfClarsError
from hf_clars.layers import LayerMode, ParamLayer
from hf_clars.per_sample.closing import closing_words
from hf_clars.per_sample.gradient import GradientProbe
from hf_clars.per_sample.indexing import INDEX_COLUMN, IndexTaker
from hf_clars.per_sample.monitor import NormMonitor
from hf_clars.per_sample.reporting import Reporter, layer_values, model_values
from hf_clars.per_sample.setup import any_process, check_settings
from hf_clars.per_sample.spikes import Spike
from hf_clars.per_sample.window import Hard

logger = logging.getLogger(__name__)

KEPT = "hf_clars.proven_calls"
"""In a checkpoint's `trainer_state.json`, beside the states of callbacks: what `NormMonitor(proven=...)` takes."""


def _harmless(hook: Callable[..., None]) -> Callable[..., None]:
    """An error in a hook of ours ends the measuring, and not the training, unless it is strict."""

    @wraps(hook)
    def run(self: PerSampleNormsCallback, *args: Any, **kwargs: Any) -> None:
        try:
            hook(self, *args, **kwargs)
        except Exception as error:
            if self.strict:
                raise
            self._fail(error)

    return run


class PerSampleNormsCallback(TrainerCallback):
    """Measure every N-th training step: noise scale, norm quantiles, hardest examples, spikes.

    ::

        Trainer(model, args, train_dataset=dataset, callbacks=[PerSampleNormsCallback(every=50)])

    It attaches before the first step, is off the model between measured ones, and leaves no hook at the end. Gradients,
    random numbers and the optimizer are left alone. In the output folder it keeps `per_sample_norms/` (see
    `PerSampleLog`; `windows.jsonl` and `spikes.jsonl` beside it), which `hf-clars plot` draws. Trainer's own log gets
    the model's values, and tensorboard, trackio and wandb, where `report_to` names them, those of each layer too. A few
    lines at the end say on which side of the noise scale the batch is, and which examples were the hardest.

    To have the hardest examples by their index in the data set, train on `with_index(dataset)` and set
    `remove_unused_columns=False`; the column is taken out of the batch before the model sees it. TRL's collators drop
    it: `trainer.data_collator = keep_index(trainer.data_collator)`.

    Args:
        every: Steps between two measured ones; the first is measured too. Default 50.
        top_k: How many examples with the largest gradient norms to name in each window (between two logs of Trainer).
            Default 20; 0: none.
        noise_scale: Read the batch gradient too: noise scale, share of signal, R_k. Default True.
        strict: An error of the measuring ends the training. Default False: it is reported once, and measuring ends.
        decay: How much of the noise scale's averages a measured step keeps. Default 0.9.
        layers: `"module"` (default), `"tensor"`, or a partition. Parts that are frozen at first and thaw on the way
            need `param_layers(model, frozen=True)`.
        norm_layers_only: The cheap mode: measure the normalisation layers only. Default False.
        index_column: Column of the batch with the data set's indices. Default `"sample_index"`.
        keep_log: Keep `per_sample_norms/` in the output folder. Default True.

    Attributes:
        monitor: The `NormMonitor` at work, or the last one; None before training.

    Raises:
        ConfigError: For settings out of range.
    """

    def __init__(
        self,
        *,
        every: int = 50,
        top_k: int = 20,
        noise_scale: bool = True,
        strict: bool = False,
        decay: float = 0.9,
        layers: LayerMode | Sequence[ParamLayer] = "module",
        norm_layers_only: bool = False,
        index_column: str = INDEX_COLUMN,
        keep_log: bool = True,
    ) -> None:
        check_settings(every=every, top_k=top_k, decay=decay, flush_every=1, layers=layers, index_column=index_column)
        self.strict = strict
        self.keep_log = keep_log
        self._with_gradient = noise_scale
        self._settings: dict[str, Any] = {
            "every": every,
            "top_k": top_k,
            "noise_scale": noise_scale,
            "decay": decay,
            "layers": layers,
            "norm_layers_only": norm_layers_only,
            "index_column": index_column,
            "strict": strict,
        }
        self.monitor: NormMonitor | None = None
        self._taker: IndexTaker | None = None
        self._probe: GradientProbe | None = None
        self._reporter: Reporter | None = None
        self._begun = False
        self._told = False
        self._loss_scale = 1.0
        self._hardest: list[Hard] = []

    # ---- begin and end ---------------------------------------------------------------------------------------

    @_harmless
    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Look at the model, and begin or continue the log."""
        self._close()
        self._begun, self.monitor, self._told, self._hardest = True, None, False, []
        self._begin(args, state, kwargs)

    def _begin(self, args: TrainingArguments, state: TrainerState, given: dict[str, Any]) -> None:
        model: nn.Module | None = given.get("model")
        if model is None:
            return
        folder = Path(str(args.output_dir)) if self.keep_log else None
        try:
            _check_engine(args, model, self._with_gradient)
            self._reporter = Reporter(args, state, folder)
            self.monitor = NormMonitor(
                model,
                folder=folder,
                first_step=state.global_step,
                window_began=int(max((entry["step"] for entry in state.log_history if "loss" in entry), default=0)),
                proven=_kept_by(state).get(KEPT),
                on_spike=self._on_spike,
                optimizer=given.get("optimizer"),
                run=state,
                **self._settings,
            )
        except Exception as error:
            if self.strict:
                raise
            self._fail(error)
        if any_process(self.monitor is None, args.device):
            if self.monitor is not None:
                self.monitor.close()  # all take part in the sums, or none
                self.monitor = None
            # The data set has the column all the same, and the model does not know it.
            self._taker = IndexTaker(model, self._settings["index_column"], lambda _: None)

    @_harmless
    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take everything off the model, write what is left, and say what was found."""
        try:
            self._end_window(state)
            if self.monitor is not None and state.is_world_process_zero:
                folder = Path(str(args.output_dir)) if self.keep_log else None
                if words := closing_words(self.monitor, self._hardest, folder):
                    print(f"\n{words}", flush=True)  # a progress bar may stand in this line
        finally:
            self._close()

    def _close(self) -> None:
        self._drop_probe()
        if self.monitor is not None:
            self.monitor.close()
        if self._taker is not None:
            self._taker.remove()
            self._taker = None
        if self._reporter is not None:
            self._reporter.close()
            self._reporter = None

    def _drop_probe(self) -> None:
        if self._probe is not None:
            self._probe.remove()
            self._probe = None

    def _fail(self, error: Exception) -> None:
        if self.monitor is not None:
            self.monitor.end(error)
            return
        logger.warning("Per-sample norms are not measured, and training goes on. %s: %s", type(error).__name__, error)

    # ---- steps -----------------------------------------------------------------------------------------------

    @_harmless
    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Before the first micro-batch of a step."""
        if not self._begun:  # added while the training was under way
            self._begun = True
            logger.warning(
                "PerSampleNormsCallback was added after training began: its log begins at step %d.",
                state.global_step + 1,
            )
            self._begin(args, state, kwargs)
        monitor = self.monitor
        if monitor is None:
            return
        monitor.step = state.global_step
        monitor.begin()
        if not monitor.measures_now:
            return
        self._loss_scale = _deepspeed_loss_scale(kwargs.get("optimizer"))
        if monitor.with_gradient and monitor.early is None and self._probe is None:
            self._probe = GradientProbe([p for layer in monitor.layers for p in layer.params])

    @_harmless
    def on_substep_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """After a micro-batch that is not the step's last."""
        if self.monitor is not None:
            self.monitor.end_pass()

    @_harmless
    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """After the last micro-batch and Trainer's clipping, before the optimizer's step."""
        monitor = self.monitor
        if monitor is None or not monitor.measures_now:
            return
        monitor.end_pass()
        scaler = getattr(kwargs.get("optimizer"), "scaler", None)
        monitor.measure(
            factor=None if self._probe is None else self._probe.factor,
            loss_scale=self._loss_scale if scaler is None else float(scaler.get_scale()),
        )
        self._drop_probe()

    @_harmless
    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """The log is on disk before a checkpoint is, so that a run that is killed resumes without a gap."""
        if self.monitor is not None and (control.should_save or control.should_evaluate):  # the best one is kept
            self.monitor.flush()
            _kept_by(state)[KEPT] = self.monitor.proven_calls()

    on_epoch_end = on_step_end

    # ---- reports ---------------------------------------------------------------------------------------------

    @_harmless
    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Add the model's values to Trainer's log of a training step, and end the window."""
        monitor = self.monitor
        if monitor is None or logs is None or "loss" not in logs or monitor.last is None:
            return
        values = model_values(monitor)
        logs.update(values)  # for the console and callbacks after this one
        if state.log_history and state.log_history[-1].get("step") == state.global_step:
            state.log_history[-1].update(values)
        if self._reporter is not None and state.is_world_process_zero:
            self._reporter.log({**values, **layer_values(monitor)}, state.global_step)
        self._end_window(state)

    def _end_window(self, state: TrainerState) -> None:
        monitor = self.monitor
        hardest = [] if monitor is None else monitor.hardest()
        if monitor is None or not hardest:
            return
        self._hardest = hardest
        if not monitor.knows_indices and not self._told:
            self._told = True
            logger.warning(
                "Batches have no column %r, so the hardest examples are named by process, micro-batch and row only: "
                "train on hf_clars.with_index(dataset), with remove_unused_columns=False, and where the collator drops "
                "the column, with trainer.data_collator = hf_clars.keep_index(trainer.data_collator).",
                self._settings["index_column"],
            )
        if self._reporter is not None and state.is_world_process_zero:
            self._reporter.keep_window(state.global_step, hardest)
        monitor.new_window()

    def _on_spike(self, spike: Spike) -> None:
        if self._reporter is not None:
            self._reporter.keep_spike(spike)


def _kept_by(state: TrainerState) -> dict[str, Any]:
    """What callbacks keep in checkpoints."""
    kept: Any = state.stateful_callbacks  # a dictionary, once Trainer has made the state
    return kept


def _deepspeed_loss_scale(optimizer: Any) -> float:
    """What DeepSpeed multiplies the losses of the step that begins with; it may choose another one as the step ends."""
    return float(getattr(getattr(optimizer, "optimizer", None), "loss_scale", 1.0))


def _check_engine(args: TrainingArguments, model: nn.Module, with_gradient: bool) -> None:
    """Refuse what would be measured wrongly."""
    deepspeed = getattr(args, "deepspeed", None) or getattr(args, "deepspeed_plugin", None)
    if deepspeed and with_gradient and not any(is_zeros(p) for p in model.parameters() if p.requires_grad):
        raise HfClarsError(
            "DeepSpeed without ZeRO steps inside backward(), before the batch gradient can be read: use ZeRO, or "
            "set noise_scale=False to have the samples' norms, the hardest examples and spikes."
        )
