"""Promise: every kernel gives what plain torch gives, in Triton's interpreter on the CPU and on a device alike."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
KINDS = (
    "product",
    "product with bias",
    "gram",
    "convolution_product",
    "convolution_gram",
    "batch_norm",
    "rows",
    "rows with mean",
)
pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")


def compare(every):
    """The lines of the comparison; Triton reads TRITON_INTERPRET when it is imported, so it has its own process."""
    command = [sys.executable, "-m", "tests.kernels.compare", "cpu", "0", str(every)]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=1500)
    assert not done.returncode, done.stderr
    return done.stdout.splitlines()


def check(lines):
    assert [line for line in lines if not line.startswith("ok ")] == []
    for dtype in ("torch.float32", "torch.float16"):
        for kind in KINDS:
            assert any(line.startswith(f"ok {dtype} {kind} (") for line in lines), (dtype, kind)


def test_each_kernel_is_exact_on_a_ninth_of_the_shapes():
    check(compare(every=9))


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_each_kernel_is_exact_on_all_shapes():
    lines = compare(every=1)
    assert len(lines) >= 320
    check(lines)
