"""What the measuring costs a run: `python -m benchmarks.callback_cost --help`.

One model is trained in one process, in segments that take turns: watched by `NormMonitor`, which the callback drives,
and not. What a segment costs is its processor time, so that other work on the machine counts less.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from hf_clars.bench.report import machine, text_table
from hf_clars.models import build_model
from hf_clars.per_sample import NormMonitor

DESCRIPTION = """\
Processor time of training steps that are watched, as a part of that of as many that are not: the median over pairs of
segments, and the quartiles. Sums are checked as usual, in the first three measured steps: "to begin" is what these cost
more than plain ones, once in a run, in plain steps. Data are random numbers: the cost does not depend on them.
"""
WAYS: dict[str, tuple[dict[str, Any], int]] = {
    "between measured steps": ({"every": 10**9}, 10),
    "every=50": ({"every": 50}, 50),
    "every=1": ({"every": 1}, 10),
    "every=1, norm layers": ({"every": 1, "norm_layers_only": True}, 10),
}
"""Settings of the monitor, and the steps of a segment."""
Batch = dict[str, Tensor]


def gpt2(batch: int, words: int, tokens: int, **sizes: Any) -> tuple[nn.Module, Batch]:
    """GPT-2 with a tied head of so many words, on texts of so many tokens."""
    special: dict[str, Any] = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    model = GPT2LMHeadModel(GPT2Config(vocab_size=words, n_positions=tokens, **special, **sizes))
    ids = torch.randint(0, words, (batch, tokens))
    return model, {"input_ids": ids, "labels": ids}


def images(batch: int, name: str, size: int) -> tuple[nn.Module, Batch]:
    """A network of `build_model` on colour images of so many pixels a side."""
    model = build_model(name, num_labels=10, num_channels=3, image_size=size)
    return model, {"pixel_values": torch.randn(batch, 3, size, size), "labels": torch.randint(0, 10, (batch,))}


NETWORKS: dict[str, Callable[[int], tuple[nn.Module, Batch]]] = {
    "resnet20": partial(images, name="resnet20", size=32),
    "gpt2": partial(gpt2, words=2048, tokens=64, n_embd=128, n_layer=2, n_head=4),
    "resnet-50": partial(images, name="resnet-50", size=128),
    "gpt2-small": partial(gpt2, words=50257, tokens=256),
}
"""By name, from the samples of a batch: two small ones, and two of real size, for which `--segment 2` is enough."""


class Run:
    """A model, its batch and its optimizer.

    Args:
        network: A name of `NETWORKS`.
        batch: Samples a step.
    """

    def __init__(self, network: str, batch: int) -> None:
        torch.manual_seed(0)
        self.model, self.batch = NETWORKS[network](batch)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4)
        self.model.train()

    def seconds(self, monitor: NormMonitor | None, steps: int) -> float:
        """Processor time of a segment."""
        begun = time.process_time()
        for _ in range(steps):
            with nullcontext() if monitor is None else monitor.batch():
                self.model(**self.batch)["loss"].backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
        return time.process_time() - begun


def rows_of(network: str, batch: int, rounds: int, ways: Sequence[str], segment: int) -> Iterator[tuple[str, ...]]:
    """The lines of one network; a `segment` of 0 steps leaves to each way how many it has."""
    run = Run(network, batch)
    run.seconds(None, 2)
    for name in ways:
        settings, steps = WAYS[name]
        steps = segment or steps
        with NormMonitor(run.model, strict=True, **settings) as monitor:
            begins = [_measured(run, monitor) for _ in range(3)]
            watched: list[float] = []
            plain: list[float] = []
            for turn in range(rounds):  # between two segments the monitor is off the model
                for which in (plain, watched) if turn % 2 else (watched, plain):
                    which.append(run.seconds(monitor if which is watched else None, steps))
        step = statistics.median(plain) / steps
        low, middle, high = statistics.quantiles([a / b for a, b in zip(watched, plain, strict=True)], n=4)
        start = f"{sum(begins) / step - 3:.1f}"
        yield network, name, f"{1000 * step:.1f}", f"{middle:.3f}", f"{low:.3f} to {high:.3f}", start


def _measured(run: Run, monitor: NormMonitor) -> float:
    """Processor time of a step that is measured, whatever `every` says."""
    before, monitor.step = monitor.step, 0
    seconds = run.seconds(monitor, 1)
    monitor.step = before + 1
    return seconds


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20, help="pairs of segments of each kind (default: 20)")
    parser.add_argument("--batch", type=int, default=64, help="samples a step (default: 64)")
    parser.add_argument("--segment", type=int, default=0, help="steps a segment (default: 10, or 50 for every=50)")
    parser.add_argument("--networks", nargs="+", choices=list(NETWORKS), default=["resnet20", "gpt2"])
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for network in arguments.networks:
        for row in rows_of(network, arguments.batch, arguments.rounds, arguments.ways, arguments.segment):
            print(*row, sep=", ", file=sys.stderr, flush=True)  # a long run that is stopped has shown something
            rows.append(row)
    heads = ("network", "monitor", "plain step, ms", "ratio", "quartiles", "to begin")
    print(text_table(rows, {head: lambda row, i=i: row[i] for i, head in enumerate(heads)}))  # type: ignore[misc]
    print(", ".join(f"{name}: {value}" for name, value in machine().items()))


if __name__ == "__main__":
    main()
