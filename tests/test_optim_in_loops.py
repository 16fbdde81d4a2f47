"""Promises of the optimizers to a training loop: states, groups, frozen and tied weights, schedules, refusals."""

import copy
import io

import pytest
import torch
from torch import nn

from hf_clars.layers import param_layers
from hf_clars.optim import CLARS, LARS, NAG
from tests.twin import OPTIMIZERS, batch, loss_on, mlp, small_model, train

# ---- states --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("after", [0, 1, 4])
def test_a_state_dict_round_trip_continues_exactly(name, after):
    model = small_model()
    optimizer = OPTIMIZERS[name](model, 0.3)
    train(model, optimizer, after)
    buffer = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, buffer)
    buffer.seek(0)
    saved = torch.load(buffer, weights_only=True)
    other = small_model(seed=9)
    other.load_state_dict(saved["model"])
    restored = OPTIMIZERS[name](other, 99.0)
    restored.load_state_dict(saved["optimizer"])
    train(model, optimizer, 5, start=after)
    train(other, restored, 5, start=after)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_one_buffer_per_weight_is_all_the_state(name):
    model = small_model()
    optimizer = OPTIMIZERS[name](model, 0.1)
    train(model, optimizer, 2)
    for p in model.parameters():
        assert list(optimizer.state[p]) == ["momentum_buffer"]
        assert optimizer.state[p]["momentum_buffer"].shape == p.shape


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_gradients_are_left_as_backward_made_them(name):
    model = small_model()
    optimizer = OPTIMIZERS[name](model, 0.1, weight_decay=0.1)
    loss_on(*batch(0))(model).backward()
    before = [p.grad.clone() for p in model.parameters()]
    optimizer.step()
    assert all(torch.equal(p.grad, b) for p, b in zip(model.parameters(), before, strict=True))


# ---- which parameters ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_frozen_and_unused_parameters_stay_and_the_rest_trains(name):
    class Partial(nn.Module):
        def __init__(self):
            super().__init__()
            self.frozen, self.used, self.unused = nn.Linear(6, 6), nn.Linear(6, 3), nn.Linear(6, 3)
            self.frozen.requires_grad_(False)

        def forward(self, x):
            return self.used(self.frozen(x))

    model = Partial()
    before = copy.deepcopy(model.state_dict())
    optimizer = OPTIMIZERS[name](model, 0.1)
    assert optimizer.layer_names == ["used", "unused"]
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(4, 6)).square().mean().backward()
        optimizer.step()
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]) == (not key.startswith("used")), key


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_layer_may_be_frozen_and_released_while_training(name):
    model = small_model()
    optimizer = OPTIMIZERS[name](model, 0.1)
    model[0].requires_grad_(False)
    before = model[0].weight.detach().clone()
    train(model, optimizer, 2)
    assert torch.equal(model[0].weight, before)
    model[0].requires_grad_(True)
    train(model, optimizer, 2, start=2)
    assert not torch.equal(model[0].weight, before)


@pytest.mark.parametrize("layers", ["module", "tensor"])
def test_every_trainable_parameter_is_in_exactly_one_layer(layers):
    model = small_model()
    model[4].weight.requires_grad_(False)
    tied = nn.Sequential(model, nn.Linear(3, 3), nn.Linear(3, 3))
    tied[2].weight = tied[1].weight
    partition = param_layers(tied, layers=layers)
    members = [p for layer in partition for p in layer.params]
    assert len(members) == len(set(members))
    assert set(members) == {p for p in tied.parameters() if p.requires_grad}
    assert len({layer.name for layer in partition}) == len(partition)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_tied_weight_is_updated_once(name):
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Tanh(), nn.Linear(4, 4, bias=False))
    model[2].weight = model[0].weight
    optimizer = OPTIMIZERS[name](model, 0.1, momentum=0.0)
    model(torch.randn(5, 4)).square().mean().backward()
    before, grad = model[0].weight.detach().clone(), model[0].weight.grad.clone()
    optimizer.step()
    assert optimizer.layer_names == ["0"]
    torch.testing.assert_close(model[0].weight.detach(), before - optimizer.last_step.rate[0] * grad)


def test_groups_with_settings_of_their_own_equal_separate_optimizers():
    def groups(net):
        return [
            {"params": net[0].parameters(), "lr": 0.2, "eta": 0.05, "weight_decay": 0.1},
            {"params": net[2].parameters(), "momentum": 0.5},
        ]

    model = mlp().double()
    copies = [copy.deepcopy(model) for _ in range(2)]
    joint = CLARS(model, 0.1, params=groups(model))
    first = CLARS(copies[0], 0.2, eta=0.05, weight_decay=0.1)
    second = CLARS(copies[1], 0.1, momentum=0.5)
    assert [g["lr"] for g in joint.param_groups] == [0.2, 0.1]
    x, y = torch.randn(8, 6).double(), torch.randint(0, 3, (8,))
    for net, opt in ((model, joint), (copies[0], first), (copies[1], second)):
        nn.functional.cross_entropy(net(x), y).backward()
        opt.step()
    assert torch.equal(model[0].weight, copies[0][0].weight)
    assert torch.equal(model[2].weight, copies[1][2].weight)


