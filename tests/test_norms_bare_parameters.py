"""Promise: bare parameters, and lookups made for all samples at once, are exact in every pass, and cheap later."""

import gc
import weakref

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from hf_clars.grad_norms import PerSampleGradNorms
from hf_clars.grad_norms.graph.measured_uses import Gate
from tests.oracle import layer_norms, one_by_one, per_sample_grads

B = 4


class Embedder(nn.Module):
    """As vision transformers have it: owned by the model itself, like everything in it."""

    def __init__(self):
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, 1, 6))
        self.position = nn.Parameter(torch.randn(1, 4, 6))
        self.scale = nn.Parameter(torch.randn(6))
        self.project, self.head = nn.Linear(5, 6), nn.Linear(6, 2)

    def forward(self, x):  # [B, 3, 5]
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), self.project(x)], dim=1) + self.position
        x = x - self.scale + torch.tanh(x) * self.scale
        return self.head(torch.tanh(x)).mean(1)


class Scaled(nn.Module):
    """The parameter is the first operand, and multiplies something that needs no gradient too."""

    def __init__(self):
        super().__init__()
        self.gain, self.shift = nn.Parameter(torch.randn(3, 1, 1)), nn.Parameter(torch.randn(3, 1, 1))

    def forward(self, x):  # [B, 3, 5, 5]
        return torch.sub(self.gain * x, self.shift, alpha=2).flatten(1)


class Table(nn.Module):
    """Indexed before it meets the samples."""

    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.randn(9))

    def forward(self, x):  # [B, 5]
        return x * self.table[torch.tensor([0, 3, 3, 1, 8])] + self.table[0]


class Coupled(nn.Module):
    """A product with a batch statistic: exact by the definition, which the oracle knows."""

    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.randn(5))

    def forward(self, x):
        return (x - x.mean(0)) * self.gain


class Shared(nn.Module):
    """One parameter of two modules."""

    def __init__(self):
        super().__init__()
        self.first, self.second = Scaled(), Scaled()
        self.second.gain = self.first.gain

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)).view_as(x))


class BatchLike(nn.Module):
    """A parameter whose own first axis is as long as the batch."""

    def __init__(self):
        super().__init__()
        self.rows = nn.Parameter(torch.randn(B, 5))

    def forward(self, x):  # [B, 5]: each sample meets every row
        return (x.unsqueeze(1) * self.rows).flatten(1)


class Positions(nn.Module):
    """Looked up once for all samples, as in GPT-2 ([1, T]) or by hand ([T]); some positions twice."""

    def __init__(self, positions, first=False):
        super().__init__()
        self.table, self.head = nn.Embedding(6, 5), nn.Linear(5, 2)
        self.positions, self.first = positions, first

    def forward(self, x):  # [B, 3, 5]
        found = self.table(self.positions)
        return self.head(torch.tanh(found + x if self.first else x - found)).mean(1)


class Twofold(Positions):
    """One result used twice, or cut before it is used."""

    def __init__(self, positions, end=None):
        super().__init__(positions)
        self.end = end

    def forward(self, x):
        found = self.table(self.positions)
        again = found if self.end is None else found[: self.end]
        return self.head(torch.tanh((x + found) * again)).mean(1)


class Queries(nn.Module):
    """Learned queries that are normalised and projected before they meet the samples."""

    def __init__(self):
        super().__init__()
        self.queries = nn.Parameter(torch.randn(3, 5))
        self.norm, self.head = nn.LayerNorm(5), nn.Linear(5, 2)

    def forward(self, x):  # [B, 3, 5]
        return self.head(torch.tanh(x * self.norm(self.queries))).mean(1)


class OnePlus(nn.Module):
    """A norm as Gemma has it."""

    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.randn(5))

    def forward(self, x):  # [B, 3, 5]
        return (torch.tanh(x) * (1 + self.gain)).flatten(1)


class Windows(nn.Module):
    """A bias by relative position for attention in windows, [B * windows, heads, T, T], as Swin has it."""

    def __init__(self):
        super().__init__()
        self.mix, self.table = nn.Linear(5, 5), nn.Parameter(torch.randn(3, 2))
        self.index = torch.tensor([[0, 1], [2, 0]])

    def forward(self, x):  # [B, 4, 5]
        x = self.mix(x).unflatten(1, (2, 2)).flatten(0, 1)  # windows of two
        scores = x @ x.mT
        scores = scores.unsqueeze(1) * torch.tensor([[[1.0]], [[2.0]]], dtype=x.dtype)
        scores = scores + self.table[self.index].permute(2, 0, 1).contiguous().unsqueeze(0)
        return (scores.softmax(-1) @ x.unsqueeze(1)).unflatten(0, (-1, 2)).flatten(1)


