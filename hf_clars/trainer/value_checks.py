"""What `ClarsTrainingArguments` refuses: values that cannot work, and settings that would have no effect."""

from __future__ import annotations

import difflib
import logging
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from importlib.util import find_spec
from typing import Any

import torch
from accelerate.utils import str_to_bool
from transformers import TrainingArguments, get_scheduler
from transformers.integrations import get_reporting_integration_callbacks
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from hf_clars.errors import ConfigError
from hf_clars.optim.methods import METHODS
from hf_clars.trainer.settings import ClarsSettings

logger = logging.getLogger(__name__)

ABOVE_ZERO = (
    "gamma_base",
    "base_batch_size",
    "global_batch_size",
    "lr_step_factor",
    "eta",
    "per_device_train_batch_size",
    "per_device_eval_batch_size",
    "gradient_accumulation_steps",
    "ddp_timeout",
    "dataloader_prefetch_factor",
    "eval_accumulation_steps",
)
NOT_NEGATIVE = (
    "learning_rate",
    "weight_decay",
    "warmup_epochs",
    "warmup_steps",
    "freeze_head_epochs",
    "norm_samples",
    "trust_clip",
    "layer_report_steps",
    "dataloader_num_workers",
    "eval_delay",
    "eval_steps",
    "save_total_limit",
)
OF_TRANSFORMERS = ("optim", "optim_args", "optim_target_modules", "adam_beta1", "adam_beta2", "adam_epsilon")
"""Settings of optimizers that `ClarsTrainer` never makes."""

_MEASURING = tuple(name for name, method in METHODS.items() if method.measures_samples)
_SCALED = tuple(name for name, method in METHODS.items() if method.eta is not None)
FOR_METHODS = {
    "norm_samples": _MEASURING,
    "norm": ("clars",),
    "estimator": ("clars",),
    "signal_n": ("signal_lars",),
    "eta": _SCALED,
    "trust_clip": _SCALED,
    "scale_norm_and_bias": _SCALED,
}
"""Settings that only some methods read."""


def _say(args: Any, name: str, must: str) -> ConfigError:
    return ConfigError(f"{name}={getattr(args, name)} {must}.")


def check_ranges(args: ClarsSettings) -> None:
    """Refuse numbers that no run can work with.

    Args:
        args: As they were given.

    Raises:
        ConfigError: Naming setting, value and range.
    """
    for name in (*ABOVE_ZERO, *NOT_NEGATIVE, "num_train_epochs", "max_steps", "momentum", "signal_n", "seed"):
        value = getattr(args, name)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ConfigError(f"{name}={value!r} is a {type(value).__name__}, but must be a number.")
        if not math.isfinite(value):
            raise _say(args, name, "must be finite")
        if name in ABOVE_ZERO and value <= 0:
            raise _say(args, name, "must be above 0")
        if name in NOT_NEGATIVE and value < 0:
            raise _say(args, name, "must not be negative")
    if not 0 <= args.momentum < 1:
        raise _say(args, "momentum", "must be at least 0 and below 1")
    if args.signal_n < 1:
        raise _say(args, "signal_n", "must be at least 1: a step of pure signal is so many times shorter")
    if not 0 <= args.seed < 2**32:
        raise _say(args, "seed", "must be at least 0 and below 2**32")
    if not 0 <= args.label_smoothing_factor < 1:
        raise _say(args, "label_smoothing_factor", "must be at least 0 and below 1")
    _check_length(args)


def _check_length(args: ClarsSettings) -> None:
    if args.max_steps == 0 or args.max_steps < -1:
        raise _say(args, "max_steps", "must be above 0, or -1 to count epochs instead")
    if args.max_steps < 0 and args.num_train_epochs <= 0:
        raise _say(args, "num_train_epochs", "must be above 0: nothing would be trained")
    if any(not math.isfinite(epoch) or epoch <= 0 for epoch in args.lr_step_epochs):
        raise _say(args, "lr_step_epochs", "must all be above 0: the rate changes at these epochs")
    for kind in ("save", "logging"):
        strategy, steps = getattr(args, f"{kind}_strategy"), getattr(args, f"{kind}_steps")
        if getattr(strategy, "value", strategy) == "steps" and not steps > 0:
            raise _say(args, f"{kind}_steps", f"must be above 0 with {kind}_strategy=steps")


