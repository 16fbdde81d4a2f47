"""Measure what per-sample gradient norms cost on a GPU: `python scripts/benchmark_gpu.py --help`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a lent machine has no installed package

from hf_clars.bench.gpu.run import main

if __name__ == "__main__":
    sys.exit(main())
