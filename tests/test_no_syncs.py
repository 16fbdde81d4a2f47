"""Promise: a training step with norms never waits for the device.

On the meta device tensors have shapes but no values: whatever needs a value on the host (`item`, a branch on a tensor,
a copy to the CPU) raises there, as it would make a GPU wait. And on the CPU a dispatch mode counts such operations.
"""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from hf_clars.grad_norms import PerSampleGradNorms
from hf_clars.models import build_model
from hf_clars.optim import CLARS, LARS, NAG, SignalLARS

READS_A_VALUE = ("_local_scalar_dense", "item", "nonzero", "is_nonzero", "equal", "masked_select", "unique")


class Reads(TorchDispatchMode):
    """Counts operations that need a value on the host."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__.lstrip("_") in {name.lstrip("_") for name in READS_A_VALUE}:
            self.found.append(str(func))
        return func(*args, **(kwargs or {}))


class Copies(TorchDispatchMode):
    """Counts copies between the host and the meta device, which would be waited for on a GPU."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__ in ("_to_copy", "copy_"):
            source = args[1] if func.overloadpacket.__name__ == "copy_" else args[0]
            self.found += [f"{func} {tuple(source.shape)}"] if source.device != result.device else []
        return result


def network():
    layers = (nn.Conv2d(3, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU(True), nn.Conv2d(8, 8, 1), nn.GroupNorm(2, 8))
    return nn.Sequential(
        *layers, nn.Conv2d(8, 64, 3, padding=1), nn.Flatten(2), nn.LayerNorm(49), nn.Flatten(), nn.Linear(3136, 4)
    )


def step(model, optimizer, x, y, passes=1):
    optimizer.zero_grad()
    for _ in range(passes):
        out = model(x)
        nn.functional.cross_entropy(out if torch.is_tensor(out) else out.logits, y).backward()
    optimizer.step()


OPTIMIZERS = {
    "clars": lambda model, **settings: CLARS(model, 1.0, samples=None, **settings),
    "clars, some samples": lambda model, **settings: CLARS(model, 1.0, samples=5, **settings),
    "clars, decay and clip": lambda model, **settings: CLARS(
        model, 1.0, weight_decay=1e-3, trust_clip=10.0, **settings
    ),
    "lars": lambda model, **settings: LARS(model, 1.0, **settings),
    "nag": lambda model, **settings: NAG(model, 1.0, **settings),
}


@pytest.mark.parametrize("foreach", [None, True, False])
@pytest.mark.parametrize("method", OPTIMIZERS)
def test_a_step_needs_no_value_from_the_device(method, foreach):
    model = network().to("meta")
    optimizer = OPTIMIZERS[method](model, foreach=foreach)
    x, y = torch.empty(4, 3, 15, 15, device="meta"), torch.empty(4, dtype=torch.long, device="meta")
    for _ in range(3):
        step(model, optimizer, x, y, passes=2)
    assert optimizer.last_step.rate.device.type == "meta"


def groups_of(model, settings):
    """Two groups, each with these settings times its number."""
    halves = list(model.parameters())[:4], list(model.parameters())[4:]
    return [{"params": half, **{k: i * v for k, v in settings.items()}} for i, half in enumerate(halves, 1)]


SETTINGS = {
    "biases at lr": lambda model: {"scale_norm_and_bias": False},
    "groups": lambda model: {"params": groups_of(model, {"lr": 0.5, "eta": 1e-2, "weight_decay": 1e-3})},
    "clips": lambda model: {"params": groups_of(model, {"trust_clip": 10.0})},
}


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("method", [CLARS, SignalLARS, LARS])
def test_a_step_copies_nothing_from_the_host(method, settings):
    """Whatever differs from layer to layer; the first steps may set up what stays."""
    model = network().to("meta")
    optimizer = method(model, 1.0, **SETTINGS[settings](model))
    x, y = torch.empty(4, 3, 15, 15, device="meta"), torch.empty(4, dtype=torch.long, device="meta")
    for _ in range(2):
        step(model, optimizer, x, y)
    for i in range(3):
        for group in optimizer.param_groups:
            group["lr"] *= 0.5 + i
        with Copies() as copies:
            step(model, optimizer, x, y)
        assert copies.found == []


def test_the_counter_of_copies_counts():
    with Copies() as copies:
        torch.ones(3).to("meta")
    assert len(copies.found) == 1


@pytest.mark.parametrize("shared", [True, False])
def test_a_rate_that_is_a_tensor_stays_on_the_device(shared):
    models = [network() for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    given = [torch.tensor(0.5), 0.5]
    optimizers = [CLARS(model, lr, foreach=True) for model, lr in zip(models, given, strict=True)]
    if not shared:
        for group in optimizers[0].param_groups:
            group["lr"] = group["lr"].clone()
    for batch in range(3):
        x, y = torch.randn(4, 3, 15, 15), torch.arange(4)
        for model, optimizer in zip(models, optimizers, strict=True):
            optimizer.norms.check_every = 0
            if optimizer is optimizers[0] and batch:
                with Reads() as reads:
                    step(model, optimizer, x, y)
                assert reads.found == []
            else:
                step(model, optimizer, x, y)
            for group in optimizer.param_groups[: 1 if shared else None]:
                group["lr"] *= 0.5
            for group in optimizer.param_groups[1:] if shared and optimizer is optimizers[1] else ():
                group["lr"] *= 0.5
    for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(p, q)


def test_the_meta_device_would_tell():
    with pytest.raises(RuntimeError):
        torch.empty((), device="meta").item()


@pytest.mark.parametrize("name", ["resnet8", "clars-cnn"])
def test_norms_read_no_value(name):
    model = build_model(name, num_labels=3, image_size=16, num_channels=3)
    x, y = torch.randn(4, 3, 16, 16), torch.arange(4) % 3
    with PerSampleGradNorms(model, keep_per_sample=False) as norms:
        for _ in range(3):  # in which it is checked that norms add up to the gradient
            model.zero_grad()
            nn.functional.cross_entropy(model(x).logits, y).backward()
            norms.totals()
        for _ in range(2):
            model.zero_grad()
            with Reads() as reads:
                nn.functional.cross_entropy(model(x).logits, y).backward()
                norms.totals()
            assert reads.found == []


def test_the_counter_counts():
    with Reads() as reads:
        bool(torch.ones(()) > 0)
    assert len(reads.found) == 1


def test_state_is_one_buffer_a_weight():
    model = network()
    for make in OPTIMIZERS.values():
        optimizer = make(model)
        step(model, optimizer, torch.randn(4, 3, 15, 15), torch.arange(4))
        for p in model.parameters():
            assert [v.shape for v in optimizer.state[p].values()] == [p.shape]
        optimizer.remove_hooks()
