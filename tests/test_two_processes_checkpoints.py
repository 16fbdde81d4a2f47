"""Promise: on two real processes FSDP2's ways to save, load and clip are exact, and who trains alone is told."""

import copy
import os
import warnings

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import fully_shard

from hf_clars.optim import CLARS, LARS, NAG, SignalLARS, TrainsAloneError
from tests.processes import GROUP, leave, results_of_two
from tests.test_two_processes import make_model
from tests.twin import batch, loss_on

pytestmark = GROUP
METHODS = {
    "CLARS": CLARS,
    "SignalLARS": SignalLARS,
    "LARS": LARS,
    "NAG": NAG,
    "LARS, heavy ball": lambda m, lr: LARS(m, lr, momentum_form="heavy_ball", weight_decay=0.1),
}
FORMS = {"nested": StateDictOptions(), "flat": StateDictOptions(flatten_optimizer_state_dict=True)}


def sharded():
    model = make_model()
    for module in (model[0], model[3], model):
        fully_shard(module)
    return model


def whole(model):
    return {n: t.full_tensor().detach().clone() for n, t in model.state_dict().items()}


def step(model, optimizer, t, rank, world, clip=None):
    x, y = batch(t, 16)
    optimizer.zero_grad()
    loss_on(x.double()[rank::world], y[rank::world])(model).backward()
    if clip is not None:
        nn.utils.clip_grad_norm_(model.parameters(), clip)
    optimizer.step()


def same(left, right):
    return all(torch.equal(left[n], right[n]) for n in left)


def state_of_an_optimizer_that_has_not_stepped(name, form, rank, world):
    """Asked for its state it does not move; loaded, it goes on as the run that was not stopped."""
    model = sharded()
    optimizer = METHODS[name](model, 0.3)
    start = whole(model)
    empty = get_optimizer_state_dict(model, optimizer, options=FORMS[form])
    stayed = same(whole(model), start) and optimizer.last_step is None and bool(empty)
    for t in range(3):
        step(model, optimizer, t, rank, world)
    state = copy.deepcopy(get_optimizer_state_dict(model, optimizer, options=FORMS[form]))  # what is written down
    weights = model.state_dict()
    again = sharded()
    again.load_state_dict({n: t.clone() for n, t in weights.items()})
    fresh = METHODS[name](again, 0.9)
    set_optimizer_state_dict(again, fresh, state, options=FORMS[form])
    stayed = stayed and same(whole(again), whole(model))
    for t in range(3, 6):
        step(model, optimizer, t, rank, world), step(again, fresh, t, rank, world)
    return stayed, same(whole(model), whole(again))


def clipped(name, rank, world):
    """Rates and weights after three steps, without clipping and with it."""
    found = []
    for clip in (None, 1e-3):
        model = sharded()
        optimizer = METHODS[name](model, 0.3)
        ratios = []
        for t in range(3):
            step(model, optimizer, t, rank, world, clip)
            ratios.append(optimizer.last_step.ratio)
        found.append((torch.stack(ratios), whole(model)))
    return found


def thrown_away(how, rank, world):
    """n_k of one batch, after the gradients of another were cleared."""
    found = []
    for other in (False, True):
        model = sharded()
        optimizer = CLARS(model, 0.3)
        if other:
            x, y = batch(7, 16)
            loss_on(x.double()[rank::world], y[rank::world])(model).backward()
            how(model)
        x, y = batch(1, 16)
        loss_on(x.double()[rank::world], y[rank::world])(model).backward()
        optimizer.step()
        found.append(optimizer.last_step.mean_sample_norm)
    return found


