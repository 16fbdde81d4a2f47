"""Train an image classifier: `accelerate launch scripts/train_imagenet.py --config configs/quickstart.yaml`."""

import sys

from hf_clars.errors import HfClarsError
from hf_clars.trainer.image_classification import parse_run, train_image_classifier
from hf_clars.trainer.stopping import RESUME_ME, RunInterruptedError


def main() -> int:
    """Run, and turn an error that the user can mend into one paragraph and exit code 2; 75: stopped, to be resumed."""
    try:
        train_image_classifier(parse_run())
    except RunInterruptedError as stopped:
        print(f"stopped: {stopped}", file=sys.stderr)
        return RESUME_ME
    except HfClarsError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
