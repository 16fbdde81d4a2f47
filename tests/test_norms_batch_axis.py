"""Promise: a module that does not show which sample is which is measured right all the same, or refused by name."""

import pytest
import torch
from torch import nn

from hf_clars.grad_norms import MixedDevicesError, PerSampleGradNorms, UncoveredParameterError
from tests.oracle import layer_norms, one_by_one


class Windows(nn.Module):
    """Folds windows into the batch axis, as Swin does; or the batch into the windows, with `mixed`."""

    def __init__(self, mixed=False, inner=None):
        super().__init__()
        self.mixed, self.inner = mixed, inner or nn.Linear(4, 3)
        self.head = nn.Linear(3, 2)

    def forward(self, x):  # [B, windows, tokens, 4]
        b, w = x.shape[:2]
        folded = (x.transpose(0, 1) if self.mixed else x).flatten(0, 1)
        y = self.inner(folded)
        y = y.view(w, b, *y.shape[1:]).transpose(0, 1) if self.mixed else y.view(b, w, *y.shape[1:])
        return self.head(torch.tanh(y).flatten(1, -2).mean(1))


class Texts(Windows):
    """Several texts of each sample, as the choices of a question: some words are in more than one of them."""

    def __init__(self, tied=False):
        words, product = nn.Embedding(5, 3, padding_idx=1), nn.Linear(3, 5, bias=False)
        if tied:
            product.weight = words.weight
        super().__init__(inner=nn.Sequential(words, nn.Tanh(), product, nn.Tanh(), nn.Linear(5, 3)))


class Video(nn.Module):
    """Frames folded into the batch of a convolution."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(2, 3, 3), nn.GroupNorm(1, 3), nn.Linear(3, 2)

    def forward(self, x):  # [B, frames, 2, 5, 5]
        y = self.norm(self.conv(x.flatten(0, 1)))
        return self.head(torch.tanh(y).mean((2, 3)).view(*x.shape[:2], 3).mean(1))


class Positions(nn.Module):
    """A position table that is looked up once for all samples."""

    def __init__(self, leading_one):
        super().__init__()
        self.leading_one = leading_one
        self.words, self.positions, self.head = nn.Embedding(7, 4), nn.Embedding(9, 4), nn.Linear(4, 2)

    def forward(self, tokens):
        places = torch.arange(tokens.shape[1])
        places = places.unsqueeze(0) if self.leading_one else places
        return self.head(torch.tanh(self.words(tokens) + self.positions(places)).mean(1))


class TiedHead(nn.Module):
    """Embedding and output layer share one weight, and the module around both adopts the embedding's use at first."""

    def __init__(self, head_first=False):
        super().__init__()
        self.embed, self.head, self.head_first = nn.Embedding(7, 7), nn.Linear(7, 7, bias=False), head_first
        self.head.weight = self.embed.weight

    def forward(self, tokens):
        hidden = self.head(nn.functional.one_hot(tokens, 7).to(self.head.weight.dtype)) if self.head_first else 0
        return self.head(torch.tanh(self.embed(tokens) + hidden)).mean(1)


class Bias(nn.Module):
    """Owns a table and takes no input."""

    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.randn(5, 4))

    def forward(self):
        return self.table


class Biased(nn.Module):
    def __init__(self):
        super().__init__()
        self.bias, self.head = Bias(), nn.Linear(4, 2)

    def forward(self, x):  # [B, 5, 4]
        return self.head(torch.tanh(x + self.bias()).mean(1))


def check(model, x, passes=3):
    """Several passes: the first proves, later ones may use what was proven."""

    def loss_of(m, rows):
        data = x[rows].to(next(m.parameters()).dtype) if x.is_floating_point() else x[rows]
        return m(data).square().sum(1).mean()

    expected = one_by_one(model, lambda m, i: loss_of(m, slice(i, i + 1)), len(x))
    with PerSampleGradNorms(model) as norms:
        for _ in range(passes):
            model.zero_grad()
            loss_of(model, slice(None)).backward()
            for name, want in layer_norms(expected, norms.layers).items():
                torch.testing.assert_close(norms.per_sample[name].double(), want, rtol=1e-4, atol=1e-6, msg=name)
    return norms


CASES = {
    "windows": (Windows, lambda: torch.randn(3, 2, 5, 4)),
    "windows of one token": (Windows, lambda: torch.randn(3, 2, 1, 4)),
    "windows, another order": (lambda: Windows(mixed=True), lambda: torch.randn(3, 2, 5, 4)),
    "windows of a LayerNorm": (
        lambda: Windows(inner=nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 3))),
        lambda: torch.randn(3, 2, 5, 4),
    ),
    "texts of words": (Texts, lambda: torch.randint(0, 5, (3, 2, 4))),
    "texts of words, tied": (lambda: Texts(tied=True), lambda: torch.randint(0, 5, (3, 2, 4))),
    "one sample": (Windows, lambda: torch.randn(1, 2, 5, 4)),
    "frames": (Video, lambda: torch.randn(3, 2, 2, 5, 5)),
    "positions": (lambda: Positions(True), lambda: torch.randint(0, 7, (3, 5))),
    "positions without a leading one": (lambda: Positions(False), lambda: torch.randint(0, 7, (3, 5))),
    "as many positions as samples": (lambda: Positions(False), lambda: torch.randint(0, 7, (5, 5))),
    "tied to the head": (TiedHead, lambda: torch.randint(0, 7, (3, 4))),
    "tied to a head that is called first": (lambda: TiedHead(True), lambda: torch.randint(0, 7, (3, 4))),
    "a table from no input": (Biased, lambda: torch.randn(3, 5, 4)),
    "a table as long as the batch": (Biased, lambda: torch.randn(5, 5, 4)),
}


