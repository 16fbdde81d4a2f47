"""Promise: `param_groups` shows what the caller gave, layers are held beside it, and states find their way by name."""

import copy
import os
import pickle
import warnings

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.optim.lr_scheduler import LambdaLR

from hf_clars.optim import CLARS, LARS, NAG, SignalLARS
from hf_clars.optim.freeze import set_frozen
from tests.twin import OPTIMIZERS, batch, loss_on, mlp, small_model, train

WITHOUT_MODEL = {"LARS": LARS, "NAG": NAG}


def halves(model):
    """Two groups of several layers each."""
    params = list(model.parameters())
    return [{"params": params[:4], "lr": 0.2}, {"params": params[4:], "lr": 0.1, "momentum": 0.5}]


def three_steps(model, optimizer, start=0):
    train(model, optimizer, 3, start=start)
    return [p.detach().clone() for p in model.parameters()]


def assert_same(left, right):
    assert all(torch.equal(p, q) for p, q in zip(left, right, strict=True))


# ---- what is shown ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_groups_of_a_model_are_shown_as_given_and_train_as_one_group_a_layer_does(name):
    model, other = small_model(), small_model()
    given = halves(model)
    optimizer = OPTIMIZERS[name](model, params=[dict(g) for g in given])
    assert [[id(p) for p in g["params"]] for g in optimizer.param_groups] == [
        [id(p) for p in g["params"]] for g in given
    ]
    assert [g["lr"] for g in optimizer.param_groups] == [0.2, 0.1]
    split = OPTIMIZERS[name](other)
    for group in split.param_groups:
        first = {id(p) for p in halves(other)[0]["params"]}
        group.update(lr=0.2) if id(group["params"][0]) in first else group.update(lr=0.1, momentum=0.5)
    assert len(split.param_groups) == len(split.layer_names) == len(optimizer.layer_names)
    assert_same(three_steps(model, optimizer), three_steps(other, split))


@pytest.mark.parametrize("name", WITHOUT_MODEL)
def test_parameters_without_groups_are_one_group_as_in_torch(name):
    model, other = small_model(), small_model()
    one = WITHOUT_MODEL[name](model.parameters(), 0.1)
    assert len(one.param_groups) == len(torch.optim.SGD(model.parameters()).param_groups) == 1
    each = WITHOUT_MODEL[name]([{"params": [p]} for p in other.parameters()], 0.1)
    assert_same(three_steps(model, one), three_steps(other, each))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_schedule_with_one_function_a_group_has_one_for_each_that_was_given(name):
    model = small_model()
    optimizer = OPTIMIZERS[name](model, params=halves(model))
    schedule = LambdaLR(optimizer, [lambda t: 1.0, lambda t: 0.5**t])
    for step in range(3):
        train(model, optimizer, 1, start=step)
        schedule.step()
    assert [g["lr"] for g in optimizer.param_groups] == pytest.approx([0.2, 0.1 * 0.5**3])


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_group_may_be_one_tensor_a_generator_or_empty(name):
    model, other = mlp(), mlp()
    other.load_state_dict(model.state_dict())
    groups = [{"params": model[0].weight}, {"params": []}, {"params": (p for p in [*model.parameters()][1:])}]
    if name in WITHOUT_MODEL:
        optimizer = OPTIMIZERS[name](groups, lr=0.1)
        plain = OPTIMIZERS[name](other.parameters(), lr=0.1)
    else:
        optimizer = OPTIMIZERS[name](model, 0.1, layers="tensor", params=groups)
        plain = OPTIMIZERS[name](other, 0.1, layers="tensor")
    assert [len(g["params"]) for g in optimizer.param_groups] == [1, 0, 3]
    for step in range(3):
        for net, opt in ((model, optimizer), (other, plain)):
            opt.zero_grad()
            net(torch.full((4, 6), 0.1 * step)).square().mean().backward()
            opt.step()
    assert_same(model.parameters(), other.parameters())


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_same_tensor_twice_is_torchs_warning_in_a_group_and_its_error_in_two(name):
    make = OPTIMIZERS[name]
    model = mlp()
    w = model[0].weight
    with pytest.warns(UserWarning, match="duplicate parameters"):
        twice = make([w, w]) if name in WITHOUT_MODEL else make(model, params=[{"params": [w, w]}])
    for _ in range(3):
        before = w.detach().clone()
        twice.zero_grad()
        model(torch.ones(4, 6)).square().mean().backward()
        twice.step()
        assert not torch.equal(before, w)
    groups = [{"params": [w]}, {"params": [w]}]
    with pytest.raises(ValueError, match=r"more than one parameter group|in group 0 and in group 1"):
        make(groups) if name in WITHOUT_MODEL else make(model, params=groups)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_nothing_at_all_is_refused_as_torch_does(name):
    with pytest.raises(ValueError, match="empty parameter list"):
        OPTIMIZERS[name]([]) if name in WITHOUT_MODEL else OPTIMIZERS[name](mlp(), params=[])


