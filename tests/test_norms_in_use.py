"""Promises to someone who measures norms: read, leave, nothing left behind."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from hf_clars.grad_norms import (
    PerSampleGradNorms,
)
from hf_clars.optim import CLARS
from tests.oracle import layer_norms, per_sample_grads
from tests.twin import batch, loss_on, small_model


def hooks_on(model):
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    count = sum(len(getattr(m, kind)) for m in model.modules() for kind in kinds)
    return count + sum(len(p._backward_hooks or ()) for p in model.parameters())


def test_names_shapes_and_means():
    model = small_model()
    with PerSampleGradNorms(model) as norms:
        loss_on(*batch(0))(model).backward()
    assert list(norms.per_sample) == ["0", "1", "4", "5", "6"]
    for name, values in norms.per_sample.items():
        assert values.shape == (8,)
        assert norms.mean_norm[name] == pytest.approx(values.mean().item())


def test_nothing_is_left_on_the_model():
    model = small_model()
    attributes = {id(m): set(vars(m)) for m in model.modules()}
    modules = [type(m) for m in model.modules()]
    for _ in range(100):
        with PerSampleGradNorms(model):
            loss_on(*batch(0))(model).backward()
    assert hooks_on(model) == 0
    assert [type(m) for m in model.modules()] == modules
    assert {id(m): set(vars(m)) for m in model.modules()} == attributes


def test_hooks_are_removed_when_the_block_fails():
    model = small_model()
    with pytest.raises(ZeroDivisionError), PerSampleGradNorms(model):
        raise ZeroDivisionError
    assert hooks_on(model) == 0


def test_a_sum_loss_is_measured_as_it_is():
    model = small_model().eval()
    x, y = batch(0)
    with PerSampleGradNorms(model, loss_reduction="sum") as summed:
        nn.functional.cross_entropy(model(x), y, reduction="sum").backward()
    with PerSampleGradNorms(model) as mean:
        nn.functional.cross_entropy(model(x), y).backward()
    for name, values in summed.per_sample.items():
        torch.testing.assert_close(values, mean.per_sample[name])


def test_accumulated_passes_are_one_batch_until_the_gradients_are_cleared():
    model = small_model().eval()
    norms = PerSampleGradNorms(model)
    x, y = batch(0)
    whole = {}
    loss_on(x, y)(model).backward()
    whole = norms.per_sample
    model.zero_grad()
    for part in range(2):
        loss_on(x[4 * part :][:4], y[4 * part :][:4])(model).backward()
    for name, values in norms.per_sample.items():
        torch.testing.assert_close(values, whole[name])
    norms.remove()


def test_evaluation_between_training_passes_is_not_counted():
    model = small_model().eval()
    x, y = batch(0)
    norms = PerSampleGradNorms(model)
    loss_on(x, y)(model).backward()
    with torch.no_grad():
        model(torch.randn(50, 1, 6, 6))
    model(torch.randn(3, 1, 6, 6))  # with gradients enabled, but nothing is ever differentiated
    assert norms.totals().total == 8
    assert norms.per_sample["0"].shape == (8,)


def test_samples_are_the_first_of_the_accumulated_batch():
    model = small_model().eval()
    norms = PerSampleGradNorms(model, samples=5)
    for part in range(3):
        loss_on(*batch(part, 4))(model).backward()
    totals = norms.totals()
    assert (totals.captured, totals.total) == (5, 12)
    assert norms.per_sample["0"].shape == (5,)


def test_autograd_grad_without_accumulation_works_too():
    model = small_model()
    with PerSampleGradNorms(model) as norms:
        torch.autograd.grad(loss_on(*batch(0))(model), list(model.parameters()))
    assert norms.per_sample["0"].min() > 0


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing_is_exact(reentrant):
    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(nn.Linear(6, 6), nn.ReLU(inplace=True), nn.Linear(6, 6))
            self.head = nn.Linear(6, 2)
            self.use = True

        def forward(self, x):
            x = x.requires_grad_() if self.use else x
            return self.head(checkpoint(self.body, x, use_reentrant=reentrant) if self.use else self.body(x))

    torch.manual_seed(0)
    model = Checkpointed()
    x = torch.randn(5, 6)

    def loss_of(m):
        return m(x.to(m.head.weight.dtype)).square().mean()

    with PerSampleGradNorms(model) as norms:
        loss_of(model).backward()
    model.use = False
    expected = layer_norms(per_sample_grads(model, loss_of, 5), norms.layers)
    for name, values in norms.per_sample.items():
        torch.testing.assert_close(values.double(), 5 * expected[name], rtol=1e-4, atol=1e-6)


def test_inplace_activations_are_exact():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(48, 3))
    x, y = batch(0)
    with PerSampleGradNorms(model) as norms:
        loss_on(x, y)(model).backward()
    expected = layer_norms(per_sample_grads(model, loss_on(x.double(), y), 8), norms.layers)
    for name, values in norms.per_sample.items():
        torch.testing.assert_close(values.double(), 8 * expected[name], rtol=1e-4, atol=1e-6)


def test_a_model_called_in_parts_is_exact():
    model = small_model()
    whole = copy.deepcopy(model)
    x, y = batch(0)
    with PerSampleGradNorms(whole) as expected:
        loss_on(x, y)(whole).backward()
    with PerSampleGradNorms(model) as norms:
        for _ in range(2):  # the second round must not mix with the first
            model.zero_grad()
            h = x
            for part in model:
                h = part(h)
            nn.functional.cross_entropy(h, y).backward()
    for name, values in norms.per_sample.items():
        torch.testing.assert_close(values[-8:], expected.per_sample[name])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_norms_are_float32_under_autocast_and_right_to_its_precision(dtype):
    model = small_model()
    x, y = batch(0)
    with PerSampleGradNorms(copy.deepcopy(model)) as exact:
        loss_on(x, y)(exact.model).backward()
    with PerSampleGradNorms(model) as norms:
        with torch.autocast("cpu", dtype=dtype):
            loss = loss_on(x, y)(model)
        loss.backward()
    for name, values in norms.per_sample.items():
        assert values.dtype == torch.float32
        torch.testing.assert_close(values, exact.per_sample[name], rtol=0.1, atol=0.02)


@pytest.mark.parametrize("size", [0, 1])
def test_an_empty_batch_and_a_batch_of_one_work(size):
    model = small_model().eval()
    x, y = batch(0, size)
    with PerSampleGradNorms(model) as norms:
        nn.functional.cross_entropy(model(x), y, reduction="sum").backward()
    assert list(norms.per_sample) == ["0", "1", "4", "5", "6"]
    assert all(v.shape == (size,) for v in norms.per_sample.values())


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_of_the_model_takes_no_part(copied):
    """An EMA or a saved module must not feed the norms of the model it was copied from."""
    model = small_model()
    optimizer = CLARS(model)
    loss_on(*batch(0))(model).backward()
    other = copied(model)
    for _ in range(3):
        loss_on(*batch(1))(other).backward()
    assert optimizer.norms.totals().total == 8
    optimizer.step()
    loss_on(*batch(2))(other).backward()
    assert optimizer.norms.totals() is None


def test_two_trackers_and_an_optimizer_on_one_model_see_the_same():
    """Each would take the weight gradient over: whoever comes second must watch, and cut nobody off."""

    def convolutions():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten()
        ).double()

    x = torch.randn(6, 1, 12, 12, dtype=torch.double)
    alone = convolutions()
    with PerSampleGradNorms(alone) as expected:
        alone(x).square().mean().backward()
    model = convolutions()
    optimizer = CLARS(model, 0.1)
    with PerSampleGradNorms(model) as outer, PerSampleGradNorms(model) as inner:
        model(x).square().mean().backward()
    for name, values in expected.per_sample.items():
        assert (values > 0).all()
        torch.testing.assert_close(outer.per_sample[name], values, rtol=1e-9, atol=0)
        torch.testing.assert_close(inner.per_sample[name], values, rtol=1e-9, atol=0)
    optimizer.step()
    n = torch.stack([values.mean() for values in expected.per_sample.values()])
    torch.testing.assert_close(optimizer.last_step.mean_sample_norm, n, rtol=1e-9, atol=0)
    for p, q in zip(model.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("layer", ["linear", "tokens", "conv1d", "conv2d"])
@pytest.mark.parametrize("some_first", [True, False])
def test_a_tracker_of_some_samples_and_one_of_all_do_not_cut_each_other_off(layer, some_first):
    torch.manual_seed(0)
    shape = {"linear": (6,), "tokens": (4, 6), "conv1d": (6, 5), "conv2d": (6, 5, 5)}[layer]
    first = {"conv1d": nn.Conv1d(6, 8, 3), "conv2d": nn.Conv2d(6, 8, 3)}.get(layer, nn.Linear(6, 8))
    model = nn.Sequential(first, nn.Tanh(), nn.Flatten(), nn.LazyLinear(3)).double()
    model(torch.randn(2, *shape, dtype=torch.double))
    settings = [{"samples": 3}, {}]
    trackers = [PerSampleGradNorms(model, **given) for given in (settings if some_first else settings[::-1])]
    some, every = trackers if some_first else trackers[::-1]
    for _ in range(4):
        model.zero_grad()
        wanted = {name: [] for name in ("0", "3")}
        parts = [torch.randn(size, *shape, dtype=torch.double) for size in (2, 4)]
        for x in parts:
            plain = copy.deepcopy(model)
            for row in x.split(1):
                grads = torch.autograd.grad(plain(row).square().sum(), list(plain.parameters()))
                for name, pair in zip(wanted, (grads[:2], grads[2:]), strict=True):
                    wanted[name].append(sum(g.square().sum() for g in pair).sqrt())
        for x in parts:
            (model(x).square().sum() / len(x)).backward()
        for name, values in wanted.items():
            torch.testing.assert_close(every.per_sample[name], torch.stack(values))
            torch.testing.assert_close(some.per_sample[name], torch.stack(values)[:3])
    for tracker in trackers:
        tracker.remove()