def accumulated(rank, world):
    """n_k and weights of three steps, each of one pass, and of two without reduction in between."""
    found = []
    for passes in (1, 2):
        model = sharded()
        optimizer = CLARS(model, 0.3)
        norms = []
        for t in range(3):
            x, y = batch(t, 16)
            optimizer.zero_grad()
            xs, ys = x.double()[rank::world].chunk(passes), y[rank::world].chunk(passes)
            for i, (part_x, part_y) in enumerate(zip(xs, ys, strict=True)):
                model.set_requires_gradient_sync(i == passes - 1)
                (loss_on(part_x, part_y)(model) / passes).backward()
            optimizer.step()
            norms.append(optimizer.last_step.mean_sample_norm)
        found.append((torch.stack(norms), whole(model)))
    return found


def alone(name, rank, world, *, same_data=False):
    """What is said of a model that no one has wrapped."""
    model = make_model()
    optimizer = METHODS[name](model, 0.3)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            for t in range(3):
                step(model, optimizer, t, 0 if same_data else rank, world)
        except TrainsAloneError as error:
            return str(error)
    return " ".join(str(w.message) for w in said if "by itself" in str(w.message))


def together(name, rank, world):
    """What is said of one that data parallelism has wrapped."""
    model = make_model()
    optimizer = METHODS[name](model, 0.3)
    wrapped = nn.parallel.DistributedDataParallel(model)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for t in range(3):
            step(wrapped, optimizer, t, rank, world, clip=1e-2)
    return " ".join(str(w.message) for w in said if "by itself" in str(w.message))


def by_hand_to_zero(model):
    for p in model.parameters():
        p.grad.zero_()


CLEARED = {
    "set to zero": lambda model: model.zero_grad(set_to_none=False),
    "by hand": by_hand_to_zero,
    "set to none": lambda model: model.zero_grad(),
}


def worker(rank, world, port, folder):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=world)
    results = {}
    for name in METHODS:
        for form in FORMS:
            results["state", name, form] = state_of_an_optimizer_that_has_not_stepped(name, form, rank, world)
        results["alone", name] = alone(name, rank, world)
        results["together", name] = together(name, rank, world)
    results["alone", "same data"] = alone("CLARS", rank, world, same_data=True)
    results["accumulated"] = accumulated(rank, world)
    results["clipped"] = clipped("CLARS", rank, world)
    for name, how in CLEARED.items():
        results["cleared", name] = thrown_away(how, rank, world)
    leave(results, folder, rank)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    return results_of_two(worker, folder)


@pytest.mark.distributed
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", METHODS)
def test_a_state_is_made_without_a_move_and_goes_on_bit_for_bit(two, name, form):
    for rank in range(2):
        assert two[rank]["state", name, form] == (True, True)


@pytest.mark.distributed
def test_clipping_split_gradients_changes_no_step(two):
    for rank in range(2):
        (plain, weights), (ratios, others) = two[rank]["clipped"]
        torch.testing.assert_close(ratios, plain, rtol=1e-9, atol=0)
        assert plain.max() < 0.999
        for key, value in weights.items():
            torch.testing.assert_close(others[key], value, rtol=1e-8, atol=1e-12)


@pytest.mark.distributed
def test_passes_without_a_reduction_in_between_are_one_batch(two):
    for rank in range(2):
        (once, weights), (twice, others) = two[rank]["accumulated"]
        torch.testing.assert_close(twice, once, rtol=1e-9, atol=0)
        for key, value in weights.items():
            torch.testing.assert_close(others[key], value, rtol=1e-9, atol=1e-12)


@pytest.mark.distributed
@pytest.mark.parametrize("name", CLEARED)
def test_norms_of_a_pass_that_was_thrown_away_are_forgotten(two, name):
    for rank in range(2):
        expected, found = two[rank]["cleared", name]
        assert torch.equal(found, expected)


@pytest.mark.distributed
@pytest.mark.parametrize("name", METHODS)
def test_processes_that_each_train_alone_are_told(two, name):
    for rank in range(2):
        assert "by itself" in two[rank]["alone", name]
        assert two[rank]["together", name] == ""


@pytest.mark.distributed
def test_the_same_data_everywhere_is_worth_a_warning_only(two):
    assert "same" in two[0]["alone", "same data"]