# ---- groups that come later ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", WITHOUT_MODEL)
def test_a_group_that_is_added_trains_as_one_given_at_the_start(name):
    model, other = mlp(), mlp()
    other.load_state_dict(model.state_dict())
    whole = WITHOUT_MODEL[name]([{"params": model[0].parameters()}, {"params": model[2].parameters(), "lr": 0.01}])
    added = WITHOUT_MODEL[name](other[0].parameters())
    added.add_param_group({"params": other[2].parameters(), "lr": 0.01})
    for step in range(3):
        for net, opt in ((model, whole), (other, added)):
            opt.zero_grad()
            net(torch.full((4, 6), 0.1 * step)).square().mean().backward()
            opt.step()
    assert_same(model.parameters(), other.parameters())
    with pytest.raises(ValueError, match="lr="):
        added.add_param_group({"params": [nn.Parameter(torch.ones(2))], "lr": float("inf")})


@pytest.mark.parametrize("name", [*OPTIMIZERS, "SignalLARS"])
def test_parameters_of_the_model_that_were_in_no_group_can_be_added(name):
    make = {**OPTIMIZERS, "SignalLARS": SignalLARS}[name]
    model, other = small_model(), small_model()
    first, second = halves(model)
    optimizer = make(model, params=[first])
    optimizer.add_param_group(second)
    whole = make(other, params=halves(other))
    assert len(optimizer.param_groups) == 2
    assert optimizer.layer_names == whole.layer_names
    assert_same(three_steps(model, optimizer), three_steps(other, whole))
    with pytest.raises(ValueError, match="more than one parameter group"):
        optimizer.add_param_group(dict(second))


def test_zero_redundancy_shards_the_state_and_changes_no_weight():
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(29500 + os.getpid() % 2000))
    dist.init_process_group("gloo", rank=0, world_size=1)
    try:
        for name, make in WITHOUT_MODEL.items():
            model, other = small_model(), small_model()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                sharded = ZeroRedundancyOptimizer(model.parameters(), optimizer_class=make, lr=0.1)
            plain = make(other.parameters(), lr=0.1)
            assert_same(three_steps(model, sharded), three_steps(other, plain)), name
            sharded.consolidate_state_dict()
            assert len(sharded.state_dict()["state"]) == len(list(model.parameters()))
    finally:
        dist.destroy_process_group()


# ---- layers inside groups --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_one_layer_of_a_group_can_be_held_and_let_go(name):
    model = mlp()
    optimizer = OPTIMIZERS[name](model, params=[{"params": model.parameters(), "lr": 0.1}])
    set_frozen(optimizer, ["2"], True)
    held = model[2].weight.detach().clone()
    restored = OPTIMIZERS[name](model, params=[{"params": model.parameters()}])
    restored.load_state_dict(optimizer.state_dict())
    for step in range(3):
        restored.zero_grad()
        before = model[0].weight.detach().clone()
        model(torch.full((4, 6), 0.1 + step)).square().mean().backward()
        restored.step()
        assert not torch.equal(model[0].weight, before)
    assert torch.equal(model[2].weight, held)
    set_frozen(restored, ["2"], False)
    restored.zero_grad()
    model(torch.ones(4, 6)).square().mean().backward()
    restored.step()
    assert not torch.equal(model[2].weight, held)


# ---- states ----------------------------------------------------------------------------------------------------------


def old_form(optimizer):
    """A state as it was written when every layer, or tensor, had a group of its own and groups had no other names."""
    state = copy.deepcopy(optimizer.state_dict())
    for group in state["param_groups"]:
        group.pop("param_names", None)
    return state


@pytest.mark.parametrize("name", [*OPTIMIZERS, "SignalLARS"])
@pytest.mark.parametrize("after", [0, 3])
def test_a_state_with_one_group_a_layer_goes_on_exactly_under_the_callers_groups(name, after):
    make = {**OPTIMIZERS, "SignalLARS": SignalLARS}[name]
    model, other = small_model(), small_model()
    split = make(model, 0.3)
    train(model, split, after)
    other.load_state_dict(model.state_dict())
    joint = make(other, 0.7, params=[{"params": other.parameters()}])
    joint.load_state_dict(old_form(split))
    assert [g["lr"] for g in joint.param_groups] == [0.3]
    assert_same(three_steps(model, split, after), three_steps(other, joint, after))


