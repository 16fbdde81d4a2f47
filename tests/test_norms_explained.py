"""Promise: a tracker says how it measures each parameter, and what its norms are the norms of."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from hf_clars.grad_norms import LayerRule, PerSampleGradNorms, register_rule, unregister_rule


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.gain, self.spare = nn.Linear(4, 4), nn.Parameter(torch.rand(4)), nn.Linear(4, 4)

    def forward(self, x):
        return self.inner(x) * (1 + self.gain)


def test_each_parameter_is_explained():
    model = Net()
    with PerSampleGradNorms(model) as norms:
        model(torch.randn(3, 4)).sum().backward()
        told = {p.parameter: " ".join(p.ways) for p in norms.explain().parameters}
    assert "LinearRule" in told["inner.weight"]
    assert "in the graph, at MulBackward0" in told["gain"]
    assert "led back" in told["gain"]
    assert told["spare.weight"] == ""
    assert "spare.bias" in str(norms.explain())


def test_each_parameter_has_its_share_of_the_time():
    model = Net()
    with PerSampleGradNorms(model) as norms:
        for timed in (False, True, True):
            norms.time_passes(timed)
            model.zero_grad()
            model(torch.randn(3, 4)).sum().backward()
            shares = {p.parameter: p.share for p in norms.explain().parameters}
            if not timed:
                assert set(shares.values()) == {None}
                assert "%" not in str(norms.explain())
                continue
            assert sum(shares.values()) == pytest.approx(1)
            assert shares["spare.weight"] == 0
            assert shares["inner.weight"] == shares["inner.bias"] > 0
            assert shares["gain"] > 0
            assert f"{shares['gain']:.1%}" in str(norms.explain())


def test_rows_that_were_followed_are_named_as_proven():
    class Windows(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(4, 4)

        def forward(self, x):  # [B, 6, 4] -> [B * 3, 2, 4]
            return self.inner(x.reshape(-1, 2, 4)).reshape(len(x), -1)

    model = Windows()
    with PerSampleGradNorms(model) as norms:
        model(torch.randn(5, 6, 4)).square().mean().backward()
        assert "3 rows a sample, proven by following one sample's gradient" in str(norms.explain())


def test_norms_of_a_mean_over_tokens_are_those_of_each_sequence():
    class Tagger(nn.Module):
        def __init__(self):
            super().__init__()
            self.words, self.head = nn.Embedding(9, 6), nn.Linear(6, 5)

        def forward(self, x, labels):
            out = self.head(torch.tanh(self.words(x)))
            return functional.cross_entropy(out.flatten(0, 1), labels.flatten()), out

    torch.manual_seed(0)
    model, x, labels = Tagger().double(), torch.randint(0, 9, (3, 7)), torch.randint(0, 5, (3, 7))
    labels[0, 2:], labels[1, 5:] = -100, -100
    want = []
    for i in range(3):
        (g,) = torch.autograd.grad(model(x[i : i + 1], labels[i : i + 1])[0], model.head.weight)
        want.append(g.norm())
    for told in (False, True):
        with PerSampleGradNorms(model, layers="tensor", loss_reduction="mean_tokens") as norms:
            for _ in range(3):
                model.zero_grad()
                if told:
                    loss = model(x, labels)[0]
                    norms.set_weights((labels != -100).sum(1))
                else:
                    loss = model(x, labels=labels)[0]
                loss.backward()
                torch.testing.assert_close(norms.per_sample["head.weight"], torch.stack(want), rtol=1e-6, atol=0)


def test_tokens_that_nobody_told_are_asked_for():
    model = Net()
    with PerSampleGradNorms(model, loss_reduction="mean_tokens") as norms:
        model(torch.randn(3, 4)).sum().backward()
        with pytest.raises(ValueError, match="call the model with labels="):
            norms.per_sample  # noqa: B018
        with pytest.raises(ValueError, match="5 weights were given"):
            norms.set_weights(torch.ones(5))


def test_a_rule_may_be_registered_again_replaced_and_taken_back():
    class Gain(nn.Module):
        def __init__(self):
            super().__init__()
            self.gain = nn.Parameter(torch.ones(4))

        def forward(self, x):
            return x * self.gain

    def cell():
        @register_rule(Gain)
        class GainRule(LayerRule):
            def per_sample_grads(self, module, saved, g, wanted):
                return {"gain": saved[0] * g}

    cell()
    cell()  # a notebook cell that is run twice

    class Other(LayerRule):
        def per_sample_grads(self, module, saved, g, wanted):
            return {"gain": 2 * saved[0] * g}

    with pytest.raises(ValueError, match="Gain already has the rule GainRule"):
        register_rule(Gain)(Other)
    register_rule(Gain, override=True)(Other)
    model, x = Gain(), torch.randn(3, 4)
    with PerSampleGradNorms(model, check=False) as norms:
        model(x).sum(1).mean().backward()
        torch.testing.assert_close(norms.per_sample["Gain"], 2 * x.norm(dim=1))
    unregister_rule(Gain)
    with PerSampleGradNorms(model) as norms:
        model.zero_grad()
        model(x).sum(1).mean().backward()
        torch.testing.assert_close(norms.per_sample["Gain"], x.norm(dim=1))
    with pytest.raises(ValueError, match="Gain has no rule of its own"):
        unregister_rule(Gain)
