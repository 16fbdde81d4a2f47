"""`hf-clars COMMAND ...`: every command is a module of `hf_clars.cli` with a `main(argv) -> int`."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from importlib import import_module

from hf_clars.errors import HfClarsError
from hf_clars.extras import MissingExtraError, needing_an_extra
from hf_clars.version import __version__

Main = Callable[..., int]

COMMANDS = {  # name: (module, what it does)
    "train": ("hf_clars.cli.train", "train an image classifier from a YAML file and flags"),
    "plot": ("hf_clars.plots.command", "draw runs: layer rates, curves, an interactive page"),
    "explain": ("hf_clars.cli.explain", "say how the norms of a model's parameters are measured"),
    "advise": ("hf_clars.cli.advise", "say which batch size a run could have used"),
    "card": ("hf_clars.cli.card", "write a finished run's model card again, with other facts"),
    "push": ("hf_clars.cli.push", "put a finished run on the Hugging Face Hub"),
    "bench": ("hf_clars.cli.bench", "measure what per-sample gradient norms cost on this machine"),
    "bench-input": ("hf_clars.cli.bench_input", "measure how fast images come, beside other loaders"),
}
"""In the order of the help. Modules are imported only when their command is called."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: Its name and arguments; None: those of the process.

    Returns:
        The exit code: 0, or 2 after an error that the user can mend.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_help())
        return 0
    if arguments[0] == "--version":
        print(f"hf_clars {__version__}")
        return 0
    name = arguments[0]
    if name not in COMMANDS:
        near = get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(COMMANDS)}."
        print(f"error: there is no command {name!r}; {hint} `hf-clars --help` explains them.", file=sys.stderr)
        return 2
    sys.argv = [f"hf-clars {name}", *arguments[1:]]  # argparse shows this as the program's name
    return _run(name, arguments[1:])


def _run(name: str, arguments: Sequence[str]) -> int:
    try:
        with needing_an_extra(f"`hf-clars {name}`"):
            command: Main = import_module(COMMANDS[name][0]).main
    except MissingExtraError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    try:
        code = command(arguments)
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # whoever read it, as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more at its end
        return 1


def reporting(command: Main) -> Main:
    """Turn an error that the user can mend into one paragraph on stderr and exit code 2.

    Args:
        command: A command's `main`.

    Returns:
        The same, reporting.
    """

    def run(argv: Sequence[str] | None = None) -> int:
        try:
            return command(argv)
        except HfClarsError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2

    run.__doc__ = command.__doc__
    return run


def _help() -> str:
    lines = [f"  {name:<12} {text}" for name, (_, text) in COMMANDS.items()]
    return "\n".join(
        [
            "hf-clars COMMAND [...]",
            "",
            "Large-batch training without warmup, and exact per-sample gradient norms.",
            "",
            *lines,
            "",
            "`hf-clars COMMAND --help` explains one. To train with several processes:",
            "`accelerate launch --module hf_clars.cli.train --config FILE.yaml`.",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
