"""Promise: a loop that would make the rates silently wrong raises instead."""

import copy
import gc
import weakref

import pytest
import torch
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from hf_clars.grad_norms.errors import SecondBackwardError
from hf_clars.grad_norms.torch_internals import version
from hf_clars.optim import CLARS, LARS, NAG, NoNormsError, OptimizerNotSteppedError, SignalLARS
from tests.twin import batch, loss_on, small_model, train


def test_torch_still_counts_changes_in_place():
    tensor = torch.ones(3)
    before = version(tensor)
    tensor.mul_(2)
    torch._foreach_mul_([tensor], 2.0)
    assert version(tensor) == before + 2
    assert version(tensor + 1) == 0


def test_another_optimizer_that_trains_the_model_is_noticed_in_its_second_step():
    model = small_model()
    CLARS(model)
    other = torch.optim.AdamW(model.parameters())
    loss_on(*batch(0))(model).backward()
    other.step()
    with pytest.raises(OptimizerNotSteppedError, match="use ClarsTrainer"):
        loss_on(*batch(1))(model)


def test_accumulation_before_the_first_step_is_no_cause_for_alarm():
    model = small_model()
    optimizer = CLARS(model)
    for step in range(6):
        loss_on(*batch(step))(model).backward()
    optimizer.step()
    assert optimizer.last_step is not None


def test_a_removed_optimizer_no_longer_watches():
    model = small_model()
    optimizer = CLARS(model)
    optimizer.remove_hooks()
    other = torch.optim.SGD(model.parameters(), 0.1)
    for step in range(3):
        other.zero_grad()
        loss_on(*batch(step))(model).backward()
        other.step()


@pytest.mark.parametrize("estimator", ["samples", "microbatch"])
def test_gradients_may_be_cleared_between_forward_and_backward(estimator):
    """`loss = ...; optimizer.zero_grad(); loss.backward()` is as common as clearing first."""
    models = [small_model(), small_model(), small_model()]
    before, between, by_model = [CLARS(m, estimator=estimator) for m in models]
    for step in range(3):
        before.zero_grad()
        losses = [loss_on(*batch(step))(m) for m in models]
        between.zero_grad()
        models[2].zero_grad()
        for loss, optimizer in zip(losses, (before, between, by_model), strict=True):
            loss.backward()
            optimizer.step()
        assert torch.equal(before.last_step.ratio, between.last_step.ratio)
        assert torch.equal(before.last_step.ratio, by_model.last_step.ratio)
    if estimator == "samples":  # one micro-batch is the batch: its ratio is 1 either way
        assert before.last_step.ratio.max() < 0.999


def test_gradients_that_no_backward_brought_are_refused():
    model = small_model()
    optimizer = CLARS(model)
    loss_on(*batch(0))(model).backward()
    optimizer.step()
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    with pytest.raises(NoNormsError, match="no backward pass"):
        optimizer.step()


def test_zero_grad_by_hand_drops_what_was_measured():
    """A step that is skipped (an overflow in fp16) clears p.grad: its norms must not leak into the next batch."""
    model, other = small_model().eval(), small_model().eval()
    skipping, fresh = CLARS(model), CLARS(other)
    loss_on(*batch(0))(model).backward()
    model.zero_grad()
    for net, opt in ((model, skipping), (other, fresh)):
        loss_on(*batch(1))(net).backward()
        opt.step()
    assert torch.equal(skipping.last_step.mean_sample_norm, fresh.last_step.mean_sample_norm)


def test_an_optimizer_may_be_created_anew_before_it_ever_stepped():
    """A notebook cell run twice: the first one is gone, and so are its hooks."""
    model = small_model()
    first = CLARS(model)
    dropped = weakref.ref(first.norms)
    first = CLARS(model)
    for step in range(3):
        first.zero_grad()
        loss_on(*batch(step))(model).backward()
        first.step()
    gc.collect()
    assert dropped() is None


def test_a_dropped_optimizer_still_notices_that_another_trains():
    """Trainer under DeepSpeed drops the one it was given: nothing refers to it any more."""
    model = small_model()
    CLARS(model)
    gc.collect()
    other = torch.optim.AdamW(model.parameters())
    loss_on(*batch(0))(model).backward()
    other.step()
    with pytest.raises(OptimizerNotSteppedError):
        loss_on(*batch(1))(model)


# ---- weights that are moved and put back -----------------------------------------------------------------------------


@pytest.mark.parametrize("make", [CLARS, LARS, NAG])
@pytest.mark.parametrize("passes", [1, 3])
def test_sharpness_aware_steps_are_no_other_optimizer(make, passes):
    """Two backward passes, the second where the weights were moved to, and back again: once or more before a step."""
    model = small_model()
    optimizer = make(model, 0.1)
    for step in range(3):
        before = model[0].weight.detach().clone()
        for part in range(passes):
            optimizer.zero_grad()
            loss_on(*batch(10 * step + part))(model).backward()
            moves = [0.05 * p.grad for p in model.parameters()]
            with torch.no_grad():
                torch._foreach_add_(list(model.parameters()), moves)
            optimizer.zero_grad()
            loss_on(*batch(10 * step + part))(model).backward()
            with torch.no_grad():
                torch._foreach_sub_(list(model.parameters()), moves)
        optimizer.step()
        assert not torch.equal(model[0].weight, before)


