"""What defines a run's rates, as plain values."""

from __future__ import annotations

from typing import Any

from hf_clars.optim import METHODS, LayerwiseOptimizer, method_of
from hf_clars.trainer.arguments import ClarsTrainingArguments


def run_settings(args: ClarsTrainingArguments, given: LayerwiseOptimizer | None) -> dict[str, Any]:
    """The settings that the layer-rate log, the summary and the card name.

    Args:
        args: The run's arguments.
        given: Its optimizer, if it is there; it may be of another method than the arguments say.

    Returns:
        Values by name; JSON-able.
    """
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
        "schedule": schedule_in_words(args),
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


def schedule_in_words(args: ClarsTrainingArguments) -> str:
    """The schedule of the rate, for people."""
    if args.lr_step_epochs:
        return f"times {args.lr_step_factor} at epochs {', '.join(f'{e:g}' for e in args.lr_step_epochs)}"
    name = getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)
    given = args.lr_scheduler_kwargs if isinstance(args.lr_scheduler_kwargs, dict) else {}
    details = ", ".join(f"{key} {value}" for key, value in given.items())
    return f"{name} ({details})" if details else str(name)
