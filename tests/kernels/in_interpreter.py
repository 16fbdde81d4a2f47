"""Promises of the kernels that need Triton's interpreter: tests/test_kernels_exact.py runs them apart."""

import copy
import logging

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from hf_clars.grad_norms import PerSampleGradNorms
from hf_clars.grad_norms.choice import FormChoices
from hf_clars.grad_norms.kernels import INTERPRETED, convolution, linear, operations, reference
from hf_clars.grad_norms.registry import find_rule
from tests.oracle import layer_norms, per_sample_grads
from tests.test_kernels_as_operations import arguments

B = 3
assert INTERPRETED, "run me with TRITON_INTERPRET=1"


class Every(nn.Module):
    """A layer of each family that has kernels, at sizes between their tiles."""

    def __init__(self):
        super().__init__()
        self.images = nn.Sequential(
            nn.Conv2d(3, 34, 3, padding=1),
            nn.BatchNorm2d(34),
            nn.ReLU(True),
            nn.Conv2d(34, 34, 3, stride=2, padding=1, groups=34),
            nn.GroupNorm(2, 34),
            nn.Conv2d(34, 22, (3, 2), dilation=(1, 2), groups=2, bias=False),
            nn.BatchNorm2d(22),
        )
        self.tokens = nn.Sequential(nn.Linear(22, 8), nn.LayerNorm(8), nn.Tanh(), nn.RMSNorm(8), nn.Linear(8, 5))

    def forward(self, x):
        return self.tokens(self.images(x).flatten(2).mT).mean(1)


def every(memory):
    """That network, and images for it."""
    torch.manual_seed(0)
    return Every().to(memory_format=memory), torch.randn(B, 3, 5, 7).to(memory_format=memory)


def loss_of(x):
    weights = torch.linspace(-1, 2, 5, dtype=x.dtype)
    return lambda model: (model(x.to(next(model.parameters()).dtype)) * weights.to(x)).sin().sum(1).mean()


MEMORY = pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last], ids=["plain", "last"])


@pytest.fixture
def used(monkeypatch):
    """The names of the kernels that run, in order."""
    names, real = [], operations._run
    monkeypatch.setattr(operations, "_run", lambda file, name, *args: names.append(name) or real(file, name, *args))
    return names


def take(form, monkeypatch):
    """This form of norms wherever there is a choice."""
    monkeypatch.setattr(FormChoices, "take", lambda self, kind, use, runs=None: form)


@pytest.fixture
def products(monkeypatch):
    take("product", monkeypatch)


@pytest.fixture
def grams(monkeypatch):
    take("gram", monkeypatch)


