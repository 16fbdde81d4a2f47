"""Promise: a model, a graph or a thread that changes under the hooks gives exact norms, or an error that says so."""

import copy
import gc
import threading
import weakref

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from hf_clars.grad_norms import PerSampleGradNorms
from hf_clars.grad_norms.errors import MixedDevicesError, UncoveredParameterError
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


def expected_here(model, x, norms):
    """The same of the very model, which is not copied, while its hooks do nothing."""
    params = list(norms._layer_of)
    norms.pause()
    rows = [torch.autograd.grad(loss_of(model, x[i : i + 1]), params) for i in range(len(x))]
    norms.resume()
    squares = torch.tensor([[g.square().sum() for g in row] for row in rows]).T
    wanted = squares.new_zeros(len(norms.layers), len(x))
    wanted.index_add_(0, torch.tensor(list(norms._layer_of.values())), squares)
    return dict(zip([layer.name for layer in norms.layers], wanted.sqrt(), strict=True))


def assert_a_pass_is_exact(model, norms):
    model.zero_grad()
    x = data()
    wanted = expected_here(model, x, norms)
    loss_of(model, x).backward()
    assert_exact(norms, wanted)


@pytest.mark.parametrize("made_of", ["weights", "numbers"])
def test_tensors_that_stand_in_for_weights_during_one_call_are_let_go(made_of):
    torch.manual_seed(0)
    model = Net()
    alive = []
    with PerSampleGradNorms(model) as norms:
        for _ in range(5):
            model.zero_grad()
            x = data()
            wanted = expected(model, x, norms.layers)
            weights = dict(model.named_parameters())
            given = {n: 1.0 * p if made_of == "weights" else p.detach().requires_grad_() for n, p in weights.items()}
            alive += [weakref.ref(t) for t in given.values()]
            functional_call(model, given, (x,)).square().flatten(1).sum(1).mean().backward()
            assert_exact(norms, wanted)
            del given
        gc.collect()
        assert sum(ref() is not None for ref in alive) <= 2 * len(weights)  # the last pass's, and a known graph's


def test_copies_of_data_parallel_are_refused():
    model = nn.Sequential(nn.Linear(4, 3))
    with PerSampleGradNorms(model):
        replica = model._replicate_for_data_parallel()
        replica[0] = model[0]._replicate_for_data_parallel()
        replica[0]._parameters = {}
        replica[0].weight, replica[0].bias = model[0].weight * 1, model[0].bias * 1
        with pytest.raises(MixedDevicesError, match="DistributedDataParallel"):
            replica(torch.randn(2, 4))


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


class Interrupted(Net):
    """In the middle of a forward pass, another thread calls the model too."""

    def __init__(self, call):
        super().__init__()
        self.call, self.errors, self.again = call, [], False

    def forward(self, x):
        if self.again:
            return super().forward(x)
        first = checkpoint(self.body[0], x + self.shift, use_reentrant=False)
        self.again = True
        thread = threading.Thread(target=self.interrupt)
        thread.start()
        thread.join()
        self.again = False
        return self.body[1:](first) * self.scale

    def interrupt(self):
        try:
            self.call(self)
        except Exception as error:
            self.errors.append(error)


def test_another_thread_may_evaluate_the_model_meanwhile():
    torch.manual_seed(0)
    model = Interrupted(torch.no_grad()(lambda model: model(data(3))))
    with PerSampleGradNorms(model) as norms:
        for _ in range(5):
            assert_a_pass_is_exact(model, norms)
    assert model.errors == []


def test_another_thread_that_calls_the_model_with_gradients_is_refused():
    torch.manual_seed(0)
    model = Interrupted(lambda model: model(data(3)))
    with PerSampleGradNorms(model) as norms:
        for count in range(1, 5):
            model.zero_grad()
            x = data()
            loss_of(model, x).backward()
            found = norms.per_sample
            assert [str(e)[:40] for e in model.errors] == ["The model was called in two threads at o"] * count
            model.errors, kept = [], model.errors
            wanted = expected_here(model, x, norms)
            model.errors = kept
            for name, values in found.items():
                torch.testing.assert_close(values, wanted[name], rtol=1e-9, atol=1e-12)
