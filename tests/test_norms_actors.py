"""Promise: a policy may return its distribution, also one whose spread is a parameter, beside values."""

import pytest
import torch
from torch import nn
from torch.distributions import Categorical, Independent, Normal, TanhTransform, TransformedDistribution

from hf_clars.grad_norms import PerSampleGradNorms
from tests.oracle import layer_norms, one_by_one

B, SEEN, ACTIONS = 4, 5, 2


class Actor(nn.Module):
    """A trunk for a policy and a value."""

    def __init__(self, distribution):
        super().__init__()
        self.trunk, self.mean, self.value = nn.Linear(SEEN, 6), nn.Linear(6, ACTIONS), nn.Linear(6, 1)
        self.log_spread = nn.Parameter(0.1 * torch.randn(ACTIONS))
        self.distribution = distribution

    def forward(self, seen):
        hidden = self.trunk(seen).tanh()
        return self.distribution(self.mean(hidden), self.log_spread.exp()), self.value(hidden).squeeze(1)


def squashed(mean, spread):
    return Independent(TransformedDistribution(Normal(mean, spread), [TanhTransform()]), 1)


DISTRIBUTIONS = {
    "normal": Normal,
    "one for all actions": lambda mean, spread: Independent(Normal(mean, spread), 1),
    "squashed": squashed,
    "which action": lambda mean, spread: Categorical(logits=mean * spread),
}


def loss_of(model, seen, done, gain):
    policy, value = model(seen)
    done = (done[:, 0] > 0).long() if isinstance(policy, Categorical) else done
    likely = policy.log_prob(done).reshape(len(seen), -1).sum(1)
    return (-gain * likely.exp().clamp(max=5) + (value - gain) ** 2).mean()


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_a_policy_beside_a_value_is_exact(name):
    torch.manual_seed(0)
    model = Actor(DISTRIBUTIONS[name]).double()
    with PerSampleGradNorms(model) as norms:
        for batch in (B, B, B, B - 1):
            data = torch.randn(batch, SEEN), torch.rand(batch, ACTIONS) - 0.5, torch.randn(batch)
            data = [t.double() for t in data]
            model.zero_grad()
            loss_of(model, *data).backward()
            right = one_by_one(model, lambda m, i, data=data: loss_of(m, *(t[i : i + 1] for t in data)), batch)
            for layer, want in layer_norms(right, norms.layers).items():
                torch.testing.assert_close(norms.per_sample[layer], want, rtol=1e-9, atol=1e-12)
