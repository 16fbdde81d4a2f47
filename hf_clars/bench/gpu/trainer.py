"""`ClarsTrainer` beside transformers' Trainer: images a second, on tensors that are already on the device."""

from __future__ import annotations

import contextlib
import copy
import gc
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_clars.bench.check import refusal
from hf_clars.bench.gpu.measuring import Figures, device, so_far, sync
from hf_clars.bench.gpu.networks import NETWORKS
from hf_clars.trainer import ClarsTrainer, ClarsTrainingArguments
from hf_clars.trainer.arguments import DEFAULT_NORM_SAMPLES

PLAIN, LOOP = "Trainer, SGD", "bare loop, SGD"
SOME = f"ClarsTrainer, clars ({DEFAULT_NORM_SAMPLES} samples)"
WARMUP, ROUNDS, SECONDS = 6, 2, 0.8
"""Steps before the clock runs, turns of each row, and how long a turn lasts."""

RATE, MOMENTUM = 1e-3, 0.9
STEPS = 1_000_000
"""More than any turn takes."""

Turn = Callable[[nn.Module, "Batches", float], float]
"""Trains a model for some seconds, and gives the images a second."""


class Batches(Dataset[Any]):
    """The same batch again and again, whole: it lies on the device, and nothing is decoded, collated or copied.

    Args:
        images: [B, 3, side, side].
        labels: [B].
    """

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.batch = {"images": images, "labels": labels}

    def __len__(self) -> int:
        return STEPS * len(self.batch["labels"])

    def __getitems__(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """The batch, whatever is asked for; torch's DataLoader asks for a whole batch at once."""
        return self.batch


class WithLoss(nn.Module):
    """A network with the loss that Trainer expects of it.

    Args:
        model: From images to scores, or to an output object that has them.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """The mean loss of a batch."""
        output = self.model(images)
        logits = output if isinstance(output, Tensor) else output.logits
        return {"loss": cross_entropy(logits.float(), labels)}


class Enough(Exception):
    """A turn is over: nothing is saved, drawn or evaluated."""


class Clock(TrainerCallback):
    """Times steps once the first are taken, and ends training when its seconds are up.

    Args:
        seconds: How long; at least two steps.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds, self.steps_a_second = seconds, 0.0
        self._start = 0.0

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Look at the clock.

        Raises:
            Enough: The time is up.
        """
        self.tick(state.global_step)

    def tick(self, step: int) -> None:
        """As `on_step_end`.

        Args:
            step: How many were taken.

        Raises:
            Enough: The time is up.
        """
        if step == WARMUP:
            sync()
            self._start = time.perf_counter()
        elif step >= WARMUP + 2 and time.perf_counter() - self._start > self.seconds:
            sync()
            self.steps_a_second = (step - WARMUP) / (time.perf_counter() - self._start)
            raise Enough


def trainer(tiny: bool) -> Figures:
    """Images a second of `ClarsTrainer` with each method, over those of Trainer with torch's Nesterov SGD.

    Same model, same batch, bf16 on a GPU; the rows take turns. SGD also runs in a loop of its own without any Trainer.

    Args:
        tiny: Small sizes.

    Returns:
        {network: {row: figures, or its error}}.
    """
    if torch.cuda.device_count() > 1:
        return {"skipped": "Trainer would split batches over all GPUs: show one, by CUDA_VISIBLE_DEVICES=0"}
    figures: Figures = {}
    for name in ("resnet8 B2048", "resnet50 B256"):
        spec = NETWORKS[name]
        torch.manual_seed(0)
        with torch.device(device()):
            model = WithLoss(spec.build(tiny)).train().to(memory_format=torch.channels_last)
            inputs, labels = spec.inputs(tiny, 4 if tiny else spec.batch)
        (images,) = inputs.values()
        batches = Batches(images.contiguous(memory_format=torch.channels_last), labels)
        rows = figures[name] = {}
        measure(model, batches, rows, partial(so_far, figures), tiny=tiny)
    return figures


def measure(model: nn.Module, batches: Batches, rows: Figures, say: Callable[[], None], *, tiny: bool) -> None:
    """Measure one network. A row that fails has its error; the others go on.

    Args:
        model: Copied for each turn.
        batches: What it is trained on.
        rows: Filled: {row: figures}.
        say: Called whenever there is more in them.
        tiny: Only show that it runs.
    """
    speeds: dict[str, list[float]] = {name: [] for name in TURNS}
    if len(batches.batch["labels"]) <= DEFAULT_NORM_SAMPLES and not tiny:
        del speeds[SOME]  # they are all
    for _ in range(1 if tiny else ROUNDS):
        for name in list(speeds):
            try:
                speeds[name].append(TURNS[name](copy.deepcopy(model), batches, 0.01 if tiny else SECONDS))
            except Exception as error:  # it found no memory, or a Trainer of another version refuses
                rows[name] = {"error": refusal(error)}
                del speeds[name]
                continue
            finally:
                gc.collect()
            rows[name] = {"images a second": statistics.median(speeds[name]), "turns": len(speeds[name])}
            if plain := speeds.get(PLAIN):
                each = [own / other for own, other in zip(speeds[name], plain, strict=True)]
                rows[name]["of Trainer's"] = statistics.median(each)
            say()


# ---- the rows ------------------------------------------------------------------------------------------------


def _bare_loop(model: nn.Module, batches: Batches, seconds: float) -> float:
    optimizer = torch.optim.SGD(model.parameters(), RATE, momentum=MOMENTUM, nesterov=True)
    clock = Clock(seconds)
    with contextlib.suppress(Enough):
        for step in range(1, STEPS):
            with torch.autocast(device().type, torch.bfloat16, enabled=device().type == "cuda"):
                loss = model(**batches.batch)["loss"]
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            clock.tick(step)
    return clock.steps_a_second * len(batches.batch["labels"])


def _trainer(model: nn.Module, batches: Batches, seconds: float) -> float:
    sgd = (torch.optim.SGD, {"lr": RATE, "momentum": MOMENTUM, "nesterov": True})

    def made(folder: str, settings: dict[str, Any], **how: Any) -> Trainer:
        # As in ClarsTrainer gradients are not clipped, and no loss is waited for in each step.
        args = TrainingArguments(folder, max_grad_norm=0.0, logging_nan_inf_filter=False, **settings)
        return Trainer(args=args, optimizer_cls_and_kwargs=sgd, **how)

    return _images_a_second(made, model, batches, seconds)


def _clars_trainer(model: nn.Module, batches: Batches, seconds: float, **method: Any) -> float:
    def made(folder: str, settings: dict[str, Any], **how: Any) -> Trainer:
        return ClarsTrainer(args=ClarsTrainingArguments(folder, **settings, **method), **how)

    return _images_a_second(made, model, batches, seconds)


def _images_a_second(made: Callable[..., Trainer], model: nn.Module, batches: Batches, seconds: float) -> float:
    clock, samples = Clock(seconds), len(batches.batch["labels"])
    settings: dict[str, Any] = {
        "per_device_train_batch_size": samples, "max_steps": STEPS, "learning_rate": RATE,
        "lr_scheduler_type": "constant", "bf16": device().type == "cuda", "use_cpu": device().type == "cpu",
        "dataloader_pin_memory": False, "remove_unused_columns": False, "train_sampling_strategy": "sequential",
        "save_strategy": "no", "report_to": "none", "disable_tqdm": True,
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):  # the figures go to stdout
        how = {"model": model, "train_dataset": batches, "data_collator": _as_it_is, "callbacks": [clock]}
        loop = made(folder, settings, **how)
        with contextlib.suppress(Enough):
            loop.train()
    return clock.steps_a_second * samples


def _as_it_is(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return batch


TURNS: dict[str, Turn] = {
    PLAIN: _trainer,
    LOOP: _bare_loop,
    "ClarsTrainer, nag": partial(_clars_trainer, method="nag"),
    "ClarsTrainer, lars": partial(_clars_trainer, method="lars"),
    SOME: partial(_clars_trainer, method="clars"),
    "ClarsTrainer, clars (every sample)": partial(_clars_trainer, method="clars", norm_samples=0),
}
"""By name. The first is what the others are compared with."""
