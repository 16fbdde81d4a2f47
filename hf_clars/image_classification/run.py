"""The main job, end to end: data, model, training, evaluation, and everything a run leaves behind."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, set_seed

from hf_clars.data import (
    DevicePixels,
    ImageData,
    PixelTransform,
    build_image_processor,
    load_image_data,
    trainable,
)
from hf_clars.data.strong_augment import MixedImages, StrongPixelTransform, collate_mixed
from hf_clars.errors import ConfigError, name_list
from hf_clars.hub.licences import licence_identifier
from hf_clars.image_classification.arguments import DataArguments, ModelArguments, OutputArguments
from hf_clars.image_classification.averaging import AveragingTrainer
from hf_clars.image_classification.card import write_model_card
from hf_clars.image_classification.checks import check_for_images, check_takes_images
from hf_clars.image_classification.held_out import hold_out
from hf_clars.image_classification.pixels import choose_pixels
from hf_clars.image_classification.soft_targets import SoftTargetLoss
from hf_clars.image_classification.summary import after_evaluation, after_training, before_training
from hf_clars.metrics import AccuracyOfRanked, ranked_classes
from hf_clars.models import build_model, pretrained_classes
from hf_clars.records.checkpoints import newest_checkpoint
from hf_clars.trainer.arguments import ClarsTrainingArguments
from hf_clars.trainer.card import final_results
from hf_clars.trainer.config import parse_config, settings_explained
from hf_clars.trainer.disk import disk_failures_explained
from hf_clars.trainer.outside_failures import outside_failures_explained
from hf_clars.trainer.preflight import check_free_space, checkpoint_bytes, claim_output_dir
from hf_clars.trainer.resuming import newest_to_resume
from hf_clars.trainer.stopping import StopCallback
from hf_clars.trainer.trainer import ClarsTrainer

DESCRIPTION = (
    "Train an image classifier with layer-wise rates (CLARS, LARS or mNAG). Give a YAML file with --config and "
    "override "
    "any setting on the command line. Start it with `accelerate launch` for several processes."
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunSettings:
    """Everything that defines a run."""

    model: ModelArguments
    data: DataArguments
    output: OutputArguments
    training: ClarsTrainingArguments


def parse_run(argv: Sequence[str] | None = None) -> RunSettings:
    """Read a run's settings from `--config` and flags.

    Args:
        argv: Arguments; None: those of the process.

    Returns:
        The settings.

    Raises:
        ConfigError: For anything that cannot work.
    """
    kinds = (ModelArguments, DataArguments, OutputArguments, ClarsTrainingArguments)
    return RunSettings(*parse_config(kinds, argv, description=DESCRIPTION))


def train_image_classifier(settings: RunSettings) -> dict[str, float]:
    """Train, evaluate, and write model, processor, log, picture, results and card to the output folder.

    Args:
        settings: From `parse_run`, or made by hand.

    Returns:
        The results, as in `all_results.json`.

    Raises:
        HfClarsError: Before any work is done, if the run cannot succeed.
    """
    if settings.training.evaluate_only:
        return evaluate_image_classifier(settings)
    args, stop = settings.training, StopCallback(settings.output.max_hours)
    if settings.output.license is not None:
        settings.output.license = licence_identifier(settings.output.license)
    resume = bool(args.resume_from_checkpoint) and str(args.resume_from_checkpoint).lower() != "false"
    args.resume_from_checkpoint = str(args.resume_from_checkpoint) if resume else None
    folder = claim_output_dir(str(args.output_dir), existing=settings.output.existing_output, resume=resume)
    args.output_dir = str(folder)
    checkpoint = _checkpoint(folder, str(args.resume_from_checkpoint)) if resume else None
    set_seed(args.seed)
    pixels = choose_pixels(settings.model, settings.data)
    data = _load(settings)
    check_for_images(args, len(data.label_names))
    model = _build(settings, data)
    check_free_space(folder, checkpoint_bytes(_elements(model), args.save_total_limit))
    with settings_explained():
        trainer = _trainer(settings, data, model, stop)
    before_training(trainer, data, pixels)
    with outside_failures_explained(args.ddp_timeout), disk_failures_explained(folder):
        trainer.train(resume_from_checkpoint=checkpoint)
        return _finish(trainer, settings, data)


def evaluate_image_classifier(settings: RunSettings) -> dict[str, float]:
    """Measure the model that a finished run left in the output folder; nothing is trained.

    Args:
        settings: Of that run: the data are as they say; the model, and pixels that are not set, are the folder's.

    Returns:
        The metrics, which `eval_results.json` in the folder holds too.

    Raises:
        HfClarsError: No run has finished there, or the data have nothing to evaluate on.
    """
    args = settings.training
    folder = Path(str(args.output_dir))
    if not (folder / "config.json").is_file() or not any(folder.glob("model*.safetensors*")):
        raise ConfigError(
            f"do_eval measures a finished run, but {folder} holds no model: give the run's --output_dir. To train and "
            "evaluate, leave do_eval out or add --do_train true."
        )
    args.eval_strategy = "no"  # what there is to evaluate on is asked for below
    finished = replace(settings.model, model=str(folder.resolve()), from_scratch=False, replace_head=False)
    settings = replace(settings, model=replace(finished, model_kwargs=None, ema_decay=0.0))
    choose_pixels(settings.model, settings.data)
    data = _in_order_of_the_model(_read(settings), settings.model)
    if data.eval is None:
        raise ConfigError(f"{settings.data.dataset} has nothing to evaluate on: name a split with --eval_split.")
    with settings_explained():
        trainer = _trainer(settings, data, _build(settings, data), StopCallback())
    with outside_failures_explained(args.ddp_timeout), disk_failures_explained(folder):
        results = trainer.evaluate()
        trainer.save_metrics("eval", results, combined=False)
    if trainer.is_world_process_zero():
        after_evaluation(trainer, data, results)
    return results


def _read(settings: RunSettings) -> ImageData:
    args = settings.data
    data = load_image_data(
        args.dataset,
        config=args.dataset_config,
        train_split=args.train_split,
        eval_split=args.eval_split,
        image_column=args.image_column,
        label_column=args.label_column,
        streaming=args.streaming,
        max_train_samples=args.max_train_samples,
        max_eval_samples=args.max_eval_samples,
    )
    data = _in_order_of_the_model(data, settings.model)  # before a share is held out: whole columns are exchanged
    return hold_out(data, args.eval_share) if args.eval_share else data


def _load(settings: RunSettings) -> ImageData:
    args, training = settings.data, settings.training
    data = _read(settings)
    if args.streaming and training.max_steps <= 0:
        raise ConfigError("A stream has no known length, so epochs cannot be counted: set --max_steps.")
    if data.train_size is not None and data.train_size < training.total_batch_size:
        raise ConfigError(
            f"One update takes {training.total_batch_size} images, but the training split of {args.dataset} has only "
            f"{data.train_size}: lower global_batch_size or gradient_accumulation_steps."
        )
    if data.eval is None and str(getattr(training.eval_strategy, "value", training.eval_strategy)) != "no":
        raise ConfigError(
            f"eval_strategy={training.eval_strategy} needs an evaluation split, but {args.dataset} has none: name "
            "one with --eval_split, or set --eval_strategy no."
        )
    return data


def _in_order_of_the_model(data: ImageData, args: ModelArguments) -> ImageData:
    """The data with its classes in the order of a pretrained classifier's outputs, where both name the same classes."""
    kwargs = args.model_kwargs if isinstance(args.model_kwargs, dict) else None
    known = pretrained_classes(args.model, from_scratch=args.from_scratch, model_kwargs=kwargs)
    if known is None or args.keep_numbers or known == data.label_names or set(known) != set(data.label_names):
        return data
    logger.warning("The classes are numbered as in %s: %s.", args.model, name_list(known))
    return data.with_classes(known)


