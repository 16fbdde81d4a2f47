"""From arguments to an optimizer and a schedule."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from hf_clars.errors import ConfigError
from hf_clars.optim import CLARS, LARS, NAG, LayerwiseOptimizer, SignalLARS
from hf_clars.optim.freeze import head_layer_names
from hf_clars.optim.schedules import steps_down
from hf_clars.trainer.arguments import ClarsTrainingArguments


def build_optimizer(model: nn.Module, args: ClarsTrainingArguments) -> LayerwiseOptimizer:
    """The optimizer that the arguments describe, attached to the model.

    Args:
        model: The module as it will be called, not yet wrapped by a launcher.
        args: The run's arguments.

    Returns:
        `CLARS`, `SignalLARS`, `LARS` or `NAG`.
    """
    common: dict[str, Any] = {"momentum": args.momentum, "weight_decay": args.weight_decay, "layers": args.layers}
    rate = float(args.learning_rate or 0.0)
    if args.method == "nag":
        return NAG(model, rate, measure=args.log_layer_rates, **common)
    common |= {
        "eta": args.eta,
        "trust_clip": args.trust_clip or None,
        "scale_norm_and_bias": args.scale_norm_and_bias,
    }
    if args.method == "lars":
        return LARS(model, rate, **common)
    measure_all = args.norm_samples == 0 or args.norm_samples >= args.total_batch_size
    common |= {"samples": None if measure_all else args.norm_samples}
    if args.method == "signal_lars":
        return SignalLARS(model, rate, n=args.signal_n, **common)
    # ClarsTrainingArguments has checked these two; dataclass fields cannot be Literals for the argument parser.
    choices: dict[str, Any] = {"norm": args.norm, "estimator": args.estimator}
    return CLARS(model, rate, **choices, **common)


def layers_to_hold(args: ClarsTrainingArguments, model: nn.Module, optimizer: LayerwiseOptimizer) -> list[str]:
    """The layers that are held for the first epochs.

    Args:
        args: With `head_layers`; empty: found from the model.
        model: That is trained.
        optimizer: Its optimizer.

    Returns:
        Their names.

    Raises:
        ConfigError: `head_layers` names what is no layer.
    """
    names = args.head_layers or head_layer_names(model, optimizer)
    unknown = set(names) - set(optimizer.layer_names)
    if unknown:
        raise ConfigError(
            f"head_layers names {', '.join(sorted(unknown))}, which are no layers of this model. Its last layers "
            f"are {', '.join(optimizer.layer_names[-4:])}."
        )
    return names


def layerwise(optimizer: Any) -> LayerwiseOptimizer | None:
    """The layer-wise optimizer inside a launcher's wrappers, or None when there is none."""
    while optimizer is not None and not isinstance(optimizer, LayerwiseOptimizer):
        optimizer = getattr(optimizer, "optimizer", None)
    return optimizer


def step_schedule(
    optimizer: Optimizer, *, step_epochs: list[float], factor: float, warmup_steps: int, steps_an_epoch: float
) -> LambdaLR:
    """Constant rate multiplied by `factor` at given epochs, after an optional linear warmup.

    Args:
        optimizer: Whose groups' `lr` to move.
        step_epochs: Epochs at which to multiply, in any order.
        factor: What to multiply with.
        warmup_steps: Steps over which the rate rises from 0.
        steps_an_epoch: Optimizer steps in an epoch.

    Returns:
        The scheduler.
    """
    boundaries = sorted(epoch * steps_an_epoch for epoch in step_epochs)

    def relative_rate(step: int) -> float:
        return steps_down(step, boundaries=boundaries, factor=factor, warmup_steps=warmup_steps)

    return LambdaLR(optimizer, relative_rate)
