"""Train an image classifier: `hf-clars train --config FILE.yaml`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from hf_clars.cli.commands import reporting
from hf_clars.image_classification.run import parse_run, train_image_classifier
from hf_clars.trainer.stopping import RESUME_ME, RunInterruptedError


@reporting
def main(argv: Sequence[str] | None = None) -> int:
    """Train, and leave model, card, log and picture in the output folder; 75: stopped, to be resumed."""
    try:
        train_image_classifier(parse_run(argv))
    except RunInterruptedError as stopped:
        print(f"stopped: {stopped}", file=sys.stderr)
        return RESUME_ME
    return 0


if __name__ == "__main__":
    sys.exit(main())
