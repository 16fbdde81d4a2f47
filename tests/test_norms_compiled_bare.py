"""Promise: in compiled code a parameter is measured wherever samples meet it, in a module with a rule or not."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from hf_clars.grad_norms import PerSampleGradNorms, UncoveredParameterError
from hf_clars.optim import CLARS
from tests.test_norms_compiled_uses import compare, fresh_compiler, loss_of  # noqa: F401  (a fixture)
from tests.test_norms_compiled_whole import traced, whole


class Net(nn.Module):
    """A layer, what a test does between, and a head."""

    def __init__(self, width=4):
        super().__init__()
        self.first, self.head = nn.Linear(width, width), nn.Linear(width, 3)


class ClassToken(Net):
    """As in a ViT: a token for each sample, positions for all, a gain."""

    def __init__(self):
        super().__init__()
        self.token, self.positions = nn.Parameter(torch.randn(1, 1, 4)), nn.Parameter(torch.randn(1, 6, 4))
        self.gain = nn.Parameter(torch.randn(4))

    def forward(self, x):
        x = torch.cat([self.token.expand(len(x), -1, -1), self.first(x)], 1)
        return self.head((x + self.positions) * self.gain.exp())


class Latents(Net):
    """As in a Perceiver: a rule's module meets them first, and they are the queries."""

    def __init__(self):
        super().__init__()
        self.latents, self.norm = nn.Parameter(torch.randn(3, 4)), nn.LayerNorm(4)

    def forward(self, x):
        queries = self.norm(self.latents.unsqueeze(0).repeat(x.size(0), 1, 1))
        return self.head(F.scaled_dot_product_attention(queries, self.first(x), x))


class Attention(Net):
    """Its packed weights, time first inside; from one text to another, with tokens of its own."""

    def __init__(self):
        super().__init__()
        self.block = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True)
        self.across = nn.MultiheadAttention(4, 2, add_bias_kv=True, batch_first=True)

    def forward(self, x):
        y = self.block(self.first(x))
        return self.head(self.across(y[:, :2], y, y)[0])


class Dropping(Net):
    def __init__(self):
        super().__init__()
        self.block = nn.MultiheadAttention(4, 2, dropout=0.3, batch_first=True)

    def forward(self, x):
        return self.head(self.block(x, x, x)[0])


class Windows(Net):
    """As in a Swin: shifted windows, a table of places that is indexed, and a mask spread over the samples."""

    def __init__(self):
        super().__init__()
        self.table, self.scale = nn.Parameter(torch.randn(3, 1)), nn.Parameter(torch.ones(1))
        self.register_buffer("places", torch.tensor([[1, 2], [0, 1]]))

    def forward(self, x):
        batch = x.shape[0]
        windows = self.first(x).roll(1, 1).view(batch, 3, 2, 4).reshape(-1, 1, 2, 4)
        bias = self.table[self.places.view(-1)].view(2, 2, -1).permute(2, 0, 1).unsqueeze(0)
        mask = torch.zeros(3, 2, 2)
        mask[0, 0, 1] = -3.0
        mask = mask[None, :, None].expand(batch, -1, -1, -1, -1).reshape(-1, 1, 2, 2).to(x.dtype)
        y = F.scaled_dot_product_attention(windows * self.scale, windows, windows, attn_mask=bias + mask)
        return self.head(y.view(batch, 6, 4).roll(-1, 1))


class Written(Net):
    """Operations that write: into the data, and into what is made of a parameter, as SwinV2 does with a bias."""

    def __init__(self):
        super().__init__()
        self.shift, self.gain = nn.Parameter(torch.randn(4)), nn.Parameter(torch.randn(5, 4))

    def forward(self, x):
        shift = self.shift.clone()
        shift[1:3].zero_()
        x = self.first(x)
        x += shift
        return self.head(x.mul_(self.gain) + shift.sum())


