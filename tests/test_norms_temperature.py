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
    scale = scale.expand(len(image), 1)
    own = [t.detach().clone().requires_grad_() for t in (a, b, scale)]
    grads = torch.autograd.grad(loss_of(*own), own)
    found = {name: [] for name, _ in model.named_parameters()}
    for i in range(len(image)):
        part = (a[i] * grads[0][i]).sum() + (b[i] * grads[1][i]).sum() + (scale[i] * grads[2][i]).sum()
        of_one = torch.autograd.grad(part, list(model.parameters()), retain_graph=True)
        for name, g in zip(found, of_one, strict=True):
            found[name].append(len(image) * g.norm())
    return {name: torch.stack(norms) for name, norms in found.items()}


class Expanded(Towers):
    """The other way out."""

    def forward(self, image, text):
        images, texts, scale = super().forward(image, text)
        return images, texts, scale.expand(len(image), 1)


class AlsoInside(Towers):
    """A use that is seen hides none that is not, also where no sums are checked."""

    def forward(self, image, text):
        images, texts, scale = super().forward(image, text)
        return images * scale, texts, scale


@pytest.mark.parametrize("samples", [None, 2])
@pytest.mark.parametrize("make", [Towers, AlsoInside])
def test_a_returned_temperature_that_the_loss_takes_is_refused_by_name(make, samples):
    torch.manual_seed(0)
    model = make().double()
    with (
        PerSampleGradNorms(model, samples=samples),
        pytest.raises(UncoveredParameterError, match="log_scale: the"),
    ):
        loss_of(*model(*data(B))).backward()


def test_so_is_one_that_the_loss_takes_from_the_model():
    torch.manual_seed(0)
    model = Towers().double()
    with PerSampleGradNorms(model) as norms:
        images, texts, _ = model(*data(B))
        loss_of(images, texts, model.log_scale.exp()).backward()
        with pytest.raises(UncoveredParameterError, match=r"log_scale: has a gradient.*as a temperature"):
            norms.per_sample  # noqa: B018


def test_a_temperature_that_is_returned_and_not_used_is_no_fault():
    torch.manual_seed(0)
    model = Towers().double()
    with PerSampleGradNorms(model) as norms:
        images, texts, scale = model(*data(B))
        loss_of(images, texts, scale.detach()).backward()
    assert norms.per_sample["images"].shape == (B,)


def test_a_penalty_on_weights_may_be_returned_where_nothing_is_checked():
    torch.manual_seed(0)
    model = AlsoInside().double()
    with PerSampleGradNorms(model, check=False) as norms:
        images, texts, penalty = model(*data(B))
        (loss_of(images, texts, 2.0) + penalty).backward()
    assert norms.per_sample["images"].shape == (B,)


@pytest.mark.parametrize("make", [Towers, Expanded])
def test_the_ways_out_are_exact(make):
    torch.manual_seed(0)
    model = make().double()
    around = WithLoss(model)
    with PerSampleGradNorms(around, layers="tensor") as norms:
        for batch in (B, B, B, B - 1):
            given = data(batch)
            around.zero_grad()
            around(*given).backward()
            for name, want in right_norms(model, *given).items():
                torch.testing.assert_close(norms.per_sample[f"model.{name}"], want, rtol=1e-9, atol=1e-12)
