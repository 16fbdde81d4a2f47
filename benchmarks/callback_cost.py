"""What `PerSampleNormsCallback` costs in a Trainer run: `python -m benchmarks.callback_cost --help`.

Runs of the same Trainer, with the callback and without, take turns in one process. Of each run the processor time of 50
steps is taken, from the end of its first step on: the first one also learns what the model looks like.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel, Trainer, TrainerCallback, TrainingArguments

from hf_clars.bench.report import machine, text_table
from hf_clars.models import build_model
from hf_clars.per_sample import PerSampleNormsCallback

DESCRIPTION = """\
Processor time of 50 training steps with the callback, as a part of the same 50 steps without it: the median over
rounds, and the quartiles. Data are random numbers: the cost does not depend on them.
"""
STEPS = 50
WAYS: dict[str, int | None] = {"plain": None, "every=50": 50, "every=10": 10, "every=1": 1}


class Items(Dataset[dict[str, Tensor]]):
    """Random samples.

    Args:
        item: Makes one.
    """

    def __init__(self, item: Callable[[], dict[str, Tensor]]) -> None:
        self.items = [item() for _ in range(64)]

    def __len__(self) -> int:
        return 4096

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return self.items[i % len(self.items)]


def gpt2() -> tuple[PreTrainedModel, Items]:
    """2 layers of width 128, a tied head of 2,048 words, texts of 64 tokens."""
    sizes: dict[str, Any] = {"vocab_size": 2048, "n_positions": 64, "n_embd": 128, "n_layer": 2, "n_head": 4}
    model = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0, pad_token_id=0))

    def item() -> dict[str, Tensor]:
        ids = torch.randint(0, 2048, (64,))
        return {"input_ids": ids, "labels": ids}

    return model, Items(item)


def resnet() -> tuple[PreTrainedModel, Items]:
    """ResNet-20 on images of Fashion-MNIST's shape."""
    model = build_model("resnet20", num_labels=10, num_channels=1, image_size=28)
    return model, Items(lambda: {"pixel_values": torch.randn(1, 28, 28), "labels": torch.randint(0, 10, ())})


NETWORKS = {"gpt2": gpt2, "resnet20": resnet}


class Clock(TrainerCallback):
    """Takes the processor time of the steps after the first."""

    seconds = 0.0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start after the first step, stop after the last."""
        if state.global_step == 1:
            self.seconds = -time.process_time()
        elif state.global_step == 1 + STEPS:
            self.seconds += time.process_time()


def seconds_of(network: str, every: int | None, batch: int) -> float:
    """Processor seconds of one run's steps."""
    torch.manual_seed(0)
    model, data = NETWORKS[network]()
    clock = Clock()
    measuring = [] if every is None else [PerSampleNormsCallback(every=every, strict=True)]
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            folder,
            per_device_train_batch_size=batch,
            max_steps=1 + STEPS,
            report_to="none",
            disable_tqdm=True,
            save_strategy="no",
            logging_steps=1000,
            remove_unused_columns=False,
            use_cpu=True,
        )
        Trainer(model, args, train_dataset=data, callbacks=[*measuring, clock]).train()
    return clock.seconds


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="runs of each kind (default: 5)")
    parser.add_argument("--batch", type=int, default=8, help="samples a step (default: 8)")
    parser.add_argument("--networks", nargs="+", choices=list(NETWORKS), default=list(NETWORKS))
    arguments = parser.parse_args()
    rows = []
    for network in arguments.networks:
        taken: dict[str, list[float]] = {name: [] for name in WAYS}
        for turn in range(arguments.rounds):
            order = list(WAYS)[turn % len(WAYS) :] + list(WAYS)[: turn % len(WAYS)]
            for name in order:
                taken[name].append(seconds_of(network, WAYS[name], arguments.batch))
        for name in list(WAYS)[1:]:
            ratios = [a / b for a, b in zip(taken[name], taken["plain"], strict=True)]
            low, middle, high = statistics.quantiles(ratios, n=4)
            step = 1000 * statistics.median(taken["plain"]) / STEPS
            rows.append((network, name, f"{step:.0f}", f"{middle:.3f}", f"{low:.3f} to {high:.3f}"))
    heads = ("network", "callback", "plain step, ms", "ratio", "quartiles")
    print(text_table(rows, {head: lambda row, i=i: row[i] for i, head in enumerate(heads)}))  # type: ignore[misc]
    print(", ".join(f"{name}: {value}" for name, value in machine().items()))


if __name__ == "__main__":
    main()
