"""Promise: a weight that somebody's own `torch.autograd.Function` uses is measured exactly, also with other uses."""

import logging

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from hf_clars.grad_norms import PerSampleGradNorms
from hf_clars.grad_norms.graph import operands
from hf_clars.grad_norms.graph.measured_uses import MeasuredUse
from hf_clars.per_sample import NormMonitor


class TokenLosses(torch.autograd.Function):
    """A fused head: each token's log-probability, [N], and what is logged only. Some arguments are no tensors."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, scale):
        ctx.save_for_backward(hidden, weight, targets)
        ctx.scale = scale
        logits = scale * hidden @ weight.T
        return logits.log_softmax(-1).gather(1, targets[:, None])[:, 0], logits.mean(-1)

    @staticmethod
    def backward(ctx, g, g_mean):
        hidden, weight, targets = ctx.saved_tensors
        logits = ctx.scale * hidden @ weight.T
        at_logits = -logits.softmax(-1) * g[:, None]
        at_logits[torch.arange(len(targets)), targets] += g
        at_logits = ctx.scale * (at_logits + g_mean[:, None] / logits.shape[1])
        return at_logits @ weight, at_logits.T @ hidden, None, None, None


class FusedHead(nn.Module):
    def __init__(self, tied, checkpointed=False):
        super().__init__()
        torch.manual_seed(0)
        self.checkpointed = checkpointed
        self.words = nn.Embedding(7, 5)
        self.body = nn.Linear(5, 5)
        self.head = nn.Linear(5, 7, bias=False)
        if tied:
            self.head.weight = self.words.weight

    def forward(self, ids):
        hidden = self.words(ids)
        hidden = checkpoint(self.body, hidden, use_reentrant=False) if self.checkpointed else self.body(hidden)
        hidden = hidden[:, :-1].reshape(-1, 5)
        found, _ = TokenLosses.apply(hidden, self.head.weight, None, ids[:, 1:].reshape(-1), 0.5)
        return -found.view(len(ids), -1).masked_fill(ids[:, 1:] == 0, 0)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_a_fused_head_is_exact(tied, checkpointed):
    model, ids = FusedHead(tied, checkpointed).double(), torch.randint(0, 7, (4, 6))
    with PerSampleGradNorms(model, loss_reduction="sum", layers="tensor", check=True) as norms:
        for _ in range(3):
            model.zero_grad()
            model(ids).sum().backward()
            found = norms.per_sample
    names = dict(model.named_parameters())
    for i in range(len(ids)):
        right = torch.autograd.grad(model(ids[i : i + 1]).sum(), list(names.values()))
        for name, grad in zip(names, right, strict=True):
            torch.testing.assert_close(found[name][i], grad.norm(), rtol=1e-9, atol=1e-12)


def test_an_error_there_ends_the_measuring_and_not_the_training(monkeypatch, caplog):
    monkeypatch.setattr(MeasuredUse, "grads", lambda *a, **k: 1 / 0)
    model, ids = FusedHead(tied=True), torch.randint(0, 7, (4, 6))
    with caplog.at_level(logging.WARNING), NormMonitor(model, every=1) as monitor:
        for _ in range(3):
            with monitor.batch():
                model(ids).sum().backward()
    assert monitor.ended.startswith("ZeroDivisionError")
    assert model.words.weight.grad is not None


def test_where_no_sum_is_checked_a_fused_head_s_gradients_are_made_one_at_a_time_and_exact(monkeypatch):
    """[B, vocabulary, width] of a real head is more than a device holds."""
    together = []
    original = operands.call_for_each

    def one(node, index, stacks, shape):
        together.append(len(stacks[0]))
        return original(node, index, stacks, shape)

    monkeypatch.setattr(operands, "call_for_each", one)
    model, ids = FusedHead(tied=False).double(), torch.randint(0, 7, (4, 6))
    with PerSampleGradNorms(model, loss_reduction="sum", layers="tensor", check=False) as norms:
        for _ in range(4):
            model.zero_grad()
            model(ids).sum().backward()
            found = norms.per_sample["head.weight"]
    alone = [torch.autograd.grad(model(ids[i : i + 1]).sum(), model.head.weight)[0].norm() for i in range(4)]
    torch.testing.assert_close(found, torch.stack(alone))
    assert together == [1] * 16


class Reversible(torch.autograd.Function):
    """Keeps its result alone: its backward runs both modules again, and calls backward() there."""

    @staticmethod
    def forward(ctx, x, f, g):
        ctx.modules = f, g
        first, second = x.chunk(2, -1)
        first = first + f(second)
        second = second + g(first)
        ctx.save_for_backward(first, second)
        return torch.cat((first, second), -1)

    @staticmethod
    def backward(ctx, grad):
        f, g = ctx.modules
        (first, second), (to_first, to_second) = ctx.saved_tensors, grad.chunk(2, -1)
        first = first.detach().requires_grad_()
        with torch.enable_grad():
            out = g(first)
            out.backward(to_second)
        second = (second - out.detach()).requires_grad_()
        to_first = to_first + first.grad
        with torch.enable_grad():
            f(second).backward(to_first)
        return torch.cat((to_first, to_second + second.grad), -1), None, None


class ReversibleNet(nn.Module):
    """Time comes first before them: whose rows are whose is learned from the graph, through the reversible layers."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.words, self.head = nn.Linear(4, 6), nn.Linear(6, 3)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3), nn.Tanh()) for _ in range(4))

    def forward(self, x):  # [B, T, 4]
        hidden = self.words(x.transpose(0, 1)).transpose(0, 1)
        for f, g in zip(self.layers[::2], self.layers[1::2], strict=True):
            hidden = Reversible.apply(hidden, f, g)
        return self.head(hidden)


