"""The exponential moving average of a run's weights (EMA), which is what such a run evaluates and leaves."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_clars.errors import ConfigError
from hf_clars.trainer.disk import stored_once
from hf_clars.trainer.resuming import newest_to_resume
from hf_clars.trainer.trainer import ClarsTrainer

FILE = "weight_average.safetensors"


class WeightAverage:
    """The average of a model's weights and running statistics.

    The decay rises to its value as timm's and TensorFlow's does, `min(decay, (1 + t) / (10 + t))` after t updates, so
    that a short run does not keep its first weights.

    Args:
        model: Whose weights.
        decay: What is kept of the average at each update.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self._tensors = stored_once(dict(model.named_parameters()) | dict(model.named_buffers()))
        self._average = {name: tensor.detach().clone() for name, tensor in self._tensors.items()}
        self._floats = [name for name, tensor in self._tensors.items() if tensor.is_floating_point()]

    @torch.no_grad()
    def update(self, updates: int) -> None:
        """Take in the weights of now; nothing waits for the device.

        Args:
            updates: How many the optimizer has made.
        """
        average = get_ema_multi_avg_fn(min(self.decay, (1 + updates) / (10 + updates)))
        average([self._average[n] for n in self._floats], [self._tensors[n].detach() for n in self._floats], updates)
        for name in self._average.keys() - set(self._floats):
            self._average[name].copy_(self._tensors[name])

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange the model's weights and the average; a second call puts both back."""
        for name, tensor in self._tensors.items():
            tensor.data, self._average[name] = self._average[name], tensor.data

    def save(self, path: Path) -> None:
        """Write the average, without pickle.

        Args:
            path: A safetensors file.
        """
        save_file({name: tensor.contiguous() for name, tensor in self._average.items()}, str(path))

    def load(self, path: Path) -> None:
        """Go on with an average that `save` wrote.

        Args:
            path: The file.

        Raises:
            ConfigError: There is none, or it is of another model.
        """
        if not path.is_file():
            raise ConfigError(
                f"{path.parent} holds no average of weights: the run that wrote it had no ema_decay. Resume without it."
            )
        stored: dict[str, Tensor] = load_file(str(path))
        if {n: t.shape for n, t in stored.items()} != {n: t.shape for n, t in self._average.items()}:
            raise ConfigError(f"{path} is the average of another model: resume with the model that began the run.")
        for name, tensor in stored.items():
            self._average[name].copy_(tensor)


class _Averages(TrainerCallback):
    """Lets the average follow training."""

    def __init__(self, trainer: AveragingTrainer) -> None:
        self._trainer = trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Begin the average, or go on with that of the run that is resumed."""
        self._trainer.begin_average()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Take in the step that was just made."""
        assert self._trainer.average is not None
        self._trainer.average.update(state.global_step)


class AveragingTrainer(ClarsTrainer):
    """A `ClarsTrainer` that evaluates the average of the weights, and ends with it.

    Checkpoints hold the weights of the optimizer, and the average beside them: a resumed run goes on with both.

    Args:
        model: The model, not wrapped.
        args: The arguments.
        ema_decay: What is kept of the average at each update, above 0 and below 1.
        kwargs: Everything else that `ClarsTrainer` takes.

    Raises:
        ConfigError: The weights lie in pieces (DeepSpeed, FSDP), or `load_best_model_at_end` would bring back weights
            that are not the average that was best.
    """

    def __init__(self, model: nn.Module, args: Any, *, ema_decay: float, **kwargs: Any) -> None:
        self.ema_decay = ema_decay
        self.average: WeightAverage | None = None
        self._resume: Path | None = None
        super().__init__(model, args, **kwargs)
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:
            raise ConfigError("ema_decay needs whole weights: leave it out under DeepSpeed and FSDP.")
        if args.load_best_model_at_end:
            raise ConfigError("ema_decay and load_best_model_at_end do not go together: keep one of the two.")
        self.add_callback(_Averages(self))

    def run_settings(self) -> dict[str, Any]:
        """As of `ClarsTrainer`, and the decay."""
        return {**super().run_settings(), "ema_decay": self.ema_decay}

    def begin_average(self) -> None:
        """Start from the weights of now, or from the checkpoint that training resumes from."""
        assert isinstance(self.model, nn.Module)
        self.average = WeightAverage(self.model, self.ema_decay)
        if self._resume is not None:
            self.average.load(self._resume / FILE)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train, and leave the average in the model.

        Args:
            resume_from_checkpoint: As in `ClarsTrainer`.
            args: Likewise.
            kwargs: Likewise.

        Returns:
            As `ClarsTrainer` does.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = str(newest_to_resume(Path(str(self.args.output_dir))))
        self._resume = Path(str(resume_from_checkpoint)) if resume_from_checkpoint else None
        output = super().train(resume_from_checkpoint, *args, **kwargs)
        if self.average is not None:
            self.average.swap()
            self.average = None
        return output

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Within this, the model has the average for its weights."""
        average = self.average
        if average is None:  # before training, and after it
            yield
            return
        average.swap()
        try:
            yield
        finally:
            average.swap()

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Evaluate the average.

        Args:
            args: As in `Trainer`.
            kwargs: Likewise.

        Returns:
            Metrics by name.
        """
        with self.averaged():
            return super().evaluate(*args, **kwargs)

    def write_beside_weights(self, folder: Path) -> None:
        """Store the average in a checkpoint.

        Args:
            folder: The checkpoint, not yet complete.
        """
        if self.average is not None:
            self.average.save(folder / FILE)
