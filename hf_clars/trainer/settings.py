"""What a large-batch run may set beside `transformers.TrainingArguments`: names, defaults, and what `--help` says."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from transformers import TrainingArguments

from hf_clars.optim.methods import METHODS

DEFAULT_NORM_SAMPLES = 512


def _option(default: Any, help_text: str) -> Any:
    return field(default=default, metadata={"help": help_text})


@dataclass
class ClarsSettings(TrainingArguments):
    """The fields of `ClarsTrainingArguments`, which says what they mean, and resolves and checks them."""

    # transformers parses these as it parses its own: None must be allowed where None is the default.
    learning_rate: float | None = _option(  # type: ignore[assignment]
        None, "gamma_scale; empty: linear scaling gamma_base * B / base_batch_size."
    )
    lr_scheduler_type: str = _option("polynomial", "Schedule of the rate (transformers' names).")
    max_grad_norm: float = _option(0.0, "Must stay 0: clipping would change gradients after their norms were measured.")
    logging_nan_inf_filter: bool = _option(False, "Replace NaN losses in logs by the mean of others.")
    hub_strategy: str = _option("end", "Must stay end: checkpoints hold states that are not for sharing.")
    resume_from_checkpoint: str | None = _option(
        None, "true: go on from the newest checkpoint in output_dir; auto: likewise, if there is one; or its folder."
    )
    report_to: str | list[str] = field(
        default_factory=lambda: ["none"],
        metadata={"help": "Trackers: tensorboard, trackio, wandb ..., several one after the other; or none."},
    )
    method: str = field(
        default="clars", metadata={"help": f"Layer rates: {', '.join(METHODS)}.", "choices": list(METHODS)}
    )
    gamma_base: float = _option(0.1, "Rate at the base batch size.")
    base_batch_size: int = _option(128, "Batch size that gamma_base belongs to.")
    global_batch_size: int | None = _option(None, "Samples an update; sets gradient_accumulation_steps.")
    eta: float | None = _option(None, "Trust coefficient; empty: 1e-2 for clars, 1e-3 for lars.")
    signal_n: float = _option(16.0, "signal_lars: how much shorter a step of pure signal is than one of noise.")
    momentum: float = _option(0.9, "Nesterov momentum.")
    norm_samples: int = _option(DEFAULT_NORM_SAMPLES, "Samples of a batch whose gradient norms are measured; 0: all.")
    norm: str = field(default="mean", metadata={"help": "mean (Eq. 5) or rms.", "choices": ["mean", "rms"]})
    estimator: str = field(
        default="samples",
        metadata={"help": "samples, or microbatch (authors' code).", "choices": ["samples", "microbatch"]},
    )
    layers: str = field(
        default="module", metadata={"help": "What shares a rate: module or tensor.", "choices": ["module", "tensor"]}
    )
    trust_clip: float = _option(1e8, "Upper bound of ||w|| / n; 0: none.")
    scale_norm_and_bias: bool = _option(True, "Scale biases and normalisation weights too.")
    warmup_epochs: float = _option(0.0, "Epochs of gradual warmup.")
    lr_step_epochs: list[float] = field(
        default_factory=list, metadata={"help": "Epochs at which the rate is multiplied by lr_step_factor."}
    )
    lr_step_factor: float = _option(0.1, "Factor at lr_step_epochs.")
    freeze_head_epochs: float = _option(0.0, "Epochs for which the fully connected layers are held (FC freeze).")
    head_layers: list[str] = field(
        default_factory=list, metadata={"help": "Layers to hold; empty: found from the model."}
    )
    log_layer_rates: bool = _option(True, "Keep the layer-rate log and draw it.")
    layer_report_steps: int | None = _option(
        None, "Steps between reports of all layers to report_to; empty: at each log, within 1 % of the time; 0: never."
    )
    nonfinite: str = field(
        default="skip",
        metadata={
            "help": "Steps with NaN or infinity are not taken: skip (and report), or stop.",
            "choices": ["skip", "stop"],
        },
    )
    on_save_error: str = field(
        default="stop",
        metadata={
            "help": "If a checkpoint or the log cannot be written: stop or continue.",
            "choices": ["stop", "continue"],
        },
    )

    evaluate_only: bool = field(default=False, init=False)  # do_eval was given, and do_train was not
