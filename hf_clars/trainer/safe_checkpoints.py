"""Checkpoints that hold no pickle, and that are complete or absent.

transformers' Trainer has no public hook for how and where these are stored, so this file, and no other, overrides its
private methods for it; `tests/test_safe_checkpoints.py` fails loudly when they change. Sharded engines (DeepSpeed,
FSDP) keep their own formats, in folders that are complete or absent too. Checkpoints of the plain Trainer load, by its
own weights-only loading.

Private name: `_keys_to_ignore_on_save`, transformers' list of tied weights that a file may lack. It ends when a model
says this in public.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from accelerate.utils import gather_object
from torch import nn
from transformers import PreTrainedModel, Trainer
from transformers.trainer_utils import TrainOutput
from transformers.utils import is_peft_available

from hf_clars.records import RecordError, checkpoints, load_optimizer_state, save_optimizer_state
from hf_clars.records.differences import optimizer_differences, sentence
from hf_clars.trainer import stored_weights
from hf_clars.trainer.disk import DISK_ERRORS, disk_problem, stored_once
from hf_clars.trainer.random_states import random_states, set_random_states
from hf_clars.trainer.resuming import (
    CheckpointMisfitError,
    check_checkpoint,
    check_engine,
    check_weights,
    newest_to_resume,
    take_forms,
)

OPTIMIZER = "optimizer.safetensors"
SCHEDULER = "scheduler.safetensors"
SCALER = "scaler.safetensors"

logger = logging.getLogger(__name__)


class SafeCheckpoints(Trainer):
    """A Trainer whose checkpoints hold no pickle and are complete or absent.

    A checkpoint that cannot be written leaves the earlier ones as they are. What happens then is the attribute
    `on_save_error`: `"stop"` (default) raises, `"continue"` warns and trains on; all processes do the same.
    """

    on_save_error = "stop"
    _partial: Path | None = None  # where a checkpoint is being written
    _save_problem: tuple[str, bool] | None = None  # what went wrong, and whether the disk is at fault

    def checkpoint_settings(self) -> dict[str, Any]:
        """What a run that resumes should have in common with this one, as plain values; stored in each checkpoint."""
        return {}

    def before_checkpoint(self) -> None:
        """Called on all processes before a checkpoint is written."""

    def write_beside_weights(self, folder: Path) -> None:
        """Called on the process that writes, before a checkpoint is complete: a subclass stores what else it needs.

        Args:
            folder: The checkpoint.
        """

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        """Train, from the newest complete checkpoint (`True`), a given one, or the start.

        Args:
            resume_from_checkpoint: As in `Trainer`.
            trial: As in `Trainer`.
            ignore_keys_for_eval: As in `Trainer`.

        Returns:
            As `Trainer` does.

        Raises:
            CheckpointMisfitError: The checkpoint is of another model or run; the message says what differs.
            RecordError: It is damaged.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = str(newest_to_resume(Path(str(self.args.output_dir))))
        if resume_from_checkpoint:
            check_engine(Path(str(resume_from_checkpoint)), self._engine())
        if resume_from_checkpoint and not self._keeps_own_format():
            assert isinstance(self.model, nn.Module)
            check_checkpoint(Path(str(resume_from_checkpoint)), self.model, self.checkpoint_settings())
        if resume_from_checkpoint:
            take_forms(Path(str(resume_from_checkpoint)))
        output = super().train(resume_from_checkpoint or None, trial, ignore_keys_for_eval)
        if resume_from_checkpoint:  # the run before may have been killed before it had cleaned up
            self._delete_old_checkpoints(self.run_folder(trial), set())
        return output

    def _keeps_own_format(self) -> bool:
        return bool(self.is_deepspeed_enabled or self.is_fsdp_enabled)

    def _engine(self) -> str | None:
        """The engine whose format checkpoints are in; None: this project's own."""
        return "DeepSpeed" if self.is_deepspeed_enabled else "FSDP" if self.is_fsdp_enabled else None

    # ---- complete or absent --------------------------------------------------------------------------------------

    def run_folder(self, trial: Any = None) -> Path:
        """The folder of a run: the output folder, or in it that of a trial of a hyperparameter search.

        Args:
            trial: As `train` gets it. Default None.
        """
        return Path(super()._get_output_dir(trial))

    def _get_output_dir(self, trial: Any) -> str:
        """The run's folder; while a checkpoint is written, the one that it is written in."""
        return super()._get_output_dir(trial) if self._partial is None else str(self._partial)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        run = self.run_folder(trial)
        name = f"checkpoint-{self.state.global_step}"
        if self.args.local_process_index == 0:
            checkpoints.clear_partial(run)
        self.accelerator.wait_for_everyone()
        self._save_problem, self._partial = None, checkpoints.partial_run(run)
        push, self.args.push_to_hub = self.args.push_to_hub, False
        try:
            with self._disk_errors_noted():
                self.before_checkpoint()
            with self._disk_errors_noted():
                super()._save_checkpoint(model, trial)
        finally:
            self._partial, self.args.push_to_hub = None, push
        if self._finish_checkpoint(run, name) and push:
            self._push_from_checkpoint(str(run / name))

    def _finish_checkpoint(self, run: Path, name: str) -> bool:
        """Give a checkpoint its name if all processes wrote their part, and delete old ones; whether it was given."""
        partial = checkpoints.partial_run(run) / name
        self._agree_on_problem()
        if self._save_problem is None:
            with self._disk_errors_noted():
                if self.args.should_save:
                    self._correct_best(run, partial)
                    self.write_beside_weights(partial)
                    checkpoints.write_manifest(partial, self.checkpoint_settings())
                    checkpoints.commit(partial, run / name)
            self._agree_on_problem()
        if self._save_problem is not None:
            if self.args.should_save:
                checkpoints.clear_partial(run)
            self._report_problem(run / name)
            return False
        self._delete_old_checkpoints(run, {run / name})
        return True

    def _delete_old_checkpoints(self, run: Path, newest: set[Path]) -> None:
        if self.args.should_save:
            best = self.state.best_model_checkpoint
            checkpoints.rotate(run, self.args.save_total_limit, newest | ({Path(best)} if best else set()))

    def _correct_best(self, run: Path, partial: Path) -> None:
        """Trainer noted the best checkpoint where it was written; its name is about to change."""
        if self.state.best_model_checkpoint == str(partial):
            self.state.best_model_checkpoint = str(run / partial.name)
            self.state.save_to_json(str(partial / checkpoints.TRAINER_STATE))

    @contextmanager
    def _disk_errors_noted(self) -> Iterator[None]:
        """Go on to the next collective call, which other processes wait in; the problem is shared afterwards."""
        try:
            yield
        except DISK_ERRORS as error:
            if self._partial is not None and self._keeps_own_format():
                raise  # the saving of sharded engines has collective calls inside, which nobody can go past
            self._note(error)

    def _note(self, error: Exception) -> None:
        reason = disk_problem(error, Path(str(self.args.output_dir)))
        said = f"{type(error).__name__}: {' '.join(str(error).split())}" if reason is None else reason
        self._save_problem = self._save_problem or (said, reason is not None)

    def _agree_on_problem(self) -> None:
        if self.accelerator.num_processes > 1:
            found = [problem for problem in gather_object([self._save_problem]) if problem is not None]
            self._save_problem = found[0] if found else None

    def _report_problem(self, folder: Path) -> None:
        assert self._save_problem is not None
        said, of_the_disk = self._save_problem
        message = f"The checkpoint {folder} could not be written ({said}). Earlier checkpoints are unchanged"
        if not of_the_disk:
            raise RecordError(f"{message}. The disk is not at fault: the next one would fail in the same way.")
        message += ". Free some space or make the folder writable"
        if self.on_save_error == "stop":
            raise RecordError(f"{message}, then go on with --resume_from_checkpoint true.")
        logger.warning(
            "%s; training goes on (on_save_error=continue) and the next checkpoint is tried in its turn.", message
        )

    # ---- weights -------------------------------------------------------------------------------------------------

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if not self._load_weights(Path(resume_from_checkpoint)):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        if not self._load_weights(Path(str(self.state.best_model_checkpoint))):
            super()._load_best_model()

    def _load_weights(self, folder: Path) -> bool:
        """Fill the model from a checkpoint; False where that is Trainer's: sharded engines, other kinds of files."""
        if self._keeps_own_format() or not folder.is_dir():
            return False
        assert isinstance(self.model, nn.Module)
        if stored_weights.holds_adapter_for(folder, self.model):
            load = stored_weights.load_adapter
        elif stored_weights.holds_whole_model(folder):
            load = stored_weights.load
        else:
            return False
        check_weights(folder, self.model)
        load(folder, self.model)
        return True

    # ---- without pickle ------------------------------------------------------------------------------------------

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save model and processor, and the arguments as JSON: Trainer's `training_args.bin` is a pickle.

        Args:
            output_dir: Where to; None: the run's folder.
            _internal_call: As Trainer passes it.
        """
        folder = Path(str(self.args.output_dir if output_dir is None else output_dir))
        pickle = folder / "training_args.bin"
        try:
            super().save_model(output_dir, _internal_call)
            if self.args.should_save:
                pickle.unlink(missing_ok=True)
                (folder / "training_args.json").write_text(self.args.to_json_string(), encoding="utf-8")
        except (*DISK_ERRORS, RuntimeError) as error:  # torch's word for a full disk is RuntimeError
            if self._keeps_own_format():
                raise
            if self.args.should_save:
                with suppress(OSError):
                    pickle.unlink(missing_ok=True)  # half of it
            if self._partial is not None:
                self._note(error)
                return
            reason = disk_problem(error, folder)
            if reason is None:
                raise
            raise RecordError(
                f"The model could not be saved in {folder} ({reason}). Checkpoints are unchanged: free some space or "
                "make the folder writable, then go on with --resume_from_checkpoint true."
            ) from error

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """As `Trainer` does; a tied weight of a module that is not transformers' own is stored under its first name."""
        assert isinstance(self.model, nn.Module)
        inner = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        if state_dict is None and not isinstance(inner, _saves_itself()):
            state_dict = stored_once(self.model.state_dict())
        super()._save(output_dir, state_dict)

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """Trainer asks a model of its own for names it may lack; `check_checkpoint` has compared any other's before."""
        if hasattr(self.model, "_keys_to_ignore_on_save"):
            super()._issue_warnings_after_load(load_result)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self._keeps_own_format():
            super()._save_optimizer_and_scheduler(output_dir)
        elif self.args.should_save:
            assert self.optimizer is not None
            assert self.lr_scheduler is not None
            with self._disk_errors_noted():
                save_optimizer_state(self.optimizer.state_dict(), Path(output_dir) / OPTIMIZER)
                save_optimizer_state(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or not (Path(checkpoint) / OPTIMIZER).exists():
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        assert self.optimizer is not None
        assert self.lr_scheduler is not None
        state = load_optimizer_state(Path(checkpoint) / OPTIMIZER)
        differences = optimizer_differences(state, self.optimizer)
        if differences:
            raise CheckpointMisfitError(
                f"The optimizer state in {checkpoint} is of another model or another partition into layers: "
                f"{sentence(differences)}. Resume with the model and the `layers` option that began the run."
            )
        self.optimizer.load_state_dict(state)
        self.lr_scheduler.load_state_dict(load_optimizer_state(Path(checkpoint) / SCHEDULER))

    def _save_scaler(self, output_dir: str) -> None:
        scaler = getattr(self.accelerator, "scaler", None)
        if scaler is not None and self.args.should_save:
            with self._disk_errors_noted():
                save_optimizer_state(scaler.state_dict(), Path(output_dir) / SCALER)

    def _load_scaler(self, checkpoint: str | None) -> None:
        scaler = getattr(self.accelerator, "scaler", None)
        if checkpoint is None or scaler is None or not (Path(checkpoint) / SCALER).exists():
            super()._load_scaler(checkpoint)
            return
        scaler.load_state_dict(load_optimizer_state(Path(checkpoint) / SCALER))

    def _rng_file(self, folder: str) -> Path:
        return Path(folder) / f"rng_state_{self.args.process_index}.safetensors"

    def _save_rng_state(self, output_dir: str) -> None:
        with self._disk_errors_noted():
            Path(output_dir).mkdir(parents=True, exist_ok=True)
            save_optimizer_state(random_states(), self._rng_file(output_dir))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is None or not self._rng_file(checkpoint).exists():
            super()._load_rng_state(checkpoint)
            return
        set_random_states(load_optimizer_state(self._rng_file(checkpoint)))


def _saves_itself() -> tuple[type, ...]:
    """Classes whose `save_pretrained` knows their tied weights."""
    if not is_peft_available():
        return (PreTrainedModel,)
    from peft import PeftModel

    return (PreTrainedModel, PeftModel)
