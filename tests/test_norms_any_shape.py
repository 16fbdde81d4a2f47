"""Promise: every form of a weight's norms is exact for any shape and setting, not only for those it is taken for."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from hf_clars.grad_norms import norm_math
from hf_clars.grad_norms.rules.convolution import ConvolutionRule, convolution_squared_norm, convolution_use
from hf_clars.grad_norms.rules.costs import CPU, WeightUse, cheapest_form, predicted
from hf_clars.grad_norms.rules.linear import linear_squared_norm

small = st.integers(1, 3)
CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


@st.composite
def convolutions(draw):
    """(module, input) with a non-empty output."""
    dims, groups = draw(st.integers(1, 3)), draw(st.integers(1, 2))
    axes = [
        {"kernel": draw(small), "stride": draw(small), "padding": draw(st.integers(0, 3)), "dilation": draw(small)}
        for _ in range(dims)
    ]
    sizes = [max(1, a["dilation"] * (a["kernel"] - 1) + 1 - 2 * a["padding"]) + draw(st.integers(0, 3)) for a in axes]
    mode = draw(st.sampled_from(["zeros", "zeros", "replicate"]))
    module = CONVOLUTIONS[dims](
        groups * draw(small),
        groups * draw(small),
        tuple(a["kernel"] for a in axes),
        tuple(a["stride"] for a in axes),
        tuple(a["padding"] for a in axes),
        tuple(a["dilation"] for a in axes),
        groups,
        padding_mode=mode,
    ).double()
    return module, torch.randn(draw(st.integers(1, 3)), module.in_channels, *sizes, dtype=torch.float64)


def brute_force(module, x, g):
    """[B]: one autograd call a sample."""
    squares = []
    for i in range(len(x)):
        (grad,) = torch.autograd.grad(module(x[i : i + 1]), module.weight, g[i : i + 1])
        squares.append(grad.square().sum())
    return torch.stack(squares)


@settings(max_examples=150, deadline=None)
@given(convolutions())
def test_convolutions_in_both_forms(case):
    module, x = case
    g = torch.randn_like(module(x))
    want = brute_force(module, x, g)
    for form in ("gram", "product"):
        with torch.no_grad():
            found = convolution_squared_norm(module, x, g, form)
        torch.testing.assert_close(found, want, rtol=1e-9, atol=1e-12, msg=form)


@settings(max_examples=60, deadline=None)
@given(convolutions())
def test_one_product_gives_the_weight_gradient_and_the_input_gradient(case):
    module, x = case
    x.requires_grad_()
    out = module(x)
    g = torch.randn_like(out)
    x_grad, weight_grad, bias_grad = torch.autograd.grad(out, [x, module.weight, module.bias], g)
    rule = ConvolutionRule()
    with torch.no_grad():
        grads = rule.per_sample_grads(module, (x,), g, {"weight", "bias"})
        torch.testing.assert_close(grads["weight"].sum(0), weight_grad)
        torch.testing.assert_close(grads["bias"].sum(0), bias_grad)
        if module.padding_mode == "zeros":
            torch.testing.assert_close(rule.input_grad(module, x, module.weight, g), x_grad)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 4), st.integers(1, 5), st.integers(1, 5), st.integers(1, 5), st.booleans())
def test_linear_layers_in_all_forms(batch, positions, width_in, width_out, sliced):
    x = torch.randn(batch, positions, width_in, dtype=torch.float64)
    g = torch.randn(batch, positions, width_out, dtype=torch.float64)
    want = torch.einsum("bto,bti->boi", g, x).square().sum((1, 2))
    before, norm_math.MAX_ELEMENTS = norm_math.MAX_ELEMENTS, 7 if sliced else norm_math.MAX_ELEMENTS
    try:
        for form in ("gram", "product", *(("outer",) if positions == 1 else ())):
            torch.testing.assert_close(linear_squared_norm(x, g, form), want, rtol=1e-9, atol=1e-12, msg=form)
    finally:
        norm_math.MAX_ELEMENTS = before


@given(
    st.integers(1, 64),
    st.integers(1, 4096),
    st.integers(1, 2048),
    st.integers(1, 2048),
    st.sampled_from(["cpu", "cuda"]),
)
def test_the_cheapest_form_is_the_cheapest_by_the_stated_model(batch, positions, width_in, width_out, device):
    use = WeightUse(batch, positions, width_in, width_out)
    if device == "cpu":
        gram, product = use.gram_seconds(CPU), use.product_seconds(CPU)
    else:
        gram, product = (predicted("torch", use)[form] for form in ("gram", "product"))
    want = "outer" if positions == 1 else "gram" if gram < product else "product"
    assert cheapest_form(use, device) == want


@pytest.mark.parametrize(
    ("layer", "size", "form"),
    [
        (nn.Conv2d(16, 16, 3, padding=1), 32, "product"),  # an early layer: many pixels, few channels
        (nn.Conv2d(512, 512, 3, padding=1), 7, "gram"),  # a late one
        (nn.Conv2d(64, 64, 1), 28, "product"),
        (nn.Conv2d(512, 2048, 1), 7, "gram"),
        (nn.Conv2d(96, 96, 3, groups=96, padding=1), 56, "product"),  # depthwise
    ],
)
def test_usual_layers_take_the_form_one_expects(layer, size, form):
    x = torch.empty(16, layer.in_channels, size, size)
    assert cheapest_form(convolution_use(layer, x, torch.empty(16, layer.out_channels, size, size)), "cpu") == form
