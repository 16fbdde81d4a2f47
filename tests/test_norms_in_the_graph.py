"""Promise: whatever a model does with its parameters, norms are exact in every pass, or refused by name."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from hf_clars.grad_norms import PerSampleGradNorms, UncoveredParameterError
from hf_clars.optim import CLARS
from tests.oracle import layer_norms, one_by_one

B = 3


class Depth(nn.Module):
    """The same weights three times in a row, behind control flow that depends on the data."""

    def __init__(self):
        super().__init__()
        self.w, self.head = nn.Parameter(torch.randn(5, 5) * 0.4), nn.Linear(5, 4)

    def forward(self, x):
        for _ in range(3):
            x = x if x.sum() > 1e9 else torch.tanh(x @ self.w)
        return self.head(x)


class Cell(nn.Module):
    """An LSTMCell that is stepped by hand."""

    def __init__(self):
        super().__init__()
        self.cell, self.head = nn.LSTMCell(5, 8), nn.Linear(8, 4)

    def forward(self, x):
        state = None
        for t in range(x.shape[1]):
            state = self.cell(x[:, t], state)
        return self.head(state[0])


class Attention(nn.Module):
    def __init__(self, shared):
        super().__init__()
        self.shared, self.w = shared, nn.Parameter(torch.randn(5, 5))

    def forward(self, x):
        return self.shared(x) @ self.w.tanh()


class SharedModule(nn.Module):
    """One module registered at two places, below modules without a rule."""

    def __init__(self):
        super().__init__()
        shared = nn.Linear(5, 5)
        self.first, self.second, self.shared = Attention(shared), Attention(shared), shared
        self.gain = nn.Parameter(torch.ones(5, 4))

    def forward(self, x):
        return self.second(self.first(x)) @ self.gain.tanh()


class Buffered(nn.Module):
    """An embedding of a buffer that is expanded to the batch, as token types that are left out."""

    def __init__(self):
        super().__init__()
        self.word, self.kind = nn.Embedding(20, 8), nn.Embedding(2, 8)
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 4)
        self.register_buffer("ids", torch.zeros(1, 16, dtype=torch.long))

    def forward(self, x):
        kinds = self.kind(self.ids[:, : x.shape[1]].expand(x.shape[0], -1))
        return self.head(torch.tanh(self.norm(self.word(x) + kinds))).mean(1)


class Root(nn.Module):
    """nanoGPT's layout: positions, a tied head and a bare scale at the root."""

    def __init__(self):
        super().__init__()
        self.words, self.places = nn.Embedding(20, 8), nn.Embedding(8, 8)
        self.block, self.head = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8), nn.GELU()), nn.Linear(8, 20, bias=False)
        self.head.weight, self.scale = self.words.weight, nn.Parameter(torch.ones(8))

    def forward(self, x):
        hidden = self.words(x) + self.places(torch.arange(x.shape[1]))
        return self.head((hidden + self.block(hidden)) * self.scale).mean(1)


class Fold(nn.Module):
    """Time first and flattened: a sample's rows are B apart."""

    def __init__(self):
        super().__init__()
        self.inner, self.head = nn.Linear(5, 6), nn.Linear(6, 4)

    def forward(self, x):  # [B, T, 5]
        rows = torch.tanh(self.inner(x.transpose(0, 1).reshape(-1, 5)))
        return self.head(rows.view(x.shape[1], x.shape[0], 6).mean(0))


class WeightTied(nn.Module):
    """A layer's weight is used by a function too."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(5, 5)

    def forward(self, x):
        return functional.linear(torch.tanh(self.inner(x)), self.inner.weight.sigmoid(), self.inner.bias)[:, :4]


class Standardized(nn.Module):
    """A convolution whose weight is standardized first, above a BatchNorm in eval mode."""

    def __init__(self):
        super().__init__()
        self.weight, self.norm, self.head = nn.Parameter(torch.randn(6, 2, 3, 3)), nn.BatchNorm2d(6), nn.Linear(6, 4)

    def forward(self, x):
        w = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return self.head(torch.tanh(self.norm(functional.conv2d(x, w))).mean((2, 3)))


class Checkpointed(nn.Module):
    """Bare scales inside an activation checkpoint."""

    def __init__(self, reentrant, inner=None):
        super().__init__()
        self.reentrant, self.embed, self.head = reentrant, nn.Linear(5, 5), nn.Linear(5, 4)
        self.block = Around(inner or Scale())

    def forward(self, x):
        hidden = self.embed(x)
        return self.head(checkpoint(self.block, hidden, use_reentrant=self.reentrant))


class Around(nn.Module):
    """Owns a parameter, and a module that owns some."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.tilt = inner, nn.Parameter(torch.rand(5))

    def forward(self, x):
        return self.inner(x) * self.tilt