class Resized(nn.Module):
    """Positions for another number of patches than there are, resized first."""

    def __init__(self):
        super().__init__()
        self.mix, self.positions = nn.Linear(5, 5), nn.Parameter(torch.randn(1, 5, 2))

    def forward(self, x):  # [B, 3, 5]
        return torch.tanh(self.mix(x) + functional.interpolate(self.positions, size=3, mode="linear").mT).flatten(1)


class Network(nn.Module):
    """Biases that a small network makes of coordinates, as Swin v2 has it; its bias is added last, elsewhere."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.shift = nn.Linear(2, 7), nn.Linear(7, 5), nn.Parameter(torch.randn(5))
        self.coordinates = torch.tensor([[0.0, 1.0], [1.0, 0.0], [1.0, 1.0]])

    def forward(self, x):  # [B, 3, 5]
        biases = self.second(torch.relu(self.first(self.coordinates.to(x.dtype))))
        return torch.tanh(x * 16 * biases.sigmoid() + self.shift.exp()).flatten(1)


class ByFrequency(Positions):
    """Rows' gradients are divided by how often they are looked up in the whole batch: once, not once a sample."""

    def __init__(self, positions):
        super().__init__(positions)
        self.table = nn.Embedding(6, 5, scale_grad_by_freq=True)


CASES = {
    "tokens": (Embedder, (B, 3, 5)),
    "scales": (Scaled, (B, 3, 5, 5)),
    "indexed": (Table, (B, 5)),
    "coupled": (Coupled, (B, 5)),
    "shared": (Shared, (B, 3, 5, 5)),
    "as long as the batch": (BatchLike, (B, 5)),
    "positions [T]": (lambda: Positions(torch.tensor([4, 0, 4])), (B, 3, 5)),
    "positions [1, T]": (lambda: Positions(torch.tensor([[4, 0, 4]]), first=True), (B, 3, 5)),
    "a lookup used twice": (lambda: Twofold(torch.tensor([[4, 0, 4]])), (B, 3, 5)),
    "a lookup cut before it is used": (lambda: Twofold(torch.tensor([4, 0, 4]), end=1), (B, 3, 5)),
    "queries": (Queries, (B, 3, 5)),
    "one plus": (OnePlus, (B, 3, 5)),
    "windows": (Windows, (B, 4, 5)),
    "resized": (Resized, (B, 3, 5)),
    "a network of its own": (Network, (B, 3, 5)),
    "rows by frequency": (lambda: ByFrequency(torch.tensor([4, 0, 4])), (B, 3, 5)),
}


def loss_of(model, x):
    out = model(x.to(next(model.parameters()).dtype))
    return (out * torch.linspace(-1, 2, out.shape[1], dtype=out.dtype)).sin().sum(1).mean()


@pytest.mark.parametrize("layers", ["module", "tensor"])
@pytest.mark.parametrize("case", CASES)
def test_every_pass_is_exact_and_no_module_is_run_for_each_sample(case, layers, monkeypatch):
    torch.manual_seed(0)
    build, shape = CASES[case]
    model, x = build(), torch.randn(shape)
    calls = []
    monkeypatch.setattr(Gate, "parts", lambda self, *a: calls.append(1))
    if case == "coupled":
        expected = {n: B * g for n, g in per_sample_grads(model, lambda m: loss_of(m, x), B).items()}
    else:
        expected = one_by_one(model, lambda m, i: loss_of(m, x[i : i + 1]), B)
    with PerSampleGradNorms(model, layers=layers) as norms:
        for _ in range(4):
            model.zero_grad()
            loss_of(model, x).backward()
            assert not calls  # no module is differentiated for each sample
            for name, want in layer_norms(expected, norms.layers).items():
                torch.testing.assert_close(norms.per_sample[name].double(), want, rtol=1e-4, atol=1e-6, msg=name)


