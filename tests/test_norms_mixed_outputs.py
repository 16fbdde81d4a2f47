"""Promise: a model that mixes samples in what it returns, or returns a loss alone, hides none of its samples' rows.

Products of every text with every image, in-batch negatives and statistics of the batch lead each sample's gradient to
all rows. Which are whose is then told by what the layers made of the model's own inputs. Time comes first here, with as
many steps as samples.
"""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional

from hf_clars.grad_norms import BatchAxisError, PerSampleGradNorms
from tests.three_passes import on_one_thread

B, D = 4, 8
one_thread = pytest.fixture(autouse=True)(on_one_thread)


class Tower(nn.Module):
    """[B, T, D] to [B, D], time first in between."""

    def __init__(self):
        super().__init__()
        self.inner, self.last = nn.Linear(D, D), nn.Linear(D, D)
        self.scale, self.weight = nn.Parameter(torch.randn(D)), nn.Parameter(torch.randn(D, D))

    def forward(self, x):
        h = self.inner(x.transpose(0, 1)).tanh()
        return self.last((h * self.scale @ self.weight).tanh().mean(0))


class Pooled(nn.Module):
    """A learned query for each sample, as SigLIP's images are pooled; torch's attention puts time first."""

    def __init__(self):
        super().__init__()
        self.patches, self.query = nn.Linear(D, D), nn.Parameter(torch.randn(1, 1, D))
        self.attention = nn.MultiheadAttention(D, 2, batch_first=True)
        nn.init.normal_(self.attention.in_proj_bias)

    def forward(self, x):
        h = self.patches(x)
        return self.attention(self.query.repeat(len(x), 1, 1), h, h)[0][:, 0]


class Adapter(nn.Module):
    """Trained behind a frozen layer, so that no layer in the graph takes the inputs."""

    def __init__(self):
        super().__init__()
        self.frozen, self.down, self.up = nn.Linear(D, D).requires_grad_(False), nn.Linear(D, 2), nn.Linear(2, D)

    def forward(self, x):
        return self.up(self.down(self.frozen(x).transpose(0, 1))).tanh().mean(0)


class Experts(nn.Module):
    """Rows routed by index, in a module whose results have time first: it is no gate."""

    def __init__(self):
        super().__init__()
        self.first, self.routed, self.last = nn.Linear(D, D), Routed(), nn.Linear(D, D)

    def forward(self, x):
        return self.last(self.routed(self.first(x).transpose(0, 1))).tanh().mean(0)


class Routed(nn.Module):
    def __init__(self):
        super().__init__()
        self.gains = nn.Parameter(torch.rand(2, D))

    def forward(self, x):
        rows = x.flatten(0, 1)
        out = torch.zeros_like(rows)
        for k in range(2):
            where = (rows[:, 0] > 0).eq(k).nonzero()[:, 0]
            out = out.index_add(0, where, torch.tanh(rows[where] * self.gains[k]))
        return out.view_as(x)


def products(z):
    unit = functional.normalize(z, dim=1)
    return 3 * unit @ unit.roll(1, 1).T


def contrast(logits):
    return functional.cross_entropy(logits, torch.arange(len(logits)))


def hardest(z):
    apart = torch.cdist(z, z)
    same = torch.arange(len(z))[:, None] % 2 == torch.arange(len(z)) % 2
    return (apart.masked_fill(~same, -9).amax(1) - apart.masked_fill(same, 9).amin(1) + 2).relu().mean()


def correlations(z):
    unit = (z - z.mean(0)) / (z.var(0) + 0.1).sqrt()
    return unit.T @ unit.sin() / len(z)


def wave(z):
    return (z * torch.linspace(-1, 2, z.shape[1], dtype=z.dtype)).sin().sum()


TOWERS = {"time first": Tower, "pooled": Pooled, "adapter": Adapter, "experts": Experts}
HEADS = {  # what the model returns, and the loss of it
    "each sample's own": (lambda z: z, wave),
    "embeddings and products": (lambda z: (z, products(z)), lambda out: contrast(out[1])),
    "products": (products, contrast),
    "loss": (lambda z: contrast(products(z)), lambda out: out),
    "loss and statistics": (lambda z: (z.mean(0), z.var(0), contrast(products(z))), lambda out: out[2]),
    "hardest of the batch": (hardest, lambda out: out),
    "correlations": (correlations, lambda out: (out - torch.eye(D)).square().sum()),
    "attention over the batch": (lambda z: (z @ z.T).softmax(1) @ z, wave),
}


class Model(nn.Module):
    def __init__(self, tower, head):
        super().__init__()
        self.tower, self.head = tower, head

    def forward(self, x):
        return self.head(self.tower(x))


def expected(tower, head, loss, x):
    """Each sample's gradient reaches the tower through its own embedding alone."""
    z = tower(x).detach().requires_grad_()
    (g,) = torch.autograd.grad(loss(head(z)), z)
    named = {n: p for n, p in tower.named_parameters() if p.requires_grad}
    rows = [torch.autograd.grad(tower(x[i : i + 1]), list(named.values()), g[i : i + 1]) for i in range(len(x))]
    return {n: len(x) * torch.stack([row[k].norm() for row in rows]) for k, n in enumerate(named)}


@pytest.mark.filterwarnings("ignore:.*every sample")
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("tower", TOWERS)
def test_three_passes_are_exact(tower, head):
    torch.manual_seed(0)
    made, (head, loss) = TOWERS[tower]().double(), HEADS[head]
    model, alone = Model(made, head), copy.deepcopy(made)
    with PerSampleGradNorms(model, layers="tensor") as norms:
        for _ in range(3):
            x = torch.randn(B, B, D, dtype=torch.float64)
            model.zero_grad()
            loss(model(x)).backward()
            for name, want in expected(alone, head, loss, x).items():
                torch.testing.assert_close(norms.per_sample[f"tower.{name}"], want, rtol=1e-7, atol=1e-10, msg=name)


def test_what_nothing_tells_is_refused_by_name():
    """Behind a function that nobody knows, with as many steps as samples and a loss alone."""

    class Unknown(Tower):
        def forward(self, x):
            return super().forward(x.put(torch.arange(3), x.flatten()[:3]))

    model = Model(Unknown().double(), HEADS["loss"][0])
    with PerSampleGradNorms(model), pytest.raises(BatchAxisError, match=r"tower.inner \(Linear\).*embeddings"):
        model(torch.randn(B, B, D, dtype=torch.float64))


def test_no_gradient_is_taken_one_sample_at_a_time():
    """What mixes samples costs a longer first pass, and no gate."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for tower in (Tower, Pooled, Adapter):
            model = Model(tower().double(), HEADS["loss"][0])
            with PerSampleGradNorms(model) as norms:
                model(torch.randn(B, B, D, dtype=torch.float64)).backward()
                assert norms.per_sample
