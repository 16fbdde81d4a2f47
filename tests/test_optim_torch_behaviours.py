"""Promise: LARS and NAG behave as PyTorch's own tests ask of an optimizer, wherever that applies to them."""

import copy
import io
import warnings

import pytest
import torch
from torch import nn

pytest.importorskip("expecttest", reason="torch.testing's list of optimizers needs the package expecttest")

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from torch.testing._internal.common_optimizers import get_error_inputs_for_all_optims, optim_db

from hf_clars.optim import LARS, NAG

SGD = next(info for info in optim_db if info.optim_cls is torch.optim.SGD)
# Settings of SGD that LARS and NAG have too; NAG's momentum is Nesterov's, as `nesterov` asks for.
OURS = {"lr", "weight_decay", "momentum"}
SETTINGS = [
    {k: v for k, v in given.kwargs.items() if k in OURS}
    for given in SGD.optim_inputs_func("cpu")
    if set(given.kwargs) <= OURS | {"nesterov"}
]
BOTH = pytest.mark.parametrize("optimizer_class", [LARS, NAG])
EACH_SETTING = pytest.mark.parametrize("settings", SETTINGS, ids=str)


def problem():
    """A quadratic in a matrix and a vector, and what makes its gradients."""
    torch.manual_seed(0)
    weight, bias = nn.Parameter(torch.randn(6, 5)), nn.Parameter(torch.randn(6))
    x = torch.randn(5)

    def loss(params=(weight, bias)):
        return (params[0] @ x + params[1]).square().sum()

    return [weight, bias], loss


def steps(optimizer, params, loss, count=5):
    values = []
    for _ in range(count):
        optimizer.zero_grad()
        value = loss(params)
        value.backward()
        optimizer.step()
        values.append(float(value.detach()))
    return values


ERRORS = {case.optimizer_error_input.desc: case for case in get_error_inputs_for_all_optims("cpu", torch.float32)}


@BOTH
@pytest.mark.parametrize("desc", ERRORS)
def test_bad_input_is_refused_or_warned_of(optimizer_class, desc):
    case = ERRORS[desc]
    given = case.optimizer_error_input
    params = problem()[0] if given.params is None else given.params
    if case.error_type is UserWarning:
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            try:
                optimizer_class(params, **given.kwargs)
            except ValueError:
                return  # a refusal is as good as a warning
        assert seen
        return
    with pytest.raises((ValueError, TypeError)):
        optimizer_class(params, **given.kwargs)


@BOTH
@EACH_SETTING
def test_the_loss_goes_down(optimizer_class, settings):
    params, loss = problem()
    values = steps(optimizer_class(params, **({"lr": 0.01} | settings)), params, loss, 20)
    assert values[-1] < values[0]


@BOTH
@pytest.mark.parametrize("number", range(len(SGD.scheduler_inputs)))
def test_schedulers_move_the_rate_as_they_move_that_of_sgd(optimizer_class, number):
    """Every scheduler, or several at once, that PyTorch's tests use with SGD."""
    traces = []
    for make in (lambda params: torch.optim.SGD(params, lr=0.1), lambda params: optimizer_class(params, lr=0.1)):
        params, loss = problem()
        optimizer = make(params)
        schedulers = [scheduler(optimizer) for scheduler in SGD.scheduler_inputs[number]]
        trace = []
        for _ in range(25):
            optimizer.zero_grad()
            loss(params).backward()
            optimizer.step()
            for scheduler in schedulers:
                if isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
                    scheduler.step(1.0)  # the same for both: it watches the loss
                else:
                    scheduler.step()
            trace.append(optimizer.param_groups[0]["lr"])
        traces.append(trace)
    assert traces[0] == traces[1]


@BOTH
@EACH_SETTING
def test_a_state_dict_goes_on_bit_for_bit(optimizer_class, settings):
    """Also through `torch.save` and `torch.load(weights_only=True)`."""
    params, loss = problem()
    optimizer = optimizer_class(params, **settings)
    steps(optimizer, params, loss)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    others = [nn.Parameter(p.detach().clone()) for p in params]
    other = optimizer_class(others, **settings)
    other.load_state_dict(torch.load(file, weights_only=True))
    steps(optimizer, params, loss)
    steps(other, others, loss)
    for a, b in zip(params, others, strict=True):
        assert torch.equal(a, b)


