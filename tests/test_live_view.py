"""Promise: a run's reporters receive each layer's values as they are, at the interval, within 1 % of its time."""

import json
import os
import sqlite3
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState
from transformers.integrations import TensorBoardCallback

from hf_clars import CLARS, LayerRateLog
from hf_clars.errors import ConfigError
from hf_clars.optim import LayerMeasures
from hf_clars.trainer import ClarsTrainer
from hf_clars.trainer.live_view import LayerReportCallback, rate_summary, reporters_of
from tests.trainer_kit import Images, Plain, clars_args, plain_args

OPTIONS = {"per_device_train_batch_size": 16, "max_steps": 6, "log_layer_rates": True}


def train(folder, **changes):
    trainer = ClarsTrainer(Plain(), clars_args(folder, **{**OPTIONS, **changes}), train_dataset=Images())
    trainer.train()
    return trainer


def events(folder) -> EventAccumulator:
    """What TensorBoard's own reader finds."""
    (place,) = {path.parent for path in folder.rglob("events.out.tfevents.*")}
    return EventAccumulator(str(place), size_guidance={"scalars": 0, "histograms": 0}).Reload()


def test_tensorboard_receives_the_logged_values_of_each_layer_at_the_interval(tmp_path):
    train(tmp_path, report_to="tensorboard", layer_report_steps=2)
    found, log = events(tmp_path), LayerRateLog.open(tmp_path)
    assert len(log.layers) == 3
    for quantity in ("rate", "ratio"):
        for column, layer in enumerate(log.layers):
            series = found.Scalars(f"{quantity}/{layer}")
            assert [event.step for event in series] == [2, 4, 6]
            np.testing.assert_allclose([event.value for event in series], log[quantity][1::2, column], rtol=1e-6)
    for quantity in ("rate", "weight_norm", "grad_norm", "mean_sample_norm", "ratio"):
        histograms = found.Histograms(f"layers/log10_{quantity}")
        assert [event.step for event in histograms] == [2, 4, 6]
        expected = np.log10(log[quantity][1])
        counted = histograms[0].histogram_value
        assert counted.num == 3
        assert (counted.min, counted.max) == (pytest.approx(expected.min()), pytest.approx(expected.max()))
    assert len(found.Scalars("train/loss")) == 6  # transformers' own are undisturbed


def test_by_default_there_is_a_report_beside_the_losses_and_none_with_zero(tmp_path, monkeypatch):
    monkeypatch.setattr("hf_clars.trainer.live_view.SHARE", float("inf"))
    train(tmp_path / "default", report_to="tensorboard", logging_steps=3)
    log = LayerRateLog.open(tmp_path / "default")
    assert [event.step for event in events(tmp_path / "default").Scalars(f"rate/{log.layers[0]}")] == [3, 6]
    train(tmp_path / "none", report_to="tensorboard", layer_report_steps=0)
    assert not any(tag.startswith(("rate/", "layers/")) for tag in events(tmp_path / "none").Tags()["scalars"])
    with pytest.raises(ConfigError, match="must not be negative"):
        clars_args(tmp_path, layer_report_steps=-1)


def test_layer_values_stay_out_of_the_log_history_but_its_summary_is_in_it(tmp_path):
    trainer = train(tmp_path, report_to="tensorboard", layer_report_steps=1)
    log = LayerRateLog.open(tmp_path)
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(entries) == 6
    for entry, rate, ratio in zip(entries, log["rate"], log["ratio"], strict=True):
        assert not any("/" in key for key in entry)
        found = [entry[f"rate_{name}"] for name in ("smallest", "median", "largest")]
        np.testing.assert_allclose(found, [rate.min(), np.median(rate), rate.max()], rtol=1e-6)
        assert entry["ratio_median"] == pytest.approx(np.median(ratio), rel=1e-6)


def test_trackio_receives_them_too_in_its_local_store(tmp_path):
    pytest.importorskip("trackio")
    train(tmp_path, report_to="trackio", layer_report_steps=3, project=tmp_path.name)
    log = LayerRateLog.open(tmp_path)
    store = Path(os.environ["TRACKIO_DIR"]) / f"{tmp_path.name}.db"  # conftest.py points it away from the user's own
    with sqlite3.connect(store) as database:
        rows = [json.loads(text) for (text,) in database.execute("select metrics from metrics order by id")]
    found = {row["train/global_step"]: row for row in rows if f"train/rate/{log.layers[0]}" in row}
    assert list(found) == [3, 6]
    for step, row in found.items():
        for quantity in ("rate", "ratio"):
            values = [row[f"train/{quantity}/{layer}"] for layer in log.layers]
            np.testing.assert_allclose(values, log[quantity][step - 1], rtol=1e-6)


def test_what_trackio_receives_lies_at_the_optimizer_step_that_it_belongs_to(tmp_path):
    """Loss and layers of one step are at one place of its axis, also after a resume."""
    pytest.importorskip("trackio")
    options = {"report_to": "trackio", "layer_report_steps": 1, "project": tmp_path.name, "run_name": "one"}
    train(tmp_path, **options, save_strategy="steps", save_steps=3)
    resumed = ClarsTrainer(
        Plain(), clars_args(tmp_path, **{**OPTIONS, **options, "max_steps": 8}), train_dataset=Images()
    )
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    store = Path(os.environ["TRACKIO_DIR"]) / f"{tmp_path.name}.db"
    with sqlite3.connect(store) as database:
        rows = [(step, json.loads(text)) for step, text in database.execute("select step, metrics from metrics")]
    assert {step for step, row in rows if "train/loss" in row} == set(range(1, 9))
    assert {step for step, row in rows if any(key.startswith("train/rate/") for key in row)} == set(range(1, 9))
    assert all(step == row["train/global_step"] for step, row in rows)


