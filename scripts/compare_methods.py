"""Compare methods at an equal tuning budget: `python scripts/compare_methods.py --help`."""

import argparse
import os
import sys
from pathlib import Path

from hf_clars.errors import HfClarsError
from hf_clars.study.driver import run_study
from hf_clars.study.plan import read_study

DESCRIPTION = """\
Do the runs of a study, all of them kept: one small file a run in the results folder, under a key of its settings. A
finished run is never done again; stop at any time, and start the same command to go on, here or in several processes
or on several machines that share the folder.

  python scripts/compare_methods.py --config configs/study/fashion_mnist.yaml --data DATA --jobs 2
"""


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True, help="the study, see configs/study")
    parser.add_argument("--results", type=Path, metavar="DIR", help="results folder (default: runs/NAME OF CONFIG)")
    parser.add_argument(
        "--data",
        type=Path,
        metavar="DIR",
        help="a folder that holds the config's data set under its name; or any data set, used instead of the config's",
    )
    parser.add_argument("--networks", nargs="+", default=[], metavar="NAME", help="only these of the config")
    parser.add_argument("--jobs", type=int, default=1, help="processes that share the cores (default: 1)")
    args = parser.parse_args()
    if not 1 <= args.jobs <= (os.cpu_count() or 1):
        parser.error(f"--jobs must be between 1 and the {os.cpu_count()} cores of this machine")
    args.results = args.results or Path("runs") / args.config.stem
    return args


def main() -> int:
    """Run; an error that the user can mend is one paragraph and exit code 2."""
    args = parse()
    try:
        study = read_study(args.config, networks=args.networks)
        run_study(study, args.results, data=args.data, jobs=args.jobs)
    except HfClarsError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
