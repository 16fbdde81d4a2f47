"""`hf-clars advise RUN`: which batch size a CLARS run could have used."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from hf_clars.cli.commands import reporting
from hf_clars.theory import advice_table, advise

DESCRIPTION = """\
Estimate, for each layer of a CLARS run, the gradient variance factor M_k early and late in training, and the batch up
to which linear scaling holds by the step-size condition of the paper's Theorem 2 (B <= M_k).

R_k is ||g_k|| / n_k early in training: how far the samples of a batch agree. The estimate reads it and the batch
size from the run's layer-rate log; `hf_clars.theory.advice` has the formula, and what it does not tell.
"""


@reporting
def main(argv: Sequence[str] | None = None) -> int:
    """Print the table.

    Args:
        argv: Arguments; None: those of the process.

    Returns:
        The exit code.
    """
    parser = argparse.ArgumentParser(description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", metavar="RUN", help="a run's folder, or its layer_rates.safetensors")
    parser.add_argument("--all", action="store_true", help="show every layer, not only those that limit")
    parser.add_argument("--batch", type=int, help="the run's global batch (default: as the log says)")
    parser.add_argument(
        "--data-size", type=int, help="number of training samples; give it when the batch is a noticeable part of them"
    )
    parser.add_argument(
        "--window", type=float, default=0.1, help="share of the steps that counts as early, and as late (default: 0.1)"
    )
    args = parser.parse_args(argv)
    advice = advise(args.run, batch=args.batch, data_size=args.data_size, window=args.window)
    print(advice_table(advice, all_layers=args.all))
    return 0