def test_a_trainer_that_is_no_optimizer_of_torchs_is_noticed_too():
    model = small_model()
    CLARS(model)

    def steps():
        for step in range(6):
            loss_on(*batch(step))(model).backward()
            with torch.no_grad():
                for p in model.parameters():
                    p.sub_(0.01 * p.grad)

    with pytest.raises(OptimizerNotSteppedError):
        steps()


# ---- gradients that are cleared in place -----------------------------------------------------------------------------


def set_to_zero(model):
    model.zero_grad(set_to_none=False)


def by_hand_to_zero(model):
    for p in model.parameters():
        p.grad.zero_()


@pytest.mark.parametrize("estimator", ["samples", "microbatch"])
@pytest.mark.parametrize("between", [False, True], ids=["before forward", "between forward and backward"])
@pytest.mark.parametrize("clear", [set_to_zero, by_hand_to_zero, lambda model: model.zero_grad()])
def test_norms_of_a_pass_that_was_thrown_away_are_forgotten(clear, between, estimator):
    model, other = small_model().eval(), small_model().eval()
    skipping, fresh = CLARS(model, 0.1, estimator=estimator), CLARS(other, 0.1, estimator=estimator)
    for step in range(3):
        loss_on(*batch(10 + step))(model).backward()
        if between:
            loss = loss_on(*batch(step))(model)
            clear(model)
        else:
            clear(model)
            loss = loss_on(*batch(step))(model)
        loss.backward()
        skipping.step()
        fresh.zero_grad(), skipping.zero_grad()
        loss_on(*batch(step))(other).backward()
        fresh.step()
        assert torch.equal(skipping.last_step.mean_sample_norm, fresh.last_step.mean_sample_norm)


def test_two_passes_with_one_backward_are_one_batch():
    model, other = small_model().eval(), small_model().eval()
    together, apart = CLARS(model), CLARS(other)
    (loss_on(*batch(0))(model) + loss_on(*batch(1))(model)).backward()
    loss_on(*batch(0))(other).backward(), loss_on(*batch(1))(other).backward()
    together.step(), apart.step()
    torch.testing.assert_close(together.last_step.mean_sample_norm, apart.last_step.mean_sample_norm)


# ---- a step that only makes the state --------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [CLARS, SignalLARS, LARS, NAG])
@pytest.mark.parametrize("momentum_form", ["nesterov", "heavy_ball"])
@pytest.mark.parametrize("flat", [False, True])
def test_a_state_that_torch_makes_and_loads_goes_on_bit_for_bit(make, momentum_form, flat):
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    settings = {"momentum_form": momentum_form, "weight_decay": 0.01}
    model, other = small_model(), small_model()
    optimizer = make(model, 0.1, **settings)
    start = [p.detach().clone() for p in model.parameters()]
    get_optimizer_state_dict(model, optimizer, options=options)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), start, strict=True))
    assert optimizer.last_step is None
    assert not any(state["momentum_buffer"].any() for state in optimizer.state.values())
    train(model, optimizer, 3)
    other.load_state_dict(model.state_dict())
    fresh = make(other, 0.7, **settings)
    set_optimizer_state_dict(
        other, fresh, copy.deepcopy(get_optimizer_state_dict(model, optimizer, options=options)), options=options
    )
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))
    train(model, optimizer, 3, start=3), train(other, fresh, 3, start=3)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("make", [CLARS, LARS, NAG])
def test_a_warmup_that_begins_at_zero_is_a_step(make):
    model = small_model()
    optimizer = make(model, 0.0)
    train(model, optimizer, 1)
    assert optimizer.last_step is not None
    assert optimizer.last_step.grad_norm.min() > 0


# ---- what the hooks have no part in ----------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [CLARS, LARS])
def test_functions_of_torch_func_work_beside_the_hooks_and_change_no_norm(make):
    model, other = small_model().eval(), small_model().eval()
    beside, alone = make(model), make(other)
    weights = dict(model.named_parameters())
    for step in range(3):
        x, y = batch(step)

        def loss(given, x=x, y=y):
            return torch.nn.functional.cross_entropy(torch.func.functional_call(model, given, (x,)), y)

        for net, optimizer in ((model, beside), (other, alone)):
            optimizer.zero_grad()
            loss_on(x, y)(net).backward()
        found = torch.func.grad(loss)(weights)
        torch.func.vmap(lambda one: model(one[None]))(x)
        torch.func.jvp(model, (x,), (x,))
        torch.testing.assert_close(found["0.weight"], model[0].weight.grad)
        beside.step(), alone.step()
        assert torch.equal(beside.last_step.rate, alone.last_step.rate)


def test_a_loss_with_a_gradient_of_its_own_is_refused_in_words_that_fit():
    model = small_model()
    _held = CLARS(model)  # norms of an optimizer that is gone are not measured
    x, y = batch(0)
    x.requires_grad_()
    loss = torch.nn.functional.cross_entropy(model(x), y)
    (penalty,) = torch.autograd.grad(loss, x, create_graph=True)
    with pytest.raises(SecondBackwardError, match=r"gradient penalty with create_graph=True.*microbatch"):
        (loss + penalty.square().sum()).backward()


def test_processes_that_know_of_no_other_are_told(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    model = small_model()
    optimizer = LARS(model)
    with pytest.warns(UserWarning, match="2 processes were started"):
        train(model, optimizer, 1)
