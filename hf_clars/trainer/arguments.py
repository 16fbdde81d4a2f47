"""`ClarsTrainingArguments`: what a large-batch run needs beside `transformers.TrainingArguments`."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist

from hf_clars.errors import ConfigError
from hf_clars.optim.methods import METHODS
from hf_clars.trainer.settings import DEFAULT_NORM_SAMPLES, ClarsSettings
from hf_clars.trainer.value_checks import (
    check_effect,
    check_engine_is_there,
    check_given,
    check_needs,
    check_ranges,
    check_schedule,
    check_trackers,
    environment_kept_if_refused,
)


@dataclass
class ClarsTrainingArguments(ClarsSettings):
    """Arguments of `ClarsTrainer`: those of `TrainingArguments`, and these.

    Defaults that differ from `TrainingArguments`: `learning_rate` None (linear scaling), `lr_scheduler_type`
    `"polynomial"` with power 2 down to 0, `max_grad_norm` 0 (clipping would change gradients after their norms were
    measured), `logging_nan_inf_filter` False (it would wait for the device at every pass; `ClarsTrainer` does not),
    `hub_strategy` `"end"` (nothing but the finished run is shared), `weight_decay` stays 0.

    Args:
        method: `"clars"` (default), `"signal_lars"` (LARS that measures its own warmup), `"lars"` or `"nag"` (mNAG).
        learning_rate: gamma_scale. None (default): linear scaling, gamma_base * B / base_batch_size with the global
            batch size B of the run.
        gamma_base: Rate at the base batch size. Default 0.1.
        base_batch_size: Default 128.
        global_batch_size: B. Sets `gradient_accumulation_steps` to B / (samples a pass of all devices). Default None:
            B follows from `gradient_accumulation_steps`.
        eta: Trust coefficient. None (default): 1e-2 for clars and signal_lars, 1e-3 for lars.
        signal_n: For signal_lars: how much shorter a step of pure signal is than one of pure noise. Default 16.
        momentum: Default 0.9.
        norm_samples: How many samples of a batch clars and signal_lars measure; 0: all. Default 512, the paper's; a
            batch of fewer is then measured whole, but another number above the batch size is an error.
        norm: `"mean"` (default, Eq. 5) or `"rms"` (Algorithm 1).
        estimator: `"samples"` (default) or `"microbatch"` (the authors' code).
        layers: What shares a rate: `"module"` (default) or `"tensor"`.
        trust_clip: Upper bound of the trust ratio. Default 1e8; 0: none.
        scale_norm_and_bias: False trains biases and normalisation weights at the plain rate. Default True.
        warmup_epochs: Gradual warmup from 0, in epochs. Default 0.
        lr_step_epochs: If given, the rate is multiplied by `lr_step_factor` at these epochs, and `lr_scheduler_type` is
            not used (the paper's Figure 3: 60 120 150).
        lr_step_factor: Default 0.1.
        freeze_head_epochs: Hold the fully connected layers for the first epochs (FC freeze). Default 0.
        head_layers: Names of the layers to hold. Default: all Linear layers of a network with convolutions,
            otherwise the last layer.
        log_layer_rates: Keep the layer-rate log and draw it at the end. Default True.
        layer_report_steps: Optimizer steps between two reports of each layer's rate and R_k to `report_to`
            (TensorBoard, Trackio ...). None (default): at each log of the loss, within 1 % of the training time;
            0: never.
        nonfinite: What to do about a step with NaN or infinity in it, which is never taken: `"skip"` (default) counts
            and reports it, `"stop"` ends the run.
        on_save_error: When a checkpoint or the log cannot be written: `"stop"` (default) or `"continue"`.

    Raises:
        ConfigError: For settings that cannot work together; before anything is loaded or trained.
    """

    def __post_init__(self) -> None:
        """Resolve and check the settings."""
        with environment_kept_if_refused():
            self._resolve()

    def _resolve(self) -> None:
        check_ranges(self)
        check_trackers(self)
        check_engine_is_there(self)
        self._join_processes_on_cpu()
        super().__post_init__()
        if self.device.type == "cpu":
            self.dataloader_pin_memory = False  # there is nothing to pin for, and torch warns at every epoch
        self._check_values()
        if self.lr_scheduler_type == "polynomial" and self.lr_scheduler_kwargs is None:
            self.lr_scheduler_kwargs = {"power": 2.0, "lr_end": 0.0}
        self._resolve_batch()
        self._check_norm_samples()
        self._resolved: dict[str, float | None] = {}
        if self.learning_rate is None:
            self.learning_rate = self._resolved["learning_rate"] = self._scaled_rate()
        if self.eta is None:
            self.eta = self._resolved["eta"] = METHODS[self.method].eta
        check_schedule(self)

    def check_given(self, in_file: set[str], as_flags: set[str]) -> None:
        """Refuse settings that were given and would have no effect; `parse_config` calls it.

        Args:
            in_file: Names of the settings that a file gave.
            as_flags: Names of those that flags gave.

        Raises:
            ConfigError: Naming the setting and what to do.
        """
        given = in_file | as_flags
        self.evaluate_only = "do_eval" in given and self.do_eval and not self.do_train
        check_given(self, in_file, as_flags)

    def _join_processes_on_cpu(self) -> None:
        """Start the process group with `ddp_timeout`, which transformers heeds on accelerators only."""
        launched = {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys()
        engine = self.deepspeed or os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true"
        if self.use_cpu and launched and not engine and not dist.is_initialized():
            dist.init_process_group(self.ddp_backend or "gloo", timeout=timedelta(seconds=self.ddp_timeout))

    def _scaled_rate(self) -> float:
        return self.gamma_base * self.total_batch_size / self.base_batch_size

    def follow_trial(self) -> None:
        """Resolve again what follows from settings that a trial of a hyperparameter search has changed.

        Raises:
            ConfigError: `global_batch_size` was given, and is not what the trial's settings make.
        """
        if self.global_batch_size not in (None, self.total_batch_size):
            raise ConfigError(
                f"global_batch_size={self.global_batch_size} was given, but the settings now make batches of "
                f"{self.total_batch_size} samples: leave it out where per_device_train_batch_size or "
                "gradient_accumulation_steps is searched for."
            )
        if "learning_rate" in self._resolved and self.learning_rate == self._resolved["learning_rate"]:
            self.learning_rate = self._resolved["learning_rate"] = self._scaled_rate()
        if "eta" in self._resolved and self.eta == self._resolved["eta"]:
            self.eta = self._resolved["eta"] = METHODS[self.method].eta

    @property
    def total_batch_size(self) -> int:
        """B: samples of one update, over all processes and accumulated passes."""
        return self._samples_a_pass * self.gradient_accumulation_steps

    @property
    def _samples_a_pass(self) -> int:
        # With split_batches accelerate shares each loaded batch out, instead of loading one a process.
        shared_out = bool(getattr(self.accelerator_config, "split_batches", False))
        return self.train_batch_size * (1 if shared_out else self.world_size)

    def _check_values(self) -> None:
        choices = {
            "method": tuple(METHODS),
            "norm": ("mean", "rms"),
            "estimator": ("samples", "microbatch"),
            "layers": ("module", "tensor"),
            "nonfinite": ("skip", "stop"),
            "on_save_error": ("stop", "continue"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ConfigError(f"{name}={getattr(self, name)!r} is unknown: choose one of {', '.join(allowed)}.")
        check_effect(self)
        check_needs(self)
        if self.max_grad_norm:
            raise ConfigError(
                f"max_grad_norm={self.max_grad_norm} would clip the gradients after the norms that the layer rates "
                "rest on were measured. Set max_grad_norm to 0: CLARS and LARS bound each layer's step by themselves."
            )
        if self.push_to_hub and self.hub_strategy != "end":
            raise ConfigError(
                f"hub_strategy={getattr(self.hub_strategy, 'value', self.hub_strategy)} would push checkpoints with "
                "optimizer states, logs and arguments during training. Set hub_strategy to end: the finished run's "
                "model, card, layer rates and results are pushed."
            )
        if self.warmup_epochs and self.warmup_steps:
            raise ConfigError(
                f"warmup_epochs={self.warmup_epochs} and warmup_steps={self.warmup_steps} are both set: keep one."
            )

    def _resolve_batch(self) -> None:
        if self.global_batch_size is None:
            return
        a_pass = self._samples_a_pass
        steps, rest = divmod(self.global_batch_size, a_pass)
        if rest or not steps:
            near = f"The nearest that work are {steps * a_pass} and {(steps + 1) * a_pass}"
            raise ConfigError(
                f"global_batch_size={self.global_batch_size} is not a multiple of the {a_pass} samples that one pass "
                f"takes ({self.train_batch_size} a process x {self.world_size} processes). "
                f"{near if steps else f'The smallest that works is {a_pass}'}; or change per_device_train_batch_size."
            )
        given = self.gradient_accumulation_steps
        if given not in (1, steps):
            raise ConfigError(
                f"global_batch_size={self.global_batch_size} needs {steps} accumulated passes of {a_pass} samples, but "
                f"gradient_accumulation_steps={given} is set: leave one of the two out."
            )
        self.gradient_accumulation_steps = steps

    def _check_norm_samples(self) -> None:
        if self.norm_samples not in (0, DEFAULT_NORM_SAMPLES) and self.norm_samples > self.total_batch_size:
            raise ConfigError(
                f"norm_samples={self.norm_samples} is larger than the batch of {self.total_batch_size} samples "
                f"({self.train_batch_size} a process x {self.world_size} processes x "
                f"{self.gradient_accumulation_steps} accumulated passes). Use 0 to measure every sample."
            )
