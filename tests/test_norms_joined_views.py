"""Promise: where several views of each sample are joined inside, and a loss alone is returned, norms are exact."""

import pytest
import torch
from torch import nn

from hf_clars.grad_norms import PerSampleGradNorms
from tests.oracle import layer_norms, one_by_one

B, SIDE, WORDS, WIDTH = 4, 6, 9, 6


class Views(nn.Module):
    """Each view of an image shall be near its others, and far from what other images give."""

    def __init__(self):
        super().__init__()
        self.seen, self.said = nn.Conv2d(1, 4, 3), nn.Linear(4, WIDTH)

    def encode(self, x):
        return self.said(self.seen(x).relu().mean((2, 3)))

    def features(self, *views):
        return self.encode(torch.cat(views)).chunk(len(views))

    def forward(self, *views):
        return self.contrast(self.features(*views))

    @staticmethod
    def contrast(features):
        z = nn.functional.normalize(torch.cat(features), dim=1)
        alike = (z @ z.t() / 0.5).masked_fill(torch.eye(len(z), dtype=torch.bool), -1e9)
        return nn.functional.cross_entropy(alike, torch.arange(len(z)).roll(len(features[0])))


class Preferred(Views):
    """A text that is preferred, and one that is not, are read in one call."""

    def __init__(self):
        super().__init__()
        self.table, self.places, self.said = nn.Embedding(WORDS, WIDTH), nn.Parameter(torch.randn(SIDE, WIDTH)), None
        self.seen = nn.Linear(WIDTH, 1)

    def encode(self, x):
        return self.seen((self.table(x) + self.places).cumsum(1).tanh()).mean(1)

    @staticmethod
    def contrast(features):
        return -nn.functional.logsigmoid(features[0] - features[1]).mean()


def data(make, views, batch):
    if make is Preferred:
        return [torch.randint(WORDS, (batch, SIDE)) for _ in range(views)]
    return [torch.randn(batch, 1, SIDE, SIDE, dtype=torch.float64) for _ in range(views)]


def right_grads(model, views, batch):
    """Of what each sample's own features do to the loss: with one copy of the model for each sample."""
    features = model.features(*views)
    leaves = [t.detach().requires_grad_() for t in features]
    gradients = torch.autograd.grad(model.contrast(leaves), leaves)

    def of_sample(m, i):
        own = m.features(*(v[i : i + 1] for v in views))
        return batch * sum((f * g[i : i + 1]).sum() for f, g in zip(own, gradients, strict=True))

    return one_by_one(model, of_sample, batch)


@pytest.mark.parametrize("sizes", [(B, B, B, B - 1), (B, B, B, 2), (2, 2, 2, SIDE)])
@pytest.mark.parametrize(("make", "views"), [(Views, 2), (Views, 3), (Preferred, 2)])
def test_joined_views_are_exact(make, views, sizes):
    torch.manual_seed(0)
    model = make().double()
    plain = make().double()
    with PerSampleGradNorms(model) as norms:
        for batch in sizes:
            given = data(make, views, batch)
            plain.load_state_dict(model.state_dict())
            model.zero_grad()
            model(*given).backward()
            for layer, want in layer_norms(right_grads(plain, given, batch), norms.layers).items():
                torch.testing.assert_close(norms.per_sample[layer], want, rtol=1e-9, atol=1e-12)


class Crops(nn.Module):
    """Crops of one size go in together; the head sees all, and its rows are returned as they lie."""

    def __init__(self):
        super().__init__()
        self.seen, self.said = nn.Linear(SIDE, WIDTH), nn.Linear(WIDTH, 2)

    def forward(self, crops):
        large, small = torch.cat(crops[:2])[:, :SIDE], torch.cat(crops[2:]).abs()
        return self.said(torch.cat([self.seen(large), self.seen(small)]).tanh())


def crops_losses(model, crops):
    out = model(crops).unflatten(0, (len(crops), -1))
    return (out * torch.arange(1.0, len(crops) + 1)[:, None, None]).sin().sum((0, 2))


def test_a_list_of_crops_of_several_sizes_is_exact():
    torch.manual_seed(0)
    model = Crops().double()
    with PerSampleGradNorms(model) as norms:
        for batch in (B, B, B, B - 1):
            crops = [torch.randn(batch, SIDE + 2 * (k < 2), dtype=torch.float64) for k in range(5)]
            plain = Crops().double()
            plain.load_state_dict(model.state_dict())
            model.zero_grad()
            crops_losses(model, crops).mean().backward()
            wanted = one_by_one(plain, lambda m, i, c=crops: crops_losses(m, [x[i : i + 1] for x in c])[0], batch)
            for layer, want in layer_norms(wanted, norms.layers).items():
                torch.testing.assert_close(norms.per_sample[layer], want, rtol=1e-9, atol=1e-12)
