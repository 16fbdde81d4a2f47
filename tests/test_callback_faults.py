"""Promise: the callback never ends a run unless it is told to; what cannot be measured is said once."""

import contextlib
import importlib
import logging

import pytest
import torch
from torch import nn
from torch.utils.data import default_collate
from transformers import Trainer, TrainerCallback

from hf_clars.errors import ConfigError, DataError, HfClarsError
from hf_clars.grad_norms import PerSampleGradNorms
from hf_clars.layers import param_layers
from hf_clars.per_sample import NormMonitor, PerSampleLog, PerSampleNormsCallback, rank_samples, with_index
from hf_clars.per_sample.log import FOLDER
from tests.callback_kit import LOGGER, Sentences, hooks_on, train
from tests.trainer_kit import Images, Plain, plain_args


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


@pytest.mark.parametrize("how", ["error", "removed"])
def test_a_callback_whose_run_ended_early_makes_room_for_the_next(tmp_path, how):
    class Ends(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if how == "error":
                raise KeyError("the user's own")
            if state.global_step == 1:
                trainer.remove_callback(first)

    first, second = PerSampleNormsCallback(every=1), PerSampleNormsCallback(every=1, strict=True)
    args = plain_args(tmp_path / "first", per_device_train_batch_size=8, max_steps=2)
    trainer = Trainer(Plain(), args, train_dataset=Images(), callbacks=[first, Ends()])
    with contextlib.suppress(KeyError):
        trainer.train()
    again = train(tmp_path / "second", second, model=trainer.model)
    assert second.monitor.last.step == 6
    assert hooks_on(again.model) == 0


def test_gradients_clipped_by_value_are_refused_and_not_taken_for_the_batch_s(tmp_path, caplog):
    class ByValue(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            nn.utils.clip_grad_value_(model.parameters(), 1e-4)

    with caplog.at_level(logging.WARNING, LOGGER):
        train(tmp_path, [ByValue(), PerSampleNormsCallback(every=1)])
    assert any("by something else than a factor" in r.getMessage() for r in caplog.records)


def as_words(items):
    return {**default_collate([{**item, "sample_index": 0} for item in items]), "sample_index": ["a"] * len(items)}


def as_halves(items):
    return {**default_collate(items), "sample_index": torch.arange(len(items)) + 0.5}


def as_nothing(items):
    return {**default_collate(items), "sample_index": [None] * len(items)}


@pytest.mark.parametrize("collate", [as_words, as_halves, as_nothing])
@pytest.mark.parametrize("strict", [False, True])
def test_indices_that_are_no_whole_numbers_are_refused_in_a_sentence(tmp_path, caplog, collate, strict):
    callback = PerSampleNormsCallback(every=1, strict=strict)
    args = plain_args(tmp_path, per_device_train_batch_size=8, max_steps=4)
    trainer = Trainer(Plain(), args, train_dataset=Images(), callbacks=[callback], data_collator=collate)
    if strict:
        with pytest.raises(DataError, match="give whole numbers, one for each sample"):
            trainer.train()
        return
    with caplog.at_level(logging.WARNING, LOGGER):
        trainer.train()
    assert trainer.state.global_step == 4
    assert sum("give whole numbers" in r.getMessage() for r in caplog.records) == 1


def test_a_column_of_no_indices_at_all_is_taken_out_and_nothing_is_known():
    model, data = Plain(), Images(8)
    with NormMonitor(model, every=1, strict=True) as monitor:
        with monitor.batch():
            model(pixel_values=data.x, labels=data.y, sample_index=None)["loss"].backward()
        assert not monitor.knows_indices
        assert monitor.last.samples == 8


class Names(Plain):
    """A model that wants the column for itself."""

    def forward(self, pixel_values, labels=None, sample_index=None):
        assert sample_index is not None
        return super().forward(pixel_values, labels)


def test_a_model_that_wants_the_column_keeps_it(tmp_path):
    callback = PerSampleNormsCallback(every=1, strict=True)
    train(tmp_path, callback, model=Names(), dataset=with_index(Images()))
    assert callback.monitor.knows_indices


class Words(nn.Module):
    """An embedding whose gradient is sparse."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.table, self.head = nn.Embedding(50, 8, sparse=True), nn.Linear(8, 3)

    def forward(self, input_ids, attention_mask=None, labels=None):
        logits = self.head(self.table(input_ids).mean(1))
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


class Freezes(TrainerCallback):
    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step == 2:
            model.conv.requires_grad_(False)


@pytest.mark.parametrize("every", [1, 2])
def test_parts_that_are_frozen_on_the_way_have_no_gradient_from_there_and_others_are_measured_on(tmp_path, every):
    callback = PerSampleNormsCallback(every=every, strict=True)
    trainer = train(tmp_path, [callback, Freezes()], max_grad_norm=0.1)
    last, place = callback.monitor.last, [layer.name for layer in callback.monitor.layers].index("conv")
    assert last.step == trainer.state.global_step == 6
    assert last.sample_norm[place] == last.batch_square[place] == 0
    logged = [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry][-1]
    torch.testing.assert_close(last.batch_square.sum().sqrt().float(), torch.tensor(logged), rtol=1e-5, atol=0)


class Thaws(TrainerCallback):
    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step == 3:
            model.conv.requires_grad_(True)


@pytest.mark.parametrize("first", [False, True])
def test_parts_that_thaw_on_the_way_are_measured_where_the_partition_has_them(tmp_path, first):
    model = Plain()
    model.conv.requires_grad_(False)
    callback = PerSampleNormsCallback(every=1, strict=True, layers=param_layers(model, frozen=True))
    callbacks = [Thaws(), callback] if first else [callback, Thaws()]
    trainer = train(tmp_path, callbacks, model=model, max_grad_norm=0.1)
    log = PerSampleLog.open(tmp_path).read()
    logged = [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry]
    torch.testing.assert_close(log["batch_square"].sum(1).sqrt().float(), torch.tensor(logged), rtol=1e-4, atol=0)
    assert (log["sample_norm"][:, 0] > 0).tolist() == [False] * 3 + [True] * 3


@pytest.mark.parametrize(
    "broken",
    [
        "hf_clars.per_sample.callback.GradientProbe",
        "hf_clars.per_sample.callback._deepspeed_loss_scale",
        "hf_clars.per_sample.callback.model_values",
        "hf_clars.per_sample.reporting.Reporter.keep_window",
        "hf_clars.per_sample.monitor.NormMonitor.begin",
        "hf_clars.per_sample.monitor.NormMonitor.hardest",
    ],
)
@pytest.mark.parametrize("strict", [False, True])
def test_an_error_anywhere_in_the_callback_ends_no_training(tmp_path, caplog, monkeypatch, broken, strict):
    def raises(*args, **kwargs):
        raise ZeroDivisionError

    monkeypatch.setattr(broken, raises)
    callback = PerSampleNormsCallback(every=1, strict=strict)
    if strict:
        with pytest.raises(ZeroDivisionError):
            train(tmp_path, callback)
        return
    with caplog.at_level(logging.WARNING, LOGGER):
        trainer = train(tmp_path, callback)
    assert trainer.state.global_step == 6
    assert sum("no longer measured" in r.getMessage() for r in caplog.records) == 1
    assert hooks_on(trainer.model) == 0


def test_sparse_gradients_are_read_too(tmp_path):
    callback, data = PerSampleNormsCallback(every=1, top_k=8, strict=True), Sentences()
    train(tmp_path, callback, model=Words(), dataset=data, max_steps=1, max_grad_norm=0, optim="sgd")
    model, rows = Words(), []
    model.table.sparse = False
    for i in range(8):
        loss = model(data[i]["input_ids"][None], labels=data[i]["labels"][None])["loss"]
        rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))]))
    g = torch.stack(rows)
    last = callback.monitor.last
    torch.testing.assert_close(last.top_norm.float(), g.norm(dim=1).sort(descending=True).values, rtol=1e-4, atol=0)
    torch.testing.assert_close(last.batch_square.sum().float(), g.mean(0).square().sum(), rtol=1e-4, atol=0)


WRONG = [
    *({"every": value} for value in (0, 2.5, "often", True)),
    *({"top_k": value} for value in (-1, 2.5, None)),
    *({"decay": value} for value in (2.0, float("nan"), "slow")),
    *({"layers": value} for value in ("blocks", [], ["conv"], None)),
    *({"index_column": value} for value in ("", None, 3)),
]


@pytest.mark.parametrize("wrong", WRONG, ids=str)
def test_settings_out_of_range_are_refused_before_the_run(wrong):
    for make in (PerSampleNormsCallback, lambda **settings: NormMonitor(Plain(), **settings)):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            make(**wrong)


@pytest.mark.parametrize("wrong", [lambda m: param_layers(Plain()), lambda m: [*param_layers(m), param_layers(m)[0]]])
def test_a_partition_of_another_model_or_with_a_parameter_twice_is_refused(wrong):
    model = Plain()
    with pytest.raises(ConfigError, match=r"layers= has conv\.weight"):
        NormMonitor(model, layers=wrong(model))
    with pytest.raises(ConfigError, match=r"layers= has conv\.weight"):
        rank_samples(model, Images(8), layers=wrong(model), progress=False)


@pytest.mark.parametrize("model", [None, 3, [nn.Linear(2, 2)], torch.optim.SGD(nn.Linear(2, 2).parameters())], ids=str)
def test_what_is_no_module_is_refused_in_a_sentence(model):
    with pytest.raises(ConfigError, match="no torch module"):
        NormMonitor(model)
