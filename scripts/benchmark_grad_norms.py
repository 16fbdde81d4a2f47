"""Measure what per-sample gradient norms cost: `python scripts/benchmark_grad_norms.py --help`."""

import sys

from hf_clars.cli.bench import main

if __name__ == "__main__":
    sys.exit(main())
