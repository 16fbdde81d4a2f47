"""One screen before a run and one after it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from hf_clars.data import ImageData
from hf_clars.errors import name_list

if TYPE_CHECKING:
    from hf_clars.trainer.trainer import ClarsTrainer

_CHECKPOINT = r"checkpoint-(\d+)/"


def before_training(trainer: ClarsTrainer, data: ImageData, pixels: str) -> None:
    """Print what is about to be trained, on the main process.

    Args:
        trainer: Ready to train.
        data: Its data.
        pixels: What becomes of an image, in words.
    """
    if not trainer.is_world_process_zero():
        return
    args, settings, model = trainer.args, trainer.run_settings(), trainer.model
    assert model is not None
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    warmup = f"{args.warmup_epochs:g} epochs" if args.warmup_epochs else "none"
    rows = [
        ("model", f"{type(model).__name__}, {trained:,} trained parameters"),
        (
            "data",
            f"{_count(data.train_size)} to train, {_count(data.eval_size)} to evaluate",
        ),
        ("classes", _classes(data)),
        ("pixels", pixels),
        (
            "batch",
            f"{args.total_batch_size:,} = {args.train_batch_size} x {args.gradient_accumulation_steps} accumulated x "
            f"{args.world_size} process{'es' if args.world_size > 1 else ''}",
        ),
        (
            "method",
            f"{settings['method']}, gamma_scale {args.learning_rate:g}, eta {args.eta}, momentum {args.momentum:g}",
        ),
        ("schedule", f"{settings['schedule']}, warmup {warmup}"),
        ("device", f"{args.device}, {settings['precision']}"),
        ("output", str(args.output_dir)),
    ]
    if "norm_samples" in settings:
        rows.insert(6, ("norms of", f"{settings['norm_samples']} ({settings['norm']})"))
    _print(rows)


def after_training(trainer: ClarsTrainer, results: dict[str, float]) -> None:
    """Print the results and what the run left.

    Args:
        trainer: After training, on the main process.
        results: What was measured.
    """
    folder = Path(str(trainer.args.output_dir))
    rows = _accuracy(results)
    if "train_runtime" in results:
        speed = results.get("train_samples_per_second", float("nan"))
        rows.append(("training", f"{results['train_runtime']:.0f} s, {speed:,.0f} images/s"))
    rows.append(("left in", f"{folder}: {', '.join(_files(folder))}"))
    _print(rows)


def _files(folder: Path) -> list[str]:
    """What is in a run's folder; of checkpoints, which may be many, how many there are, and the newest."""
    files = sorted(p.name + ("/" if p.is_dir() else "") for p in folder.iterdir())
    numbers = sorted(int(found[1]) for name in files if (found := re.fullmatch(_CHECKPOINT, name)))
    kept = [name for name in files if not re.fullmatch(_CHECKPOINT, name)]
    return [f"{len(numbers)} x checkpoint-*/ (newest checkpoint-{numbers[-1]})", *kept] if numbers else files


def _classes(data: ImageData) -> str:
    """How many there are, the first few by name, with their training images where they are counted."""
    if data.class_counts is None:
        return f"{len(data.label_names):,}: {name_list(data.label_names)}"
    named = [f"{name} ({count:,})" for name, count in zip(data.label_names, data.class_counts, strict=True)]
    return f"{len(named):,}, with training images: {name_list(named)}"


def after_evaluation(trainer: ClarsTrainer, data: ImageData, results: dict[str, float]) -> None:
    """Print what a finished run's model reaches.

    Args:
        trainer: On the main process.
        data: What it was measured on.
        results: The metrics.
    """
    measured = ("measured", f"{trainer.args.output_dir} on {_count(data.eval_size)} of {data.eval_split}")
    _print([measured, *_accuracy(results), ("loss", f"{results['eval_loss']:.4g}")])


def _accuracy(results: dict[str, float]) -> list[tuple[str, str]]:
    if "eval_accuracy" not in results:
        return []
    top5 = f", top-5 {results['eval_top5_accuracy']:.2%}" if "eval_top5_accuracy" in results else ""
    return [("accuracy", f"top-1 {results['eval_accuracy']:.2%}{top5}")]


def _count(size: int | None) -> str:
    return "an unknown number of images" if size is None else f"{size:,} images"


def _print(rows: list[tuple[str, str]]) -> None:
    print("\n".join(["", *(f"{name:>10}  {text}" for name, text in rows), ""]), flush=True)
