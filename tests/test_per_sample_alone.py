"""Promise: the loop form needs torch, numpy and safetensors only, and leaves copies of the model alone."""

import copy

import torch

from hf_clars.layers import param_layers
from hf_clars.per_sample import NormMonitor
from hf_clars.per_sample.attached import AttachedNorms
from tests.test_imports import run
from tests.trainer_kit import Images, Plain

LOOP = """
import torch
from hf_clars.per_sample import NormMonitor
model = torch.nn.Linear(3, 2)
with NormMonitor(model, every=1, strict=True) as monitor:
    with monitor.batch():
        model(torch.randn(4, 3)).square().sum(1).mean().backward()
    assert monitor.last.samples == 4
"""
NOT_NEEDED = {"transformers", "accelerate", "datasets", "matplotlib", "pyarrow", "tqdm", "torchvision", "PIL"}


def test_the_loop_form_runs_without_transformers_datasets_and_matplotlib():
    done = run(LOOP, hidden=NOT_NEEDED)
    assert done.returncode == 0, done.stderr


def test_a_copy_of_the_model_made_in_a_measured_step_feeds_nothing():
    model, data = Plain(), Images(8)
    attached = AttachedNorms(model, param_layers(model), on_error=print)
    twin = copy.deepcopy(model)
    model(data.x, data.y)["loss"].backward()
    attached.end_pass()
    twin(data.x, data.y)["loss"].backward()
    attached.end_pass()
    assert attached.read().squares.shape[1] == 8
    attached.remove()


def test_a_step_that_is_not_measured_captures_nothing():
    model, data = Plain(), Images(8)
    with NormMonitor(model, every=3, strict=True) as monitor:
        for number in range(1, 7):
            with monitor.batch():
                loss = model(data.x, data.y)["loss"]
                assert bool(monitor._attached._norms._passes) == (number in (1, 3, 6))
                loss.backward()
            assert not monitor._attached._norms._passes


def test_the_cheap_mode_measures_the_normalisation_layers_exactly_and_nothing_else():
    found = []
    for cheap in (True, False):
        model, data = Plain(), Images(8)
        with NormMonitor(model, every=1, strict=True, norm_layers_only=cheap) as monitor:
            with monitor.batch():
                model(data.x, data.y)["loss"].backward()
            found.append(({layer.name: k for k, layer in enumerate(monitor.layers)}, monitor.last))
    (few, cheap), (every, whole) = found
    assert list(few) == ["norm"]
    for name in ("batch_square", "sample_square", "sample_norm"):
        torch.testing.assert_close(getattr(cheap, name)[0], getattr(whole, name)[every["norm"]], rtol=1e-6, atol=0)