class Products(Net):
    """Weights in an einsum, transposed in another product, made of others, of a convolution, of a mixture."""

    def __init__(self):
        super().__init__()
        self.weight, self.direction = nn.Parameter(torch.randn(4, 4)), nn.Parameter(torch.randn(4, 4))
        self.kernel, self.experts = nn.Parameter(torch.randn(5, 5, 3)), nn.Parameter(torch.randn(2, 4, 4))

    def forward(self, x):
        x = torch.einsum("btd,de->bte", self.first(x), self.weight) @ self.weight.t()
        x = F.linear(x, self.direction / self.direction.norm(dim=1, keepdim=True))
        shares = x[..., :2].softmax(-1)
        x = torch.einsum("bte,btd,edf->btf", shares, x, self.experts)
        return self.head(F.layer_norm(F.conv1d(x, self.kernel, padding=1), (4,), 1 + self.weight[0]))


class RelativeBias(Net):
    """As in T5: a module with a rule looks a table up for all samples; there may be as many steps as samples."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(9, 1)

    def forward(self, x):
        steps = torch.arange(x.shape[1])
        bias = self.table(steps[None] - steps[:, None] + 4).permute(2, 0, 1)
        return self.head((x @ self.first(x).mT + bias).softmax(-1) @ x)


class Cell(Net):
    """As many units as samples in the last batch."""

    def __init__(self):
        super().__init__()
        self.cell = nn.GRUCell(4, 4)

    def forward(self, x):
        return self.head(self.cell(x, self.first(x)))


class Root(nn.Module):
    """Parameters of its own only, but for one layer that is called last."""

    def __init__(self):
        super().__init__()
        self.weight, self.bias, self.norm = (
            nn.Parameter(torch.randn(3, 4)),
            nn.Parameter(torch.randn(3)),
            nn.LayerNorm(3),
        )

    def forward(self, x):
        return self.norm(x @ self.weight.T + self.bias)


class LowRank(nn.Module):
    """LoRA by hand, as a part or as the whole model: all modules are frozen."""

    def __init__(self):
        super().__init__()
        self.frozen = nn.Linear(4, 3).requires_grad_(False)
        self.down, self.up = nn.Parameter(torch.randn(4, 2)), nn.Parameter(torch.randn(2, 3))

    def forward(self, x):
        return self.frozen(x) + x @ self.down @ self.up


class Listed(nn.Module):
    """A frozen layer, and parameters in a list, which is never called."""

    def __init__(self):
        super().__init__()
        self.frozen = nn.Linear(4, 4).requires_grad_(False)
        self.gains = nn.ParameterList([nn.Parameter(torch.randn(4)) for _ in range(2)])

    def forward(self, x):
        return (self.frozen(x) * self.gains[0]).tanh() * self.gains[1]


class Logistic(nn.Module):
    """No module inside whose call could be seen."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 3))

    def forward(self, x):
        return x @ self.weight


def steps(length):
    return lambda batch: (torch.randn(batch, length, 4),)


@pytest.mark.parametrize(
    ("make", "inputs", "batches", "call"),
    [
        (ClassToken, steps(5), (3, 3, 3, 4, 4), whole),
        (Latents, steps(5), (2, 2, 2), traced),
        (Attention, steps(5), (3, 3, 3), whole),
        (Windows, steps(6), (2, 2, 2, 4), traced),
        (Written, steps(5), (3, 3, 3), whole),
        (Products, steps(5), (3, 3, 3), traced),
        (RelativeBias, steps(4), (4, 4, 4), traced),
        (Cell, lambda batch: (torch.randn(batch, 4),), (3, 3, 3, 4), traced),
        (LowRank, steps(5), (3, 3, 3, 4), whole),
        (lambda: nn.Sequential(LowRank(), nn.Tanh()), steps(3), (3, 3, 3), traced),
        (Listed, steps(3), (3, 3, 3), traced),
        (Root, lambda batch: (torch.randn(batch, 4),), (3, 3, 3), traced),
    ],
)
def test_norms_are_those_of_one_backward_pass_a_sample(make, inputs, batches, call):
    compare(make(), inputs, batches, call=call)


def test_also_with_inductor_in_float32_for_a_batch_of_any_size():
    norms = compare(
        ClassToken(), steps(5), (3, 5, 4), torch.float32, call=lambda model: torch.compile(model, fullgraph=True)
    )
    assert "copies for each sample" in str(norms.explain())


