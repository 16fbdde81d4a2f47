"""Whether a checkpoint can be resumed from, asked before anything is loaded from it."""

from __future__ import annotations

import dataclasses
import json
import logging
from pathlib import Path
from typing import Any

from torch import nn
from transformers import TrainerState

from hf_clars.errors import ConfigError, HfClarsError
from hf_clars.grad_norms.choice import form_choices
from hf_clars.records import RecordError, checkpoints
from hf_clars.records.differences import sentence
from hf_clars.trainer import stored_weights

MUST_AGREE = ("global_batch", "train_samples")
"""Settings that count steps: with another value the resumed run would skip or repeat other samples than it has used."""

FORMS = "forms"
"""The setting that keeps which forms the layers' norms take on a GPU: taken over, and not compared."""

logger = logging.getLogger(__name__)


class CheckpointMisfitError(HfClarsError, ValueError):
    """A checkpoint is sound, but of another model, partition into layers or run."""


def newest_to_resume(run: Path) -> Path:
    """The newest complete checkpoint of a run.

    Raises:
        ConfigError: There is none.
    """
    found = checkpoints.newest_checkpoint(run)
    if found is None:
        raise ConfigError(f"There is no checkpoint to resume from in {run}: leave out --resume_from_checkpoint.")
    return found


def check_checkpoint(folder: Path, model: nn.Module, settings: dict[str, Any]) -> None:
    """Raise unless a run can resume from a checkpoint; warn where it will not go on as it began.

    Args:
        folder: The checkpoint.
        model: To be filled.
        settings: Of the run that resumes, see `ClarsTrainer.run_settings`.

    Raises:
        CheckpointMisfitError: Weights differ in name, shape or type, or the run counts its steps otherwise.
        RecordError: The checkpoint is damaged or incomplete.
    """
    if not folder.is_dir():
        raise RecordError(f"There is no checkpoint {folder}.")
    missing = checkpoints.what_is_missing(folder)
    if missing is not None:
        raise RecordError(f"The checkpoint {folder} is not complete: {missing}. Resume from an earlier one.")
    _check_state(folder / checkpoints.TRAINER_STATE)
    check_weights(folder, model)
    if (folder / checkpoints.MANIFEST).exists():
        _compare_settings(folder, checkpoints.read_manifest(folder)["settings"], settings)


def take_forms(folder: Path) -> None:
    """Let layers' norms take the forms that they took in the run that resumes, so that sums are rounded as they were.

    Args:
        folder: The checkpoint; one of an engine's own format keeps none.

    Raises:
        ConfigError: The forms are of another version.
        RecordError: The checkpoint is damaged.
    """
    if (folder / checkpoints.MANIFEST).exists():
        form_choices.restore(checkpoints.read_manifest(folder)["settings"].get(FORMS, {}))


def check_weights(folder: Path, model: nn.Module) -> None:
    """Raise unless a checkpoint's weights fill a model.

    Args:
        folder: The checkpoint.
        model: To be filled.

    Raises:
        CheckpointMisfitError: Weights differ in name, shape or type.
        RecordError: A file is damaged.
    """
    differences = stored_weights.differences(folder, model)
    if differences:
        raise CheckpointMisfitError(
            f"The checkpoint {folder} is of another model: {sentence(differences)}. Resume with the model that began "
            "the run; to begin a new run from these weights, give the folder as the model."
        )


def check_engine(folder: Path, engine: str | None) -> None:
    """Raise if another kind of launcher wrote the optimizer state, as states of split weights fit their engine only.

    So it does where there is none.

    Args:
        folder: The checkpoint.
        engine: "DeepSpeed" or "FSDP"; None for one process and plain data parallelism, which read each other's.

    Raises:
        CheckpointMisfitError: With both, and what to do; or no launcher's state is there at all.
    """
    if folder.is_dir() and not _holds_optimizer(folder):
        raise CheckpointMisfitError(
            f"The checkpoint {folder} holds no optimizer state, as save_only_model leaves them: momentum, schedule and "
            "random numbers would begin anew. A run that shall resume saves without save_only_model; to begin a new "
            "run from these weights, give the folder as the model."
        )
    wrote = _engine_of(folder)
    if folder.is_dir() and wrote != engine:
        names = {None: "one process or plain data parallelism", "DeepSpeed": "DeepSpeed", "FSDP": "FSDP"}
        raise CheckpointMisfitError(
            f"The checkpoint {folder} was written under {names[wrote]}, and this run is under {names[engine]}, which "
            "cannot read its optimizer state. Resume under the launcher that wrote it; to begin a new run from its "
            "weights, give the folder as the model (DeepSpeed: after its zero_to_fp32.py, if it holds no "
            "model.safetensors)."
        )


def _holds_optimizer(folder: Path) -> bool:
    """Whether there is a state of an optimizer, in any format: this project's, Trainer's, DeepSpeed's, FSDP's."""
    return any(folder.glob("optimizer*")) or any(folder.glob("global_step*"))


def _engine_of(folder: Path) -> str | None:
    if any(folder.glob("global_step*")):
        return "DeepSpeed"
    return "FSDP" if any(folder.glob("pytorch_model_fsdp*")) or (folder / "optimizer_0").is_dir() else None


def _check_state(path: Path) -> None:
    known = {field.name for field in dataclasses.fields(TrainerState)}
    unknown = set(json.loads(path.read_text(encoding="utf-8"))) - known
    if unknown:
        raise RecordError(
            f"{path} has entries that this transformers does not know ({', '.join(sorted(unknown)[:3])}): it is "
            "damaged, or of another version; resume with the transformers that wrote it."
        )


def _compare_settings(folder: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    # Through JSON, as the stored ones went: tuples are lists there.
    now = json.loads(json.dumps(now))
    shared = [key for key in before if key in now and key != FORMS]
    changed = {key: (before[key], now[key]) for key in shared if before[key] != now[key]}
    fatal = [f"{key} was {changed[key][0]} and is {changed[key][1]}" for key in MUST_AGREE if key in changed]
    if fatal:
        raise CheckpointMisfitError(
            f"The checkpoint {folder} is of a run that counts its steps otherwise: {'; '.join(fatal)}. Resume with the "
            "settings that began the run; to begin a new run from these weights, give the folder as the model."
        )
    if changed:
        words = "; ".join(f"{key} was {old} and is {new}" for key, (old, new) in changed.items())
        logger.warning(
            "This run goes on from %s with other settings than it began with: %s. It will not be the run that would "
            "have gone on without a stop.",
            folder,
            words,
        )
