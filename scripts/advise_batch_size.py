"""Which batch size a CLARS run could have used: `python scripts/advise_batch_size.py RUN`; `--help` explains."""

import sys

from hf_clars.cli.advise import main

if __name__ == "__main__":
    sys.exit(main())
