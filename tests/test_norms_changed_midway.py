"""Promise: a model, a graph or a thread that changes under the hooks gives exact norms, or an error that says so."""

import copy
import gc
import threading
import weakref

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn.utils import parametrizations, parametrize, prune
from torch.utils.checkpoint import checkpoint

from hf_clars.grad_norms import PerSampleGradNorms
from hf_clars.grad_norms.errors import MixedDevicesError, UncoveredParameterError
from hf_clars.layers import param_layers
from hf_clars.optim import CLARS
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
            model.zero_grad()
            x = data()
            wanted = expected_here(model, x, norms)
            loss_of(model, x).backward()
            assert_exact(norms, wanted)


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
            model.zero_grad()
            x = data()
            wanted = expected_here(model, x, norms)
            loss_of(model, x).backward()
            assert_exact(norms, wanted)


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
            model.zero_grad()
            x = data()
            wanted = expected_here(model, x, norms)
            loss_of(model, x).backward()
            assert_exact(norms, wanted)
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
