"""Promise: a gradient that cancels has the norm 0, give or take rounding, and no NaN that would stop a training."""

import pytest
import torch
from torch import nn

from hf_clars.grad_norms import PerSampleGradNorms

POSITIONS, WIDTH = 3, 64


class Shifted(nn.Module):
    """The same shift at each position, of which the mean over positions takes all away; as a time in a video model."""

    def __init__(self, convolution):
        super().__init__()
        self.shift = nn.Conv1d(WIDTH, WIDTH, 1) if convolution else nn.Linear(WIDTH, WIDTH)
        self.convolution = convolution
        self.last = nn.Linear(WIDTH, 2)

    def forward(self, time):
        time = time[:, None].expand(-1, POSITIONS, -1)
        h = self.shift(time.mT).mT if self.convolution else self.shift(time)
        h = h - h.mean(1, keepdim=True) + time.cumsum(1)
        return self.last(h * h).mean(1)


@pytest.mark.parametrize("layers", ["module", "tensor"])
@pytest.mark.parametrize("convolution", [False, True])
def test_no_norm_is_nan(convolution, layers):
    torch.manual_seed(0)
    model = Shifted(convolution)
    with PerSampleGradNorms(model, layers=layers) as norms:
        for _ in range(3):
            model.zero_grad()
            model(torch.randn(8, WIDTH)).sin().sum(1).mean().backward()
            found = norms.per_sample
            uncancelled = torch.stack([v for n, v in found.items() if "last" in n]).sum()
            for name, values in found.items():
                assert values.isfinite().all(), name
                if "shift" in name:
                    assert values.max() < 1e-2 * uncancelled, name
