"""Sweep models and layers with PerSampleGradNorms and write docs/coverage.md.

python scripts/sweep_coverage.py                        all that the results do not hold yet
python scripts/sweep_coverage.py --only transformers/Bert timm/ --again
python scripts/sweep_coverage.py --page                 only write the page
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

from benchmarks.coverage.page import word_of, write_page  # noqa: E402
from benchmarks.coverage.sweep import SUITES, load, save, subjects, sweep, verdicts  # noqa: E402


def main() -> None:
    """Parse, sweep, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=[], metavar="START", help="subjects whose name starts like this")
    parser.add_argument("--suites", nargs="*", default=list(SUITES), choices=list(SUITES), help="which lists to sweep")
    parser.add_argument(
        "--again",
        nargs="*",
        metavar="WORD",
        help="sweep once more what has a result; or one of these words of the page",
    )
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "coverage" / "results.json")
    parser.add_argument("--seconds", type=float, default=60, help="processor time for each subject")
    parser.add_argument("--gigabytes", type=float, default=6, help="memory limit for each subject")
    parser.add_argument("--first", nargs="*", default=[], metavar="START", help="subjects to begin with")
    parser.add_argument("--page", action="store_true", help="only write the page from the results")
    parser.add_argument("--no-page", action="store_true", help="leave docs/coverage.md as it is")
    args = parser.parse_args()
    if not args.page:
        names = [n for n in subjects(args.suites) if not args.only or n.startswith(tuple(args.only))]
        names.sort(key=lambda n: not n.startswith(tuple(args.first)))
        if args.again is not None:
            results = load(args.results)
            results["rows"] = {
                k: row
                for k, row in results["rows"].items()
                if k not in names or (args.again and not {word_of(row), *verdicts(row)} & set(args.again))
            }
            save(results, args.results)
        sweep(names, args.results, args.seconds, args.gigabytes, say=lambda line: print(line, flush=True))
    if not args.no_page:
        write_page(load(args.results), ROOT / "docs" / "coverage.md", len(subjects(SUITES)))


if __name__ == "__main__":
    main()
