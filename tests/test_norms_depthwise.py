"""Promise: a convolution's norms are exact in any memory layout, also where it is changed for speed, and in slices."""

import pytest
import torch
from torch import nn

from hf_clars.grad_norms import PerSampleGradNorms, convolution_math
from tests.oracle import layer_norms, one_by_one

B = 5
SHAPES = {
    "large kernel": (nn.Conv2d(6, 6, 7, padding=3, groups=6), 9),
    "large kernel, image of its size": (nn.Conv2d(6, 6, 7, padding=3, groups=6), 7),
    "small kernel with steps": (nn.Conv2d(6, 6, 3, 2, padding=1, dilation=2, groups=6), 11),
    "two channels out of one": (nn.Conv2d(4, 8, 5, padding=2, groups=4), 8),
    "groups of two": (nn.Conv2d(4, 6, 3, padding=1, groups=2), 8),
}
LAYOUTS = {"": torch.contiguous_format, "channels_last": torch.channels_last}


@pytest.fixture
def layouts(monkeypatch):
    """What memory the library's kernel was given, and of how many samples."""
    given = []
    real = convolution_math.convolution_weight_grad

    def watched(g, x, shape, **settings):
        given.append(x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous())
        return real(g, x, shape, **settings)

    monkeypatch.setattr(convolution_math, "convolution_weight_grad", watched)
    return given


@pytest.mark.parametrize("numbers", [1 << 20, 1], ids=["whole", "slices"])
@pytest.mark.parametrize("of_output", LAYOUTS)
@pytest.mark.parametrize("of_input", LAYOUTS)
@pytest.mark.parametrize("case", SHAPES)
def test_any_layout_is_exact(monkeypatch, layouts, case, of_input, of_output, numbers):
    monkeypatch.setattr(convolution_math, "_REWRITTEN", numbers)
    torch.manual_seed(0)
    convolution, side = SHAPES[case]
    model = nn.Sequential(convolution, nn.Tanh()).double()

    def loss_of(m, x):
        y = m(x).contiguous(memory_format=LAYOUTS[of_output])
        return (y.flatten(1).sin() * torch.linspace(-1, 2, y[0].numel(), dtype=y.dtype)).sum(1).mean()

    with PerSampleGradNorms(model) as norms:
        for _ in range(3):
            x = torch.randn(B, convolution.in_channels, side, side, dtype=torch.float64)
            x = x.contiguous(memory_format=LAYOUTS[of_input])
            model.zero_grad()
            loss_of(model, x).backward()
            batch_grads = {n: p.grad.clone() for n, p in model.named_parameters()}
            per_sample = norms.per_sample
            want = one_by_one(model, lambda m, i, x=x: loss_of(m, x[i : i + 1]), B)
            for name, expected in layer_norms(want, norms.layers).items():
                torch.testing.assert_close(per_sample[name], expected, rtol=1e-9, atol=1e-12)
            for name, grad in batch_grads.items():
                torch.testing.assert_close(grad, want[name].mean(0), rtol=1e-9, atol=1e-12)
    if case == "large kernel":
        assert layouts
        assert all(layouts)
    if case == "large kernel, image of its size" and not of_input:
        assert layouts
        assert not any(layouts)
    assert len(layouts) >= (3 * 3 if numbers == 1 else 3)
