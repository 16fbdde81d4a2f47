"""`ClarsTrainer`: transformers' Trainer with layer-wise rates, a right loss scale, and a record of both."""

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
from hf_clars.optim import LayerwiseOptimizer
from hf_clars.optim.freeze import head_layer_names
from hf_clars.trainer.arguments import ClarsTrainingArguments
from hf_clars.trainer.callbacks import (
    FreezeHeadCallback,
    HooksCallback,
    LayerRateCallback,
    LogAtCheckpointCallback,
)
from hf_clars.trainer.console import print_lines
from hf_clars.trainer.epochs import EpochCallback
from hf_clars.trainer.launch_checks import allow_missing_embeddings, check_launch, check_prepared
from hf_clars.trainer.live_view import LayerReportCallback, rate_summary, reporters_of
from hf_clars.trainer.loss_scale import ItemCount, LossScale, count_items, predicts_next, with_number
from hf_clars.trainer.nonfinite import NonFiniteCallback
from hf_clars.trainer.optimizers import build_optimizer, layerwise, step_schedule
from hf_clars.trainer.run_clock import RunClockCallback
from hf_clars.trainer.run_settings import run_settings
from hf_clars.trainer.sharing import SharingTrainer


class ClarsTrainer(SharingTrainer):
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
        ConfigError: For arguments of another type, or an optimizer that the launcher would replace.
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
        self._scale = LossScale()
        self._users_scale: bool | None = None
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
        super().__init__(model, args, **{name: value for name, value in given.items() if value is not None}, **kwargs)
        check_launch(self)
        if self.is_fsdp_enabled:
            assert isinstance(self.model, nn.Module)
            allow_missing_embeddings(self.model)
        self._finite_loss: Tensor | None = None
        self._speed = (time.perf_counter(), 0)
        self._step_scheduler: Any = None
        self.on_save_error = args.on_save_error
        self._optimizer_is_the_users = self.optimizer is not None
        self.add_callback(HooksCallback(attach=not self._optimizer_is_the_users))
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
                self._freeze_head(trained, optimizer)
            except ConfigError:
                optimizer.remove_hooks()
                raise
        self.optimizer = optimizer
        return optimizer

    def _freeze_head(self, model: nn.Module, optimizer: LayerwiseOptimizer) -> None:
        names = self.args.head_layers or head_layer_names(model, optimizer)
        unknown = set(names) - set(optimizer.layer_names)
        if unknown:
            raise ConfigError(
                f"head_layers names {', '.join(sorted(unknown))}, which are no layers of this model. Its last layers "
                f"are {', '.join(optimizer.layer_names[-4:])}."
            )
        self.pop_callback(FreezeHeadCallback)  # of a training before
        self.add_callback(FreezeHeadCallback(self.args.freeze_head_epochs, names))

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
        check_prepared(self)
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

    # ---- loss ----------------------------------------------------------------------------------------------------

    def get_batch_samples(
        self, epoch_iterator: Any, num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor | int | None]:
        """Fetch the passes of one update and count their items over all processes.

        Args:
            epoch_iterator: Yields inputs.
            num_batches: Passes of this update.
            device: Where to count.

        Returns:
            (inputs of each pass, the number of items as `Trainer` counts them).
        """
        if self.state.global_step >= self.state.max_steps:
            return [], None  # resumed after its last step: Trainer would take one more
        batches, number = super().get_batch_samples(epoch_iterator, num_batches, device)
        items = sum((self._count(batch) for batch in batches), torch.zeros((), device=device))
        self._scale.begin_batch(self.accelerator.reduce(items, reduction="sum"), number)
        return batches, self._scale.number

    def _count(self, inputs: Any) -> Tensor:
        # Beside the names, Trainer's own word, which is not documented: it also knows of models of pictures and text.
        shifted = predicts_next(self.model) or getattr(self, "_loss_shifts_labels", False)
        return count_items(inputs, shifted).to(self.args.device)

    @property
    def loss_is_scaled_for_ga(self) -> bool:  # type: ignore[override]  # a plain attribute in Trainer
        """As in `Trainer`, where it can be set; if it is not, what the loss was made of tells."""
        return self._scale.scaled if self._users_scale is None else self._users_scale

    @loss_is_scaled_for_ga.setter
    def loss_is_scaled_for_ga(self, value: bool | None) -> None:
        self._users_scale = value

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The mean loss of a pass. `training_step` weights it by the pass's share of the batch, whoever computed it.

        A method that overrides this may return a mean too, or something that it has divided by `num_items_in_batch`.

        Args:
            model: The model, wrapped or not.
            inputs: Its inputs.
            return_outputs: Return (loss, outputs).
            num_items_in_batch: For `compute_loss_func`; no model is asked to divide by it.

        Returns:
            The loss, a scalar, or (loss, outputs). A share of the batch's loss where `loss_is_scaled_for_ga` is set.
        """
        function, number = self.compute_loss_func, ItemCount.of(num_items_in_batch)
        if function is not None:
            self.compute_loss_func = partial(with_number, function, number)
        try:
            loss, outputs = super().compute_loss(model, inputs, return_outputs=True)
        finally:
            self.compute_loss_func = function
        if function is None or number is None or not number.use:
            loss = self._scale.of_model(loss, self.loss_is_scaled_for_ga)
        elif self.args.average_tokens_across_devices:  # the number is that of all processes
            loss = loss * self.accelerator.num_processes
        return (loss, outputs) if return_outputs else loss

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """One pass. Where its loss is not finite, and so the step will not be taken, the last finite one is logged.

        Trainer's running sum would be NaN from there on; the step itself is reported by `NonFiniteCallback`. A pass
        without a single label adds nothing to what is logged.

        Args:
            model: As `Trainer` passes it.
            inputs: Likewise.
            num_items_in_batch: Likewise.

        Returns:
            The loss to log, 0-dim; found without waiting for the device.
        """
        items = self._count(inputs)
        with self._scale.one_pass(items, self.accelerator.num_processes) as divisor:
            self.current_gradient_accumulation_steps = divisor  # by which Trainer divides a loss that is not scaled
            loss = super().training_step(model, inputs, num_items_in_batch)
        loss = torch.where(items.to(loss.device) > 0, loss, 0.0)
        optimizer = layerwise(self.optimizer)
        if optimizer is None or not optimizer.measures_norms:
            return loss
        before = torch.zeros_like(loss) if self._finite_loss is None else self._finite_loss
        self._finite_loss = torch.where(loss.isfinite(), loss, before)
        return self._finite_loss

    # ---- resuming ------------------------------------------------------------------------------------------------

    def checkpoint_settings(self) -> dict[str, Any]:
        """What a run that resumes should have in common with this one; stored in each checkpoint."""
        size = len(self.train_dataset) if isinstance(self.train_dataset, Sized) else None
        return {**self.run_settings(), "train_samples": size}

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
