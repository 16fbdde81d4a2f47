"""Many runs side by side on one device, most important first: `python -m research.cifar10.run --help`."""

from __future__ import annotations

import argparse
import io
import json
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.multiprocessing as mp

from research.cifar10.plan import PARTS, Done, stages, stages_of
from research.cifar10.settings import Settings
from research.cifar10.train import Images, train

SHOWN = ("network", "batch", "method", "n", "warmup", "rate", "seed", "accuracy", "error")
SPLIT_SEED, TRAINED, HELD_OUT = 0, 45_000, 5_000


def decode(path: Path, *, trained: int, held_out: int, folder: Path) -> None:
    """Decode the parquet of the training split once, and leave it to the workers as arrays.

    Args:
        path: `train-*.parquet` in the Hub's layout.
        trained: Images to train on, of an order that `SPLIT_SEED` fixes.
        held_out: Images to choose by.
        folder: Where to put the arrays.
    """
    import pyarrow.parquet as pq
    from PIL import Image

    table = pq.read_table(path)
    column = "image" if "image" in table.column_names else "img"
    encoded = table[column].to_pylist()
    labels = np.array(table["label"].to_pylist(), dtype=np.int64)
    with ThreadPoolExecutor(16) as pool:
        pictures = list(pool.map(lambda e: np.asarray(Image.open(io.BytesIO(e["bytes"])).convert("RGB")), encoded))
    x, order = np.stack(pictures), np.random.default_rng(SPLIT_SEED).permutation(len(labels))
    first, rest = order[:trained], order[trained : trained + held_out]
    np.save(folder / "x.npy", np.pad(x[first], ((0, 0), (4, 4), (4, 4), (0, 0))))
    for name, array in (("y", labels[first]), ("held_out_x", x[rest]), ("held_out_y", labels[rest])):
        np.save(folder / f"{name}.npy", array)


def _images(folder: Path) -> Images:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    arrays = (np.load(folder / f"{name}.npy") for name in ("x", "y", "held_out_x", "held_out_y"))
    return Images(*(torch.from_numpy(a).to(device) for a in arrays))


def _worker(folder: Path, line: Connection) -> None:
    torch.set_num_threads(1)
    images = _images(folder)
    while True:
        settings = line.recv()
        try:
            line.send(train(settings, images))
        except Exception as error:
            line.send({**asdict(settings), "error": repr(error)[:500]})


class Workers:
    """Processes that do runs, each with a line of its own: one that is killed takes its run along, and nothing else.

    Args:
        folder: Of the decoded data.
        count: How many.
    """

    def __init__(self, folder: Path, count: int) -> None:
        self._folder, self._context = folder, mp.get_context("spawn")
        self._processes: dict[Connection, Any] = {}
        self._free: list[Connection] = []
        self._busy: dict[Connection, Settings] = {}
        self._waiting: deque[Settings] = deque()
        self._deaths = 0
        for _ in range(count):
            self._start()

    def _start(self) -> None:
        here, there = self._context.Pipe()
        process = self._context.Process(target=_worker, args=(self._folder, there), daemon=True)
        process.start()
        there.close()  # so that the line ends with the process
        self._processes[here] = process
        self._free.append(here)

    @property
    def pending(self) -> int:
        """Runs that are not done."""
        return len(self._busy) + len(self._waiting)

    def give(self, runs: Iterable[Settings]) -> None:
        """More runs to do, after those that are waiting."""
        self._waiting.extend(runs)
        self._hand_out()

    def _hand_out(self) -> None:
        while self._free and self._waiting:
            line, settings = self._free.pop(0), self._waiting.popleft()
            self._busy[line] = settings
            with suppress(OSError):  # its process has ended: `results` sees that
                line.send(settings)

    def results(self, seconds: float) -> list[dict[str, Any]]:
        """What has been done by now; waits so long for the first.

        Raises:
            RuntimeError: Process after process ends before a run is done.
        """
        found = []
        for line in wait(list(self._busy), seconds):
            assert isinstance(line, Connection)
            settings = self._busy.pop(line)
            try:
                found.append(line.recv())
                self._free.append(line)
                self._deaths = 0
            except (EOFError, OSError):
                found.append({**asdict(settings), "error": self._bury(line)})
        self._hand_out()
        return found

    def _bury(self, line: Connection) -> str:
        process = self._processes.pop(line)
        process.join()
        line.close()
        self._deaths += 1
        if self._deaths > 2 + len(self._processes):
            raise RuntimeError(
                f"Process after process ended before its run was done, the last with {process.exitcode}."
            )
        self._start()
        return f"its process ended with {process.exitcode}"

    def end(self) -> None:
        """End the processes, whatever they do."""
        for process in self._processes.values():
            process.terminate()


def run_all(
    todo: Iterable[Callable[[Done], list[Settings]]], work: Path, out: Path, *, seconds: float, workers: int
) -> int:
    """Do the stages' runs in several processes; each finished run is a line of `out` at once.

    Args:
        todo: Stages: each makes its runs from those that are done.
        work: Folder with the decoded data.
        out: File to append to; runs that are in it are not done again.
        seconds: When to stop.
        workers: Processes.

    Returns:
        How many runs were done.
    """
    begun, done = time.monotonic(), Done.read([out] if out.exists() else [])
    if out.exists() and not out.read_bytes().endswith(b"\n"):
        with out.open("a", encoding="utf-8") as file:  # a line that was cut off
            file.write("\n")
    at_work, count = Workers(work, workers), 0

    def collect(until: int) -> None:
        nonlocal count
        while at_work.pending > until and time.monotonic() - begun < seconds:
            for result in at_work.results(2.0):
                count += 1
                done.add(result)
                with out.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(result) + "\n")
                shown = {k: result.get(k) for k in SHOWN}
                print(f"{time.monotonic() - begun:6.1f} {shown}", flush=True)

    try:
        for stage in todo:
            at_work.give(stage(done))
            collect(workers // 2)  # the next stage is chosen by what this one found, with few processes idle
        collect(0)
    finally:
        at_work.end()
    return count


def main() -> int:
    """Decode, then run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="the training split's parquet file")
    parser.add_argument("--out", type=Path, required=True, help="file of runs, one JSON a line; appended to")
    parser.add_argument("--seconds", type=float, default=300.0, help="when to stop (default: 300)")
    parser.add_argument("--workers", type=int, default=12, help="processes (default: 12)")
    parser.add_argument("--tiny", action="store_true", help="256 images and one epoch: only shows that it runs")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="of the study (default: all)")
    parser.add_argument("--plan", type=Path, help="a YAML of runs in their order, in place of the whole study")
    args = parser.parse_args()
    begun = time.monotonic()
    todo = stages_of(args.plan) if args.plan else stages(args.parts, tiny=args.tiny)
    sizes = {"trained": 256, "held_out": 64} if args.tiny else {"trained": TRAINED, "held_out": HELD_OUT}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        decode(args.data, **sizes, folder=Path(folder))
        left = args.seconds - (time.monotonic() - begun)
        count = run_all(todo, Path(folder), args.out, seconds=left, workers=args.workers)
    print(f"{count} runs in {time.monotonic() - begun:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