def measured(model, x, compiled=None):
    """Norms and gradients are those of brute force."""
    plain = copy.deepcopy(model)
    with PerSampleGradNorms(model) as norms:
        loss_of(x)(model if compiled is None else compiled(model)).backward()
    expected = layer_norms(per_sample_grads(plain, loss_of(x.double()), B), norms.layers)
    for name, want in expected.items():
        torch.testing.assert_close(norms.per_sample[name].double(), B * want, rtol=1e-4, atol=1e-6)
    loss_of(x)(plain).backward()
    for (name, p), q in zip(model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


@MEMORY
def test_a_network_of_every_family_in_gram_forms(memory, used, grams):
    measured(*every(memory))
    assert {"linear_gram", "convolution_gram", "channel_norm_backward", "row_sums", "root_mean_square_dx"} <= {*used}


@MEMORY
def test_a_network_of_every_family_by_one_product(memory, used, products):
    measured(*every(memory))
    assert used.count("linear_product") == 2
    assert used.count("convolution_product") == 3
    assert not operations.failed()


class Two(nn.Module):
    """Small, for compilers take their time."""

    def __init__(self):
        super().__init__()
        self.convolution, self.norm, self.linear = nn.Conv2d(16, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 5)

    def forward(self, x):
        return self.linear(self.norm(self.convolution(x)).flatten(2).mT).mean(1)


@pytest.mark.parametrize("form", ["gram", "product"])
def test_compiled_as_a_whole_a_model_uses_the_same_products(form, used, request):
    request.getfixturevalue(f"{form}s")
    torch.compiler.reset()
    torch.manual_seed(0)
    memory = torch.channels_last if form == "gram" else torch.contiguous_format
    model, x = Two().to(memory_format=memory), torch.randn(B, 16, 5, 6).to(memory_format=memory)
    measured(model, x, lambda model: torch.compile(model, fullgraph=True, backend="aot_eager"))
    assert {*used} == {f"linear_{form}", f"convolution_{form}"}  # sums are left to the compiler


def layers():
    return [
        (nn.Conv2d(18, 4, 3), (B, 18, 5, 6)),
        (nn.Conv2d(4, 4, 3, groups=2, bias=False), (B, 4, 5, 6)),
        (nn.Conv2d(4, 8, 3, groups=4), (B, 4, 5, 6)),
        (nn.Conv2d(18, 4, 1), (B, 18, 3, 3)),
        (nn.Linear(6, 5), (B, 7, 6)),
        (nn.BatchNorm2d(6), (B, 6, 3, 4)),
        (nn.GroupNorm(2, 6), (B, 6, 3, 4)),
        (nn.LayerNorm(6), (B, 7, 6)),
        (nn.RMSNorm(6), (B, 7, 6)),
    ]


@pytest.mark.parametrize("form", ["gram", "product"])
@pytest.mark.parametrize("index", range(len(layers())))
def test_norms_of_the_first_samples_and_the_gradient_of_all(form, index, request):
    """What a rule is asked for where `samples=` measures fewer than the batch has."""
    request.getfixturevalue(f"{form}s")
    torch.manual_seed(0)
    layer, shape = layers()[index]
    x = torch.randn(shape).to(memory_format=torch.channels_last if len(shape) == 4 else torch.contiguous_format)
    y = layer(x.requires_grad_())
    g, rule = torch.randn_like(y), find_rule(layer)
    assert rule.supplies_backward(layer, x, y)
    y.backward(g, retain_graph=True)
    saved = tuple(t.detach() for t in rule.operands(layer, x, y))
    whole, part = (
        rule.whole_backward(layer, saved, layer.weight.detach(), g, input_wanted=True, measured=m) for m in (None, 2)
    )
    for name, p in layer.named_parameters():
        torch.testing.assert_close(part.grads[name], p.grad, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(part.squares[name], whole.squares[name][:2])
        assert whole.squares[name].shape == (B,)
    torch.testing.assert_close(part.input_grad, x.grad, rtol=1e-4, atol=1e-5)


def test_an_activation_inside_a_timm_batch_norm_is_not_left_out():
    timm = pytest.importorskip("timm.layers.norm_act")
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 4, 1), timm.BatchNormAct2d(4), timm.BatchNormAct2d(4, apply_act=False), nn.Flatten(2)
    model = nn.Sequential(*layers, nn.Linear(12, 5), nn.AvgPool1d(1), nn.Flatten(), nn.Linear(20, 5))
    measured(model.to(memory_format=torch.channels_last), torch.randn(B, 3, 3, 4).to(memory_format=torch.channels_last))


class Broken:
    """A kernel whose compilation fails."""

    def __getitem__(self, grid):
        def launch(*args, **kwargs):
            raise RuntimeError("ptxas: out of registers")

        return launch


def test_a_kernel_that_does_not_compile_is_replaced_and_named_once(used, grams, monkeypatch, caplog):
    monkeypatch.setattr(convolution, "_gram", Broken())
    monkeypatch.setattr(operations, "_failed", set())
    with caplog.at_level(logging.WARNING, "hf_clars"):
        measured(*every(torch.channels_last))
        measured(*every(torch.channels_last))
    (said,) = (r.getMessage() for r in caplog.records if r.name == operations.__name__)
    assert "convolution_gram" in said
    assert "ptxas: out of registers" in said
    assert operations.failed() == {"convolution_gram"}
    assert used.count("convolution_gram") == 2


def test_no_memory_is_no_failure_of_the_compiler(monkeypatch):
    def no_memory(*args):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(linear, "linear_gram", no_memory)
    with pytest.raises(torch.OutOfMemoryError):
        operations.linear_gram(torch.randn(2, 3, 4), torch.randn(2, 3, 5))
    assert not operations.failed()


@pytest.mark.parametrize(("name", "args"), arguments(), ids=lambda a: a if isinstance(a, str) else "")
def test_what_a_kernel_gives_is_what_compilers_are_told(name, args):
    torch.library.opcheck(getattr(operations, name).whole, args, test_utils=("test_schema", "test_faketensor"))
    assert not operations.failed()


@pytest.mark.parametrize("strides", [(2**30, 8, 1), (8, 2**26, 1)], ids=["samples", "positions"])
def test_offsets_beyond_31_bits(strides):
    """Memory that is never touched is never given: the tensor has 2^31 elements and more, and few pages."""
    shape = (3, 40, 8)
    size = 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
    assert size > 2**31
    x, g = torch.empty(size, dtype=torch.float16).as_strided(shape, strides), torch.randn(3, 40, 5).half()
    x.copy_(torch.randn(shape))
    for found, args in ((linear.linear_product, (x, g, True, 2)), (linear.linear_gram, (x, g))):
        expected = getattr(reference, found.__name__)(*args)
        torch.testing.assert_close(found(*args), expected, rtol=2e-3, atol=1e-3)


# ---- any shape ---------------------------------------------------------------------------------------------

small = st.integers(1, 19)
sizes = settings(deadline=None, max_examples=8)


def agree(name, *args):
    found, expected = (getattr(of, name)(*args) for of in (operations, reference))
    again = getattr(operations, name)(*args)
    found, expected, again = ([t] if isinstance(t, torch.Tensor) else t for t in (found, expected, again))
    for f, e, a in zip(found, expected, again, strict=True):
        assert f.shape == e.shape
        assert f.dtype == e.dtype
        assert torch.equal(f, a)  # bit for bit
        tolerance = 2e-3 if e.dtype is torch.float16 else 1e-5
        torch.testing.assert_close(f, e, rtol=tolerance, atol=tolerance * float(e.abs().max()) if e.numel() else 0)
    assert not operations.failed()


def tensor(*shape, dtype=torch.float32):
    return torch.randn(shape).to(dtype)


types = st.sampled_from([torch.float32, torch.float16])


@sizes
@given(
    b=st.integers(1, 4), t=st.sampled_from([1, 2, 15, 16, 17, 49, 50]), d=small, p=small, dtype=types, data=st.data()
)
def test_linear_of_any_shape(b, t, d, p, dtype, data):
    x, g = tensor(b, t, d, dtype=dtype), tensor(b, t, p, dtype=dtype)
    agree("linear_product", x, g, data.draw(st.booleans()), data.draw(st.integers(1, b)))
    agree("linear_gram", x, g)


@sizes
@given(data=st.data(), dtype=types)
def test_convolutions_of_any_shape(data, dtype):
    def draw(low, high):
        return data.draw(st.integers(low, high))

    def pair(low, high):
        return [draw(low, high), draw(low, high)]

    kernel, stride, padding, dilation = pair(1, 3), pair(1, 3), pair(0, 2), pair(1, 2)
    groups, b = draw(1, 3), draw(1, 3)
    channels, outputs = groups * draw(1, 18), groups * draw(1, 18)
    x = tensor(b, channels, draw(5, 8), draw(5, 8), dtype=dtype)
    weight = torch.zeros(outputs, channels // groups, *kernel)
    g = torch.randn_like(nn.functional.conv2d(x.float(), weight, None, stride, padding, dilation, groups)).to(dtype)
    if data.draw(st.booleans()):
        x = x.contiguous(memory_format=torch.channels_last)
    args = (x, g, kernel, stride, padding, dilation, groups)
    agree("convolution_product", *args, data.draw(st.booleans()), draw(1, b))
    agree("convolution_gram", *args)


@sizes
@given(b=st.integers(1, 4), groups=st.integers(1, 3), per=small, h=st.integers(1, 9), dtype=types, data=st.data())
def test_normalisation_of_any_shape(b, groups, per, h, dtype, data):
    x, g = (tensor(b, groups * per, h, h + 1, dtype=dtype) for _ in range(2))
    if data.draw(st.booleans()):
        x = x.contiguous(memory_format=torch.channels_last)
    shape = data.draw(st.sampled_from([(groups * per,), (b, groups)]))
    stats = torch.randn(shape), torch.rand(shape) + 0.5
    agree("channel_sums", x, g, *stats)
    agree("channel_norm_backward", x, g, torch.randn(groups * per), *stats)
    rows, g_rows = (t.flatten(2).mT for t in (x, g))
    rstd = torch.rand(rows.shape[:2]) + 0.5
    agree("row_sums", rows, g_rows, data.draw(st.sampled_from([None, torch.randn(rstd.shape)])), rstd)
    agree("root_mean_square_dx", rows, g_rows, torch.randn(groups * per), rstd)
