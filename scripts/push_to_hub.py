"""Push a finished run to the Hub: `python scripts/push_to_hub.py RUN --repo-id owner/name`."""

import sys

from hf_clars.cli.push import main

if __name__ == "__main__":
    sys.exit(main())
