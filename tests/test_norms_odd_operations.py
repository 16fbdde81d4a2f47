"""Promise: parameters of operations with odd derivatives are measured: complex products, distances to centres."""

import pytest
import torch
from torch import nn

from hf_clars.grad_norms import PerSampleGradNorms


class Complex(nn.Module):
    """Weights of a Fourier layer: a product that conjugates what it is multiplied with."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 4, dtype=torch.complex128))
        self.bias = nn.Parameter(torch.randn(3, dtype=torch.complex128))

    def forward(self, x):
        return torch.view_as_real(nn.functional.linear(torch.fft.fft(x), self.weight, self.bias))


@pytest.mark.parametrize("tokens", [(), (5,)])
def test_complex_weights_are_exact(tokens):
    torch.manual_seed(0)
    model = Complex()
    with PerSampleGradNorms(model, layers="tensor") as norms:
        for _ in range(5):  # the first three are checked, which makes the gradients
            x = torch.randn(3, *tokens, 4, dtype=torch.float64)
            model.zero_grad()
            want: dict[str, list[torch.Tensor]] = {name: [] for name, _ in model.named_parameters()}
            for i in range(3):
                found = torch.autograd.grad(model(x[i : i + 1]).sin().sum(), list(model.parameters()))
                for name, g in zip(want, found, strict=True):
                    want[name].append(g.abs().square().sum().sqrt())
            norms.reset()
            model(x).sin().flatten(1).sum(1).mean().backward()
            for name, each in want.items():
                torch.testing.assert_close(norms.per_sample[name], torch.stack(each), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("centres", [3, 5])
def test_distances_to_centres_are_exact(centres):
    """Of torch.cdist, torch maps the backward function over samples wrongly."""
    torch.manual_seed(0)

    class Distances(nn.Module):
        def __init__(self):
            super().__init__()
            self.centres = nn.Parameter(torch.randn(centres, 4, dtype=torch.float64))

        def forward(self, x):
            return torch.cdist(x, self.centres)

    model = Distances()
    with PerSampleGradNorms(model, check=False) as norms:
        for _ in range(3):
            x = torch.randn(3, 4, dtype=torch.float64)
            rows = (torch.autograd.grad(model(x[i : i + 1]).sin().sum(), model.centres)[0] for i in range(3))
            want = torch.stack([g.norm() for g in rows])
            norms.reset()
            model.zero_grad()
            model(x).sin().sum(1).mean().backward()
            torch.testing.assert_close(norms.per_sample["Distances"], want)
