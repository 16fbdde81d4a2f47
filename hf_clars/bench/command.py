"""The command line of the pages: `hf-clars bench --help`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from hf_clars.bench.networks import LARGE, NETWORKS
from hf_clars.bench.pages import PAGES, Settings
from hf_clars.bench.report import machine

DESCRIPTION = """\
What per-sample gradient norms cost, with hf_clars and with other libraries, as a multiple of the plain forward and
backward pass of the same model. All ways take turns in one process, so that whatever else the machine does hits all
alike; a way that refuses a network, or computes other norms, is listed with the reason instead of a time.

pages:
  cost       time of every way, for every network
  memory     peak memory of every way, each in a process of its own
  optimizer  the optimizer step alone, on resnet-50, against torch's SGD
  subset     norms of the first 512 samples of an accumulated batch of 16384 (resnet20)
  growth     the time ratio of hf_clars against batch, image size, width and depth, and where each form wins
  layers     the cost model: predicted and measured time of the forms, for every layer
  overhead   the engine's own time on tiny tensors, in microseconds a layer and pass, for each kind of layer
  compiled   norms in models compiled as a whole, against the compiled plain model (minutes of compiling: ask for it)

Networks whose name ends in -gn have GroupNorm for BatchNorm, which other libraries do not support.
Tables go to standard output, raw figures and pictures to the output folder; pages measured earlier stay in its JSON.
`hf-clars bench --gpu` runs the kit for a GPU in its place; `hf-clars bench --gpu --help` has its settings.
For other libraries: pip install 'hf_clars[bench]'
"""


NETWORKS_HELP = f"for cost, memory, layers and compiled: {', '.join(NETWORKS)} (default: all but {', '.join(LARGE)})"
PAGES_HELP = "what to measure (default: all but compiled)"

# glibc gives freed memory back to the system and takes it anew, page by page, whenever it likes; which of two ways pays
# for that is chance, and on a virtual machine it can be a third of a step. All ways alike keep what they freed instead.
KEEP_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 40), "MALLOC_TOP_PAD_": str(1 << 26)}


def keep_freed_memory() -> None:
    """Start once more with an allocator that keeps freed memory; it reads its settings only at start-up."""
    if sys.platform == "linux" and not any(name in os.environ for name in KEEP_MEMORY):
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, **KEEP_MEMORY})


def parse(argv: Sequence[str] | None) -> tuple[Settings, list[str]]:
    """The settings, and the pages, of the command line."""
    parser = argparse.ArgumentParser(description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--pages", nargs="+", choices=PAGES, default=[p for p in PAGES if p != "compiled"], help=PAGES_HELP
    )
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=[], metavar="NAME", help=NETWORKS_HELP)
    parser.add_argument("--rounds", type=int, default=7, help="how often each thing is timed (default: 7)")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="threads of torch (default: all cores)")
    parser.add_argument("--output", type=Path, default=Path("benchmark"), metavar="DIR", help="(default: benchmark)")
    parser.add_argument("--quick", action="store_true", help="tiny sizes and one round: only shows that all pages run")
    parser.add_argument("--gpu", action="store_true", help="the kit for a GPU, with settings of its own")
    args = parser.parse_args(argv)
    if args.rounds < 1 or args.threads < 1:
        parser.error("--rounds and --threads must be at least 1")
    rounds = 1 if args.quick else args.rounds
    # In the order of the tables, whatever the order on the command line.
    networks = tuple(name for name in NETWORKS if name in args.networks)
    return Settings(networks, rounds, args.threads, args.output, quick=args.quick), [
        p for p in PAGES if p in args.pages
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Print the machine, then every page."""
    settings, pages = parse(argv)
    keep_freed_memory()
    torch.set_num_threads(settings.threads)
    print("# What per-sample gradient norms cost\n")
    for name, value in machine().items():
        print(f"- {name}: {value}")
    for page in pages:
        PAGES[page](settings)
    return 0
