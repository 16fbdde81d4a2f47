"""Measure the gradient variance factor M_k of each layer (Figure 2): `--help` explains."""

import argparse
import os
import sys
from pathlib import Path

import torch
from tqdm import tqdm

from hf_clars.errors import HfClarsError
from research.plots.variance_factors import plot_variance_factors
from research.study.gradient_variance import VarianceHistory, measure_run, sentence, write_csv
from research.study.images import MemoryImages, open_images
from research.study.settings import RunSettings

DESCRIPTION = """\
Figure 2 of the paper: mNAG at the constant rate 0.001 and B = 128; before training and after each epoch

    M_k = mean_i ||grad_k f_i||^2 / ||mean_i grad_k f_i||^2

over the whole training set, exactly, for every layer. fcn5 and cnn5 (sigmoid) train on MNIST for 10 epochs, resnet8 on
CIFAR-10 for 6, as in the paper, or on any other set that --data-set names. BatchNorm is measured as it trains: in
batches of 128, in the order of the set, a sample's gradient being what reaches the weights through its own use of the
layer. It runs on a GPU if there is one. For each network a csv and a png go to the output folder, and a sentence to
standard output.
"""

PAPER = RunSettings(
    dataset="mnist",
    model="fcn5",
    method="nag",
    batch_size=128,
    micro_batch=128,
    epochs=10,
    learning_rate=0.001,
    schedule="constant",
)
RUNS = {
    "fcn5": PAPER,
    "cnn5": PAPER.replace(model="cnn5"),
    "resnet8": PAPER.replace(model="resnet8", dataset="uoft-cs/cifar10", epochs=6, image_size=32, num_channels=3),
}


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", choices=RUNS, default=list(RUNS), help="(default: all)")
    parser.add_argument("--data", type=Path, metavar="DIR", help="folder with the sets under their names, as parquet")
    parser.add_argument("--data-set", metavar="NAME", help="train on this set instead; grey sets in 28 px")
    parser.add_argument("--output", type=Path, default=Path("runs/figure2"), metavar="DIR", help="(runs/figure2)")
    parser.add_argument("--epochs", type=int, help="instead of the paper's")
    parser.add_argument("--learning-rate", type=float, default=0.001, help="(default: the paper's, 0.001)")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="threads of torch (default: all cores)")
    return parser.parse_args()


def settings_of(name: str, args: argparse.Namespace) -> RunSettings:
    """The paper's settings with what the command line changes."""
    settings = RUNS[name].replace(learning_rate=args.learning_rate)
    if args.data_set:
        settings = settings.replace(dataset=args.data_set)
        if "mnist" in args.data_set:
            settings = settings.replace(image_size=28, num_channels=1)
    return settings if args.epochs is None else settings.replace(epochs=args.epochs)


def measure(name: str, settings: RunSettings, args: argparse.Namespace) -> None:
    """One network: train, measure, write, print."""
    images = open_images(settings, args.data, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    assert isinstance(images, MemoryImages)
    with tqdm(total=settings.epochs + 1, desc=name, unit="measurement") as bar:
        history = measure_run(settings, images, progress=lambda epoch: bar.update() and None)
    args.output.mkdir(parents=True, exist_ok=True)
    write_csv(history, args.output / f"{name}.csv")
    plot_variance_factors(
        args.output / f"{name}.png",
        title=f"{name} on {settings.dataset}: mNAG, rate {settings.rate:g}, B = 128",
        layers=history.layers,
        thin=history.norm_or_bias,
        epochs=history.epochs,
        values=history.stacked(),
    )
    print(sentence(name, history))
    print(cost(images.train_size, history))


def cost(samples: int, history: VarianceHistory) -> str:
    """What the exact measurement took."""
    each = sum(history.measure_seconds) / len(history.measure_seconds)
    return (
        f"    The exact pass over {samples:,} samples took {each:.1f} s, an epoch of training "
        f"{history.train_seconds:.1f} s: {each / history.train_seconds:.2f} epochs. "
        f"Test accuracy after {history.epochs[-1]} epochs: {100 * history.accuracy:.1f} %."
    )


def main() -> int:
    """Measure all networks; an error that the user can mend is one paragraph and exit code 2."""
    args = parse()
    torch.set_num_threads(args.threads)
    try:
        for name in args.networks:
            measure(name, settings_of(name, args), args)
    except HfClarsError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
