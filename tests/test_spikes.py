"""Promise: a step that stands out is named with its process, micro-batch, examples and layers, and others are not."""

import json
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from hf_clars.per_sample import NormMonitor, SpikeRule, StepMeasures
from hf_clars.per_sample.log import FOLDER
from hf_clars.per_sample.reporting import Reporter


def step(number, norm, loss=1.0, layers=(0.5, 0.5)):
    """A step whose gradient has this norm, shared by two layers."""
    squares = torch.tensor(layers, dtype=torch.float64) * norm**2
    top = torch.tensor([3.0, 1.0], dtype=torch.float64)
    places = [torch.tensor(p) for p in ([17, 4], [1, 0], [0, 2], [5, 6])]
    mean = torch.ones(2, dtype=torch.float64)
    return StepMeasures(number, 8, 1, squares, squares, mean, torch.ones(5), torch.tensor(loss), top, top / 10, *places)


def rule_after(norms, losses=None):
    rule = SpikeRule(["conv", "fc"])
    for number, norm in enumerate(norms, 1):
        assert not rule.look(step(number, norm, 1.0 if losses is None else losses[number - 1]))
    return rule


USUAL = [1.0, 1.1, 0.9, 1.05, 0.95, 1.0, 1.1, 0.9, 1.0, 1.02]


def test_a_jump_of_the_norm_names_who_carries_it():
    (spike,) = rule_after(USUAL).look(step(11, 5.0, layers=(0.9, 0.1)))
    assert (spike.step, spike.what) == (11, "gradient norm")
    assert (spike.value, spike.usual) == (pytest.approx(5.0), pytest.approx(1.0))
    first = spike.samples[0]
    assert (first.index, first.rank, first.micro_batch, first.row) == (17, 1, 0, 5)
    assert spike.layers[0] == ("conv", pytest.approx(0.9), pytest.approx(0.5))
    assert "index 17 (rank 1, micro-batch 0, 30%)" in spike.sentence()
    assert "conv (90%, usually 50%)" in spike.sentence()


def test_a_jump_of_the_loss_is_one_too():
    (spike,) = rule_after(USUAL, USUAL).look(step(11, 1.0, loss=4.0))
    assert spike.what == "loss"


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_norm_that_is_no_number_is_a_spike_always(value):
    assert [s.what for s in rule_after(USUAL).look(step(11, value))] == ["gradient norm"]


def test_what_is_usual_is_no_spike():
    assert not rule_after(USUAL).look(step(11, 1.15))
    assert not rule_after([1.0] * 10).look(step(11, 1.4))  # no spread at all: the factor of 1.5 holds


def test_too_few_steps_before_are_no_ground_for_a_rule():
    assert not rule_after(USUAL[:7]).look(step(8, 50.0))


def test_a_spike_is_not_taken_for_usual_afterwards():
    rule = rule_after(USUAL)
    for number in range(11, 40):
        assert rule.look(step(number, 9.0))


@pytest.mark.parametrize("top_k", [20, 0])
def test_in_a_training_loop_the_example_that_made_the_spike_is_named_whatever_windows_name(top_k):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(96, 5, generator=generator), torch.randn(96, 1, generator=generator)
    y[83] = 500.0  # a label of another world, in the second micro-batch of the eleventh step
    spikes = []
    with NormMonitor(model, every=1, top_k=top_k, strict=True, on_spike=spikes.append) as monitor:
        for number in range(24):
            index = torch.arange(4) + 4 * (20 if number == 21 else number % 20)
            with monitor.batch(index, last=number % 2 == 1):
                ((model(x[index]) - y[index]).square().mean() / 2).backward()
            if number % 2 == 1:
                optimizer.step()
                optimizer.zero_grad()
    assert [s.step for s in spikes] == [11]
    assert len(monitor.hardest()) == top_k
    first = spikes[0].samples[0]
    assert (first.index, first.rank, first.micro_batch, first.row) == (83, 0, 1, 3)
    assert first.share > 0.9
    assert spikes[0].layers[0][0] in ("0", "2")


def test_a_spike_is_kept_as_a_line_and_raised_as_trackios_alert(tmp_path, monkeypatch):
    import trackio

    alerts, logged = [], []
    monkeypatch.setattr(trackio, "alert", lambda **what: alerts.append(what))
    monkeypatch.setattr(trackio, "log", lambda values: logged.append(values))
    args = SimpleNamespace(report_to=["trackio"], output_dir=str(tmp_path))
    reporter = Reporter(args, SimpleNamespace(is_world_process_zero=True, global_step=0), tmp_path)
    (spike,) = rule_after(USUAL).look(step(11, 5.0))
    reporter.keep_spike(spike)
    reporter.log({"per_sample/noise_scale": 3.0}, 11)
    assert "step 11" in alerts[0]["title"]
    assert "index 17" in alerts[0]["text"]
    assert logged == [{"train/per_sample/noise_scale": 3.0, "train/global_step": 11}]
    kept = json.loads((tmp_path / FOLDER / "spikes.jsonl").read_text())
    assert kept["samples"][0]["index"] == 17


def test_a_run_that_begins_anew_does_not_keep_the_lines_of_the_last(tmp_path):
    args = SimpleNamespace(report_to=[], output_dir=str(tmp_path))
    (spike,) = rule_after(USUAL).look(step(11, 5.0))
    Reporter(args, SimpleNamespace(is_world_process_zero=True, global_step=0), tmp_path).keep_spike(spike)
    path = tmp_path / FOLDER / "spikes.jsonl"
    Reporter(args, SimpleNamespace(is_world_process_zero=True, global_step=11), tmp_path)
    assert path.read_text()
    Reporter(args, SimpleNamespace(is_world_process_zero=True, global_step=10), tmp_path)
    assert not path.read_text()
