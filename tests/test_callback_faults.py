"""Promise: the callback never ends a run unless it is told to; what cannot be measured is said once."""

import importlib
import logging

import pytest
import torch
from torch import nn
from transformers import TrainerCallback

from hf_clars.errors import ConfigError, HfClarsError
from hf_clars.grad_norms import PerSampleGradNorms
from hf_clars.per_sample import PerSampleNormsCallback, with_index
from hf_clars.per_sample.log import FOLDER
from tests.callback_kit import LOGGER, hooks_on, train
from tests.trainer_kit import Images, Plain


@pytest.mark.parametrize(
    "broken",
    [
        "hf_clars.grad_norms.hooked_norms.HookedNorms._on_call",  # a hook on a module
        "hf_clars.grad_norms.hooked_norms.HookedNorms._watch_uses",  # the hook on the model's result
        "hf_clars.grad_norms.rule_call.RuleCall.measure",  # a hook on a tensor, in the backward pass
        "hf_clars.grad_norms.sum_check.SumCheck._take",  # one on a parameter
    ],
)
@pytest.mark.parametrize("step", [1, 3])
def test_an_error_in_a_hook_is_reported_once_and_changes_nothing(tmp_path, caplog, monkeypatch, broken, step):
    if broken.endswith("_take"):
        step = 1  # later steps are not checked
    place, _, name = broken.rpartition(".")
    owner = getattr(importlib.import_module(place.rpartition(".")[0]), place.rpartition(".")[2])
    original, callback = getattr(owner, name), PerSampleNormsCallback(every=1)

    def raises(self, *args, **kwargs):
        if callback.monitor is not None and callback.monitor.step + 1 == step:
            raise ZeroDivisionError
        return original(self, *args, **kwargs)

    without = train(tmp_path / "without", []).model.state_dict()
    monkeypatch.setattr(owner, name, raises)
    with caplog.at_level(logging.WARNING, LOGGER):
        trainer = train(tmp_path / "with", callback)
    assert trainer.state.global_step == 6
    assert callback.monitor.ended.startswith("ZeroDivisionError")
    assert sum("no longer measured" in r.getMessage() for r in caplog.records) == 1
    assert hooks_on(trainer.model) == 0
    assert not torch.overrides._get_current_function_mode_stack()
    for name, weight in trainer.model.state_dict().items():
        torch.testing.assert_close(weight, without[name], rtol=1e-4, atol=1e-6)


def test_a_tracker_that_fails_is_told_once_and_the_run_goes_on(tmp_path, caplog, monkeypatch):
    from hf_clars.per_sample.reporting import Reporter

    monkeypatch.setattr(Reporter, "_to_tensorboard", lambda *a: 1 / 0)
    with caplog.at_level(logging.WARNING, LOGGER):
        trainer = train(tmp_path, PerSampleNormsCallback(every=1), report_to=["tensorboard"])
    assert trainer.state.global_step == 6
    assert sum("tensorboard took no per-sample norms" in r.getMessage() for r in caplog.records) == 1


class Bare(Plain):
    """Uses a weight by a way that no hook sees."""

    def forward(self, pixel_values, labels=None):
        out = super().forward(pixel_values, labels)
        if out["loss"] is not None:
            out["loss"] = out["loss"] + self.classifier.weight.square().sum()
        return out


class SkipsSamples(Plain):
    """A model whose loss does not come from its samples."""

    def forward(self, pixel_values, labels=None):
        loss = sum(p.square().sum() for p in self.parameters())
        return {"loss": loss, "logits": torch.zeros(len(pixel_values), 3)}


@pytest.mark.parametrize("kind", [Bare, SkipsSamples])
def test_a_model_that_cannot_be_measured_trains_on_and_is_reported_once(tmp_path, caplog, kind):
    with caplog.at_level(logging.WARNING, LOGGER):
        trainer = train(tmp_path, PerSampleNormsCallback(every=1), model=kind())
    assert trainer.state.global_step == 6
    said = [r.getMessage() for r in caplog.records if "no longer measured" in r.getMessage()]
    assert len(said) == 1
    assert "training goes on" in said[0]
    assert hooks_on(trainer.model) == 0


@pytest.mark.parametrize("kind", [Bare, SkipsSamples])
def test_strict_ends_the_training_instead(tmp_path, kind):
    with pytest.raises(HfClarsError):
        train(tmp_path, PerSampleNormsCallback(every=1, strict=True), model=kind())


def test_an_error_of_the_engine_s_reading_is_reported_once(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(PerSampleGradNorms, "check_all_captured", lambda self: 1 / 0)
    with caplog.at_level(logging.WARNING, LOGGER):
        trainer = train(tmp_path, PerSampleNormsCallback(every=1))
    assert trainer.state.global_step == 6
    assert sum("ZeroDivisionError" in r.getMessage() for r in caplog.records) == 1


def test_a_log_that_cannot_be_written_ends_the_measuring_only(tmp_path, caplog):
    (tmp_path / FOLDER).write_text("a file in the folder's place")
    with caplog.at_level(logging.WARNING, LOGGER):
        trainer = train(tmp_path, PerSampleNormsCallback(every=1))
    assert trainer.state.global_step == 6
    assert any("are not measured" in r.getMessage() for r in caplog.records)


def test_where_nothing_can_be_measured_the_index_column_is_taken_out_all_the_same(tmp_path):
    (tmp_path / FOLDER).write_text("a file in the folder's place")
    trainer = train(tmp_path, PerSampleNormsCallback(every=1), dataset=with_index(Images()))
    assert trainer.state.global_step == 6
    assert hooks_on(trainer.model) == 0


def test_two_callbacks_are_one_too_many(tmp_path, caplog):
    first, second = PerSampleNormsCallback(every=2), PerSampleNormsCallback(every=1)
    with caplog.at_level(logging.WARNING, LOGGER):
        train(tmp_path, [first, second])
    assert first.monitor is not None
    assert second.monitor is None
    assert any("measures this Plain already" in r.getMessage() for r in caplog.records)


def test_gradients_clipped_by_value_are_refused_and_not_taken_for_the_batch_s(tmp_path, caplog):
    class ByValue(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            nn.utils.clip_grad_value_(model.parameters(), 1e-4)

    with caplog.at_level(logging.WARNING, LOGGER):
        train(tmp_path, [ByValue(), PerSampleNormsCallback(every=1)])
    assert any("by something else than a factor" in r.getMessage() for r in caplog.records)


@pytest.mark.parametrize("wrong", [{"every": 0}, {"top_k": -1}, {"decay": 2.0}])
def test_settings_out_of_range_are_refused_before_the_run(wrong):
    with pytest.raises(ConfigError):
        PerSampleNormsCallback(**wrong)
