"""Promise: passes that overlap, fail, are thrown away, run again or are cleared are told apart."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from hf_clars.grad_norms import PerSampleGradNorms
from hf_clars.optim import CLARS


class Scaled(nn.Module):
    """A block that is applied several times, with a parameter of its own."""

    def __init__(self, kind):
        super().__init__()
        self.block, self.head = Block(), nn.Linear(4, 2)
        self.kind, self.times = kind, 2

    def forward(self, x):
        for _ in range(self.times):
            x = x + (self.block(x) if self.kind is None else checkpoint(self.block, x, use_reentrant=self.kind))
        return self.head(x)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.gain = nn.Linear(4, 4), nn.Parameter(torch.rand(4))

    def forward(self, x):
        return torch.tanh(self.linear(x)) * self.gain


def one_backward_a_sample(model, parts, layers):
    """{layer: [B]} of the summed loss, without checkpointing, by a copy."""
    plain = copy.deepcopy(model)
    plain.kind = None
    named, rows = dict(plain.named_parameters()), []
    for row in torch.cat(parts).split(1):
        grads = torch.autograd.grad(plain(row).square().sum(), list(named.values()))
        squares = {n: g.square().sum() for n, g in zip(named, grads, strict=True)}
        rows.append([sum(squares[n] for n in layer.param_names).sqrt() for layer in layers])
    return dict(zip([layer.name for layer in layers], torch.tensor(rows, dtype=torch.double).T, strict=True))


@pytest.mark.parametrize("kind", [None, True, False])
@pytest.mark.parametrize("turn", ["together", "as begun", "last first"])
def test_passes_of_several_sizes_under_checkpointing_are_told_apart(kind, turn):
    torch.manual_seed(0)
    model = Scaled(kind).double()
    norms = PerSampleGradNorms(model, loss_reduction="sum", check=False)
    for times in (2, 2, 3, 1, 2):
        model.zero_grad()
        model.times = times
        parts = [torch.randn(size, 4, dtype=torch.double, requires_grad=True) for size in (2, 3, 3)]
        losses = [model(x).square().sum() for x in parts]
        for loss in {"together": [sum(losses)], "as begun": losses, "last first": losses[::-1]}[turn]:
            loss.backward()
        for name, wanted in one_backward_a_sample(model, parts, norms.layers).items():
            torch.testing.assert_close(norms.per_sample[name], wanted)
    norms.remove()


def test_passes_that_fail_or_are_thrown_away_use_up_no_samples():
    torch.manual_seed(0)
    model = Scaled(None).double()
    norms = PerSampleGradNorms(model, samples=5, loss_reduction="sum")
    for _ in range(4):
        model.zero_grad()
        parts = [torch.randn(size, 4, dtype=torch.double) for size in (2, 4)]
        for x in parts:
            model(torch.randn(3, 4, dtype=torch.double)).sum().item()  # an evaluation with gradients
            with pytest.raises(RuntimeError):
                model(torch.randn(3, 7, dtype=torch.double))
            model(x).square().sum().backward()
        for name, wanted in one_backward_a_sample(model, parts, norms.layers).items():
            torch.testing.assert_close(norms.per_sample[name], wanted[:5])
    norms.remove()


class Heads(nn.Module):
    """Each pass uses one of many."""

    def __init__(self):
        super().__init__()
        self.heads = nn.ModuleList(nn.Linear(4, 3) for _ in range(7)).double()

    def forward(self, x, number):
        return self.heads[number](x)


@pytest.mark.parametrize("to_none", [True, False])
def test_cleared_gradients_of_any_parameter_begin_a_batch(to_none):
    torch.manual_seed(0)
    model = Heads()
    norms = PerSampleGradNorms(model)
    for number in (0, 2, 2, 5, 6, 5, 1, 1):  # the first, the middle and the last are watched from the start
        model.zero_grad(set_to_none=to_none)
        parts = [torch.randn(size, 4, dtype=torch.double) for size in (2, 3)]
        for x in parts:
            (model(x, number).square().sum() / len(x)).backward()
        x, linear = torch.cat(parts), model.heads[number]
        wanted = 2 * linear(x).detach().norm(dim=1) * (1 + x.square().sum(1)).sqrt()
        for name, values in norms.per_sample.items():
            torch.testing.assert_close(values, wanted if name == f"heads.{number}" else torch.zeros_like(wanted))
    norms.remove()


def test_cleared_gradients_begin_a_batch_of_the_microbatch_estimator():
    torch.manual_seed(0)
    model = Heads()
    optimizer = CLARS(model, lr=0.0, estimator="microbatch")
    for number in (2, 2, 5, 5):
        for p in model.parameters():
            if p.grad is not None:
                p.grad.zero_()
        model(torch.randn(3, 4, dtype=torch.double), number).square().sum().backward()
        assert optimizer.norms.totals().captured == 1
