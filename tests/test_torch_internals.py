"""Promise: the parts of torch without a documented name do what we rely on; this fails loudly when one changes."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from hf_clars.grad_norms import torch_internals as internals
from hf_clars.grad_norms import torch_kernels as kernels


def test_a_running_backward_pass_is_seen():
    seen = []
    x = torch.ones(2, requires_grad=True)
    y = 2 * x
    y.register_hook(lambda g: seen.append(internals.inside_backward()))
    assert not internals.inside_backward()
    y.sum().backward()
    assert seen == [True]
    assert not internals.inside_backward()


@pytest.mark.parametrize("inside", [False, True])
def test_a_backward_pass_that_leaves_parameters_out_is_seen(inside):
    """By their places in the graph, and from inside an operation, where autograd is off."""
    seen, x, w = [], torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)

    class Times(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, w):
            return x * w

        @staticmethod
        def backward(ctx, g):
            seen.append(not internals.gives_none([w]) if inside else internals.is_asked_for(w))
            return g, g

    def loss():
        return Times.apply(x, w).sum()

    loss().backward()
    torch.autograd.grad(loss(), [x, w])
    torch.autograd.grad(loss(), w)
    loss().backward(inputs=[w])
    torch.autograd.grad(loss(), x)
    loss().backward(inputs=[x])
    assert seen == [True, True, True, True, False, False]


def test_hooks_that_are_taken_out_do_not_run_and_those_put_back_do():
    seen, w = [], torch.ones(2, requires_grad=True)
    w.register_hook(lambda g: seen.append("comes"))
    w.register_post_accumulate_grad_hook(lambda w: seen.append("was added"))
    found = internals.hooks_on_gradients(w)
    before = [dict(hooks) for hooks in found]
    for hooks in found:
        hooks.clear()
    w.sum().backward()
    assert seen == []
    for hooks, kept in zip(found, before, strict=True):
        hooks.update(kept)
    w.sum().backward()
    assert seen == ["comes", "was added"]


def test_operations_are_numbered_in_their_order_and_leaves_are_not():
    x, before = torch.ones(2, requires_grad=True), internals.operations_recorded()
    y = 2 * x
    z = y.exp()
    assert [internals.number_of(t.grad_fn) - before for t in (y, z)] == [0, 1]
    assert internals.operations_recorded() == before + 2
    assert internals.number_of(y.grad_fn.next_functions[0][0]) > 2**60


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("layout", [torch.jagged, torch.strided])
def test_places_of_nested_tensors_have_no_shape(layout):
    w = torch.ones(3, requires_grad=True)
    x = torch.nested.nested_tensor([torch.ones(k, 3) for k in (1, 2)], layout=layout)
    node = (x * w if layout is torch.jagged else nn.functional.linear(x, w.view(1, 3))).grad_fn
    assert internals.shape_at(node) is None
    assert internals.is_jagged(node) == (layout is torch.jagged)


def test_packing_of_saved_tensors_is_seen():
    seen = []

    def body(x):
        seen.append(internals.saved_tensors_are_packed())
        return x * x

    assert not internals.saved_tensors_are_packed()
    checkpoint(body, torch.ones(2, requires_grad=True), use_reentrant=False)
    with torch.autograd.graph.save_on_cpu():
        assert internals.saved_tensors_are_packed()
    assert seen == [True]


def test_the_exception_that_ends_a_recomputation_is_known():
    seen, w = [], torch.ones(2, requires_grad=True)

    def body(x):
        try:
            return x.exp() * w
        except Exception as error:
            seen.append(internals.ends_recomputation(error))
            raise

    checkpoint(body, torch.ones(2, requires_grad=True), use_reentrant=False).sum().backward()
    assert seen == [True]
    assert not internals.ends_recomputation(RuntimeError("of something else"))


@pytest.mark.parametrize("activation", [nn.Identity(), nn.ReLU(), nn.SiLU(), nn.Hardswish()])
def test_batch_statistics_come_from_the_graph(activation, monkeypatch):
    norm, x = nn.BatchNorm2d(3), torch.randn(4, 3, 5, 5, requires_grad=True)
    output = activation(norm(x))
    slow = internals.batch_statistics(x, torch.ones(1), norm.eps)
    monkeypatch.delattr(torch, "native_batch_norm")  # the slow way would fail now
    for found, want in zip(internals.batch_statistics(x, output, norm.eps), slow, strict=True):
        torch.testing.assert_close(found, want)
    var, mean = torch.var_mean(x, (0, 2, 3), correction=0)
    torch.testing.assert_close(slow[0], mean)
    torch.testing.assert_close(slow[1], (var + norm.eps).rsqrt())


def test_group_statistics_come_from_the_graph(monkeypatch):
    norm, x = nn.GroupNorm(2, 4), torch.randn(3, 4, 5, 5, requires_grad=True)
    output = norm(x)
    slow = internals.group_statistics(x, torch.ones(1), 2, norm.eps)
    monkeypatch.delattr(torch, "var_mean")
    for found, want in zip(internals.group_statistics(x, output, 2, norm.eps), slow, strict=True):
        torch.testing.assert_close(found, want)


def test_another_layers_statistics_are_not_taken():
    """An unknown normalisation after a known one must not be given the known one's."""
    before, x = nn.BatchNorm2d(3), torch.randn(4, 3, 5, 5, requires_grad=True)
    between = 3 * before(x) + 1
    output = between * 2
    mean, _ = internals.batch_statistics(between, output, 1e-5)
    torch.testing.assert_close(mean, between.mean((0, 2, 3)))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("shape", [(4, 6), (4, 6, 3, 5)])
