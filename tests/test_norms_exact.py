"""Promise: every rule, and the fallback, gives the per-sample norms of the definition."""

import copy

import pytest
import torch
from torch import nn
from torchvision.models.convnext import LayerNorm2d
from transformers.models.convnext.modeling_convnext import ConvNextLayerNorm
from transformers.pytorch_utils import Conv1D

from hf_clars.grad_norms import PerSampleGradNorms, find_rule
from hf_clars.grad_norms.rules.normalization import LayerNormRule
from hf_clars.grad_norms.rules.timm_layers import BatchNormActRule
from hf_clars.layers import param_layers
from tests.oracle import layer_norms, per_sample_grads

B = 5


class Scale(nn.Module):
    """A module of a user's own: no rule knows it."""

    def __init__(self, width):
        super().__init__()
        self.gain = nn.Parameter(torch.randn(width))
        self.shift = nn.Parameter(torch.randn(width))

    def forward(self, x):
        return torch.tanh(x * self.gain + self.shift)


class ClassToken(nn.Module):
    """Owns bare parameters and a child with a rule, as vision transformers' embeddings do."""

    def __init__(self):
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, 1, 6))
        self.position = nn.Parameter(torch.randn(1, 4, 6))
        self.project = nn.Linear(5, 6)

    def forward(self, x):
        x = self.project(x)
        return torch.cat([self.token.expand(x.shape[0], -1, -1), x], dim=1) + self.position


class Twice(nn.Module):
    """One module called twice: the gradients of both uses add up before the norm."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(6, 6)

    def forward(self, x):
        return self.fc(torch.relu(self.fc(x)))


class Tied(nn.Module):
    """Two modules that share one weight."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)
        self.b.weight = self.a.weight

    def forward(self, x):
        return self.b(torch.tanh(self.a(x)))


class TwoOutputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.randn(6))

    def forward(self, x, scale=None):
        return x * self.w, {"square": (x * self.w) ** 2}


class UsesTwoOutputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.both = TwoOutputs()

    def forward(self, x):
        a, b = self.both(x, scale=torch.ones(3))
        return a + b["square"]


class OwnBatchNorm(nn.Module):
    """Couples samples in a way that one sample alone cannot show, and raises nothing when run on one."""

    def __init__(self):
        super().__init__()
        self.gain, self.shift = nn.Parameter(torch.ones(4)), nn.Parameter(torch.zeros(4))

    def forward(self, x):
        x = (x - x.mean((0, 2, 3), keepdim=True)) / (x.var((0, 2, 3), keepdim=True) + 1e-5).sqrt()
        return x * self.gain[:, None, None] + self.shift[:, None, None]


class SubclassedBatchNorm(nn.BatchNorm2d):
    """A library's BatchNorm with more in its forward, as timm's has."""

    def forward(self, x):
        return torch.relu(super().forward(x) + 0.1)