def check_schedule(args: ClarsSettings) -> None:
    """Make the schedule once for an optimizer of one number, so that what it refuses is said before any work.

    Args:
        args: Resolved.

    Raises:
        ConfigError: With the library's own reason.
    """
    if args.lr_step_epochs:
        return
    given = args.lr_scheduler_kwargs if isinstance(args.lr_scheduler_kwargs, dict) else {}
    name = str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type))
    for key, value in given.items():
        if isinstance(value, str) and _is_number(value):
            raise ConfigError(
                f"lr_scheduler_kwargs has {key}={value!r}, which is a word and no number: write it without quotes."
            )
    rate = float(args.learning_rate or 0.0)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=rate)
    try:
        get_scheduler(name, optimizer, num_warmup_steps=0, num_training_steps=10, scheduler_specific_kwargs=dict(given))
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"lr_scheduler_kwargs={given} does not fit lr_scheduler_type={name} with learning_rate={rate:g}: "
            f"{' '.join(str(error).split())}."
        ) from error


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def check_trackers(args: ClarsSettings) -> None:
    """Refuse trackers that there are not, or whose package is missing.

    Args:
        args: With `report_to` as it was given.

    Raises:
        ConfigError: Naming the tracker.
    """
    names = args.report_to if isinstance(args.report_to, list) else [args.report_to]
    if names == ["all"] or names == ["none"]:
        return
    if "none" in names or "all" in names:
        raise ConfigError(f"report_to={names} names trackers beside none or all: keep one of the two.")
    for name in names:
        if name not in INTEGRATION_TO_CALLBACK:
            near = difflib.get_close_matches(str(name), INTEGRATION_TO_CALLBACK, n=1, cutoff=0.7)
            hint = f"Did you mean {near[0]!r}? " if near else ""
            raise ConfigError(
                f"report_to={name} is no tracker. {hint}Use none, or some of "
                f"{', '.join(sorted(INTEGRATION_TO_CALLBACK))}."
            )
        try:
            for kind in get_reporting_integration_callbacks([name]):
                kind()
        except (ImportError, RuntimeError) as error:
            raise ConfigError(
                f"report_to={name} needs a package that is not installed ({' '.join(str(error).split()).rstrip('.')}); "
                "pip install 'hf_clars[tracking]' brings TensorBoard and Trackio. Or set report_to to none."
            ) from error


def check_engine_is_there(args: ClarsSettings) -> None:
    """Refuse DeepSpeed where it is not installed, or where nothing has told it its processes.

    Args:
        args: As they were given.

    Raises:
        ConfigError: With what to do.
    """
    if not args.deepspeed and not str_to_bool(os.environ.get("ACCELERATE_USE_DEEPSPEED", "false") or "false"):
        return
    if find_spec("deepspeed") is None:
        raise ConfigError(
            "DeepSpeed was asked for, but is not installed: pip install 'hf_clars[deepspeed]', or leave it out."
        )
    if "RANK" not in os.environ and find_spec("mpi4py") is None:
        raise ConfigError(
            "DeepSpeed was asked for, but no launcher has said which processes there are: start with `accelerate "
            "launch`, torchrun or deepspeed, also for one process."
        )