@pytest.mark.parametrize("of_each_sample", [True, False])
def test_affine_sums(layout, shape, of_each_sample):
    x, g = torch.randn(shape), torch.randn(shape)
    if len(shape) == 4:
        x, g = x.to(memory_format=layout), g.to(memory_format=layout)
    statistics = (4, 6) if of_each_sample else (6,)
    mean, rstd = torch.randn(statistics), torch.rand(statistics) + 0.5
    x_hat = (x.flatten(2) if len(shape) == 4 else x.unsqueeze(2)).sub(mean.unsqueeze(-1)).mul(rstd.unsqueeze(-1))
    flat = g.flatten(2) if len(shape) == 4 else g.unsqueeze(2)
    weighted, plain = kernels.affine_sums(x, g, mean, rstd)
    torch.testing.assert_close(weighted, (x_hat * flat).sum(2), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(plain, flat.sum(2), rtol=1e-4, atol=1e-5)


def test_a_mean_far_from_zero_costs_no_digits():
    x, g = torch.randn(4, 3, 8, 8) + 1000, torch.randn(4, 3, 8, 8)
    mean, rstd = x.mean((0, 2, 3)), torch.ones(3)
    weighted, _ = kernels.affine_sums(x, g, mean, rstd)
    exact = ((x.double() - mean[:, None, None].double()) * g.double()).sum((2, 3))
    torch.testing.assert_close(weighted.double(), exact, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("groups", [1, 2, 6])
@pytest.mark.parametrize("channels", [6, 1])
def test_affine_sums_of_groups_and_of_a_single_channel(groups, channels):
    """A statistic spread over samples or channels is no memory that a kernel could read."""
    groups = min(groups, channels)
    x, g = torch.randn(4, channels, 3, 3), torch.randn(4, channels, 3, 3)
    for shape in ((4, groups), (channels,)):
        mean, rstd = torch.randn(shape), torch.rand(shape) + 0.5
        each = [t.repeat_interleave(channels // groups, 1) if t.dim() == 2 else t.repeat(4, 1) for t in (mean, rstd)]
        weighted, plain = kernels.affine_sums(x, g, mean, rstd)
        x_hat = (x - each[0][..., None, None]) * each[1][..., None, None]
        torch.testing.assert_close(weighted, (x_hat * g).sum((2, 3)), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(plain, g.sum((2, 3)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(6,), (3, 6)])
def test_layer_statistics_come_from_the_graph(shape, dtype, monkeypatch):
    norm, x = nn.LayerNorm(shape).to(dtype), torch.randn(4, 2, 3, 6, dtype=dtype, requires_grad=True)
    output, dims = norm(x), len(shape)
    slow = internals.layer_statistics(x, torch.ones(1), dims, norm.eps)
    if dtype == torch.float32:
        monkeypatch.delattr(torch, "var_mean")  # the slow way would fail now
    for found, want in zip(internals.layer_statistics(x, output, dims, norm.eps), slow, strict=True):
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_gradients_of_a_convolution(layout, groups):
    conv = nn.Conv2d(4, 8, 3, stride=2, padding=1, dilation=2, groups=groups, bias=False)
    x = torch.randn(3, 4, 9, 8).to(memory_format=layout).requires_grad_()
    output = conv(x)
    g = torch.randn_like(output)
    settings = {"stride": (2, 2), "padding": (1, 1), "dilation": (2, 2), "groups": groups}
    x_grad, weight_grad = torch.autograd.grad(output, (x, conv.weight), g)
    torch.testing.assert_close(kernels.convolution_input_grad(g, x, conv.weight, **settings), x_grad)
    found = kernels.convolution_weight_grad(g, x, tuple(conv.weight.shape), **settings)
    torch.testing.assert_close(found, weight_grad, rtol=1e-4, atol=1e-4)


def test_views_are_seen():
    x = torch.ones(2, 3, 4)
    assert internals.is_view(x[0])
    assert not internals.is_view(x * 2)


def test_shapes_and_types_in_the_graph():
    a, b = torch.ones(2, 1, dtype=torch.float64, requires_grad=True), torch.ones(3, dtype=torch.float64)
    added = a + b
    halves = added.half().unbind(1)
    assert internals.shape_at(added.grad_fn) == (2, 3)
    assert internals.dtype_at(added.grad_fn) == torch.float64
    assert internals.shape_at(halves[2].grad_fn, 2) == (2,)
    assert internals.dtype_at(halves[2].grad_fn, 2) == torch.float16
    assert internals.shape_at(added.grad_fn, 1) is None


def test_a_node_gives_gradients_before_they_are_summed_over_broadcast_axes():
    """`graph/nodes.py` takes each sample's gradient there. (An expansion sums by itself, and is taken as it comes.)"""
    a, b = torch.tensor([2.0], requires_grad=True), torch.tensor([[3.0], [5.0]])
    g = torch.tensor([[1.0], [-2.0]])
    cases = {
        torch.add(b, a, alpha=4): (1, 4.0),
        a + b: (0, 1.0),
        b - a: (1, -1.0),
        a * b: (0, b),
    }
    for result, (index, factor) in cases.items():
        torch.testing.assert_close(result.grad_fn(g)[index], factor * g)
    expanded = a.expand(2, 1).grad_fn(g)
    assert expanded.shape == (1,)
    assert internals.results_of(expanded_node := a.expand(2, 1).grad_fn) == 1
    assert expanded_node.name().startswith("Expand")


@pytest.mark.parametrize(
    ("layer", "shape", "transposed"),
    [
        (nn.Linear(6, 6), (3, 6), True),
        (nn.Linear(6, 4, bias=False), (3, 5, 6), True),
        (nn.Conv2d(6, 4, 3), (3, 6, 5, 5), False),
    ],
)
def test_operands_under_autocast_are_those_that_were_multiplied(layer, shape, transposed):
    x = torch.randn(shape, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        output = layer(x)
    weight, operand = internals.weight_of(output, layer.weight, transposed=transposed), internals.operand_of(output, x)
    assert torch.equal(weight, layer.weight.bfloat16())
    assert torch.equal(operand, x.bfloat16())
    memory = weight.untyped_storage().data_ptr()
    again = internals.weight_of(output, layer.weight, transposed=transposed)
    assert again.untyped_storage().data_ptr() == memory  # the graph's own, not another copy
    assert internals.weight_of(layer(x), layer.weight, transposed=transposed) is layer.weight


def test_a_weight_that_the_graph_does_not_hold_stays_what_it_is():
    layer, x = nn.Linear(6, 4), torch.randn(3, 6)
    with torch.autocast("cpu", torch.bfloat16):
        assert internals.weight_of(layer(x), layer.weight, transposed=True) is layer.weight  # no gradient for x


def test_a_mode_does_not_see_what_is_called_where_modes_are_shut_out():
    seen = []

    class Mode(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    x = torch.ones(2)
    with Mode():
        x + 1
        with internals.unseen_by_modes():
            x + 1
            assert x.shape == (2,)
        x + 1
    assert len(seen) == 2
