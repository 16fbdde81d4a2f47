"""Times and memory, always as ratios to a plain step taken in the same minute."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from tqdm import tqdm

Step = Callable[[], object]


@dataclass(frozen=True)
class Ratio:
    """How many times as long as the plain step: the median over rounds, and the quartiles.

    Attributes:
        median: The middle.
        low: A quarter of the rounds is below.
        high: A quarter of the rounds is above.
    """

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f}-{self.high:.2f})"


def alternate(
    steps: Mapping[str, Step],
    rounds: int,
    *,
    warmup: int = 1,
    prepare: Mapping[str, Step] | None = None,
    label: str = "",
) -> dict[str, list[float]]:
    """Time several steps in turn, so that whatever else the machine does hits all of them alike.

    Args:
        steps: What to time, by name.
        rounds: How often each is timed.
        warmup: Rounds before that which are not counted.
        prepare: What to run, untimed, before a step of that name.
        label: Shown beside the progress bar.

    Returns:
        {name: seconds of each round}.
    """
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    names = list(steps)
    for index in tqdm(range(-warmup, rounds), desc=label, file=sys.stderr, leave=False):
        for place in range(len(names)):
            name = names[(place + index) % len(names)]  # each round begins with another one
            if prepare and name in prepare:
                prepare[name]()
            elapsed = time_of(steps[name])
            if index >= 0:
                seconds[name].append(elapsed)
    return seconds


def time_of(step: Step) -> float:
    """Seconds that a step takes: by the clock, or by CUDA's own events."""
    if not torch.cuda.is_available():
        begin = time.perf_counter()
        step()
        return time.perf_counter() - begin
    torch.cuda.synchronize()
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    step()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1000


def ratio(seconds: Sequence[float], baseline: Sequence[float]) -> Ratio:
    """How many times the baseline's seconds of the same round."""
    each = [own / plain for own, plain in zip(seconds, baseline, strict=True)]
    if len(each) == 1:
        return Ratio(each[0], each[0], each[0])
    low, median, high = statistics.quantiles(each, n=4, method="inclusive")
    return Ratio(median, low, high)


def ratios(seconds: Mapping[str, Sequence[float]], baseline: str = "plain") -> dict[str, Ratio]:
    """{name: ratio to the baseline} of what `alternate` returned."""
    return {name: ratio(own, seconds[baseline]) for name, own in seconds.items()}


def peak_memory(network: str, way: str, *, batch: int, image_size: int, threads: int) -> tuple[dict[str, float], str]:
    """Peak memory of three steps in a fresh process, see `hf_clars.bench.memory`.

    Args:
        network: A name of `NETWORKS`.
        way: A name of `WAYS`.
        batch: Images a step.
        image_size: Side of the images.
        threads: Threads of torch.

    Returns:
        Figures in MiB ("peak" and others), or an empty dict; and why it is empty, in one line.
    """
    command = [sys.executable, "-m", "hf_clars.bench.memory", "--network", network, "--way", way]
    command += ["--batch", str(batch), "--image-size", str(image_size), "--threads", str(threads)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        return {}, f"ended with code {done.returncode}: {last}"[:200]
    figures = json.loads(lines[-1])
    note = figures.pop("note", "")
    return figures, note
