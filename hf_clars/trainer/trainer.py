"""`ClarsTrainer`: transformers' Trainer with layer-wise rates, a right loss scale, and a record of both.

Private name: `_replace`, of named tuples; Python documents it in spite of its name.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Sized
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback
from transformers.trainer_utils import EvalPrediction, TrainOutput

from hf_clars.errors import ConfigError
from hf_clars.grad_norms.choice import form_choices
from hf_clars.trainer.arguments import ClarsTrainingArguments
from hf_clars.trainer.callbacks import (
    FreezeHeadCallback,
    HooksCallback,
    LayerRateCallback,
    LogAtCheckpointCallback,
    SharedFormsCallback,
)
from hf_clars.trainer.console import print_lines
from hf_clars.trainer.epochs import EpochCallback
from hf_clars.trainer.launch_checks import allow_missing_embeddings, check_launch, check_prepared
from hf_clars.trainer.live_view import LayerReportCallback, rate_summary, reporters_of
from hf_clars.trainer.nonfinite import NonFiniteCallback
from hf_clars.trainer.optimizers import build_optimizer, layers_to_hold, layerwise, step_schedule
from hf_clars.trainer.resuming import FORMS
from hf_clars.trainer.run_clock import RunClockCallback
from hf_clars.trainer.run_settings import run_settings
from hf_clars.trainer.value_checks import environment_kept_if_refused
from hf_clars.trainer.weighted_losses import WeightedLosses

_NO_SMOOTHING = (
    "label_smoothing_factor={0} needs a model of transformers, with a `config`: this one computes its loss by itself, "
    "and Trainer does not know where its outputs are. Leave label_smoothing_factor out, and smooth where the loss is "
    "computed: torch's cross_entropy(..., label_smoothing={0}) in the model, or in a compute_loss_func."
)


class ClarsTrainer(WeightedLosses):
    """Train with CLARS, LARS or mNAG as `ClarsTrainingArguments` say.

    Differences from `Trainer`: the optimizer is created here (also where DeepSpeed would otherwise put AdamW); the loss
    is one mean over the accumulated batch for every head; `warmup_epochs`, `lr_step_epochs` and `freeze_head_epochs`
    are honoured; layer rates are logged; logs carry `images_per_second`; checkpoints hold no pickle; `push_to_hub`
    uploads the finished run's files and nothing else.

    Args:
        model: The model, not wrapped. Default None: `model_init` makes it.
        args: The arguments. Default None: `ClarsTrainingArguments("tmp_trainer")`, as `Trainer` has it.
        data_collator: As in `Trainer`, like all that follow.
        train_dataset: As there.
        eval_dataset: As there.
        processing_class: As there.
        model_init: As there.
        compute_loss_func: As there.
        compute_metrics: As there.
        callbacks: As there.
        optimizers: As there; `(optimizer, scheduler)` wins over `method`, except under DeepSpeed, which drops it
            without a word and is refused here.
        optimizer_cls_and_kwargs: As there.
        preprocess_logits_for_metrics: As there.
        kwargs: For a trainer class that is mixed in.

    Raises:
        ConfigError: For arguments of another type, an optimizer that the launcher would replace, or label smoothing of
            a module without a `config`.
    """

    args: ClarsTrainingArguments

    def __init__(
        self,
        model: nn.Module | None = None,
        args: ClarsTrainingArguments | None = None,
        data_collator: Callable[[list[Any]], dict[str, Any]] | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        model_init: Callable[..., Any] | None = None,
        compute_loss_func: Callable[..., Any] | None = None,
        compute_metrics: Callable[[EvalPrediction], dict[str, Any]] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, Any] = (None, None),
        optimizer_cls_and_kwargs: tuple[type[torch.optim.Optimizer], dict[str, Any]] | None = None,
        preprocess_logits_for_metrics: Callable[[Tensor, Tensor], Tensor] | None = None,
        **kwargs: Any,
    ) -> None:
        args = ClarsTrainingArguments("tmp_trainer") if args is None else args
        if not isinstance(args, ClarsTrainingArguments):
            raise ConfigError(
                f"ClarsTrainer needs ClarsTrainingArguments, not {type(args).__name__}: they take every argument of "
                "TrainingArguments and resolve batch size, rate and schedule."
            )
        given = {
            "data_collator": data_collator,
            "train_dataset": train_dataset,
            "eval_dataset": eval_dataset,
            "processing_class": processing_class,
            "model_init": model_init,
            "compute_loss_func": compute_loss_func,
            "compute_metrics": compute_metrics,
            "callbacks": callbacks,
            "optimizers": optimizers,
            "optimizer_cls_and_kwargs": optimizer_cls_and_kwargs,
            "preprocess_logits_for_metrics": preprocess_logits_for_metrics,
        }
        # A class that is mixed in may know fewer words than Trainer: it gets those that were given.
        given = {name: value for name, value in given.items() if value is not None}
        with environment_kept_if_refused():
            try:
                super().__init__(model, args, **given, **kwargs)
            except AttributeError as error:
                if args.label_smoothing_factor and "no attribute 'config'" in str(error):
                    raise ConfigError(_NO_SMOOTHING.format(args.label_smoothing_factor)) from error
                raise
            check_launch(self, args)
        if self.is_fsdp_enabled:
            assert isinstance(self.model, nn.Module)
            allow_missing_embeddings(self.model)
        self._speed = (time.perf_counter(), 0)
        self._step_scheduler: Any = None
        self.on_save_error = args.on_save_error
        self._optimizer_is_the_users = self.optimizer is not None
        self.add_callback(HooksCallback(attach=not self._optimizer_is_the_users))
        self.add_callback(SharedFormsCallback())
        self.add_callback(EpochCallback())
        self._clock = RunClockCallback()
        self.add_callback(self._clock)
        self.add_callback(LogAtCheckpointCallback())
        self.add_callback(NonFiniteCallback(args.nonfinite))
        if args.log_layer_rates:
            self.add_callback(LayerRateCallback(self.run_settings, on_save_error=args.on_save_error))
        if len(inspect.signature(self.log).parameters) == 1:  # overridden as before transformers 4.47
            setattr(self, "log", partial(_without_start_time, self.log))  # noqa: B010 - mypy knows a method here
        print_lines(self)
        if args.layer_report_steps != 0 and (reporters := reporters_of(self)):
            self.add_callback(LayerReportCallback(reporters, args.layer_report_steps))

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        """As `SafeCheckpoints.train`. The model has no hooks of ours afterwards, however training ended.

        Args:
            resume_from_checkpoint: As there.
            trial: As there.
            ignore_keys_for_eval: As there.

        Returns:
            As there.

        Raises:
            CheckpointMisfitError: As there.
            RecordError: As there.
        """
        self._finite_loss = None
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, LayerRateCallback):
                callback.folder = self.run_folder(trial)
        try:
            output = super().train(resume_from_checkpoint, trial, ignore_keys_for_eval)
            return output._replace(training_loss=output.metrics.get("train_loss", output.training_loss))
        finally:
            if (optimizer := layerwise(self.optimizer)) is not None:
                optimizer.pause_hooks(False)
                if not self._optimizer_is_the_users:
                    optimizer.remove_hooks()

    # ---- optimizer and schedule ----------------------------------------------------------------------------------

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The optimizer of the arguments, once, on the unwrapped model.

        Args:
            model: The model whose parameters are trained; None: the trainer's.

        Returns:
            The optimizer.
        """
        if self.optimizer is not None or self.optimizer_cls_and_kwargs is not None:
            return super().create_optimizer() if model is None else super().create_optimizer(model)
        self.args.follow_trial()
        trained = self.model if model is None else model
        assert trained is not None
        optimizer = build_optimizer(trained, self.args)
        if self.args.freeze_head_epochs:
            try:
                held = FreezeHeadCallback(self.args.freeze_head_epochs, layers_to_hold(self.args, trained, optimizer))
            except ConfigError:
                optimizer.remove_hooks()
                raise
            self.pop_callback(FreezeHeadCallback)  # of a training before
            self.add_callback(held)
        self.optimizer = optimizer
        return optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> Any:
        """The schedule of the arguments.

        Args:
            num_training_steps: Optimizer steps of the whole run.
            optimizer: Whose rate to move; None: the trainer's.

        Returns:
            The scheduler.
        """
        steps_an_epoch = num_training_steps / max(float(self.args.num_train_epochs), 1e-12)
        if self.args.warmup_epochs:
            self.args.warmup_steps = round(self.args.warmup_epochs * steps_an_epoch)
        check_prepared(self, self.args)
        # DeepSpeed's wrapper lacks what schedulers look for; ours, inside all wrappers, is the one whose rate counts.
        inner = layerwise(self.optimizer if optimizer is None else optimizer)
        if inner is not None:
            if self.is_deepspeed_enabled:
                inner.attach_engine(self.accelerator.deepspeed_engine_wrapped.engine)
            optimizer = inner
        if not self.args.lr_step_epochs:
            return super().create_scheduler(num_training_steps, optimizer)
        if self.lr_scheduler is None or self.lr_scheduler is self._step_scheduler:
            scheduled = self.optimizer if optimizer is None else optimizer
            assert scheduled is not None
            self.lr_scheduler = self._step_scheduler = step_schedule(
                scheduled,
                step_epochs=self.args.lr_step_epochs,
                factor=self.args.lr_step_factor,
                warmup_steps=self.args.get_warmup_steps(num_training_steps),
                steps_an_epoch=steps_an_epoch,
            )
        return self.lr_scheduler

    # ---- resuming ------------------------------------------------------------------------------------------------

    def checkpoint_settings(self) -> dict[str, Any]:
        """What a run that resumes should have in common with this one; stored in each checkpoint."""
        size = len(self.train_dataset) if isinstance(self.train_dataset, Sized) else None
        forms = form_choices.export()
        return {**self.run_settings(), "train_samples": size, **({FORMS: forms} if forms else {})}

    def before_checkpoint(self) -> None:
        """A checkpoint is never ahead of the layer-rate log: a run killed right after it resumes without a gap."""
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, LayerRateCallback):
                callback.flush()

    # ---- records -------------------------------------------------------------------------------------------------

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add `images_per_second` (training samples since the last log) and the layers' rates to training logs.

        Args:
            logs: Values by name.
            start_time: As Trainer passes it.
        """
        if "loss" in logs:
            now, step = time.perf_counter(), self.state.global_step
            before, last = self._speed
            if step > last and last > 0:
                logs["images_per_second"] = round((step - last) * self.args.total_batch_size / (now - before), 1)
            self._speed = (now, step)
            logs |= rate_summary(self.optimizer)
        if "train_loss" in logs:
            self._clock.complete(logs, self.state, self.args.total_batch_size)
        super().log(logs, start_time)

    def run_settings(self) -> dict[str, Any]:
        """What defines this run's rates, as plain values: for the layer-rate log, the summary and the card."""
        return run_settings(self.args, layerwise(self.optimizer))


def _without_start_time(
    log: Callable[[dict[str, float]], None], logs: dict[str, float], _: float | None = None
) -> None:
    log(logs)
