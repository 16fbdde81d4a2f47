"""Promise: every form that a layer's norms may take on a GPU is exact, shown on the CPU by the same code."""

import pytest
import torch
from torch import nn

from hf_clars.grad_norms import PerSampleGradNorms, convolution_math, norm_math
from hf_clars.grad_norms.choice import FormChoices, cheapest_form, tables
from hf_clars.grad_norms.rules import convolution, kernel_forms
from hf_clars.grad_norms.rules.costs import SHIPPED, WeightUse, fastest, predicted

pytestmark = pytest.mark.usefixtures("fresh_forms")
USE = WeightUse(3, 20, 16, 24, element_size=2)
FEW_CHANNELS = 16


def test_the_librarys_grouped_convolution_is_taken_on_cuda_only_where_it_was_measured_faster(fresh_forms):
    use = WeightUse(8, 49, 32, 32, pixels=49, kernel=(3, 3))
    assert all("grouped" not in predicted(kind, use) for kind in ("torch", "torch beside"))
    shipped = [WeightUse.named(name) for name in SHIPPED["times"]["torch"]]
    assert all(cheapest_form(u, "cuda") != "grouped" for u in shipped)
    tables.write({"torch": {str(use): {"gram": 3.0, "product": 2.0, "grouped": 1.0}}})
    fresh_forms.measure_anew(0)
    assert cheapest_form(use, "cuda") != "grouped"
    fresh_forms._known = None
    fresh_forms.restore({})
    assert cheapest_form(use, "cuda") == "grouped"


def test_nothing_is_looked_up_on_a_cpu(fresh_forms, monkeypatch):
    monkeypatch.setattr(FormChoices, "take", lambda *_: pytest.fail("looked up"))
    cheapest_form(USE, "cpu")
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1), nn.Flatten(2), nn.Linear(36, 5))
    with PerSampleGradNorms(model) as norms:
        model(torch.randn(4, 3, 8, 8)).square().mean().backward()
        assert norms.per_sample["0"].shape == (4,)
    assert fresh_forms.export() == {}


