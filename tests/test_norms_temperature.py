"""Promise: a temperature that only the loss takes is refused by name, and the way out that is named is exact."""

import copy

import pytest
import torch
from torch import nn

from hf_clars.grad_norms import PerSampleGradNorms
from hf_clars.grad_norms.errors import UncoveredParameterError

B, SEEN, SAID, WIDTH = 4, 5, 7, 6


class Towers(nn.Module):
    """Two towers and a learned temperature, returned as they are."""

    def __init__(self):
        super().__init__()
        self.images, self.texts = nn.Linear(SEEN, WIDTH), nn.Embedding(SAID, WIDTH)
        self.log_scale = nn.Parameter(torch.tensor(0.7))

    def forward(self, image, text):
        normed = nn.functional.normalize
        return normed(self.images(image), dim=1), normed(self.texts(text), dim=1), self.log_scale.exp()


def loss_of(image, text, scale):
    alike, right = scale * image @ text.t(), torch.arange(len(image))
    return (nn.functional.cross_entropy(alike, right) + nn.functional.cross_entropy(alike.t(), right)) / 2


class WithLoss(nn.Module):
    """The way out."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, image, text):
        return loss_of(*self.model(image, text))


def data(batch):
    return torch.randn(batch, SEEN).double(), torch.randint(SAID, (batch,))


def right_norms(model, image, text):
    """Each sample's features, and the row of products that it scales, have a gradient of their own."""
    model = copy.deepcopy(model)  # without hooks
    a, b, scale = model(image, text)
    own = [t.detach().clone().requires_grad_() for t in (a, b, scale.expand(len(image)))]
    grads = torch.autograd.grad(loss_of(own[0], own[1], own[2].unsqueeze(1)), own)
    found = {name: [] for name, _ in model.named_parameters()}
    for i in range(len(image)):
        part = (a[i] * grads[0][i]).sum() + (b[i] * grads[1][i]).sum() + scale * grads[2][i]
        of_one = torch.autograd.grad(part, list(model.parameters()), retain_graph=True)
        for name, g in zip(found, of_one, strict=True):
            found[name].append(len(image) * g.norm())
    return {name: torch.stack(norms) for name, norms in found.items()}


def test_a_temperature_that_the_loss_takes_is_refused_by_name():
    torch.manual_seed(0)
    model = Towers().double()
    with PerSampleGradNorms(model) as norms:
        loss_of(*model(*data(B))).backward()
        with pytest.raises(UncoveredParameterError, match=r"log_scale: has a gradient.*as a temperature"):
            norms.per_sample  # noqa: B018


def test_the_loss_in_a_forward_is_exact():
    torch.manual_seed(0)
    model = Towers().double()
    around = WithLoss(model)
    with PerSampleGradNorms(around, layers="tensor") as norms:
        for batch in (B, B, B, B - 1):
            given = data(batch)
            around.zero_grad()
            around(*given).backward()
            for name, want in right_norms(model, *given).items():
                torch.testing.assert_close(norms.per_sample[f"model.{name}"], want, rtol=1e-9, atol=1e-12)
