"""`accelerate launch` without the imports: its own words and files, in processes that have imported already.

The command reads its configuration, prepares the environment and starts torch's agent, as it does for users. Only what
the agent starts is a fork that calls a module's `main`, and not an interpreter that would import torch, transformers
and DeepSpeed for ten seconds. Data parallelism is launched as users do it (`started.launch`), so that this is tested
too.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from accelerate.commands import launch as accelerate_launch
from torch.distributed import run as torch_run

import tests.processes  # noqa: F401  what the fork server is to import

ROOT = Path(__file__).parent.parent.parent
_agent = torch_run.elastic_launch


def _call_main(unbuffered: str, as_module: str, module: str, *arguments: str) -> None:
    assert (unbuffered, as_module) == ("-u", "-m")
    importlib.import_module(module).main(*arguments)
    sys.stdout.flush()
    sys.stderr.flush()


def _forking_agent(config: Any, entrypoint: str) -> Any:
    """torch's agent for a command, which forks instead."""
    assert entrypoint == sys.executable
    config.start_method = "fork"
    return _agent(config, _call_main)


def _launch(arguments: list[str], said: str) -> None:
    with open(said, "w") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    os.chdir(ROOT)
    os.environ["OMP_NUM_THREADS"] = "1"
    sys.argv = ["accelerate-launch", *arguments]
    torch_run.elastic_launch = _forking_agent
    accelerate_launch.main()


def launch(arguments: list[str], seconds: int) -> str:
    """Run `accelerate launch` with these arguments; returns what all of its processes printed."""
    with tempfile.TemporaryDirectory() as folder:
        said = Path(folder) / "said"
        process = multiprocessing.get_context("forkserver").Process(target=_launch, args=(arguments, str(said)))
        process.start()
        process.join(seconds)
        if process.is_alive():
            process.terminate()  # the agent ends its processes
            process.join(30)
        text = said.read_text() if said.exists() else ""
        assert process.exitcode == 0, text[-6000:]
        return text