def check_needs(args: ClarsSettings) -> None:
    """Refuse settings that need another one or a package that is not there, and modes that no compiler has.

    Args:
        args: Resolved.

    Raises:
        ConfigError: Naming what is missing.
    """
    if args.dataloader_persistent_workers and args.dataloader_num_workers == 0:
        raise ConfigError(
            "dataloader_persistent_workers keeps workers that there are not: set dataloader_num_workers above 0, or "
            "leave it out."
        )
    if args.use_liger_kernel and find_spec("liger_kernel") is None:
        raise ConfigError(
            "use_liger_kernel needs a package that is not installed: pip install liger-kernel, or leave it out."
        )
    if args.torch_compile_mode is not None:
        try:
            torch.compile(torch.nn.Identity(), mode=args.torch_compile_mode)
        except RuntimeError as error:
            raise ConfigError(
                f"torch_compile_mode={args.torch_compile_mode}: {' '.join(str(error).split())}."
            ) from error


@contextmanager
def environment_kept_if_refused() -> Iterator[None]:
    """Within this, a refusal takes back the environment variables that were set before it.

    transformers notes FSDP and the precision there while it reads its arguments, and the next run of the same process
    would be taken for one that asked for them.
    """
    before = dict(os.environ)
    try:
        yield
    except Exception:
        for name in set(os.environ) - set(before):
            del os.environ[name]
        os.environ.update(before)
        raise


def check_effect(args: ClarsSettings) -> None:
    """Refuse settings of transformers' optimizers, none of which is made.

    Args:
        args: Resolved.

    Raises:
        ConfigError: Naming what to set instead.
    """
    defaults = {field.name: field.default for field in fields(TrainingArguments)}
    for name in OF_TRANSFORMERS:
        value, default = getattr(args, name), defaults[name]
        if getattr(value, "value", value) != getattr(default, "value", default):
            raise _without_effect(name, getattr(value, "value", value))


def _without_effect(name: str, value: Any) -> ConfigError:
    instead = "momentum is `momentum`" if name == "adam_beta1" else "`method` chooses it"
    return ConfigError(
        f"{name}={value} would have no effect: the optimizer is one of {', '.join(METHODS)}, and {instead}. Leave "
        f"{name} out."
    )


def check_given(args: ClarsSettings, in_file: set[str], as_flags: set[str]) -> None:
    """Refuse what was given and would have no effect; see `parse_config`.

    A file may serve several methods: what it has for another method than a flag chose is told, not refused.

    Args:
        args: Resolved.
        in_file: Names of the settings that the file gave.
        as_flags: Names of those that flags gave.

    Raises:
        ConfigError: Naming the setting and what to do.
    """
    given = in_file | as_flags
    for name in OF_TRANSFORMERS:
        if name in given:
            value = getattr(args, name)
            raise _without_effect(name, getattr(value, "value", value))
    if "do_train" in given and not args.do_train and not args.evaluate_only:
        raise ConfigError(
            "do_train=False leaves nothing to do: add do_eval to measure a finished run, or leave do_train out."
        )
    if "do_predict" in given and args.do_predict:
        raise ConfigError(
            "do_predict=True would have no effect: no predictions are written. Leave it out; do_eval measures a model."
        )
    for name, methods in FOR_METHODS.items():
        if name not in given or args.method in methods:
            continue
        said = f"{name}={getattr(args, name)} has no effect with method={args.method}: {' and '.join(methods)} alone"
        if name not in as_flags and "method" in as_flags:
            logger.warning("%s read it. It is in the file, and is left aside.", said)
        else:
            raise ConfigError(f"{said} read{'s' * (len(methods) == 1)} it. Leave it out, or choose another method.")
    if "lr_step_factor" in given and not args.lr_step_epochs:
        raise ConfigError("lr_step_factor has no effect without lr_step_epochs: give the epochs, or leave it out.")
    if "head_layers" in given and not args.freeze_head_epochs:
        raise ConfigError("head_layers has no effect without freeze_head_epochs: say for how long they are held.")
    if args.lr_step_epochs and (clash := as_flags & {"lr_scheduler_type", "lr_scheduler_kwargs"}):
        raise ConfigError(
            f"{min(clash)} has no effect with lr_step_epochs, which is the schedule: keep one of the two."
        )
