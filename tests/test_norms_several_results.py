"""Promise: whatever a model returns beside what its loss is made of, norms are each sample's own, and cost no more.

Features of each image beside the scores, the same tensor twice, what one result is made of, guesses of which nothing is
made, products of all samples with all.
"""

import pytest
import torch
from torch import nn

from hf_clars.grad_norms import PerSampleGradNorms
from hf_clars.grad_norms.graph import following
from tests.three_passes import on_one_thread

D = 6
one_thread = pytest.fixture(autouse=True)(on_one_thread)


class Routed(nn.Module):
    """Tokens go to experts by index: the module is a gate, whose results are each sample's."""

    def __init__(self, returns):
        super().__init__()
        self.route, self.experts = nn.Linear(D, 2), nn.ModuleList(nn.Linear(D, D) for _ in range(2))
        self.top, self.returns = nn.Linear(D, 5), returns

    def forward(self, x):
        tokens = x.flatten(0, 1)
        weights = self.route(tokens).softmax(-1)
        y = torch.zeros_like(tokens)
        for e, expert in enumerate(self.experts):
            at = (weights.argmax(-1) == e).nonzero()[:, 0]
            y = y.index_add(0, at, expert(tokens[at]) * weights[at, e, None])
        h = y.view_as(x).tanh()
        pooled = h.mean(1).sin()
        every = {"twice": (h, h), "chain": (h, pooled, (2 * pooled).exp()), "scores": (h, self.top(h))}
        return every[self.returns]


class Images(nn.Module):
    """Features of all images lie one after the other, and are returned apart: as many of each as there are samples."""

    def __init__(self):
        super().__init__()
        self.words, self.patches, self.top = nn.Embedding(7, D), nn.Linear(D, D), nn.Linear(D, 5)

    def forward(self, ids, patches):
        features = self.patches(patches)
        h = self.words(ids)
        mask = (ids == 0).unsqueeze(-1).expand_as(h)
        h = h.masked_scatter(mask, torch.cat(features.split(4)))
        return self.top(h.tanh()), *features.split(4)


class Guesses(nn.Module):
    """Each layer betters a guess; of the last one nothing is made."""

    def __init__(self):
        super().__init__()
        self.layers, self.better = nn.ModuleList(nn.Linear(D, D) for _ in range(2)), nn.Linear(D, D)

    def forward(self, x):
        guess, seen = x, []
        for layer in self.layers:
            x = layer(x + guess).tanh()
            seen.append(x + self.better(x))
            guess = self.better(x).detach()
        return seen[-1]


class Towers(nn.Module):
    """Each text's end is picked by index; its products with all images are scaled."""

    def __init__(self):
        super().__init__()
        self.words, self.image, self.scale = nn.Embedding(7, D), nn.Linear(D, D), nn.Parameter(torch.ones(()))

    def forward(self, ids, pixels):
        text = self.words(ids).tanh()[torch.arange(len(ids)), ids.argmax(1)]
        image = self.image(pixels)
        scores = text @ image.T * self.scale.exp()
        return scores, scores.T, text, image


def first(out):
    return out[0] if isinstance(out, tuple) else out


def last(out):
    return out[-1]


def all_of(out):
    return torch.cat([t.flatten(1) for t in out], 1)


def check(model, batches, chosen):
    """Passes on new data against one backward pass a sample; without the sum check, which would only refuse."""
    model = model.double()
    names, params = zip(*model.named_parameters(), strict=True)
    for batch in batches:
        losses = chosen(model(*batch)).flatten(1).sin().mean(1)
        grads = [torch.autograd.grad(loss, params, retain_graph=True, allow_unused=True) for loss in losses]
        yield batch, {n: [0.0 if g[k] is None else float(g[k].norm()) for g in grads] for k, n in enumerate(names)}


def compare(model, batches, chosen):
    expected = list(check(model, batches, chosen))
    with PerSampleGradNorms(model, layers="tensor", check=False) as norms:
        for batch, want in expected:
            model.zero_grad()
            chosen(model(*batch)).flatten(1).sin().mean().backward()
            got = norms.per_sample
            for name, values in want.items():
                torch.testing.assert_close(
                    got[name], torch.tensor(values, dtype=torch.double), rtol=1e-9, atol=1e-12, msg=name
                )


@pytest.mark.parametrize("returns", ["twice", "chain", "scores"])
@pytest.mark.parametrize("chosen", [last, all_of])
def test_a_gate_counts_what_comes_by_several_of_its_results_once(returns, chosen):
    torch.manual_seed(0)
    batches = [(torch.randn(b, 3, D, dtype=torch.double),) for b in (4, 4, 4, 6)]
    compare(Routed(returns), batches, chosen)


def test_features_of_one_image_are_not_taken_for_the_samples():
    torch.manual_seed(0)
    ids = torch.cat((torch.zeros(4, 4, dtype=torch.long), torch.ones(4, 3, dtype=torch.long)), 1)
    batches = [(ids + torch.randint(1, 6, ids.shape) * ids, torch.randn(16, D, dtype=torch.double)) for _ in range(3)]
    compare(Images(), [*batches, (batches[0][0][:3], torch.randn(12, D, dtype=torch.double))], first)


def test_of_the_last_guess_nothing_is_made():
    torch.manual_seed(0)
    compare(Guesses(), [(torch.randn(b, 8, D, dtype=torch.double),) for b in (4, 4, 4, 2)], first)


def test_what_mixes_all_samples_is_not_asked_in_every_pass(monkeypatch):
    torch.manual_seed(0)
    model, asked = Towers(), []
    follow = following._follow
    monkeypatch.setattr(following, "_follow", lambda *args: asked.append(1) or follow(*args))
    sizes = (5, 5, 5, 4, 5, 5)
    batches = [(torch.stack([torch.randperm(7) for _ in range(b)]), torch.randn(b, D).double()) for b in sizes]
    compare(model, batches[:4], lambda out: torch.cat(out[2:], 1))
    model.float()
    with PerSampleGradNorms(model) as norms:
        counts = []
        for ids, pixels in batches:
            asked.clear()
            (model(ids, pixels.float())[0].diagonal() ** 2).mean().backward()
            assert norms.per_sample
            counts.append(len(asked))
    assert counts[0] > 0
    assert counts[-2:] == [0, 0], counts