def _build(settings: RunSettings, data: ImageData) -> PreTrainedModel:
    args = settings.model
    model = build_model(
        args.model,
        from_scratch=args.from_scratch,
        num_labels=len(data.label_names),
        image_size=settings.data.pixel_settings().image_size,
        num_channels=settings.data.num_channels,
        label_names=data.label_names,
        replace_head=args.replace_head,
        keep_numbers=args.keep_numbers,
        model_kwargs=args.model_kwargs if isinstance(args.model_kwargs, dict) else None,
    )
    check_takes_images(model, settings.data, name=args.model)
    if args.channels_last:
        nn.Module.to(model, memory_format=torch.channels_last)
    return model


def _trainer(settings: RunSettings, data: ImageData, model: PreTrainedModel, stop: StopCallback) -> ClarsTrainer:
    args, pixels = settings.data, settings.data.pixel_settings()
    columns: dict[str, Any] = {
        "image_column": data.image_column,
        "label_column": data.label_column,
        "in_memory": args.in_memory,
        "bad_images": args.bad_images,
        "classes": len(data.label_names),
        "on_device": True,
    }
    buffer = args.shuffle_buffer if args.streaming else 0
    strong, seed = args.strong_augment(), settings.training.seed
    train = trainable(data.train, StrongPixelTransform(pixels, strong), shuffle_buffer=buffer, seed=seed, **columns)
    if strong.mixes:
        train = MixedImages(train, strong, pixels, classes=len(data.label_names), seed=seed)
    evaluation = None if data.eval is None else trainable(data.eval, PixelTransform(pixels, train=False), **columns)
    DevicePixels(pixels, channels_last=settings.model.channels_last).attach(model)
    settings.training.remove_unused_columns = False  # the transform needs the image column, which no model names
    settings.training.label_names = ["labels"]
    smoothing = settings.training.label_smoothing_factor
    more: dict[str, Any] = {}
    if strong.mixes or smoothing:
        more["compute_loss_func"] = SoftTargetLoss(smoothing)
    kind = partial(AveragingTrainer, ema_decay=settings.model.ema_decay) if settings.model.ema_decay else ClarsTrainer
    return kind(
        model,
        settings.training,
        train_dataset=train,
        eval_dataset=evaluation,
        data_collator=collate_mixed,
        processing_class=build_image_processor(pixels),
        compute_metrics=AccuracyOfRanked(),
        preprocess_logits_for_metrics=ranked_classes,
        callbacks=[stop],
        **more,
    )


