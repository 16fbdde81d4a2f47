"""Promise: a model, a graph or a thread that changes under the hooks gives exact norms, or an error that says so."""

import copy
import threading

import pytest
import torch
from torch import nn

from hf_clars.grad_norms import PerSampleGradNorms
from hf_clars.grad_norms.errors import UncoveredParameterError
from tests.oracle import layer_norms, one_by_one


class Net(nn.Module):
    """Parameters with rules, and two without."""

    def __init__(self):
        super().__init__()
        self.shift, self.scale = nn.Parameter(torch.randn(4)), nn.Parameter(torch.rand(3))
        self.body = nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.Tanh(), nn.Linear(5, 3))
        self.double()

    def forward(self, x):
        return self.body(x + self.shift) * self.scale


class Stepped(nn.Module):
    """A module with several results."""

    def __init__(self):
        super().__init__()
        self.rnn = nn.GRU(4, 3, batch_first=True).double()

    def forward(self, x):
        return self.rnn(x[:, None].expand(-1, 2, -1))[0]


def data(batch=5):
    return torch.randn(batch, 4, dtype=torch.double)


def loss_of(model, x):
    return model(x).square().flatten(1).sum(1).mean()


def expected(model, x, layers):
    return layer_norms(one_by_one(model, lambda m, i: loss_of(m, x[i : i + 1]), len(x)), layers)


def assert_exact(norms, wanted):
    assert norms.per_sample.keys() == wanted.keys()
    for name, values in norms.per_sample.items():
        torch.testing.assert_close(values, wanted[name], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("model", [Net, Stepped])
@pytest.mark.parametrize("check", [True, False])
def test_hooks_of_the_user_that_change_gradients_of_outputs_come_first(model, check):
    torch.manual_seed(0)
    model = model()
    norms = PerSampleGradNorms(model, check=check)
    for module in list(model.modules())[1:]:
        if next(module.parameters(recurse=False), None) is not None:
            module.register_forward_hook(
                lambda _, __, out: (out[0] if isinstance(out, tuple) else out).register_hook(lambda g: 3 * g) and None
            )
    for _ in range(4):
        model.zero_grad()
        x = data()
        loss_of(model, x).backward()
        assert_exact(norms, expected(model, x, norms.layers))
    norms.remove()


def test_a_module_that_was_replaced_is_named():
    torch.manual_seed(0)
    model = Net()
    norms = PerSampleGradNorms(model)
    loss_of(model, data()).backward()
    for _ in range(2):
        model.body[0] = copy.deepcopy(model.body[0])
        with pytest.raises(UncoveredParameterError, match=r"body.0 \(Linear\): was taken out"):
            loss_of(model, data())
    norms.remove()
    with PerSampleGradNorms(model) as again:
        model.zero_grad()
        x = data()
        loss_of(model, x).backward()
    assert_exact(again, expected(model, x, again.layers))


def test_an_unused_module_is_no_replaced_one():
    torch.manual_seed(0)
    model = Net()
    model.pooler = nn.Linear(2, 2).double()
    with PerSampleGradNorms(model) as norms:
        for _ in range(4):
            model.zero_grad()
            x = data()
            wanted = layer_norms(one_by_one(model, lambda m, i, x=x: loss_of(m, x[i : i + 1]), 5), norms.layers)
            loss_of(model, x).backward()
            assert_exact(norms, wanted)


def test_a_backward_pass_after_the_norms_were_removed_is_said():
    torch.manual_seed(0)
    model = Net()
    with PerSampleGradNorms(model) as norms:
        loss = loss_of(model, data())
    loss.backward()
    with pytest.raises(UncoveredParameterError, match="inside the with block"):
        _ = norms.per_sample


def test_a_pass_whose_backward_comes_two_batches_later_is_said():
    torch.manual_seed(0)
    model = Net()
    norms = PerSampleGradNorms(model)
    loss_of(model, data()).backward()
    late = loss_of(model, data())
    model.zero_grad()
    for _ in range(2):
        loss_of(model, data())
    late.backward()
    with pytest.raises(UncoveredParameterError, match="let go before"):
        _ = norms.per_sample
    norms.remove()


def test_models_in_threads_do_not_disturb_each_other():
    torch.manual_seed(0)
    models, errors = [Net() for _ in range(3)], []

    def train(model, batch):
        norms = PerSampleGradNorms(model)
        try:
            for _ in range(20):
                model.zero_grad()
                x = data(batch)
                loss_of(model, x).backward()
                assert_exact(norms, expected(model, x, norms.layers))
        except Exception as error:
            errors.append(error)
        norms.remove()

    threads = [threading.Thread(target=train, args=(m, 3 + k)) for k, m in enumerate(models)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