@BOTH
def test_loading_a_state_dict_leaves_it_as_it_is(optimizer_class):
    params, loss = problem()
    optimizer = optimizer_class(params)
    steps(optimizer, params, loss)
    state = optimizer.state_dict()
    kept = copy.deepcopy(state)
    other = optimizer_class([nn.Parameter(p.detach().clone()) for p in params])
    other.load_state_dict(state)
    assert str(state["param_groups"]) == str(kept["param_groups"])
    for key, entry in kept["state"].items():
        for name, value in entry.items():
            assert torch.equal(torch.as_tensor(state["state"][key][name]), torch.as_tensor(value))


@BOTH
def test_nothing_moves_without_gradients(optimizer_class):
    params, _ = problem()
    before = [p.detach().clone() for p in params]
    optimizer = optimizer_class(params)
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(params, before, strict=True))


@BOTH
def test_nothing_moves_on_zero_gradients(optimizer_class):
    params, _ = problem()
    before = [p.detach().clone() for p in params]
    optimizer = optimizer_class(params)
    for p in params:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(params, before, strict=True))


@BOTH
def test_zero_grad(optimizer_class):
    params, loss = problem()
    optimizer = optimizer_class(params)
    loss(params).backward()
    optimizer.zero_grad(set_to_none=False)
    assert all(p.grad is not None and not p.grad.any() for p in params)
    optimizer.zero_grad()
    assert all(p.grad is None for p in params)


@BOTH
def test_a_closure_is_called_with_gradients_and_its_loss_comes_back(optimizer_class):
    params, loss = problem()
    optimizer = optimizer_class(params)

    def closure():
        assert torch.is_grad_enabled()
        optimizer.zero_grad()
        value = loss(params)
        value.backward()
        return value

    with torch.no_grad():
        first = optimizer.step(closure)
    assert float(optimizer.step(closure).detach()) < float(first.detach())


@BOTH
def test_hooks_around_step_are_called_in_order_and_can_be_taken_off(optimizer_class):
    params, loss = problem()
    optimizer = optimizer_class(params)
    seen = []
    before = optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
    after = optimizer.register_step_post_hook(lambda *_: seen.append("after"))
    steps(optimizer, params, loss, 2)
    assert seen == ["before", "after"] * 2
    before.remove()
    after.remove()
    steps(optimizer, params, loss, 1)
    assert len(seen) == 4


@BOTH
def test_hooks_around_state_dicts_are_called(optimizer_class):
    params, loss = problem()
    optimizer = optimizer_class(params)
    steps(optimizer, params, loss, 1)
    seen = []
    optimizer.register_state_dict_pre_hook(lambda _: seen.append("save"))
    optimizer.register_state_dict_post_hook(lambda _, state: state | {"extra": 1})
    optimizer.register_load_state_dict_pre_hook(lambda *_: seen.append("load"))
    optimizer.register_load_state_dict_post_hook(lambda _: seen.append("loaded"))
    state = optimizer.state_dict()
    assert state.pop("extra") == 1
    optimizer.load_state_dict(state)
    assert seen == ["save", "load", "loaded"]


@BOTH
def test_a_rate_in_a_tensor_is_that_number(optimizer_class):
    results = []
    for lr in (0.01, torch.tensor(0.01, dtype=torch.float64)):
        params, loss = problem()
        steps(optimizer_class(params, lr=lr), params, loss)
        results.append(params)
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


@BOTH
def test_a_group_has_its_own_rate(optimizer_class):
    params, loss = problem()
    optimizer = optimizer_class([{"params": [params[0]]}, {"params": [params[1]], "lr": 0.0}], lr=0.01)
    kept = params[1].detach().clone()
    steps(optimizer, params, loss, 3)
    assert torch.equal(params[1], kept)


@BOTH
def test_both_implementations_agree(optimizer_class):
    """`foreach` on and off."""
    results = []
    for foreach in (False, True):
        params, loss = problem()
        steps(optimizer_class(params, lr=0.01, weight_decay=0.1, foreach=foreach), params, loss)
        results.append(params)
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


@BOTH
def test_a_deep_copy_and_a_repr(optimizer_class):
    params, loss = problem()
    optimizer = optimizer_class(params)
    steps(optimizer, params, loss, 1)
    assert optimizer_class.__name__ in repr(copy.deepcopy(optimizer))


def test_nag_is_sgd_with_nesterov_momentum():
    """In every setting that both have."""
    for settings in SETTINGS:
        both = []
        for make in (
            lambda p, s: torch.optim.SGD(p, **({"momentum": 0.9} | s), nesterov=True),
            lambda p, s: NAG(p, **({"momentum": 0.9} | s)),
        ):
            params, loss = problem()
            steps(make(params, {"lr": 1e-3} | settings), params, loss)
            both.append(params)
        for a, b in zip(*both, strict=True):
            torch.testing.assert_close(a, b)
