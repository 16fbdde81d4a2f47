"""Promise: where the data say how many rows a compiled layer gets, it is refused by name, and not in torch's words."""

import pytest
import torch
from torch import nn

from hf_clars.grad_norms import PerSampleGradNorms
from hf_clars.grad_norms.errors import BatchAxisError, UncoveredParameterError


class Picks(nn.Module):
    """Tokens that a mask leaves out go through no layer."""

    def __init__(self):
        super().__init__()
        self.first, self.head = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x, mask):  # [B, T, 4], [B, T]
        kept = self.first(x[mask])
        padded = torch.zeros_like(x).masked_scatter(mask[..., None], kept)
        return self.head(padded.sum(1))


class InALoop(nn.Module):
    """Torch leaves such a loop, and compiles what is called in it: code of layers that are alike is shared."""

    def __init__(self):
        super().__init__()
        self.first, self.heads = nn.Linear(4, 4), nn.ModuleList(nn.Linear(4, 1) for _ in range(3))

    def forward(self, x, mask):
        x, total = self.first(x).mean(1), x.new_zeros(len(x))
        for mine, head in zip(mask.T, self.heads, strict=False):
            if mine.any():
                total = total.index_put((mine.nonzero()[:, 0],), head(x[mine])[:, 0], accumulate=True)
        return total


def train(compiled):
    for size in (4, 3, 5):
        mask = torch.rand(size, 5) > 0.3
        compiled(torch.randn(size, 5, 4), mask).sin().mean().backward()


@pytest.mark.parametrize(
    ("kind", "settings"), [(Picks, {"fullgraph": True, "dynamic": True}), (Picks, {}), (InALoop, {})]
)
def test_it_is_refused_by_name(kind, settings):
    torch.compiler.reset()
    torch.manual_seed(0)
    model = kind()
    with (
        PerSampleGradNorms(model),
        pytest.raises((UncoveredParameterError, BatchAxisError), match=r"(first|heads).*compile"),
    ):
        train(torch.compile(model, backend="aot_eager", **settings))
