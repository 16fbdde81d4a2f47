"""The command that draws runs: arguments in, pictures and one line for each file out."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from hf_clars.errors import HfClarsError
from hf_clars.plots.products import Product, draw_comparison, draw_run
from hf_clars.plots.runs import open_runs
from hf_clars.plots.style import SUFFIXES, THEMES, PlotError

DESCRIPTION = """\
Draw what each layer did during training. Each RUN gets, in its own folder:
  layer_rates          rates of all layers over steps, and how much the samples agree (R_k)
  gradient_variance    R_k and 1 / R_k^2, the estimate of M_k, over steps and layers (CLARS only)
  training_curves      loss and accuracy over steps and epochs
  noise_scale          gradient noise scale with its band and share of signal, by layer (per-sample norms only)
and with --html the page layer_rates.html: point at a cell to read its value, choose the quantity, zoom.
With --compare the runs are drawn against each other instead, as ..._compared files in --output.
"""
EPILOG = """\
examples:
  %(prog)s runs/quickstart --html
  %(prog)s runs/clars runs/lars --compare --html --output pictures
A run that is still training can be drawn too. Files are replaced only if this program made them.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Draw, and print what was written.

    Args:
        argv: Arguments; None: those of the process.

    Returns:
        0; 1 if a file could not be written; 2 for a mistake in the arguments. That a run has nothing to show in one
        picture (no R_k, no accuracy) is said, and is no failure.
    """
    arguments = _parser().parse_args(argv)
    try:
        products = _draw(arguments)
    except HfClarsError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for product in products:
        if product.problem is None:
            print(f"{product.path}  ({product.path.stat().st_size / 1e6:.2f} MB)")
        else:
            print(f"{product.path}  not drawn: {product.problem}", file=sys.stderr)
    return 0 if all(product.problem is None or product.missing for product in products) else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=DESCRIPTION, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    kinds = [suffix[1:] for suffix in SUFFIXES]
    parser.add_argument("runs", metavar="RUN", nargs="+", type=Path, help="folder that training wrote (its output_dir)")
    parser.add_argument("--compare", action="store_true", help="draw the runs against each other")
    parser.add_argument("--html", action="store_true", help="write the interactive page too")
    parser.add_argument("--format", nargs="+", choices=kinds, default=["png"], help="of the pictures (default: png)")
    parser.add_argument("--theme", choices=list(THEMES), default="light", help="dark pictures are named ..._dark")
    parser.add_argument(
        "--output", type=Path, help="folder for the files (default: the run's own; with --compare the current one)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace files of these names that others made")
    return parser


def _draw(arguments: argparse.Namespace) -> list[Product]:
    runs = open_runs(arguments.runs)
    output = arguments.output
    if output is None and arguments.compare:
        output = Path()
    if output is not None:
        if len(runs) > 1 and not arguments.compare:
            raise PlotError("Several runs would have the same files in --output: draw one at a time, or --compare.")
        _make_folder(output)
    options = {
        "formats": arguments.format,
        "theme": arguments.theme,
        "page": arguments.html,
        "overwrite": arguments.overwrite,
    }
    if arguments.compare:
        if len(runs) < 2:
            raise PlotError("--compare needs at least two runs.")
        return draw_comparison(runs, output, **options)
    products = []
    for run, place in zip(runs, arguments.runs, strict=True):
        products += draw_run(run, output or (place if place.is_dir() else place.parent), **options)
    return products


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise PlotError(f"The folder {folder} cannot be made: {error}. Choose another --output.") from error
