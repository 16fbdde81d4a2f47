"""Write the card of a finished run again: `python scripts/write_card.py RUN --license apache-2.0 --overwrite`."""

import sys

from hf_clars.cli.card import main

if __name__ == "__main__":
    sys.exit(main())