class Scale(nn.Module):
    def __init__(self):
        super().__init__()
        self.gain, self.shift, self.inner = nn.Parameter(torch.rand(5)), nn.Parameter(torch.rand(5)), nn.Linear(5, 5)

    def forward(self, x):
        return self.inner(torch.tanh(x) * self.gain) + self.shift


class Steps(Scale):
    """Takes its scale at each of some steps, and a layer's weight beside the layer."""

    def forward(self, x):
        for _ in range(3):
            x = torch.tanh(x) * self.gain + self.shift
        return self.inner(x) + functional.linear(x, self.inner.weight)


def vectors():
    return torch.randn(B, 5)


def tokens():
    return torch.randint(0, 20, (B, 6))


CASES = {
    "weights shared over depth": (Depth, vectors),
    "a cell in a loop": (Cell, lambda: torch.randn(B, 6, 5)),
    "a module at two places": (SharedModule, vectors),
    "token types from a buffer": (Buffered, tokens),
    "everything at the root": (Root, tokens),
    "as many steps as samples": (Root, lambda: torch.randint(0, 20, (B, B))),
    "rows of a sample apart": (Fold, lambda: torch.randn(B, 4, 5)),
    "rows apart, as many as samples": (Fold, lambda: torch.randn(B, B, 5)),
    "a weight used by a function too": (WeightTied, vectors),
    "a standardized weight": (lambda: Standardized().eval(), lambda: torch.randn(B, 2, 5, 5)),
    "checkpointing": (lambda: Checkpointed(False), vectors),
    "reentrant checkpointing": (lambda: Checkpointed(True), vectors),
    "reentrant checkpointing of steps": (lambda: Checkpointed(True, Steps()), vectors),
}


def loss_of(model, x):
    out = model(x.double() if x.is_floating_point() else x)
    return (out * torch.linspace(-1, 2, out.shape[1], dtype=out.dtype)).sin().sum(1).mean()


@pytest.mark.parametrize("case", CASES)
def test_exact_in_every_pass_and_nothing_of_the_model_is_touched(case):
    torch.manual_seed(0)
    build, data = CASES[case]
    model, x = build().double(), data()
    before = dict(model.named_parameters())
    apart = copy.deepcopy(model)
    apart.reentrant = False  # that kind cannot be differentiated by `torch.autograd.grad`
    expected = one_by_one(apart, lambda m, i: loss_of(m, x[i : i + 1]), B)
    plain = copy.deepcopy(model)
    loss_of(plain, x).backward()
    with PerSampleGradNorms(model, layers="tensor", check=True) as norms:
        for _ in range(4):
            model.zero_grad()
            loss_of(model, x).backward()
            for name, want in layer_norms(expected, norms.layers).items():
                torch.testing.assert_close(norms.per_sample[name], want, rtol=1e-9, atol=1e-12, msg=name)
    for (name, p), q in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert before[name] is p
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-9, atol=1e-12)


class InsideLoss(nn.Module):
    """Returns the loss alone."""

    def __init__(self):
        super().__init__()
        self.net = Root()

    def forward(self, x, labels):
        return functional.cross_entropy(self.net(x), labels)


