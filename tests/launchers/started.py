"""One launch of two processes for each launcher, which computes what the tests of several files look at."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.launchers import forked
from tests.launchers.cases import CHECKPOINTED, MIDDLE, Case, run, save_weights

ROOT = Path(__file__).parent.parent.parent
LAUNCHERS = ("ddp", "zero1", "zero2", "zero3", "fsdp2")
GROUP = pytest.mark.xdist_group("launchers")  # the files that share the launches
_MADE: dict[str, Path] = {}


def skip_without_engine(name):
    if name.startswith("zero"):
        pytest.importorskip("deepspeed", reason="DeepSpeed is not installed: pip install 'hf_clars[deepspeed]'")


def launch(name, module, *arguments, processes=2, seconds=560, fork=False):
    """Run a module of the tests under a launcher, in processes of its own or in forks; returns what it printed."""
    skip_without_engine(name)
    words = ["--config_file", f"configs/accelerate/{name}.yaml", "--num_processes", str(processes)]
    words += ["--main_process_port", "0", "-m", module, *map(str, arguments)]
    if fork:
        return forked.launch(words, seconds)
    command = [sys.executable, "-m", "accelerate.commands.launch", *words]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    # DeepSpeed builds a small library with ninja, which pip has put beside the interpreter.
    environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=seconds, check=False
    )
    assert done.returncode == 0, done.stderr[-6000:]
    return done.stdout


def uninterrupted(tmp_path_factory):
    """The folder of one process from start to end, with a checkpoint in the middle; made once."""
    if "one" not in _MADE:
        folder = tmp_path_factory.mktemp("one")
        trainer = run(Case(*CHECKPOINTED[0]), folder, 1, save_strategy="steps", save_steps=MIDDLE)
        save_weights(trainer.model.state_dict(), folder)
        _MADE["one"] = folder
    return _MADE["one"]


def launched(name, tmp_path_factory):
    """The folder of everything that `worker.py` trains under a launcher; made once."""
    skip_without_engine(name)
    if name not in _MADE:
        out = tmp_path_factory.mktemp(name)
        _MADE[name] = out
        one = uninterrupted(tmp_path_factory)
        launch(name, "tests.launchers.worker", out, name, "usual", one, fork=name != "ddp")
        (out / "complete").touch()
    assert (_MADE[name] / "complete").exists(), "the launch has failed, as an earlier test shows"
    return _MADE[name]
