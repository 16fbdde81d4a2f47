"""Measure what per-sample gradient norms cost: `hf-clars bench --help`, and `hf-clars bench --gpu --help`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from hf_clars.cli.commands import reporting
from hf_clars.extras import needing_an_extra


@reporting
def main(argv: Sequence[str] | None = None) -> int:
    """Run the pages, or the kit for a GPU, which needs no pictures."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if "--gpu" in arguments:
        from hf_clars.bench.gpu.run import main as kit

        return kit([argument for argument in arguments if argument != "--gpu"])
    with needing_an_extra("`hf-clars bench`"):
        from hf_clars.bench.command import main as pages
    return pages(arguments)


if __name__ == "__main__":
    sys.exit(main())