def _finish(trainer: ClarsTrainer, settings: RunSettings, data: ImageData) -> dict[str, float]:
    """Save what the run leaves; `all_results.json` and the card hold the same numbers."""
    results = final_results(trainer)
    if data.eval is not None and "eval_loss" not in results:
        results |= trainer.evaluate()
    trainer.save_model(_internal_call=True)  # pushed below, when all is there
    trainer.save_state()
    trainer.save_metrics("all", results, combined=False)
    if trainer.is_world_process_zero():
        write_model_card(trainer, settings.model, settings.data, settings.output, data, results)
        after_training(trainer, results)
    if trainer.args.push_to_hub:
        trainer.push_to_hub()
    return results


def _checkpoint(folder: Path, wanted: str) -> str | None:
    """The checkpoint to resume from; None where `auto` finds none, and the run starts anew."""
    if wanted.lower() in ("true", "latest", "last"):
        return str(newest_to_resume(folder))
    if wanted.lower() == "auto":
        found = newest_checkpoint(folder)
        return None if found is None else str(found)
    if not Path(wanted).is_dir():
        raise ConfigError(f"resume_from_checkpoint={wanted} is no folder: give a checkpoint's path, `true` or `auto`.")
    return wanted


def _elements(model: nn.Module) -> int:
    return sum(t.numel() for t in (*model.parameters(), *model.buffers()))