def test_norm_and_bias_layers_can_be_left_unscaled():
    model = small_model()
    optimizer = LARS(model, 0.3, scale_norm_and_bias=False)
    train(model, optimizer, 1)
    rates = dict(zip(optimizer.layer_names, optimizer.last_step.rate.tolist(), strict=True))
    for name in ("0.bias", "1", "4.bias", "5", "6.bias"):
        assert rates[name] == pytest.approx(0.3)
    assert rates["0"] != pytest.approx(0.3)


def test_a_frozen_group_holds_still_and_wakes():
    model = mlp()
    optimizer = CLARS(model, 0.5)
    optimizer.param_groups[1]["frozen"] = True
    before = model[2].weight.detach().clone()
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(4, 6)).square().mean().backward()
        optimizer.step()
    assert torch.equal(model[2].weight, before)
    assert not optimizer.state[model[2].weight]["momentum_buffer"].any()
    optimizer.param_groups[1]["frozen"] = False
    optimizer.zero_grad()
    model(torch.randn(4, 6)).square().mean().backward()
    optimizer.step()
    assert not torch.equal(model[2].weight, before)


@pytest.mark.parametrize("cls", [LARS, NAG])
def test_plain_parameters_are_taken_as_torchs_optimizers_take_them(cls):
    model, other = mlp(), None
    other = copy.deepcopy(model)
    by_tensor, by_module = cls(model.named_parameters(), 0.1), cls(other, 0.1, layers="tensor")
    assert by_tensor.layer_names == by_module.layer_names
    for net, opt in ((model, by_tensor), (other, by_module)):
        net(torch.ones(4, 6)).square().mean().backward()
        opt.step()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))


# ---- schedules -------------------------------------------------------------------------------------------------------

SCHEDULERS = {
    "LambdaLR": lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda t: 1 / (1 + t)),
    "MultiStepLR": lambda o: torch.optim.lr_scheduler.MultiStepLR(o, [2, 4]),
    "PolynomialLR": lambda o: torch.optim.lr_scheduler.PolynomialLR(o, total_iters=10, power=2.0),
    "CosineAnnealingLR": lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 10),
    "OneCycleLR": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 1.0, total_steps=10, cycle_momentum=False),
    "SequentialLR": lambda o: torch.optim.lr_scheduler.SequentialLR(
        o,
        [torch.optim.lr_scheduler.LinearLR(o, 0.1, total_iters=3), torch.optim.lr_scheduler.ConstantLR(o, 1.0)],
        [3],
    ),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_any_torch_scheduler_moves_the_rate(name, scheduler):
    model = small_model()
    optimizer = OPTIMIZERS[name](model, 0.4)
    schedule = SCHEDULERS[scheduler](optimizer)
    eta = optimizer.param_groups[0].get("eta", 1.0)
    seen = set()
    for step in range(6):
        lr = optimizer.param_groups[0]["lr"]
        seen.add(lr)
        train(model, optimizer, 1, start=step)
        measured = optimizer.last_step
        scale = {
            "NAG": torch.ones_like(measured.rate),
            "LARS": measured.weight_norm / measured.grad_norm,
            "CLARS": measured.weight_norm / measured.mean_sample_norm if name == "CLARS" else None,
        }[name]
        torch.testing.assert_close(measured.rate, lr * eta * scale, rtol=1e-5, atol=1e-12)
        schedule.step()
    assert len(seen) > 1


# ---- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings_",
    [
        {"lr": -1.0},
        {"eta": 0.0},
        {"momentum": 1.0},
        {"weight_decay": -1e-4},
        {"trust_clip": 0.0},
        {"samples": 0},
        *(
            {name: value}
            for name in ("lr", "eta", "momentum", "weight_decay")
            for value in (float("inf"), float("nan"))
        ),
        {"trust_clip": float("nan")},
    ],
)
def test_settings_that_cannot_work_are_refused_by_name(settings_):
    with pytest.raises(ValueError, match=next(iter(settings_))):
        CLARS(mlp(), **settings_)


def test_clars_asks_for_the_model_when_given_parameters():
    with pytest.raises(TypeError, match="needs the model itself"):
        CLARS(mlp().parameters())


@pytest.mark.parametrize(
    ("settings_", "message"),
    [
        ({"norm": "max"}, "norm='max'"),
        ({"estimator": "all"}, "estimator='all'"),
        ({"layers": "block"}, "layers='block'"),
        ({"decay_in_norm": True}, "decay_in_norm"),
    ],
)
def test_unknown_choices_are_refused(settings_, message):
    with pytest.raises(ValueError, match=message):
        CLARS(mlp(), **settings_)


def test_nothing_to_train_is_refused():
    with pytest.raises(ValueError, match="nothing to train"):
        LARS(mlp().requires_grad_(False))


def test_a_parameter_of_another_model_or_in_two_groups_is_refused():
    model = mlp()
    with pytest.raises(ValueError, match="not in the model"):
        CLARS(model, params=[{"params": mlp().parameters()}])
    with pytest.raises(ValueError, match="in group 0 and in group 1"):
        CLARS(model, params=[{"params": model.parameters()}, {"params": model[0].parameters()}])


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_parameters_cannot_be_added_afterwards(name):
    optimizer = OPTIMIZERS[name](mlp(), 0.1)
    with pytest.raises(ValueError, match="Create a new one"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))]})
