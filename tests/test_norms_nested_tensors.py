"""Promise: layers on nested tensors are refused in words; padded ones are exact."""

import pytest
import torch
from torch import nn

from hf_clars.grad_norms import PerSampleGradNorms
from hf_clars.grad_norms.errors import BatchAxisError
from tests.oracle import layer_norms, one_by_one

B, STEPS, SEEN, WIDTH = 4, 5, 3, 6


class Padded(nn.Module):
    """Samples of several lengths, as zeros are."""

    def __init__(self):
        super().__init__()
        self.layer, self.weight = nn.Linear(SEEN, WIDTH), nn.Parameter(torch.randn(WIDTH, SEEN))

    def hear(self, x):
        return self.layer(x)

    def forward(self, x):
        heard = self.hear(self.nest(x))
        heard = torch.nested.to_padded_tensor(heard, 0.0) if heard.is_nested else heard
        return heard.tanh().sum(1) + x[:, 0] @ self.weight.t()

    def nest(self, x):
        return x


class Nested(Padded):
    layout = torch.jagged

    def nest(self, x):
        return torch.nested.nested_tensor([row[: 2 if row[0, 0] > 0 else 4] for row in x], layout=self.layout)


class Strided(Nested):
    layout = torch.strided


class Bare(Nested):
    """No module is called on it."""

    def hear(self, x):
        return nn.functional.linear(x, self.weight)


class BareStrided(Bare):
    layout = torch.strided


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("make", [Nested, Strided, Bare])
def test_what_is_called_on_one_is_refused(make):
    torch.manual_seed(0)
    words = "used by" if make is Bare else "on a nested tensor"
    with PerSampleGradNorms(make()) as norms, pytest.raises(BatchAxisError, match=words):
        norms.model(torch.randn(B, STEPS, SEEN)).sum(1).mean().backward()


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("layout", [torch.jagged, torch.strided])
def test_a_model_that_is_called_with_one_is_refused(layout):
    class Pads(Padded):
        def forward(self, x):
            return super().forward(torch.nested.to_padded_tensor(x, 0.0))

    given = torch.nested.nested_tensor([torch.randn(k, SEEN) for k in (2, 3)], layout=layout)
    with PerSampleGradNorms(Pads()) as norms, pytest.raises(BatchAxisError, match="nested tensor"):
        norms.model(given)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors", "ignore:.*a backward pass of this module")
@pytest.mark.parametrize("make", [Padded, BareStrided])
def test_padded_ones_are_exact_and_so_is_a_product(make):
    torch.manual_seed(0)
    model = make().double()
    with PerSampleGradNorms(model) as norms:
        for batch in (B, B, B, B - 1):
            x = torch.randn(batch, STEPS, SEEN).double()
            model.zero_grad()
            model(x).sin().sum(1).mean().backward()
            right = one_by_one(model, lambda m, i, x=x: m(x[i : i + 1]).sin().sum(1).mean(), batch)
            for layer, want in layer_norms(right, norms.layers).items():
                torch.testing.assert_close(norms.per_sample[layer], want, rtol=1e-9, atol=1e-12)
