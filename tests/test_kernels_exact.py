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
    *(f"convolution_product{kind}" for kind in ("", " grouped", " depthwise")),
    *(f"convolution_gram{kind}" for kind in ("", " grouped")),
    "batch_norm",
    "batch_norm sums",
    "group_norm",
    "group_norm sums",
    "rows",
    "rows with mean",
    "rms_norm",
)
KERNELS = (
    *(f"linear.{name}" for name in ("_product", "_product_tma", "_gram")),
    *(f"convolution.{name}" for name in ("_product", "_product_flat", "_depthwise", "_gram")),
    *(f"normalization.{name}" for name in ("_channel_sums", "_channel_dx", "_row_sums", "_root_mean_square_dx")),
)
pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")


def run(*command, interpret):
    """The lines that a module prints; Triton reads TRITON_INTERPRET when it is imported, so it has its own process."""
    command = [sys.executable, "-m", *command]
    environment = {**os.environ, "TRITON_INTERPRET": str(interpret)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=1500)
    assert not done.returncode, done.stdout[-6000:] + done.stderr[-6000:]
    return done.stdout.splitlines()


@pytest.fixture(scope="module")
def interpreted():
    """What is printed where the interpreter runs a few shapes of each kind, and then the promises that need it."""
    return run("tests.kernels.interpreted", "15", interpret=1)


def check(lines):
    assert [line for line in lines if not line.startswith("ok ")] == []
    for dtype in ("torch.float32", "torch.float16"):
        for kind in KINDS:
            assert any(line.startswith(f"ok {dtype} {kind} (") for line in lines), (dtype, kind)


@pytest.mark.timeout(1800)
def test_each_kernel_is_exact_on_a_few_shapes_of_each_kind(interpreted):
    check([line for line in interpreted if line.startswith(("ok ", "WRONG "))])


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_each_kernel_is_exact_on_all_shapes():
    lines = run("tests.kernels.compare", "cpu", "0", "1", interpret=1)
    assert len(lines) == 450  # tensors that the cases give; the order of random numbers is fixed
    check(lines)


@pytest.mark.timeout(1800)
def test_what_needs_the_interpreter_holds(interpreted):
    """The process has ended well, and pytest's last line is what it should be."""
    assert " passed" in interpreted[-1]


def check_compiled(*pairs):
    lines = run("tests.kernels.compiles", *pairs, interpret=0)
    for kernel in KERNELS:
        for capability, dtype in (pair.split(":") for pair in pairs):
            if kernel != "linear._product_tma" or (int(capability) >= 90 and dtype != "fp32"):
                assert any(line.startswith(f"ok sm_{capability} {dtype} {kernel}: ") for line in lines), kernel


@pytest.mark.timeout(600)
def test_each_kernel_compiles_for_a_device():
    check_compiled("90:bf16")


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_each_kernel_compiles_for_older_devices_and_other_precisions():
    check_compiled("75:fp16", "80:fp16", "80:fp32", "90:fp16", "90:fp32")