class Recorder(TrainerCallback):
    def __init__(self):
        self.logs = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logs.append((state.global_step, dict(logs)))


def test_any_other_reporter_receives_them_through_its_own_on_log_also_in_the_plain_trainer(tmp_path):
    model, recorder = Plain(), Recorder()
    optimizer = CLARS(model, lr=1.0)
    trainer = Trainer(
        model,
        plain_args(tmp_path, per_device_train_batch_size=16, max_steps=4),
        train_dataset=Images(),
        optimizers=(optimizer, None),
        callbacks=[LayerReportCallback([recorder], 2)],
    )
    trainer.train()
    assert [step for step, _ in recorder.logs] == [2, 4]
    names = {f"{quantity}/{layer}" for quantity in ("rate", "ratio") for layer in optimizer.layer_names}
    assert set(recorder.logs[1][1]) == names
    rate = optimizer.last_step.rate
    assert [recorder.logs[1][1][f"rate/{layer}"] for layer in optimizer.layer_names] == rate.tolist()


def measures(layers, **changes):
    values = {"rate": torch.rand(layers) + 0.1, "weight_norm": torch.ones(layers), "grad_norm": torch.ones(layers)}
    return LayerMeasures(**{**values, **changes})


def fixed(layers, **changes):
    """A stand-in for an optimizer: its names and what its last step measured."""
    return SimpleNamespace(layer_names=[f"layer.{k}" for k in range(layers)], last_step=measures(layers, **changes))


def test_values_that_are_not_finite_or_not_measured_are_left_out(tmp_path):
    recorder, rate = Recorder(), torch.tensor([1.0, float("nan"), float("inf")])
    callback = LayerReportCallback([recorder], 1, optimizer=fixed(3, rate=rate))
    callback.on_step_end(None, TrainerState(global_step=1, is_world_process_zero=True), TrainerControl())
    assert recorder.logs == [(1, {"rate/layer.0": 1.0})]


def test_only_the_main_process_reports():
    recorder = Recorder()
    callback = LayerReportCallback([recorder], 1, optimizer=fixed(3))
    callback.on_step_end(None, TrainerState(global_step=1, is_world_process_zero=False), TrainerControl())
    assert recorder.logs == []


def test_without_an_interval_reports_take_no_more_than_one_percent_of_the_time(monkeypatch):
    """A slow reporter (20 ms) and logs every 100 ms, on a clock that only they move."""
    now = [0.0]
    monkeypatch.setattr("hf_clars.trainer.live_view.time", SimpleNamespace(perf_counter=lambda: now[0]))

    class Slow(Recorder):
        def on_log(self, *args, **kwargs):
            super().on_log(*args, **kwargs)
            now[0] += 0.02

    slow = Slow()
    callback = LayerReportCallback([slow], optimizer=fixed(3))
    state, control = TrainerState(is_world_process_zero=True), TrainerControl()
    callback.on_train_begin(None, state, control)
    for step in range(1, 1001):
        now[0] += 0.1
        state.global_step = step
        callback.on_log(None, state, control, logs={"loss": 1.0})
        assert step == 1 or callback.seconds <= 0.01 * now[0] or len(slow.logs) == 1
    assert 0.008 * now[0] < callback.seconds <= 0.01 * now[0]
    assert slow.logs[0][0] == 1  # the first log is reported at once


def test_a_report_of_161_layers_is_one_copy_and_its_scalars_are_one_record_of_tensorboard(tmp_path, monkeypatch):
    """322 single scalars would take ten times as long."""
    from torch.utils.tensorboard import SummaryWriter

    optimizer = fixed(161, mean_sample_norm=torch.ones(161), ratio=torch.rand(161))
    copies, stacked = [], LayerMeasures.stacked
    monkeypatch.setattr(LayerMeasures, "stacked", lambda self: copies.append(1) or stacked(self))
    writer, records = SummaryWriter(tmp_path), []
    add = writer.file_writer.add_summary
    monkeypatch.setattr(
        writer.file_writer, "add_summary", lambda record, *args: records.append(record) or add(record, *args)
    )
    callback = LayerReportCallback([TensorBoardCallback(writer)], 1, optimizer=optimizer)
    for step in range(1, 4):
        callback.on_step_end(None, TrainerState(global_step=step, is_world_process_zero=True), TrainerControl())
    assert len(copies) == 3
    assert [len(r.value) for r in records if r.value[0].HasField("simple_value")] == [322] * 3


def test_tensorboardx_alone_is_served_by_single_scalars(tmp_path, monkeypatch):
    from torch.utils.tensorboard import SummaryWriter

    monkeypatch.setitem(sys.modules, "tensorboard.compat.proto.summary_pb2", None)
    optimizer = fixed(3)
    with SummaryWriter(tmp_path) as writer:
        callback = LayerReportCallback([TensorBoardCallback(writer)], 1, optimizer=optimizer)
        callback.on_step_end(None, TrainerState(global_step=7, is_world_process_zero=True), TrainerControl())
    series = events(tmp_path).Scalars("rate/layer.2")
    assert [(event.step, event.value) for event in series] == [
        (7, pytest.approx(float(callback._optimizer.last_step.rate[2])))
    ]


def test_a_run_without_reporters_or_with_another_optimizer_reports_nothing(tmp_path):
    assert reporters_of(train(tmp_path, max_steps=1)) == []
    assert rate_summary(torch.optim.SGD(Plain().parameters(), 0.1)) == {}