def test_the_first_samples_alone():
    torch.manual_seed(0)
    model, x = Embedder(), torch.randn(B, 3, 5)
    expected = one_by_one(model, lambda m, i: loss_of(m, x[i : i + 1]), B)
    with PerSampleGradNorms(model, samples=2) as norms:
        for _ in range(3):
            model.zero_grad()
            loss_of(model, x).backward()
            for name, want in layer_norms(expected, norms.layers).items():
                torch.testing.assert_close(norms.per_sample[name].double(), want[:2], rtol=1e-4, atol=1e-6)


class Heads(nn.Module):
    """Spread over as many heads as there may be samples, before it is spread over the samples."""

    def __init__(self):
        super().__init__()
        self.bias = nn.Parameter(torch.randn(1, 3, 3))

    def forward(self, x):  # [B, 3, 5]
        scores = torch.stack([x @ x.mT, x @ x.mT + 1, x @ x.mT + 2, x @ x.mT + 3], 1)  # [B, heads, 3, 3]
        return (scores + (0.5 * self.bias).expand(4, 3, 3)).flatten(1)


@pytest.mark.parametrize("sizes", [(6, 4, 2, 8, 1, 4, 6), (4, 6, 4, 1, 8), (8, 4, 8)])
def test_another_batch_size_is_no_trap(sizes):
    torch.manual_seed(0)
    model = Heads().double()
    with PerSampleGradNorms(model) as norms:
        for size in sizes:
            x = torch.randn(size, 3, 5).double()
            expected = one_by_one(model, lambda m, i, x=x: loss_of(m, x[i : i + 1]), size)
            for _ in range(2):
                model.zero_grad()
                loss_of(model, x).backward()
                for name, want in layer_norms(expected, norms.layers).items():
                    torch.testing.assert_close(norms.per_sample[name], want, rtol=1e-9, atol=1e-12)


def test_whole_vision_transformers():
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    settings = {"img_size": 32, "patch_size": 8, "embed_dim": 12, "depth": 2, "num_heads": 2, "num_classes": 3}
    model = timm.models.vision_transformer.VisionTransformer(**settings, init_values=0.5, reg_tokens=1)
    for p in model.parameters():
        p.data.add_(0.1 * torch.randn_like(p))
    x = torch.randn(B, 3, 32, 32)
    expected = one_by_one(model, lambda m, i: loss_of(m, x[i : i + 1]), B)
    with PerSampleGradNorms(model) as norms:
        for _ in range(3):
            model.zero_grad()
            loss_of(model, x).backward()
            for name, want in layer_norms(expected, norms.layers).items():
                torch.testing.assert_close(norms.per_sample[name].double(), want, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("differentiated", [True, False])
def test_no_graph_is_left_behind(differentiated):
    class Token:
        """Lives as long as the graph whose hook holds it."""

    model, alive = Embedder(), []
    norms = PerSampleGradNorms(model)
    loss_of(model, torch.randn(B, 3, 5)).backward()
    for _ in range(4):
        token = Token()
        alive.append(weakref.ref(token))
        out = model(torch.randn(B, 3, 5))
        out.register_hook(lambda g, t=token: None)
        if differentiated:
            out.sum().backward()
        del token, out
        norms.reset()
    gc.collect()
    assert sum(ref() is not None for ref in alive) == 0
    norms.remove()


@pytest.mark.parametrize("repeated", [False, True])
def test_what_a_hook_makes_of_a_gradient_is_none_of_its_norms(repeated):
    """Neither of a parameter that is used itself, nor of one from which a weight is made; and it runs as without us."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.made, self.used, self.layer = *(nn.Parameter(torch.randn(4, 4)) for _ in range(2)), nn.Linear(4, 4)

        def inner(self, x):
            return self.layer((x @ self.made.exp()).tanh() @ self.used)

        def forward(self, x):
            return checkpoint(self.inner, x, use_reentrant=False) if repeated else self.inner(x)

    torch.manual_seed(0)
    model = Model().double()
    came = []
    for p in model.parameters():
        p.register_hook(lambda g: (came.append(g), 3 * g)[1])
    with PerSampleGradNorms(model, layers="tensor") as norms:
        for _ in range(3):
            x = torch.randn(3, 4, dtype=torch.float64)
            want = one_by_one(model, lambda m, i, x=x: m(x)[i].sin().sum(), 3)
            model.zero_grad()
            came.clear()
            model(x).sin().sum(1).mean().backward()
            assert len(came) == 4
            for name, expected in layer_norms(want, norms.layers).items():
                torch.testing.assert_close(norms.per_sample[name], expected, rtol=1e-9, atol=1e-12)
