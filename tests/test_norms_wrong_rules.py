"""Promise: a mistake in a layer rule of the user's is named, with rule, module and parameter."""

import pytest
import torch
from torch import nn

from hf_clars.grad_norms import LayerRule, PerSampleGradNorms, register_rule, unregister_rule
from hf_clars.grad_norms.errors import LayerRuleError, SumCheckError
from tests.oracle import one_by_one


class Affine(nn.Module):
    """Two parameters and a buffer."""

    def __init__(self):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.rand(4)), nn.Parameter(torch.rand(4))
        self.register_buffer("centre", torch.randn(4))

    def forward(self, x):
        return (x - self.centre) * self.weight + self.bias


class Right(LayerRule):
    def per_sample_grads(self, module, saved, g, wanted):
        return {"weight": g * (saved[0] - module.centre), "bias": g}


class RightFused(Right):
    def per_sample_grads(self, module, saved, g, wanted):
        return super().per_sample_grads(module, saved, g, wanted)

    def fuses_weight_grad(self, module, x, output):
        return True

    def input_grad(self, module, x, weight, g):
        return g * weight


def loss_of(model, x):
    return model(x).square().sum(1).mean()


def passes(rule, frozen=()):
    register_rule(Affine, override=True)(rule)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), Affine(), nn.Linear(4, 2)).double()
    for name, p in model[1].named_parameters():
        p.requires_grad_(name not in frozen)
    try:
        with PerSampleGradNorms(model) as norms:
            for _ in range(5):
                model.zero_grad()
                x = torch.randn(5, 4, dtype=torch.double)
                loss_of(model, x).backward()
                yield model, norms, x
    finally:
        unregister_rule(Affine)


@pytest.mark.parametrize("rule", [Right, RightFused])
@pytest.mark.parametrize("frozen", [(), ("bias",)])
def test_a_right_rule_is_exact_and_may_give_more_than_was_asked(rule, frozen):
    for model, norms, x in passes(rule, frozen=frozen):
        grads = one_by_one(model, lambda m, i, x=x: loss_of(m, x[i : i + 1]), 5)
        for layer in norms.layers:
            squares = sum(grads[n].flatten(1).square().sum(1) for n in layer.param_names if n in grads)
            torch.testing.assert_close(norms.per_sample[layer.name], squares.sqrt())


GRADS = {
    "too wide": (lambda g: {"weight": torch.cat([g, g], 1), "bias": g}, "returned shape .5, 8. for 'weight'"),
    "summed": (lambda g: {"weight": g.sum(0), "bias": g}, "returned shape .4,. for 'weight'"),
    "one number each": (lambda g: {"weight": g, "bias": g.sum(1)}, "returned shape .5,. for 'bias'"),
    "missing": (lambda g: {"weight": g}, "returned nothing for 'bias'"),
    "None": (lambda g: None, "returned NoneType"),
    "None for one": (lambda g: {"weight": None, "bias": g}, "returned nothing for 'weight'"),
    "a tensor": (lambda g: g, "returned Tensor"),
}


@pytest.mark.parametrize("base", [Right, RightFused])
@pytest.mark.parametrize("mistake", GRADS)
def test_gradients_of_another_form_are_named(base, mistake):
    grads, words = GRADS[mistake]

    class Wrong(base):
        def per_sample_grads(self, module, saved, g, wanted):
            return grads(g)

        def input_grad(self, module, x, weight, g):
            return g * weight

    with pytest.raises(LayerRuleError, match=rf"Wrong of 1 \(Affine\): per_sample_grads {words}"):
        list(passes(Wrong))


@pytest.mark.parametrize("base", [Right, RightFused])
def test_wrong_gradients_do_not_add_up(base):
    """Also where they are what `p.grad` is made of."""

    class Wrong(base):
        def per_sample_grads(self, module, saved, g, wanted):
            return {"weight": -g * (saved[0] - module.centre), "bias": g}

        def input_grad(self, module, x, weight, g):
            return g * weight

    def read():
        for _, norms, _ in passes(Wrong):
            _ = norms.per_sample

    with pytest.raises(SumCheckError, match=r"1.weight.*or a layer rule of yours is wrong"):
        read()


@pytest.mark.parametrize(
    ("grad", "words"),
    [
        (lambda g: None, "returned nothing for the input. Return a tensor of shape .5, 4."),
        (lambda g: g[:, :2], "returned shape .5, 2. for the input"),
        (lambda g: 3, "returned int for the input"),
        (lambda g: -g, "gives another gradient"),
    ],
)
def test_a_wrong_gradient_of_the_input_is_named(grad, words):
    class Wrong(RightFused):
        def input_grad(self, module, x, weight, g):
            return grad(g)

    with pytest.raises(LayerRuleError, match=rf"Wrong of 1 \(Affine\): input_grad {words}"):
        list(passes(Wrong))


@pytest.mark.parametrize(
    ("squares", "words"),
    [
        (lambda g: {"weight": g, "bias": g}, "returned shape"),
        (lambda g: {"weight": g.norm(dim=1), "bias": g.norm(dim=1)}, "are not the squared norms"),
    ],
)
def test_wrong_squared_norms_are_named(squares, words):
    class Wrong(Right):
        def squared_norms(self, module, saved, g, wanted):
            return squares(g)

    with pytest.raises(LayerRuleError, match=rf"Wrong of 1 \(Affine\): squared_norms.*{words}"):
        list(passes(Wrong))


@pytest.mark.parametrize("saved", [lambda x: None, lambda x: x, lambda x: (x, 3)])
def test_what_is_saved_must_be_tensors(saved):
    class Wrong(Right):
        def save(self, module, args, kwargs, output, wanted):
            return saved(args[0])

    with pytest.raises(LayerRuleError, match=r"Wrong of 1 \(Affine\): save"):
        list(passes(Wrong))
