"""What a launcher would do silently, said before anything is trained.

Each of these was seen to run to the end with wrong numbers and no message: an optimizer that is replaced, one process
where two were asked for, plain data parallelism where FSDP was asked for, float32 where fp16 was asked for.
"""

from __future__ import annotations

import os
from typing import Any

from accelerate.utils import DistributedType, str_to_bool
from torch import nn
from transformers import Trainer

from hf_clars.errors import ConfigError
from hf_clars.grad_norms import MicroBatchGradNorms
from hf_clars.optim import CLARS
from hf_clars.trainer.optimizers import layerwise
from hf_clars.trainer.settings import ClarsSettings

DEEPSPEED_CLIPS_AT = 1.0  # where its configuration does not say (DeepSpeed 0.19; 0 in some older versions)
ONE_BIT = ("onebit", "zerooneadam", "zenflow")


def check_launch(trainer: Trainer, args: ClarsSettings) -> None:
    """Raise where the launcher does something else than it was asked for.

    Args:
        trainer: With its accelerator created, before training.
        args: Its arguments.

    Raises:
        ConfigError: In one paragraph, with what to do.
    """
    if args.auto_find_batch_size:
        raise ConfigError(
            "auto_find_batch_size tries smaller batches when memory runs out, but the rate, the samples that are "
            "measured and the steps of a run that resumes all follow from the batch. Leave it out: set "
            "global_batch_size, and lower per_device_train_batch_size until it fits; the passes are accumulated."
        )
    if args.gradient_checkpointing and not _can_checkpoint(trainer.model):
        raise ConfigError(
            f"gradient_checkpointing: {type(trainer.model).__name__} does not support it. Leave it out; more "
            "accumulated passes of fewer samples save memory too."
        )
    _check_processes(args)
    _check_precision(trainer, args)
    if trainer.is_deepspeed_enabled:
        _check_deepspeed(trainer, args)
    _check_fsdp(trainer, args)


def _can_checkpoint(model: Any) -> bool:
    """Whether Trainer's call will be answered; models of transformers say so, others have the method or not."""
    return hasattr(model, "gradient_checkpointing_enable") and getattr(model, "supports_gradient_checkpointing", True)


def _asked_for(variable: str) -> bool:
    return bool(str_to_bool(os.environ.get(variable, "false") or "false"))


def _check_processes(args: ClarsSettings) -> None:
    started = int(os.environ.get("WORLD_SIZE", "1"))
    joined = args.world_size
    if started > 1 and joined == 1:
        raise ConfigError(
            f"{started} processes were started, but this one trains alone: each would train the whole model by itself. "
            "On a machine without GPUs add --use_cpu true (TrainingArguments(use_cpu=True)); on one with GPUs start "
            "with `accelerate launch --multi_gpu`."
        )
    # accelerate's launcher for one process sets these only where several were asked for.
    several = "ACCELERATE_MIXED_PRECISION" in os.environ and "MASTER_PORT" in os.environ
    if several and "WORLD_SIZE" not in os.environ:
        raise ConfigError(
            "Several processes were asked for, but accelerate has started one: --cpu and MULTI_CPU configurations do "
            "that. Use `accelerate launch --multi_gpu --num_processes N` with --use_cpu true among the script's own "
            "flags, or torchrun --nproc_per_node N."
        )


def _check_precision(trainer: Trainer, args: ClarsSettings) -> None:
    if args.fp16 and args.device.type == "cpu":
        raise ConfigError(
            "fp16 was asked for, but on a CPU Trainer silently computes in float32: leave --fp16 out, or use "
            "--bf16 true."
        )
    if args.fp16 and trainer.is_fsdp_enabled:
        raise ConfigError(
            "fp16 under FSDP keeps its loss scale where layer norms cannot take it out again: use --bf16 true, which "
            "needs no loss scale."
        )


