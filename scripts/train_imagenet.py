"""Train an image classifier: `accelerate launch scripts/train_imagenet.py --config configs/quickstart.yaml`."""

import sys

from hf_clars.cli.train import main

if __name__ == "__main__":
    sys.exit(main())
