"""The facts of a finished run, for its model card."""

from __future__ import annotations

import platform
from importlib.metadata import version
from typing import Any

import torch
from transformers import PreTrainedModel, Trainer

from hf_clars.hub import RunSummary

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
        "task": "image-classification" if _classifies_images(model) else None,
        "library": "transformers" if isinstance(model, PreTrainedModel) else None,
        "needs_import": type(model).__module__.startswith("hf_clars"),
    }
    return RunSummary(**known | given)


def _classifies_images(model: Any) -> bool:
    """Whether it is an image classifier of transformers; what another module does is not known here."""
    return isinstance(model, PreTrainedModel) and type(model).__name__.endswith("ForImageClassification")


def final_results(trainer: Trainer) -> dict[str, float]:
    """The figures of the training just ended and, if it was of the last step, of its evaluation.

    Args:
        trainer: After training.

    Returns:
        Values by Trainer's names for them; empty before training.
    """
    return last_logged(trainer, "train_loss") | last_logged(trainer, "eval_loss", at_step=trainer.state.global_step)


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