def _check_deepspeed(trainer: Trainer, args: ClarsSettings) -> None:
    if trainer.optimizer is not None:
        raise ConfigError(
            "optimizers=(optimizer, None) is dropped under DeepSpeed, and AdamW would train instead. Leave it out: "
            "ClarsTrainer creates the optimizer from its arguments."
        )
    plugin: Any = trainer.accelerator.state.deepspeed_plugin
    config = plugin.hf_ds_config.config
    if "optimizer" in config:
        kind = config["optimizer"].get("type", "its own optimizer")
        known = "1-bit optimizers compress gradients, and " if kind.lower().startswith(ONE_BIT) else ""
        raise ConfigError(
            f"The DeepSpeed configuration has an `optimizer` section ({kind}), which would train instead of "
            f"{args.method}: {known}layer-wise rates need this project's own optimizer. Remove the section."
        )
    zero = config.get("zero_optimization", {})
    offloaded = (zero.get("offload_optimizer") or {}).get("device", "none")
    if offloaded not in ("none", None):
        raise ConfigError(
            f"The DeepSpeed configuration offloads the optimizer to {offloaded}, which replaces it or keeps gradients "
            "where layer norms cannot be taken: remove offload_optimizer (offload_param may stay)."
        )
    clipping = config.get("gradient_clipping", DEEPSPEED_CLIPS_AT)
    if clipping == "auto":  # not filled in from max_grad_norm: accelerate will say 1.0
        clipping = args.max_grad_norm or DEEPSPEED_CLIPS_AT
    if isinstance(clipping, int | float) and clipping > 0:
        says = f"clips gradients at {clipping}"
        if "gradient_clipping" not in config:
            says = f"leaves gradient_clipping out, which DeepSpeed takes for {clipping}: it clips gradients"
        raise ConfigError(
            f"The DeepSpeed configuration {says}, after the norms that the layer rates rest on were measured. Set "
            'gradient_clipping to 0 (where it says "auto", max_grad_norm decides: set that to 0).'
        )
    if args.fp16 and int(zero.get("stage", 0)) == 0:
        raise ConfigError(
            "DeepSpeed in fp16 without ZeRO keeps its loss scale where layer norms cannot take it out again: use ZeRO "
            "stage 1, or --bf16 true."
        )


def _check_fsdp(trainer: Trainer, args: ClarsSettings) -> None:
    if (args.fsdp or _asked_for("ACCELERATE_USE_FSDP")) and not trainer.is_fsdp_enabled:
        raise ConfigError(
            "FSDP was asked for, but plain data parallelism would be given: accelerate starts FSDP on GPUs only, with "
            "two processes or more. Launch on GPUs, or without FSDP."
        )
    if not trainer.is_fsdp_enabled:
        return
    plugin: Any = trainer.accelerator.state.fsdp_plugin
    if getattr(plugin, "fsdp_version", 1) != 2:
        raise ConfigError(
            "FSDP version 1 flattens layers together, so that layer norms are lost: set fsdp_version: 2 in the "
            "accelerate configuration."
        )
    if args.estimator == "microbatch" and args.method == "clars":
        raise ConfigError(
            "estimator='microbatch' needs the gradients of whole weights, which FSDP does not have: use "
            "estimator='samples'."
        )


def allow_missing_embeddings(model: nn.Module) -> None:
    """Accelerate asks every model under FSDP2 for its input embeddings; image models of transformers raise then.

    Args:
        model: Gets an answer, None, where it has none.
    """
    ask = getattr(model, "get_input_embeddings", None)
    try:
        if ask is not None:
            ask()
    except NotImplementedError:
        model.get_input_embeddings = lambda: None  # type: ignore[assignment]


def check_prepared(trainer: Trainer, args: ClarsSettings) -> None:
    """Raise if what will train is not what was created; called when the launcher has wrapped everything.

    Args:
        trainer: With model and optimizer prepared.
        args: Its arguments.

    Raises:
        ConfigError: If the optimizer was replaced.
    """
    inner = layerwise(trainer.optimizer)
    if inner is None and trainer.optimizer_cls_and_kwargs is None and trainer.is_deepspeed_enabled:
        raise ConfigError(
            f"The launcher has put {type(trainer.optimizer).__name__} in the place of {args.method}: its "
            "configuration names an optimizer of its own. Remove that section."
        )
    sharded = trainer.accelerator.distributed_type == DistributedType.FSDP
    if sharded and isinstance(inner, CLARS) and isinstance(inner.norms, MicroBatchGradNorms):
        raise ConfigError("CLARS with estimator='microbatch' does not work under FSDP: use estimator='samples'.")
