"""Push a finished run to the Hub: `hf-clars push RUN --repo-id owner/name`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from hf_clars.cli.commands import reporting
from hf_clars.hub import push_run

DESCRIPTION = """\
Put a finished run on the Hugging Face Hub, in one commit: the model (safetensors) and its config, the image processor,
the model card, layer_rates.safetensors, pictures and pages (png, svg, html), .eval_results/*.yaml and all_results.json.
Nothing else of the folder is sent: no checkpoint, no optimizer state, no arguments, no log.

If the connection is lost, the repository stays as it was; run the same command again, and only what is missing is sent.
You need a token that may write: `hf auth login`, or the variable HF_TOKEN.
"""


@reporting
def main(argv: Sequence[str] | None = None) -> int:
    """Push, or show what would be pushed."""
    parser = argparse.ArgumentParser(description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", metavar="RUN", help="folder of the run (its --output_dir)")
    parser.add_argument("--repo-id", required=True, metavar="OWNER/NAME", help="repository; made if there is none")
    parser.add_argument("--private", action="store_true", default=None, help="make a new repository private")
    parser.add_argument("--revision", metavar="BRANCH", help="branch to commit to; made if there is none")
    parser.add_argument("--message", default="Upload a model trained with hf_clars", help="title of the commit")
    parser.add_argument("--dry-run", action="store_true", help="only list files and sizes; no token, no network")
    args = parser.parse_args(argv)
    pushed = push_run(
        args.run,
        args.repo_id,
        private=args.private,
        revision=args.revision,
        message=args.message,
        dry_run=args.dry_run,
    )
    print(pushed)
    print(f"Nothing was sent to {pushed.repo_id}." if pushed.commit is None else f"Pushed: {pushed.commit}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
