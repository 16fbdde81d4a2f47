"""Promise: accelerate's own scripts pass with LARS and NAG wherever they pass with torch's optimizers."""

import os
import subprocess
import sys
from functools import cache

import pytest

from tests.suites.checkouts import ROOT

SCRIPTS = {
    # Training on one process, on several, with and without gathered batches: the weights must agree.
    "test_script": "accelerate.test_utils.scripts.test_script",
    # Gradient accumulation, and when gradients are and are not summed over the processes.
    "test_sync": "accelerate.test_utils.scripts.test_sync",
}


def run(script: str, processes: int, stand_in: str) -> tuple[int, str]:
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", f"--num_processes={processes}"]
    launch += ["--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no", "--num_cpu_threads_per_process=1"]
    environment = os.environ | {"HF_CLARS_STAND_IN": stand_in, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [*launch, "-m", "tests.suites.stand_in", SCRIPTS[script]],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=800,
    )
    return done.returncode, (done.stdout + done.stderr)[-3000:]


@cache
def baseline(script: str, processes: int) -> tuple[int, str]:
    return run(script, processes, "")


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("stand_in", ["lars", "nag"])
@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("script", SCRIPTS)
def test_script(script, processes, stand_in):
    code, said = baseline(script, processes)
    if code:
        pytest.skip(f"{script} fails here with torch's own optimizers: {said.strip().splitlines()[-1]}")
    code, said = run(script, processes, stand_in)
    assert code == 0, said