def test_modules_that_a_backward_function_runs_again_are_exact_and_left_alone():
    model, x = ReversibleNet().double(), torch.randn(5, 7, 4, dtype=torch.float64)
    named = dict(model.named_parameters())
    model(x).sin().sum().backward()
    plain = {n: p.grad for n, p in named.items()}
    came = []
    for p in named.values():
        p.register_post_accumulate_grad_hook(came.append)
    with PerSampleGradNorms(model, loss_reduction="sum", layers="tensor", check=True) as norms:
        for number in range(1, 4):
            model.zero_grad()
            model(x).sin().sum().backward()
            found = norms.per_sample
            for name, p in named.items():
                torch.testing.assert_close(p.grad, plain[name], msg=name)
            assert len(came) == len(named) * number
        assert all(way.ways for way in norms.explain().parameters)
    for i in range(len(x)):
        model.zero_grad()
        model(x)[i].sin().sum().backward()
        for name, p in named.items():
            torch.testing.assert_close(found[name][i], p.grad.norm(), rtol=1e-9, atol=1e-12, msg=name)


class Reversed(torch.autograd.Function):
    """A reversible block: it trains its layer by a backward pass of its own, and says None for the layer's weight."""

    @staticmethod
    def forward(ctx, x, layer, weight):
        with torch.no_grad():
            y = x + layer(x).tanh()
        ctx.layer = layer
        ctx.save_for_backward(x)
        return y

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            ctx.layer(x).tanh().backward(g)
        return g + x.grad, None, None


def test_an_operation_that_says_none_for_a_weight():
    torch.manual_seed(0)
    first, layer = nn.Linear(4, 3).double(), nn.Linear(3, 3, bias=False).double()

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.layer = first, layer

        def forward(self, x):
            return Reversed.apply(self.first(x), self.layer, self.layer.weight)

    model = Model()
    with PerSampleGradNorms(model) as norms:
        for step in range(4):
            torch.manual_seed(step)
            x = torch.randn(5, 4, dtype=torch.float64)
            h = first(x).detach()
            y = h + layer(h).tanh()
            at_product = y.cos() * (1 - (y - h).square())
            model.zero_grad()
            model(x).sin().sum(1).mean().backward()
            want = at_product.norm(dim=1) * h.norm(dim=1)
            torch.testing.assert_close(norms.per_sample["layer"], want)


class ReversedByAsking(Reversed):
    """The same, but it asks for the gradients of its layer's parameters, and returns them."""

    @staticmethod
    def forward(ctx, x, layer, *params):
        ctx.params = params
        return Reversed.forward(ctx, x, layer, None)

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        with torch.no_grad():
            ctx.layer(x)
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            found = torch.autograd.grad(ctx.layer(x).tanh(), (x, *ctx.params), g)
        return g + found[0], None, *found[1:]


class ReversibleFirst(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.head = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x):
        return self.head(ReversedByAsking.apply(x, self.layer, *self.layer.parameters()))


def test_an_operation_that_asks_for_its_layers_gradients_is_not_counted_twice():
    """Also where it takes the data, which have no gradient, and parameters alone: it is made of both."""
    torch.manual_seed(0)
    model = ReversibleFirst().double()
    with PerSampleGradNorms(model, layers="tensor") as norms:
        for step, size in enumerate((5, 4, 6)):
            torch.manual_seed(step)
            x = torch.randn(size, 4, dtype=torch.float64)
            model.zero_grad()
            model(x).sin().sum(1).mean().backward()
            found = norms.per_sample
            assert "ReversedByAsking" in str(norms.explain())
            norms.pause()
            for i in range(size):
                model.zero_grad()
                model(x)[i].sin().sum().backward()
                for name, p in model.named_parameters():
                    torch.testing.assert_close(found[name][i], p.grad.norm(), rtol=1e-9, atol=1e-12, msg=name)
            norms.resume()
