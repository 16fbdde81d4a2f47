"""Measure how fast images come: `python scripts/benchmark_input.py --help`."""

import sys

from hf_clars.cli.bench_input import main

if __name__ == "__main__":
    sys.exit(main())
