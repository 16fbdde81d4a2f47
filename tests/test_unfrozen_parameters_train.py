"""Promise: parameters frozen when the optimizer was made train from the step at which they have a gradient."""

import copy

import pytest
import torch

from hf_clars.optim import CLARS, LARS, NAG, NoNormsError, SignalLARS
from tests.oracle import per_sample_grads
from tests.twin import batch, loss_on, mlp, small_model, train

OPTIMIZERS = {
    "CLARS": CLARS,
    "CLARS, tensors": lambda m, lr: CLARS(m, lr, layers="tensor"),
    "CLARS, micro-batches": lambda m, lr: CLARS(m, lr, estimator="microbatch"),
    "CLARS, groups": lambda m, lr: CLARS(m, lr, params=[{"params": m.parameters()}]),
    "SignalLARS": SignalLARS,
    "LARS": LARS,
    "NAG": NAG,
    "LARS, parameters": lambda m, lr: LARS(m.parameters(), lr),
    "NAG, parameters": lambda m, lr: NAG(m.parameters(), lr),
}


def step(model, optimizer, t=0):
    optimizer.zero_grad()
    loss_on(*batch(t))(model).backward()
    optimizer.step()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_frozen_layers_stay_then_train_and_their_gradients_are_cleared(name):
    model = small_model()
    model[0].requires_grad_(False)
    optimizer = OPTIMIZERS[name](model, 0.1)
    start = model[0].weight.detach().clone()
    for t in range(3):
        step(model, optimizer, t)
    assert torch.equal(model[0].weight, start)
    model[0].requires_grad_(True)
    for t in range(3, 6):
        before, grad = model[0].weight.detach().clone(), torch.zeros_like(start)
        optimizer.zero_grad()
        assert model[0].weight.grad is None
        loss_on(*batch(t))(model).backward()
        grad = model[0].weight.grad.clone()
        optimizer.step()
        assert not torch.equal(model[0].weight, before)
        assert grad.any()


@pytest.mark.parametrize("name", [n for n in OPTIMIZERS if n != "SignalLARS"])
def test_from_then_on_it_is_what_an_optimizer_made_unfrozen_would_do(name):
    """Without momentum an optimizer has no past: one that is made now is the truth."""
    model = small_model()
    model[0].bias.requires_grad_(False)
    model[4].requires_grad_(False)
    optimizer = OPTIMIZERS[name](model, 0.1)
    for group in optimizer.param_groups:
        group["momentum"] = 0.0
    for t in range(2):
        step(model, optimizer, t)
    model.requires_grad_(True)
    other = copy.deepcopy(model)
    fresh = OPTIMIZERS[name](other, 0.1)
    for group in fresh.param_groups:
        group["momentum"] = 0.0
    for t in range(2, 5):
        step(model, optimizer, t), step(other, fresh, t)
        rates = dict(zip(fresh.layer_names, fresh.last_step.rate.tolist(), strict=True))
        assert dict(zip(optimizer.layer_names, optimizer.last_step.rate.tolist(), strict=True)) == pytest.approx(rates)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q)


@pytest.mark.parametrize("layers", ["module", "tensor"])
def test_norms_of_an_unfrozen_layer_are_those_of_one_backward_per_sample(layers):
    model = small_model().double().eval()
    model[0].requires_grad_(False)
    optimizer = CLARS(model, 1e-3, layers=layers)
    step(model, optimizer)
    model[0].requires_grad_(True)
    for t in range(1, 4):
        expected = per_sample_grads(model, loss_on(*batch(t)), 8)
        step(model, optimizer, t)
        for layer, n in zip(optimizer.partition, optimizer.last_step.mean_sample_norm.tolist(), strict=True):
            rows = torch.cat([expected[name].flatten(1) for name in layer.param_names], 1)
            assert n == pytest.approx(float(rows.norm(dim=1).sum()), rel=1e-9), layer.name


