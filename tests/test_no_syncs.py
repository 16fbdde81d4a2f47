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
from hf_clars.optim import CLARS, LARS, NAG

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
