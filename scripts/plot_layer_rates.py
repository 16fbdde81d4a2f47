"""Draw runs: `python scripts/plot_layer_rates.py RUN [RUN ...]`; `--help` lists what and how."""

import sys

from hf_clars.plots.command import main

if __name__ == "__main__":
    sys.exit(main())
