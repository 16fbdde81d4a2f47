"""Compare methods at an equal tuning budget: `python -m research.compare_methods --help`."""

import argparse
import os
import sys
from pathlib import Path

import torch

from hf_clars.errors import ConfigError, HfClarsError
from research.study.driver import run_study
from research.study.images import MemoryImages, open_images
from research.study.plan import Study
from research.study.report_files import write_report
from research.study.speed import speed_against_bare_loop
from research.study.study_file import read_study

DESCRIPTION = """\
Do the runs of a study, all of them kept: one small file a run in the results folder, under a key of its settings. A
finished run is never done again; stop at any time, and start the same command to go on, here, in several processes, or
on several machines that share the folder. At the end (or at any time, with --report-only) all runs go to one parquet
file, with pictures and tables.

  python -m research.compare_methods --config configs/study/fashion_mnist.yaml --data DATA --jobs 2 --report REPORT
  python -m research.compare_methods --config configs/study/figure3.yaml                   # the paper's, on CIFAR-100
  python -m research.compare_methods --config configs/study/figure3.yaml --data DATA/mnist   # the same on another set
"""


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, nargs="+", required=True, help="one study or more, see configs/study")
    parser.add_argument("--results", type=Path, metavar="DIR", help="results folder (default: runs/NAME OF CONFIG)")
    parser.add_argument(
        "--data",
        type=Path,
        metavar="DIR",
        help="a folder that holds the config's data set under its name; or any data set, used instead of the config's",
    )
    parser.add_argument("--networks", nargs="+", default=[], metavar="NAME", help="only these of the config")
    parser.add_argument("--jobs", type=int, default=1, help="processes that share the cores (default: 1)")
    parser.add_argument(
        "--report", type=Path, metavar="DIR", help="write parquet, pictures and tables there at the end"
    )
    parser.add_argument("--report-only", action="store_true", help="write the report of what is finished, and end")
    parser.add_argument("--speed", action="store_true", help="compare the speed with a bare PyTorch loop, and end")
    parser.add_argument("--rounds", type=int, default=15, help="updates that --speed times (default: 15)")
    args = parser.parse_args()
    if not 1 <= args.jobs <= (os.cpu_count() or 1):
        parser.error(f"--jobs must be between 1 and the {os.cpu_count()} cores of this machine")
    args.results = args.results or Path("runs") / args.config[0].stem
    if args.report_only and args.report is None:
        args.report = args.results / "report"
    return args


def read(path: Path, args: argparse.Namespace) -> Study:
    """A study of the command line, on the data that it names."""
    study = read_study(path, networks=args.networks)
    names = {arm.base.dataset.rpartition("/")[2] for arm in study.arms}
    if args.data is None or args.data.name in names or all((args.data / name).is_dir() for name in names):
        return study
    return read_study(path, networks=args.networks, dataset=args.data.name)


def print_speed(study: Study, args: argparse.Namespace) -> None:
    """The loop's speed on each network, in one thread and in all."""
    for group in study.groups:
        settings = group[0].base
        images = open_images(settings, args.data, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
        if not isinstance(images, MemoryImages):
            raise ConfigError("--speed is about sets that are held in memory: this config has in_memory: false.")
        for threads in sorted({1, os.cpu_count() or 1}):
            torch.set_num_threads(threads)
            share = speed_against_bare_loop(settings, images, rounds=args.rounds)
            where = f"{group[0].network}, B = {settings.batch_size:,}, {threads} thread{'s' if threads > 1 else ''}"
            print(
                f"{where}: {share} of the speed of a bare PyTorch loop (median and quartiles of {args.rounds} updates)"
            )


def main() -> int:
    """Run; an error that the user can mend is one paragraph and exit code 2."""
    args = parse()
    try:
        studies = [read(path, args) for path in args.config]
        if args.speed:
            for study in studies:
                print_speed(study, args)
            return 0
        if not args.report_only:
            for study in studies:
                run_study(study, args.results, data=args.data, jobs=args.jobs)
        if args.report is not None:
            for file in write_report(studies, args.results, args.report):
                print(file)
    except HfClarsError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
