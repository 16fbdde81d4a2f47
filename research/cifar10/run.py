"""Many runs side by side on one device, most important first: `python -m research.cifar10.run --help`."""

from __future__ import annotations

import argparse
import io
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.multiprocessing as mp

from research.cifar10.plan import PARTS, Done, stages, stages_of
from research.cifar10.settings import Settings
from research.cifar10.train import Images, train

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


def _worker(folder: Path, tasks: Any, results: Any) -> None:
    torch.set_num_threads(1)
    images = _images(folder)
    while (settings := tasks.get()) is not None:
        try:
            results.put(train(settings, images))
        except Exception as error:
            results.put({**asdict(settings), "error": repr(error)[:500]})


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
    context = mp.get_context("spawn")
    tasks, results = context.Queue(), context.Queue()
    processes = [context.Process(target=_worker, args=(work, tasks, results), daemon=True) for _ in range(workers)]
    for process in processes:
        process.start()
    pending, count = 0, 0

    def collect(until: int) -> None:
        nonlocal pending, count
        while pending > until and time.monotonic() - begun < seconds:
            try:
                result = results.get(timeout=2)
            except Exception:
                continue
            pending, count = pending - 1, count + 1
            done.add(result)
            with out.open("a", encoding="utf-8") as file:
                file.write(json.dumps(result) + "\n")
            shown = {
                k: result.get(k)
                for k in ("network", "batch", "method", "n", "warmup", "rate", "seed", "accuracy", "error")
            }
            print(f"{time.monotonic() - begun:6.1f} {shown}", flush=True)

    for stage in todo:
        for settings in stage(done):
            tasks.put(settings)
            pending += 1
        collect(workers // 2)  # the next stage is chosen by what this one found, with few processes idle
    collect(0)
    for process in processes:
        process.terminate()
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