@pytest.mark.parametrize("name", WITHOUT_MODEL)
def test_a_state_with_one_group_a_tensor_loads_where_there_is_one_group_now(name):
    model, other = small_model(), small_model()
    each = WITHOUT_MODEL[name]([{"params": [p], "layer": f"param_{i}"} for i, p in enumerate(model.parameters())], 0.2)
    train(model, each, 3)
    other.load_state_dict(model.state_dict())
    one = WITHOUT_MODEL[name](other.parameters(), 0.9)
    one.load_state_dict(old_form(each))
    assert_same(three_steps(model, each, 3), three_steps(other, one, 3))


class Twins(nn.Module):
    """Two layers of one shape, made in either order."""

    def __init__(self, order):
        super().__init__()
        torch.manual_seed(0)
        made = {name: nn.Linear(6, 6) for name in ("first", "second")}
        for name in order:
            self.add_module(name, made[name])

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


@pytest.mark.parametrize("name", [*OPTIMIZERS, "SignalLARS"])
@pytest.mark.parametrize("form", [lambda o: o.state_dict(), old_form], ids=["now", "old"])
def test_momentum_goes_to_the_layer_of_its_name_whatever_the_order(name, form):
    make = {**OPTIMIZERS, "SignalLARS": SignalLARS}[name]
    model, other = Twins(["first", "second"]), Twins(["second", "first"])
    optimizer = make(model, 0.1)

    def step(net, opt, t):
        opt.zero_grad()
        net(torch.sin(torch.arange(24.0) + t).reshape(4, 6)).square().mean().backward()
        opt.step()

    for t in range(3):
        step(model, optimizer, t)
    other.load_state_dict(model.state_dict())
    again = make(other, 0.9)
    again.load_state_dict(copy.deepcopy(form(optimizer)))
    for t in range(3, 6):
        step(model, optimizer, t), step(other, again, t)
    for n, p in model.named_parameters():
        assert torch.equal(p, other.get_parameter(n)), n


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_state_of_other_layers_is_refused_by_their_names(name):
    model = Twins(["first", "second"])
    saved = OPTIMIZERS[name](model, 0.1).state_dict()
    other = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    with pytest.raises(ValueError, match=r"holds first\.weight, .* which this optimizer does not have"):
        OPTIMIZERS[name](other, 0.1).load_state_dict(saved)
    part = OPTIMIZERS[name](model, 0.1, params=[{"params": model.first.parameters()}]).state_dict()
    with pytest.raises(ValueError, match=r"holds nothing of second\.weight, second\.bias"):
        OPTIMIZERS[name](model, 0.1).load_state_dict(part)


# ---- copies ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", WITHOUT_MODEL)
@pytest.mark.parametrize("by", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["copied", "pickled"])
def test_a_model_and_its_optimizer_go_on_as_a_copy(name, by):
    model = mlp()
    optimizer = WITHOUT_MODEL[name](model.parameters(), 0.1)
    model(torch.ones(4, 6)).square().mean().backward()
    optimizer.step()
    other, again = by((model, optimizer))
    for _ in range(3):
        for net, opt in ((model, optimizer), (other, again)):
            opt.zero_grad()
            net(torch.ones(4, 6)).square().mean().backward()
            opt.step()
    assert_same(model.parameters(), other.parameters())
    assert again.state[next(other.parameters())]


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("by", [copy.deepcopy, copy.copy, pickle.dumps])
def test_an_optimizer_with_hooks_on_its_model_says_at_once_that_it_cannot_be_copied(name, by):
    with pytest.raises(TypeError, match="state_dict"):
        by(OPTIMIZERS[name](mlp(), 0.1))


def test_what_a_step_measures_is_in_the_order_of_the_names():
    model, other = small_model(), small_model()
    params = list(model.parameters())
    mixed = CLARS(model, 0.1, params=[{"params": params[3:]}, {"params": params[:3]}])
    plain = CLARS(other, 0.1)
    loss_on(*batch(0))(model).backward(), loss_on(*batch(0))(other).backward()
    mixed.step(), plain.step()
    rates = dict(zip(plain.layer_names, plain.last_step.weight_norm.tolist(), strict=True))
    for name, norm in zip(mixed.layer_names, mixed.last_step.weight_norm.tolist(), strict=True):
        if "(" not in name:
            assert norm == pytest.approx(rates[name])