@pytest.mark.parametrize("sliced", [False, True])
@pytest.mark.parametrize(
    ("axes", "groups", "kernel", "steps"),
    [
        (2, 1, (3, 3), ((1, 1), (1, 1), (1, 1))),
        (2, 2, (3, 2), ((2, 1), (1, 0), (1, 2))),
        (2, 4, (1, 1), ((2, 2), (0, 0), (1, 1))),
        (1, 1, (4,), ((3,), (2,), (2,))),
        (3, 2, (2, 1, 3), ((1, 2, 1), (0, 1, 1), (1, 1, 1))),
    ],
)
def test_products_of_patches_are_the_librarys(axes, groups, kernel, steps, sliced, monkeypatch):
    torch.manual_seed(0)
    stride, padding, dilation = steps
    layer = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[axes - 1](4, 8, kernel, stride, padding, dilation, groups).double()
    x = torch.randn(3, 4, *range(9, 9 + axes)).double()
    g = torch.randn_like(layer(x))
    shape = (8, 4 // groups, *kernel)
    settings = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    want = convolution_math.convolution_weight_grads(x, g, kernel_shape=shape, **settings)
    monkeypatch.setattr(norm_math, "MAX_ELEMENTS", 7 if sliced else norm_math.MAX_ELEMENTS)
    found = convolution_math.patch_weight_grads(x, g, kernel_shape=shape, **settings)
    torch.testing.assert_close(found, want, rtol=1e-10, atol=1e-12)
    squares = convolution_math.patch_gram_squared_norm(x, g, kernel=kernel, **settings)
    torch.testing.assert_close(squares, want.flatten(1).square().sum(1), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("form", ["gram", "product", "grouped"])
@pytest.mark.parametrize("layer", [nn.Conv2d(4, 8, 3, groups=2), nn.Conv1d(4, 6, 3), nn.ConvTranspose2d(4, 3, 2)])
def test_each_form_of_a_gpu_without_kernels_gives_the_norms_of_a_cpu(monkeypatch, fresh_forms, layer, form):
    torch.manual_seed(0)
    model = nn.Sequential(layer.double())
    x = torch.randn(5, 4, 9, 8).double() if "2d" in type(layer).__name__ else torch.randn(5, 4, 9).double()

    def norms_of():
        with PerSampleGradNorms(model) as norms:
            model(x).sin().mean().backward()
            return norms.per_sample["0"]

    want = norms_of()
    library, calls = convolution_math.convolution_weight_grads, []
    monkeypatch.setattr(
        convolution_math, "convolution_weight_grads", lambda *a, **k: calls.append(1) or library(*a, **k)
    )
    monkeypatch.setattr(convolution, "on_cuda", lambda t: True)
    monkeypatch.setattr(convolution, "cheapest_form", lambda use, *_, **__: fresh_forms.take("torch", use))
    monkeypatch.setattr(FormChoices, "take", lambda *_: form)
    torch.testing.assert_close(norms_of(), want, rtol=1e-10, atol=1e-12)
    assert bool(calls) == (form == "grouped" and isinstance(layer, nn.Conv1d | nn.Conv2d))


def test_a_slice_on_cuda_is_a_share_of_the_free_memory(monkeypatch):
    monkeypatch.setattr(norm_math, "on_cuda", lambda t: True)
    for free, numbers in ((80 << 30, 1 << 28), (1 << 30, 1 << 22), (0, 1 << 10)):
        norm_math._room.cache_clear()
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (free, 0))
        x = torch.empty(100, 1)
        parts = list(norm_math.slices_of(x, x, elements_per_sample=numbers // 10))
        assert [len(part[0]) for part in parts] == [10] * 10
    norm_math._room.cache_clear()


def test_compiled_code_asks_the_model_and_keeps_nothing(fresh_forms):
    @torch.compile(backend="eager", fullgraph=True)
    def ask(x):
        return x + (1 if cheapest_form(WeightUse(*x.shape, 8, 8), "cuda") == "gram" else 2)

    assert float(ask(torch.zeros(2, 3))[0, 0]) == (
        1 if fastest(predicted("torch", WeightUse(2, 3, 8, 8))) == "gram" else 2
    )
    assert fresh_forms.export() == {}


# ---- with kernels, by their twins: operations fall to them on a CPU --------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("form", ["gram", "product"])
def test_a_linear_layers_backward_pass_is_the_same_in_every_form(fresh_forms, form, bias):
    torch.manual_seed(0)
    x, g, weight = torch.randn(3, 5, 16), torch.randn(3, 5, 24), torch.randn(24, 16)
    use = WeightUse(3, 5, 16, 24)
    fresh_forms.restore({"linear": {str(use): form}})
    done = kernel_forms.linear_backward(x, weight, g, bias=bias, input_wanted=True)
    assert fresh_forms.look_up("linear", use).form == form
    torch.testing.assert_close(done.grads["weight"], torch.einsum("bto,bti->oi", g, x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(done.squares["weight"], (g.mT @ x).square().sum((1, 2)), rtol=1e-5, atol=1e-5)
    assert set(done.grads) == set(done.squares) == ({"weight", "bias"} if bias else {"weight"})
    torch.testing.assert_close(done.input_grad, g @ weight, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("form", "kernel", "channels"),
    [("gram", 3, 16), ("product", 3, 16), ("product", 3, 3), ("gram", 1, 16), ("product", 1, 16), ("rows", 1, 16)],
)
def test_a_convolutions_backward_pass_is_the_same_in_every_form(fresh_forms, form, kernel, channels):
    torch.manual_seed(0)
    layer = nn.Conv2d(channels, 24, kernel, padding=kernel // 2)
    x = torch.randn(3, channels, 5, 6, requires_grad=True)
    y = layer(x)
    g = torch.randn_like(y)
    want = torch.autograd.grad(y, (x, layer.weight, layer.bias), g)
    settings = {"stride": (1, 1), "padding": (kernel // 2,) * 2, "dilation": (1, 1), "groups": 1}
    x = x.detach().contiguous(memory_format=torch.channels_last)
    kind, use = kernel_forms.convolution_shapes(x, layer.weight, g, settings)
    fresh_forms.restore({kind: {str(use): form}})
    with torch.no_grad():
        done = kernel_forms.convolution_backward(x, layer.weight, g, settings, bias=True, input_wanted=True)
    assert (kind, str(use)) in {(k, str(u)) for k, u, _ in fresh_forms} or channels < FEW_CHANNELS
    for found, expected in zip((done.input_grad, done.grads["weight"], done.grads["bias"]), want, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    each = convolution_math.convolution_weight_grads(x, g, kernel_shape=tuple(layer.weight.shape), **settings)
    torch.testing.assert_close(done.squares["weight"], each.flatten(1).square().sum(1), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(done.squares["bias"], g.sum((2, 3)).square().sum(1), rtol=1e-4, atol=1e-4)


def test_only_a_1x1_kernel_without_strides_and_padding_is_rows():
    x, g, weight = torch.empty(2, 16, 8, 8), torch.empty(2, 4, 4, 4), torch.empty(4, 16, 1, 1)
    plain = {"stride": (1, 1), "padding": (0, 0), "dilation": (1, 1), "groups": 1}
    assert kernel_forms.convolution_shapes(x, weight, x[:, :4], plain)[0] == "pointwise"
    assert kernel_forms.convolution_shapes(x, weight, g, {**plain, "stride": (2, 2)})[0] == "convolution"
    assert kernel_forms.convolution_shapes(x, weight, g, {**plain, "padding": (1, 1)})[0] == "convolution"


def test_what_is_listed_for_groups_of_few_channels_is_what_runs(fresh_forms, monkeypatch):
    """There is one form for them, however many channels the groups have together."""
    monkeypatch.setattr(convolution, "kernels_fit", lambda output: True)
    layer, x, rule = nn.Conv2d(64, 64, 3, groups=64), torch.randn(2, 64, 6, 6), convolution.ConvolutionRule()
    use, _ = rule.choice(layer, x, layer(x))
    fresh_forms.restore({"convolution": {str(use): "gram"}})
    assert rule.choice(layer, x, layer(x))[1].form == "product"
