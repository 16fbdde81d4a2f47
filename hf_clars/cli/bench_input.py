"""Measure how fast images come from this library's loader: `hf-clars bench-input`."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import datasets
import torch

from hf_clars.bench.input import InputRow, measure, memory_over_an_epoch
from hf_clars.bench.jpegs import write_images
from hf_clars.bench.report import machine, save_json, text_table

DESCRIPTION = """\
Images a second of this library's training loader (random resized crop to 224, flip), on generated JPEG files of
500 x 375, quality 90, about 100 kB each, beside

  - the limit: bare decoding of the same whole files on the same cores, by three decoders;
  - a torchvision ImageFolder loader, and timm's training loader, with the same crops and flips.

All take turns over the same files, with the same number of worker processes. "of limit" is the speed as a part of that
of Pillow's bare decoding, which the other loaders use; a loader that decodes only the rows that a crop needs can do
better than 1. "CPU" is processor time an image, over all processes: on a machine that does other things too it is the
steadier figure.
"""

COLUMNS = {
    "way": lambda row: row.way,
    "images/s": lambda row: f"{row.speed:.0f}" if row.speed else "",
    "of limit": lambda row: row.of_limit,
    "CPU ms": lambda row: row.cpu_milliseconds,
    "of limit, by CPU": lambda row: row.cpu_of_limit,
    "what it does": lambda row: row.note,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Print the machine, the table, and the memory over an epoch."""
    parser = argparse.ArgumentParser(description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=2000, help="files, 100 kB each (default: 2000)")
    parser.add_argument("--rounds", type=int, default=5, help="timed epochs of each loader (default: 5)")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes (default: one a core)")
    parser.add_argument("--batch", type=int, default=64, help="images a batch (default: 64)")
    parser.add_argument("--output", type=Path, metavar="DIR", help="also keep the figures as JSON there")
    args = parser.parse_args(argv)
    if min(args.images, args.rounds, args.workers, args.batch) < 1:
        parser.error("--images, --rounds, --workers and --batch must be at least 1")
    torch.set_num_threads(1)  # one core a worker, and none for more
    datasets.disable_progress_bars()
    print("# How fast images come\n")
    for name, value in machine().items():
        print(f"- {name}: {value}")
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        files = write_images(root, args.images)
        size = sum(file.stat().st_size for file in files) / len(files) / 1000
        print(f"- files: {len(files)} of {size:.0f} kB; {args.workers} workers, {args.rounds} epochs each\n")
        held = memory_over_an_epoch(root, workers=args.workers, batch=args.batch)
        rows: Sequence[InputRow] = measure(root, files, workers=args.workers, batch=args.batch, rounds=args.rounds)
    print(text_table(rows, COLUMNS))
    print(f"\nMemory of hf_clars over an epoch (MiB): {', '.join(f'{value:.0f}' for value in held)}")
    if args.output is not None:
        print(f"Figures: {save_json(args.output, 'input', rows)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