@pytest.mark.parametrize("make", [CLARS, LARS, NAG])
def test_names_and_measures_are_of_what_trains(make):
    model = small_model()
    model[0].requires_grad_(False)
    optimizer = make(model, 0.1)
    assert optimizer.layer_names == ["1", "4", "5", "6"]
    step(model, optimizer)
    assert len(optimizer.last_step.rate) == 4
    model[0].requires_grad_(True)
    step(model, optimizer)
    assert optimizer.layer_names == ["1", "4", "5", "6", "0"]
    assert len(optimizer.last_step.rate) == 5


@pytest.mark.parametrize("name", ["CLARS", "SignalLARS", "LARS", "NAG"])
def test_a_state_from_before_unfreezing_goes_on_after_it(name):
    model = small_model()
    model[0].requires_grad_(False)
    optimizer = OPTIMIZERS[name](model, 0.1)
    train(model, optimizer, 3)
    other = copy.deepcopy(model)
    again = OPTIMIZERS[name](other, 0.1)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for net in (model, other):
        net[0].requires_grad_(True)
    for t in range(3, 6):
        step(model, optimizer, t), step(other, again, t)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("name", ["CLARS", "SignalLARS", "LARS", "NAG"])
def test_a_state_that_was_written_without_the_frozen_ones_still_loads(name):
    model = small_model()
    model[0].requires_grad_(False)
    optimizer = OPTIMIZERS[name](model, 0.1)
    train(model, optimizer, 3)
    old = copy.deepcopy(optimizer.state_dict())
    for group in old["param_groups"]:  # the frozen ones come last, and have no state
        group.pop("param_names")
        group["params"] = [i for i in group["params"] if i in old["state"]]
        if "signal_moments" in group:
            group["signal_moments"] = group["signal_moments"].reshape(2, -1)[:, 0]
    other = copy.deepcopy(model)
    again = OPTIMIZERS[name](other, 0.7)
    again.load_state_dict(old)
    for t in range(3, 6):
        step(model, optimizer, t), step(other, again, t)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))


def test_unfreezing_between_two_passes_of_a_batch_is_refused():
    model = mlp()
    model[0].requires_grad_(False)
    optimizer = CLARS(model, 0.1)
    model(torch.ones(4, 6)).square().mean().backward()
    model[0].requires_grad_(True)
    with pytest.raises(NoNormsError, match="unfrozen"):
        model(torch.ones(4, 6))
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.ones(4, 6)).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("cls", [LARS, NAG])
def test_frozen_parameters_without_a_model_are_taken_as_torch_takes_them(cls):
    model = mlp().requires_grad_(False)
    optimizer = cls(model.parameters(), 0.1)
    assert len(optimizer.param_groups[0]["params"]) == 4
    optimizer.step()
    model.requires_grad_(True)
    before = model[0].weight.detach().clone()
    model(torch.ones(4, 6)).square().mean().backward()
    optimizer.step()
    assert not torch.equal(model[0].weight, before)


def test_the_layer_rate_log_goes_on_with_the_layers_it_began_with(tmp_path, caplog):
    from transformers import TrainerControl, TrainerState, TrainingArguments

    from hf_clars import LayerRateLog
    from hf_clars.trainer.callbacks import LayerRateCallback

    model = small_model()
    model[0].requires_grad_(False)
    optimizer = CLARS(model, 0.1)
    callback = LayerRateCallback(optimizer=optimizer)
    args, state, control = TrainingArguments(str(tmp_path)), TrainerState(is_world_process_zero=True), TrainerControl()
    callback.on_train_begin(args, state, control)
    for t in range(4):
        model[0].requires_grad_(t >= 2)
        step(model, optimizer, t)
        state.global_step = t + 1
        callback.on_step_end(args, state, control)
    callback.flush()
    log = LayerRateLog.resume(tmp_path, 4)
    assert list(log.layers) == ["1", "4", "5", "6"]
    assert len(log) == 4
    assert "frozen then: 0" in caplog.text
