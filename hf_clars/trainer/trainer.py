"""`ClarsTrainer`: transformers' Trainer with layer-wise rates, a right loss scale, and a record of both."""

from __future__ import annotations

import time
from collections.abc import Sized
from typing import Any

import torch
from torch import Tensor, nn

from hf_clars.errors import ConfigError
from hf_clars.optim import METHODS, LayerwiseOptimizer, method_of
from hf_clars.optim.freeze import head_layer_names
from hf_clars.trainer.arguments import ClarsTrainingArguments
from hf_clars.trainer.callbacks import FreezeHeadCallback, LayerRateCallback, LogAtCheckpointCallback
from hf_clars.trainer.console import print_lines
from hf_clars.trainer.epochs import EpochCallback
from hf_clars.trainer.launch_checks import allow_missing_embeddings, check_launch, check_prepared
from hf_clars.trainer.live_view import LayerReportCallback, rate_summary, reporters_of
from hf_clars.trainer.loss_scale import count_all_items, count_items
from hf_clars.trainer.nonfinite import NonFiniteCallback
from hf_clars.trainer.optimizers import build_optimizer, layerwise, step_schedule
from hf_clars.trainer.sharing import SharingTrainer


class ClarsTrainer(SharingTrainer):
    """Train with CLARS, LARS or mNAG as `ClarsTrainingArguments` say.

    Differences from `Trainer`: the optimizer is created here (also where DeepSpeed would otherwise put AdamW); the loss
    is one mean over the accumulated batch for every head; `warmup_epochs`, `lr_step_epochs` and `freeze_head_epochs`
    are honoured; layer rates are logged; logs carry `images_per_second`; checkpoints hold no pickle; `push_to_hub`
    uploads the finished run's files and nothing else.

    Args:
        model: The model, not wrapped.
        args: The arguments.
        kwargs: Everything else that `Trainer` takes. `optimizers=(optimizer, scheduler)` wins over `method`, except
            under DeepSpeed, which drops it without a word and is refused here.

    Raises:
        ConfigError: For arguments of another type, or an optimizer that the launcher would replace.
    """

    args: ClarsTrainingArguments

    def __init__(self, model: nn.Module, args: ClarsTrainingArguments, **kwargs: Any) -> None:
        if not isinstance(args, ClarsTrainingArguments):
            raise ConfigError(
                f"ClarsTrainer needs ClarsTrainingArguments, not {type(args).__name__}: they take every argument of "
                "TrainingArguments and resolve batch size, rate and schedule."
            )
        super().__init__(model, args, **kwargs)
        check_launch(self)
        if self.is_fsdp_enabled:
            allow_missing_embeddings(model)
        # The loss is a mean over the accumulated batch by compute_loss below: nothing is left to divide.
        self.loss_is_scaled_for_ga = True
        self._batch_items: Tensor | None = None
        self._finite_loss: Tensor | None = None
        self._speed = (time.perf_counter(), 0)
        self._step_scheduler: Any = None
        self.on_save_error = args.on_save_error
        self.add_callback(EpochCallback())
        self.add_callback(LogAtCheckpointCallback())
        self.add_callback(NonFiniteCallback(args.nonfinite))
        if args.log_layer_rates:
            self.add_callback(LayerRateCallback(self.run_settings(), on_save_error=args.on_save_error))
        print_lines(self)
        if args.layer_report_steps != 0 and (reporters := reporters_of(self)):
            self.add_callback(LayerReportCallback(reporters, args.layer_report_steps))

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
        trained = self.model if model is None else model
        assert trained is not None
        optimizer = build_optimizer(trained, self.args)
        if self.args.freeze_head_epochs:
            self._freeze_head(trained, optimizer)
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
            (inputs of each pass, None): no model is asked to divide by the number of items.
        """
        if self.state.global_step >= self.state.max_steps:
            return [], None  # resumed after its last step: Trainer would take one more
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        items = count_all_items(batches, device)
        self._batch_items = self.accelerator.reduce(items, reduction="sum")
        return batches, None

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The pass's share of the mean loss over the accumulated batch; in evaluation, the pass's own mean.

        Args:
            model: The model, wrapped or not.
            inputs: Its inputs.
            return_outputs: Return (loss, outputs).
            num_items_in_batch: Not used: the model's own mean is weighted instead.

        Returns:
            The loss, a scalar, or (loss, outputs).
        """
        training = model.training and torch.is_grad_enabled() and self._batch_items is not None
        items = count_items(inputs) if training else None
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True)
        if items is not None:
            # Data parallelism averages gradients over processes, so each gives its share times their number.
            share = items.to(loss.device) * self.accelerator.num_processes / self._batch_items
            loss = loss * share.to(loss.dtype)
        return (loss, outputs) if return_outputs else loss

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """One pass. Where its loss is not finite, and so the step will not be taken, the last finite one is logged.

        Trainer's running sum would be NaN from there on; the step itself is reported by `NonFiniteCallback`.

        Args:
            model: As `Trainer` passes it.
            inputs: Likewise.
            num_items_in_batch: Likewise.

        Returns:
            The loss to log, 0-dim; found without waiting for the device.
        """
        loss = super().training_step(model, inputs, num_items_in_batch)
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
        super().log(logs, start_time)

    def run_settings(self) -> dict[str, Any]:
        """What defines this run's rates, as plain values: for the layer-rate log, the summary and the card."""
        args = self.args
        given = layerwise(self.optimizer)
        settings: dict[str, Any] = {
            "method": args.method if given is None else method_of(given),
            "global_batch": args.total_batch_size,
            "micro_batch": args.train_batch_size,
            "accumulation": args.gradient_accumulation_steps,
            "processes": args.world_size,
            "gamma_scale": args.learning_rate,
            "eta": args.eta,
            "momentum": args.momentum,
            "weight_decay": args.weight_decay,
            "schedule": self._schedule_in_words(),
            "warmup_epochs": args.warmup_epochs,
            "epochs": args.num_train_epochs,
            "precision": "bf16" if args.bf16 else "fp16" if args.fp16 else "fp32",
            "seed": args.seed,
        }
        if METHODS[args.method].measures_samples:
            all_samples = args.norm_samples == 0 or args.norm_samples >= args.total_batch_size
            settings["norm_samples"] = "every sample" if all_samples else args.norm_samples
            settings["norm"] = "rms" if args.method == "signal_lars" else args.norm
        if args.method == "signal_lars":
            settings["signal_n"] = args.signal_n
        if args.freeze_head_epochs:
            settings["freeze_head_epochs"] = args.freeze_head_epochs
        return settings

    def _schedule_in_words(self) -> str:
        args = self.args
        if args.lr_step_epochs:
            return f"times {args.lr_step_factor} at epochs {', '.join(f'{e:g}' for e in args.lr_step_epochs)}"
        name = getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)
        given = args.lr_scheduler_kwargs if isinstance(args.lr_scheduler_kwargs, dict) else {}
        details = ", ".join(f"{key} {value}" for key, value in given.items())
        return f"{name} ({details})" if details else str(name)
