"""Promise: norms of a model that was changed under their hooks are refused by name; made anew they are exact."""

import gc

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

from hf_clars.grad_norms import PerSampleGradNorms
from hf_clars.grad_norms.errors import UncoveredParameterError
from hf_clars.layers import param_layers
from hf_clars.optim import CLARS
from tests.test_norms_changed_midway import Net, assert_a_pass_is_exact, assert_exact, data, expected, loss_of


def append_layer(model):
    model.body.append(nn.Linear(3, 3).double())


def replace_head(model):
    model.body[3] = nn.Linear(5, 3).double()


def wrap_head(model):
    model.body[3] = nn.Sequential(model.body[3], nn.Linear(3, 3).double())


def replace_weight(model):
    model.body[0].weight = nn.Parameter(torch.randn(5, 4).double())


def assign_all(model):
    model.load_state_dict({k: v.clone() for k, v in model.state_dict().items()}, assign=True)


def tie(model):
    model.body[0].bias = model.body[1].bias


def take_bias(model):
    model.body[0].bias = None


def spectral(model):
    parametrizations.spectral_norm(model.body[0])


def no_spectral(model):
    parametrize.remove_parametrizations(model.body[0], "weight")


def pruned(model):
    prune.random_unstructured(model.body[0], "weight", 0.5)


def no_longer_pruned(model):
    prune.remove(model.body[0], "weight")


def other_forward(model):
    model.body[0].forward = lambda x: nn.functional.linear(2 * x, model.body[0].weight, model.body[0].bias)


def other_class(model):
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    model.body[0].__class__ = Doubled


def thaw(model):
    model.shift.requires_grad_(True)


def freeze(model):
    model.shift.requires_grad_(False)


CHANGES = [
    (None, append_layer, r"body.4.weight: trains"),
    (None, replace_head, r"body.3 \(Linear\): was taken out"),
    (None, wrap_head, r"body.3.1.weight: trains"),
    (None, replace_weight, r"body.0 \(Linear\): its weight"),
    (None, assign_all, r"Net\): its shift .*, and \d+ more"),
    (None, tie, r"body.0 \(Linear\): its bias"),
    (None, take_bias, r"body.0 \(Linear\): its bias"),
    (None, spectral, r"body.0 \(ParametrizedLinear\): its weight"),
    (spectral, no_spectral, r"body.0.parametrizations.weight"),
    (None, pruned, r"body.0 \(Linear\): its weight"),
    (pruned, no_longer_pruned, r"body.0 \(Linear\): its weight_orig"),
    (None, other_forward, r"body.0 \(Linear\): its class, its forward"),
    (None, other_class, r"body.0 \(Doubled\): its class, its forward"),
    (freeze, thaw, r"shift: trains"),
]


@pytest.mark.parametrize(("first", "change", "named"), CHANGES, ids=[change.__name__ for _, change, _ in CHANGES])
def test_a_change_of_the_model_is_named_and_norms_attached_anew_are_exact(first, change, named):
    torch.manual_seed(0)
    model = Net()
    if first is not None:
        first(model)
    norms = PerSampleGradNorms(model, check=False)
    for _ in range(4):
        model.zero_grad()
        loss_of(model, data()).backward()
    change(model)
    for _ in range(2):
        with pytest.raises(UncoveredParameterError, match=named):
            loss_of(model, data())
    norms.remove()
    model.eval()  # spectral_norm changes its weight in training
    with PerSampleGradNorms(model) as norms:
        for _ in range(3):
            assert_a_pass_is_exact(model, norms)


def test_layers_that_change_places_are_named():
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    with PerSampleGradNorms(model):
        model[0], model[2] = model[2], model[0]
        with pytest.raises(UncoveredParameterError, match=r"0 \(Linear\): another module has its name"):
            model(torch.randn(3, 4))


def test_of_a_part_of_the_model_the_rest_is_not_asked_for():
    torch.manual_seed(0)
    model = Net()
    layers = [layer for layer in param_layers(model) if layer.name == "body.1"]
    with PerSampleGradNorms(model, layers=layers) as norms:
        for change in (None, freeze, thaw, append_layer):
            if change is not None:
                change(model)
            model.zero_grad()
            x = data()
            loss_of(model, x).backward()
            assert_exact(norms, expected(model, x, layers))


def test_changes_that_concern_no_measured_parameter_are_none():
    torch.manual_seed(0)
    model = Net()
    teacher = Net().requires_grad_(False)
    changes = [
        lambda: None,
        lambda: model.body.__setitem__(2, nn.GELU()),
        lambda: setattr(model, "teacher", teacher),
        lambda: model.to(torch.float32).to(torch.float64),
        lambda: delattr(model, "teacher"),
        lambda: model.body.__setitem__(3, nn.Sequential(model.body[3], nn.Tanh())),
    ]
    with PerSampleGradNorms(model) as norms:
        for change in changes:
            change()
            assert_a_pass_is_exact(model, norms)


def test_an_optimizer_whose_model_was_changed_says_so():
    model = Net()
    optimizer = CLARS(model)
    for _ in range(3):
        optimizer.zero_grad()
        loss_of(model, data()).backward()
        optimizer.step()
    replace_head(model)
    with pytest.raises(UncoveredParameterError, match=r"remove_hooks\(\) of the optimizer"):
        loss_of(model, data())
    optimizer.remove_hooks()
    optimizer = CLARS(model)
    loss_of(model, data()).backward()
    optimizer.step()


def test_an_optimizer_that_nobody_keeps_has_nothing_to_say_of_a_changed_model():
    model = Net()
    gc.collect()
    gc.disable()  # as between two collections
    try:
        for _ in range(3):
            replace_head(model)
            optimizer = CLARS(model)
            for _ in range(2):
                optimizer.zero_grad()
                loss_of(model, data()).backward()
                optimizer.step()
            del optimizer
    finally:
        gc.enable()