@pytest.mark.parametrize("case", CASES)
def test_it_is_exact(case):
    torch.manual_seed(0)
    build, data = CASES[case]
    check(build(), data())


def test_what_was_proven_is_used():
    """Windows whose rows lie together are the rule's from the first pass on; others are measured in the graph."""
    for mixed in (False, True):
        model, x = Windows(mixed=mixed), torch.randn(3, 2, 5, 4)
        with PerSampleGradNorms(model) as norms:
            for _ in range(3):
                loss = model(x).sum()
                current = norms._passes[-1]
                assert sum(not call.cancelled for call in current.uses.rule_calls) == (1 if mixed else 2)
                assert bool(current.uses.in_graph) == mixed
                loss.backward()
                norms.reset()


def test_changing_batch_sizes():
    model = Positions(False)
    with PerSampleGradNorms(model) as norms:
        for size in (5, 3, 5, 1, 5):
            torch.manual_seed(size)
            x = torch.randint(0, 7, (size, 5))
            model.zero_grad()
            model(x).square().sum(1).mean().backward()
            expected = one_by_one(model, lambda m, i, x=x: m(x[i : i + 1]).square().sum(), size)
            for name, want in layer_norms(expected, norms.layers).items():
                torch.testing.assert_close(norms.per_sample[name].double(), want, rtol=1e-4, atol=1e-6)


class Opaque:
    def __init__(self, value):
        self.value = value


class ReturnsAnObject(nn.Module):
    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.randn(4))

    def forward(self, x):
        return Opaque(x * self.gain)


def test_a_module_that_returns_no_tensor_is_served_by_one_around_it():
    class Unwraps(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = ReturnsAnObject()

        def forward(self, x):
            return self.inner(x).value

    check(Unwraps(), torch.randn(3, 4))


def test_a_model_that_returns_an_object_is_exact():
    model = ReturnsAnObject()
    for _ in range(3):
        x = torch.randn(3, 4)
        with PerSampleGradNorms(model) as norms:
            model(x).value.sum().backward()
            torch.testing.assert_close(norms.per_sample["ReturnsAnObject"], 3 * x.norm(dim=1))


def test_a_model_whose_result_cannot_be_looked_into_is_refused_by_name():
    class Hides(ReturnsAnObject):
        def forward(self, x):
            y = x * self.gain
            return lambda: y

    model = Hides()
    with PerSampleGradNorms(model) as norms:
        model(torch.randn(3, 4))().sum().backward()
        with pytest.raises(UncoveredParameterError, match=r"gain: has a gradient.*forward"):
            norms.per_sample  # noqa: B018


def test_layers_on_two_devices_are_refused_by_name():
    class Split(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 2, device="meta")

        def forward(self, x):
            return self.b(self.a(x).to("meta"))

    model = Split()
    with PerSampleGradNorms(model), pytest.raises(MixedDevicesError, match=r"b \(Linear\) runs on meta.*on cpu"):
        model(torch.randn(3, 4))


class Routed(nn.Module):
    """Rows go to two experts by what they are: no axis belongs to the samples there."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList([nn.Linear(4, 4) for _ in range(2)])
        self.gains = nn.Parameter(torch.rand(2, 4))

    def forward(self, x):  # [B, T, 4]
        rows = x.flatten(0, 1)
        out = torch.zeros_like(rows)
        for k, expert in enumerate(self.experts):
            where = (rows[:, 0] > 0).eq(k).nonzero()[:, 0]
            out = out.index_add(0, where, torch.tanh(expert(rows[where])) * self.gains[k])
        return out.view_as(x)


def test_rows_routed_to_experts_are_exact():
    torch.manual_seed(1)
    check(nn.Sequential(nn.Linear(4, 4), Routed(), nn.Linear(4, 2), nn.Flatten()), torch.randn(3, 5, 4))


def test_an_exact_but_slow_way_is_announced():
    model = nn.Sequential(Routed(), nn.Flatten())
    with PerSampleGradNorms(model), pytest.warns(UserWarning, match=r"0 \(Routed\).*every sample"):
        model(torch.randn(3, 5, 4)).sum().backward()


class Timed(nn.Module):
    """A time, or one for each sample, and the samples."""

    def __init__(self):
        super().__init__()
        self.time, self.body, self.head = nn.Linear(1, 4), nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, t, x):
        return self.head(torch.tanh(self.body(x) + self.time(t.view(-1, 1))))


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("times", ["one", "each"])
def test_one_number_before_the_samples_is_shared_by_all(times, compiled):
    torch.manual_seed(0)
    torch.compiler.reset()
    model = Timed().double()
    if times == "one" and compiled:
        model.time.requires_grad_(False)  # its rows are no sample's, which is refused in compiled code
    call = torch.compile(model, fullgraph=True, backend="aot_eager") if compiled else model
    with PerSampleGradNorms(model, loss_reduction="sum") as norms:
        for batch in (4, 4, 1, 6):
            t, x = torch.randn(1 if times == "one" else batch).double(), torch.randn(batch, 3).double()

            def of_sample(twin, i, t=t, x=x):
                return twin(t if times == "one" else t[i : i + 1], x[i : i + 1]).square().sum()

            right = layer_norms(one_by_one(model, of_sample, batch), norms.layers)
            model.zero_grad()
            call(t, x).square().sum().backward()
            for name, found in norms.per_sample.items():
                torch.testing.assert_close(found.double(), right[name], rtol=1e-6, atol=1e-9)
    torch.compiler.reset()
