"""Write the card of a finished run again: `hf-clars card RUN --license apache-2.0`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from hf_clars.cli.commands import reporting
from hf_clars.hub import HubError, read_facts, write_card
from hf_clars.hub.run_files import CARD

DESCRIPTION = """\
Write README.md, the model card of a finished run, from the facts that training left in run_summary.json and the
pictures that the folder holds now; --license and the other flags replace a fact.
"""


@reporting
def main(argv: Sequence[str] | None = None) -> int:
    """Write the card."""
    parser = argparse.ArgumentParser(description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", metavar="RUN", help="folder of the run (its --output_dir)")
    parser.add_argument("--title", help="title of the card")
    parser.add_argument("--license", help="licence of the weights, as the Hub lists them: apache-2.0, mit, ...")
    parser.add_argument("--repo-id", metavar="OWNER/NAME", help="repository that the code of the card loads from")
    parser.add_argument("--base-model", metavar="OWNER/NAME", help="model on the Hub that training started from")
    parser.add_argument("--dataset-id", metavar="OWNER/NAME", help="data set on the Hub that it was trained on")
    parser.add_argument("--eval-task", help="task in the eval.yaml of that data set, if it is a benchmark")
    parser.add_argument("--batch-advice", action="store_true", help="say what batch size the run could have used")
    parser.add_argument("--overwrite", action="store_true", help="replace the card that is there")
    args = parser.parse_args(argv)
    card = Path(args.run).expanduser() / CARD
    if card.exists() and not args.overwrite:
        raise HubError(f"{card} exists, and might have been edited: replace it with --overwrite, or move it away.")
    facts = read_facts(
        args.run,
        model_name=args.title,
        license=args.license,
        repo_id=args.repo_id,
        base_model=args.base_model,
        dataset_id=args.dataset_id,
        eval_task=args.eval_task,
    )
    print(f"Wrote {write_card(card.parent, facts, batch_advice=args.batch_advice)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