def test_a_model_that_returns_the_loss_alone():
    torch.manual_seed(0)
    model, x, y = InsideLoss().double(), tokens(), torch.tensor([1, 5, 7])
    expected = one_by_one(model, lambda m, i: m(x[i : i + 1], y[i : i + 1]), B)
    with PerSampleGradNorms(model, layers="tensor") as norms:
        for _ in range(3):
            model.zero_grad()
            model(x, y).backward()
            for name, want in layer_norms(expected, norms.layers).items():
                torch.testing.assert_close(norms.per_sample[name], want, rtol=1e-9, atol=1e-12, msg=name)


class Line(nn.Module):
    """transformers' own regression model: bare scalars at the root, a loss of no dimension."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Parameter(torch.tensor(0.5)), nn.Parameter(torch.tensor(-0.3))

    def forward(self, x, labels):
        y = x * self.a + self.b
        return functional.mse_loss(y, labels), y


def test_bare_scalars_and_a_loss_of_no_dimension():
    model, x, y = Line(), torch.randn(4), torch.randn(4)
    with PerSampleGradNorms(model, layers="tensor") as norms:
        for _ in range(3):
            model.zero_grad()
            model(x, y)[0].backward()
            error = 2 * (x * model.a + model.b - y).detach()
            torch.testing.assert_close(norms.per_sample["a"], (error * x).abs())
            torch.testing.assert_close(norms.per_sample["b"], error.abs())


class Parts(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.gain, self.head = nn.Linear(5, 8), nn.Parameter(torch.ones(8)), nn.Linear(8, 4)

    def encode(self, x):
        return self.body(x) * self.gain


def test_a_parameter_used_outside_of_any_forward_is_refused_by_name():
    model = Parts()
    norms = PerSampleGradNorms(model)
    for _ in range(3):
        model.zero_grad()
        model.head(model.encode(vectors())).sum().backward()
        with pytest.raises(UncoveredParameterError, match="gain: has a gradient, but no use of it was seen"):
            norms.per_sample  # noqa: B018
    norms.remove()


@pytest.mark.parametrize("in_place", [False, True])
def test_two_observers_of_a_module_without_a_rule(in_place):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.gain = nn.Parameter(torch.ones(4))

        def forward(self, x):
            y = x * self.gain
            if in_place:
                y += x
                return y
            return y + x

    model, x = Net(), torch.randn(8, 4)
    optimizer = CLARS(model, 0.1)
    for step in range(4):
        optimizer.zero_grad()
        norms = PerSampleGradNorms(model) if step == 2 else None
        model(x).square().sum(1).mean().backward()
        if norms is not None:
            want = (2 * (x * model.gain.detach() + x) * x).norm(dim=1)
            torch.testing.assert_close(norms.per_sample["Net"], want)
            norms.remove()
        optimizer.step()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nothing_is_learned_from_a_pass_that_is_not_finite(bad):
    """The first backward pass of fp16 nearly always overflows."""
    torch.manual_seed(0)
    model, x = Root().double(), tokens()
    expected = one_by_one(model, lambda m, i: loss_of(m, x[i : i + 1]), B)
    with PerSampleGradNorms(model, layers="tensor") as norms:
        for step in range(4):
            model.zero_grad()
            (loss_of(model, x) * (bad if step == 0 else 1)).backward()
            read = norms.per_sample
            for name, want in layer_norms(expected, norms.layers).items() if step else ():
                torch.testing.assert_close(read[name], want, rtol=1e-9, atol=1e-12, msg=name)


@pytest.mark.parametrize(
    "case", ["everything at the root", "a cell in a loop", "rows of a sample apart", "checkpointing"]
)
def test_under_autocast_each_parameter_is_measured_in_the_same_way(case):
    torch.manual_seed(0)
    build, data = CASES[case]
    model, x, told = build(), data(), []
    for low in (False, True):
        with PerSampleGradNorms(model, layers="tensor") as norms:
            for _ in range(3):
                model.zero_grad()
                with torch.autocast("cpu", dtype=torch.bfloat16, enabled=low):
                    out = model(x)
                out.float().sin().sum(1).mean().backward()
                read = norms.per_sample
            told.append({p.parameter: "one backward pass a sample" in str(p.ways) for p in norms.explain().parameters})
            assert all(v.isfinite().all() and v.dtype == torch.float32 for v in read.values())
    assert told[0] == told[1]
    assert not any(told[0].values())
