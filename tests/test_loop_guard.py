"""Promise: a loop that would make the rates silently wrong raises instead."""

import gc
import weakref

import pytest
import torch

from hf_clars.grad_norms.torch_internals import version
from hf_clars.optim import CLARS, NoNormsError, OptimizerNotSteppedError
from tests.twin import batch, loss_on, small_model


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


def by_hand(model, optimizer, loss):
    (loss * 1024).backward()
    for p in model.parameters():
        p.grad.div_(1024)
    optimizer.step()


def by_clipping(model, optimizer, loss):
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    optimizer.step()


def by_scaler(model, optimizer, loss):
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    scaler.step(optimizer)


@pytest.mark.parametrize("estimator", ["samples", "microbatch"])
@pytest.mark.parametrize("rescaled", [by_hand, by_clipping, by_scaler])
def test_rescaling_the_gradients_after_backward_changes_no_step(rescaled, estimator):
    """The norms follow p.grad: a loss scale that is removed, or clipping by the global norm, cancels in the rate."""
    model, other = small_model().double(), small_model().double()
    plain, optimizer = CLARS(model, estimator=estimator), CLARS(other, estimator=estimator)
    for step in range(3):
        plain.zero_grad(), optimizer.zero_grad()
        loss_on(*batch(step))(model).backward()
        plain.step()
        rescaled(other, optimizer, loss_on(*batch(step))(other))
        torch.testing.assert_close(optimizer.last_step.ratio, plain.last_step.ratio, rtol=1e-9, atol=0)
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


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
