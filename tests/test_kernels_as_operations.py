"""Promise: each kernel is an operation of torch.library: compilers know its shapes, and without Triton it works."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hf_clars.grad_norms.kernels import operations, reference

ROOT = Path(__file__).parent.parent


def arguments():
    """{operation: arguments}, at least one call of each."""
    torch.manual_seed(0)
    x, g = torch.randn(3, 4, 6), torch.randn(3, 4, 5)
    images, out = torch.randn(3, 4, 5, 6), torch.randn(3, 8, 3, 2)
    settings = ([3, 3], [1, 2], [0, 0], [1, 1], 2)
    of_batch, of_groups = (torch.rand(4), torch.rand(4)), (torch.rand(3, 2), torch.rand(3, 2))
    last = images.to(memory_format=torch.channels_last)
    rows = torch.rand(3, 4)
    return [
        ("linear_product", (x, g, True, 2)),
        ("linear_product", (x, g, False, 3)),
        ("linear_gram", (x, g)),
        ("convolution_product", (images, out, *settings, True, 2)),
        ("convolution_product", (last, out, *settings, False, 3)),
        ("convolution_gram", (images, out, *settings)),
        ("channel_sums", (images, images, *of_groups)),
        ("channel_norm_backward", (last, images, torch.rand(4), *of_batch)),
        ("channel_norm_backward", (images, images, torch.rand(4), *of_groups)),
        ("row_sums", (x, x, rows, rows)),
        ("row_sums", (x, x, None, rows)),
        ("root_mean_square_dx", (x, x, torch.rand(6), rows)),
    ]


@pytest.mark.parametrize(("name", "args"), arguments(), ids=lambda a: a if isinstance(a, str) else "")
def test_it_is_a_sound_operation(name, args):
    torch.library.opcheck(getattr(operations, name).whole, args)


def test_every_operation_is_checked_and_has_a_twin():
    defined = {n for n, of in vars(operations).items() if isinstance(of, type(operations.linear_gram))}
    assert {name for name, _ in arguments()} == defined
    assert all(callable(getattr(reference, name)) for name in defined)


WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None  # the import system's word for: not there
import torch
from torch import nn
from hf_clars.grad_norms import PerSampleGradNorms, kernels
from tests.test_kernels_as_operations import arguments, operations, reference

model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(2), nn.Linear(16, 3), nn.Flatten())
model = model.to(memory_format=torch.channels_last)
x = torch.randn(5, 3, 6, 6).to(memory_format=torch.channels_last)
for kernels.INTERPRETED in (False, True):  # what TRITON_INTERPRET says
    assert not kernels.runs_kernels(x)
    with PerSampleGradNorms(model) as norms:
        model(x).sin().sum().backward()
    assert all(t.shape == (5,) and (t > 0).all() for t in norms.per_sample.values())
    for name, args in arguments():
        torch.testing.assert_close(getattr(operations, name)(*args), getattr(reference, name)(*args))
print("measured without Triton")
"""


def test_without_triton_all_is_as_before():
    done = subprocess.run([sys.executable, "-c", WITHOUT_TRITON], cwd=ROOT, capture_output=True, text=True, check=False)
    assert "measured without Triton" in done.stdout, done.stderr