class Attention(nn.Module):
    """Uses out_proj's weights without calling it."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)

    def forward(self, x):
        return self.attention(x, x, x, need_weights=False)[0]


def timm_norm(act):
    from timm.layers import BatchNormAct2d

    layer = BatchNormAct2d(4, act_layer=act)
    assert isinstance(find_rule(layer), BatchNormActRule)
    return layer


def timm_layer_norm():
    from timm.layers import LayerNorm

    layer = LayerNorm(6)
    assert isinstance(find_rule(layer), LayerNormRule)
    return layer


def images(channels=4, side=7):
    return torch.randn(B, channels, side, side)


LINEAR = {
    "2-D": (lambda: nn.Linear(6, 3), lambda: torch.randn(B, 6)),
    "3-D, direct": (lambda: nn.Linear(3, 2), lambda: torch.randn(B, 9, 3)),
    "3-D, Gram": (lambda: nn.Linear(40, 30), lambda: torch.randn(B, 3, 40)),
    "4-D": (lambda: nn.Linear(6, 3), lambda: torch.randn(B, 2, 4, 6)),
    "no bias": (lambda: nn.Linear(6, 3, bias=False), lambda: torch.randn(B, 6)),
}
CONV = {
    "plain": (lambda: nn.Conv2d(4, 6, 3), images),
    "stride, padding": (lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1), images),
    "stride that leaves a rest": (lambda: nn.Conv2d(4, 6, 2, stride=3), images),
    "dilation": (lambda: nn.Conv2d(4, 6, 3, dilation=2, padding=2), images),
    "groups": (lambda: nn.Conv2d(4, 6, 3, groups=2), images),
    "depthwise": (lambda: nn.Conv2d(4, 8, 3, groups=4, padding=1), images),
    "same, even kernel": (lambda: nn.Conv2d(4, 6, (2, 5), padding="same", dilation=(1, 2)), images),
    "valid": (lambda: nn.Conv2d(4, 6, 3, padding="valid"), images),
    "reflect": (lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), images),
    "circular": (lambda: nn.Conv2d(4, 6, 3, padding=(1, 2), padding_mode="circular"), images),
    "replicate, same": (lambda: nn.Conv2d(4, 6, 4, padding="same", padding_mode="replicate"), images),
    "pointwise": (lambda: nn.Conv2d(4, 6, 1), images),
    "pointwise, grouped": (lambda: nn.Conv2d(4, 6, 1, groups=2), images),
    "pointwise, strided": (lambda: nn.Conv2d(4, 6, 1, stride=2), images),
    "many channels, few positions": (lambda: nn.Conv2d(16, 24, 3, stride=2, padding=1), lambda: images(16, 4)),
    "the same, grouped and dilated": (
        lambda: nn.Conv2d(32, 48, 3, groups=2, dilation=2, padding=2, stride=2),
        lambda: images(32, 4),
    ),
    "the same, circular": (
        lambda: nn.Conv2d(16, 24, 3, padding=1, stride=2, padding_mode="circular"),
        lambda: images(16, 4),
    ),
    "more stride than kernel, few positions": (
        lambda: nn.Conv2d(16, 24, 2, padding=2, stride=3),
        lambda: images(16, 5),
    ),
    "1-d, few positions": (lambda: nn.Conv1d(16, 24, 3, padding=2, dilation=2), lambda: torch.randn(B, 16, 4)),
    "3-d, few positions": (lambda: nn.Conv3d(16, 24, (1, 2, 3), padding=1), lambda: torch.randn(B, 16, 2, 2, 3)),
    "transposed": (lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, output_padding=1, padding=1), images),
    "transposed, grouped": (lambda: nn.ConvTranspose2d(4, 6, 3, groups=2, dilation=2), images),
    "transposed, 1-d": (lambda: nn.ConvTranspose1d(4, 6, 4, stride=3), lambda: torch.randn(B, 4, 5)),
    "transposed, 3-d": (lambda: nn.ConvTranspose3d(4, 2, 2, stride=2), lambda: torch.randn(B, 4, 2, 3, 2)),
    "1-d": (lambda: nn.Conv1d(4, 6, 3, stride=2, padding=1, groups=2), lambda: torch.randn(B, 4, 9)),
    "3-d": (lambda: nn.Conv3d(4, 6, 2, padding=1, groups=2), lambda: torch.randn(B, 4, 3, 4, 5)),
}
NORM = {
    "BatchNorm1d": (lambda: nn.BatchNorm1d(6), lambda: torch.randn(B, 6)),
    "BatchNorm1d, sequence": (lambda: nn.BatchNorm1d(6), lambda: torch.randn(B, 6, 3)),
    "BatchNorm2d": (lambda: nn.BatchNorm2d(4), images),
    "BatchNorm2d, eval": (lambda: nn.BatchNorm2d(4).eval(), images),
    "BatchNorm2d, no running statistics": (
        lambda: nn.BatchNorm2d(4, track_running_stats=False).eval(),
        images,
    ),
    "BatchNorm3d": (lambda: nn.BatchNorm3d(4), lambda: torch.randn(B, 4, 3, 2, 2)),
    "LayerNorm": (lambda: nn.LayerNorm(6), lambda: torch.randn(B, 3, 6)),
    "LayerNorm, 2 axes": (lambda: nn.LayerNorm((3, 6)), lambda: torch.randn(B, 3, 6)),
    "GroupNorm": (lambda: nn.GroupNorm(2, 4), images),
    "InstanceNorm2d, running statistics": (
        lambda: nn.InstanceNorm2d(4, affine=True, track_running_stats=True).eval(),
        images,
    ),
    "InstanceNorm2d": (lambda: nn.InstanceNorm2d(4, affine=True), images),
    "timm LayerNorm": (timm_layer_norm, lambda: torch.randn(B, 3, 6)),
    "RMSNorm": (lambda: nn.RMSNorm(6), lambda: torch.randn(B, 3, 6)),
}
OTHER = {
    "Embedding": (lambda: nn.Embedding(7, 3), lambda: torch.randint(0, 7, (B, 9))),
    "Embedding, 1-D": (lambda: nn.Embedding(7, 3), lambda: torch.randint(0, 7, (B,))),
    "Embedding, padding": (lambda: nn.Embedding(4, 3, padding_idx=1), lambda: torch.randint(0, 4, (B, 9))),
    "transformers' Conv1D": (lambda: Conv1D(4, 6), lambda: torch.randn(B, 6)),
    "transformers' Conv1D, Gram": (lambda: Conv1D(40, 30), lambda: torch.randn(B, 3, 30)),
    "transformers' Conv1D, product": (lambda: Conv1D(4, 5), lambda: torch.randn(B, 30, 5)),
    "torchvision's LayerNorm2d": (lambda: LayerNorm2d(4), images),
    "transformers' ConvNextLayerNorm": (lambda: ConvNextLayerNorm(4, data_format="channels_first"), images),
    "transformers' ConvNextLayerNorm, channels last": (lambda: ConvNextLayerNorm(4), lambda: images().movedim(1, -1)),
    "timm's LayerNorm2d": (lambda: pytest.importorskip("timm").layers.LayerNorm2d(4), images),
    "own module": (lambda: Scale(6), lambda: torch.randn(B, 6)),
    "PReLU": (lambda: nn.PReLU(4), images),
    "Bilinear-like two outputs": (UsesTwoOutputs, lambda: torch.randn(B, 6)),
    "own BatchNorm": (OwnBatchNorm, images),
    "subclass of BatchNorm": (lambda: SubclassedBatchNorm(4), images),
    "timm BatchNormAct2d": (lambda: timm_norm(torch.nn.SiLU), images),
    "timm BatchNormAct2d, in place": (lambda: timm_norm(torch.nn.ReLU), images),
    "attention": (Attention, lambda: torch.randn(B, 3, 6)),
    "bare parameters": (ClassToken, lambda: torch.randn(B, 3, 5)),
    "called twice": (Twice, lambda: torch.randn(B, 6)),
    "tied": (Tied, lambda: torch.randn(B, 6)),
}
CASES = {**LINEAR, **CONV, **NORM, **OTHER}


def randomised(model):
    for p in model.parameters():
        nn.init.normal_(p, std=0.5)
    return model


def check(model, x, *, tolerance, layers="module", samples=None):
    target = torch.randn_like(model(x).detach())

    def loss_of(m):
        data = x.double() if x.is_floating_point() else x
        data = data.to(next(m.parameters()).dtype) if x.is_floating_point() else data
        return (m(data) * target.to(next(m.parameters()).dtype)).pow(2).flatten(1).sum(1).mean()

    plain = copy.deepcopy(model)
    loss_of(plain).backward()
    with PerSampleGradNorms(model, layers=layers, samples=samples) as norms:
        loss_of(model).backward()
    oracle = per_sample_grads(model, loss_of, x.shape[0])
    expected = layer_norms(oracle, param_layers(model, layers=layers))
    assert norms.per_sample.keys() == expected.keys()
    for name, value in expected.items():
        got = norms.per_sample[name]
        want = value[:samples] * x.shape[0]
        torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=tolerance * want.max().item())
    for (n, p), q in zip(model.named_parameters(), plain.parameters(), strict=True):
        # One product for norms and weight gradient sums in another order; a watched backward pass changes nothing.
        rounding = 0.0 if samples else 100 * torch.finfo(p.dtype).eps
        torch.testing.assert_close(p.grad, q.grad, rtol=rounding, atol=rounding * q.grad.abs().max().item())
        torch.testing.assert_close(oracle[n].sum(0), p.grad.double(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("case", CASES)
def test_float32_is_exact_to_1e4(case):
    torch.manual_seed(0)
    build, data = CASES[case]
    check(randomised(build()), data(), tolerance=1e-4)


@pytest.mark.parametrize("case", CASES)
def test_float64_is_exact_to_1e9(case):
    torch.manual_seed(1)
    build, data = CASES[case]
    x = data()
    check(randomised(build()).double(), x.double() if x.is_floating_point() else x, tolerance=1e-9)


@pytest.mark.parametrize("case", CASES)
def test_each_tensor_can_be_a_layer(case):
    torch.manual_seed(2)
    build, data = CASES[case]
    check(randomised(build()), data(), tolerance=1e-4, layers="tensor")


@pytest.mark.parametrize("case", CASES)
def test_the_first_samples_alone(case):
    torch.manual_seed(3)
    build, data = CASES[case]
    check(randomised(build()), data(), tolerance=1e-4, samples=3)