def test_the_loss_may_be_compiled_with_the_model_and_some_samples_are_enough():
    model, x = ClassToken(), torch.randn(5, 5, 4)
    step = torch.compile(lambda m, x: loss_of(m, (x,)), fullgraph=True, backend="aot_eager")
    found = []
    for call in (step, lambda m, x: loss_of(m, (x,))):
        with PerSampleGradNorms(model, samples=3) as norms:
            for _ in range(3):
                model.zero_grad()
                call(model, x).backward()
                found.append(norms.per_sample)
    for compiled, plain in zip(found[:3], found[3:], strict=True):
        for name, right in plain.items():
            torch.testing.assert_close(compiled[name], right)
            assert len(right) == 3


def test_gradients_stay_bit_for_bit_what_they_were_also_where_attention_drops_at_random():
    model = Dropping()
    (x,) = steps(5)(3)
    grads = []
    for measured in (False, True):
        torch.compiler.reset()
        norms = PerSampleGradNorms(model) if measured else None
        call = whole(model)
        for seed in range(3):
            torch.manual_seed(seed)
            model.zero_grad()
            call(x).square().sum().backward()
            grads.append({n: p.grad.clone() for n, p in model.named_parameters() if "block.in" in n})
    norms.remove()
    for plain, with_norms in zip(grads[:3], grads[3:], strict=True):
        for name, right in plain.items():
            assert torch.equal(with_norms[name], right)


def test_two_observers_and_one_that_trains():
    model = ClassToken().double()
    other = ClassToken().double()
    other.load_state_dict(model.state_dict())
    trained, plain = CLARS(model, 1.0, eta=0.02), CLARS(other, 1.0, eta=0.02)
    with PerSampleGradNorms(model) as norms, PerSampleGradNorms(other) as right:
        call = whole(model)
        for _ in range(4):
            x = torch.randn(3, 5, 4, dtype=torch.double)
            for m, optimizer in ((call, trained), (other, plain)):
                optimizer.zero_grad()
                loss_of(m, (x,)).backward()
                optimizer.step()
            for name, values in right.per_sample.items():
                torch.testing.assert_close(norms.per_sample[name], values)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q)


class Penalised(ClassToken):
    def forward(self, x):
        return super().forward(x), self.gain.square().sum()


class RandomBias(RelativeBias):
    """Its attention drops at random, and the table is inside of it."""

    def forward(self, x):
        bias = self.table(torch.arange(5)).mT[None]
        return self.head(F.scaled_dot_product_attention(x, x, self.first(x), attn_mask=bias, dropout_p=0.5))


class WrittenIntoTheData(ClassToken):
    def forward(self, x):
        x = self.first(x)
        x[:, 0] = self.gain
        return super().forward(x)


class WrittenIntoABlank(ClassToken):
    def forward(self, x):
        blank = torch.zeros(4)
        blank.add_(self.gain)
        return super().forward(x) * blank[:3]


def test_a_model_of_which_no_call_can_be_seen_is_refused_by_name():
    model = Logistic()
    with PerSampleGradNorms(model) as norms:
        assert norms.why_not_compiled() == "weight"
        with pytest.raises(UncoveredParameterError, match="weight: no layer rule measures this in compiled code"):
            traced(model)(torch.randn(3, 4))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (WrittenIntoTheData, r"gain \(in setitem\).*is written into something else"),
        (WrittenIntoABlank, r"gain \(in add\).*is written into something else"),
        (Penalised, r"gain \(in sum\).*leaves the compiled code without having met a sample"),
        (RandomBias, r"table\.weight \(in scaled_dot_product_attention\).*draws numbers at random"),
    ],
)
def test_what_belongs_to_no_sample_is_refused_by_name(make, words):
    model = make()
    with PerSampleGradNorms(model) as norms:
        call = traced(model)
        for _ in range(3):
            with pytest.raises(UncoveredParameterError, match=words):
                call(*steps(5)(3))
        norms.reset()
