"""Promise: what the callback measured is in Trainer's log, in TensorBoard and in its own, under the data's indices."""

import json
import logging

import datasets
import pytest
import torch
from torch.utils.data import IterableDataset
from transformers import Trainer, TrainerCallback

from hf_clars.errors import DataError
from hf_clars.per_sample import IndexedDataset, PerSampleLog, PerSampleNormsCallback, keep_index, with_index
from hf_clars.per_sample.log import FOLDER
from tests.callback_kit import LOGGER, brute_force, train
from tests.trainer_kit import Images, Plain, plain_args


def pixels(items):
    """A collator that takes what it knows."""
    return {name: torch.stack([torch.as_tensor(i[name]) for i in items]) for name in ("pixel_values", "labels")}


@pytest.mark.parametrize("workers", [0, 2])
def test_the_hardest_examples_are_named_by_the_data_sets_index_under_shuffling_and_workers(tmp_path, workers):
    data = Images()
    callback = PerSampleNormsCallback(every=1, top_k=3, strict=True)
    settings = {"train_sampling_strategy": "random", "dataloader_num_workers": workers, "max_steps": 8}
    train(tmp_path, callback, dataset=with_index(data), learning_rate=0.0, logging_steps=8, **settings)
    windows = [json.loads(line) for line in (tmp_path / FOLDER / "windows.jsonl").read_text().splitlines()]
    norms, _ = brute_force(Plain(), data.x, data.y)
    assert [hard["index"] for hard in windows[0]["hardest"]] == norms.topk(3).indices.tolist()
    arrays = PerSampleLog.open(tmp_path).read()
    assert sorted(set(arrays["top_index"].flatten().tolist()))[0] >= 0
    seen = {int(i): float(n) for i, n in zip(arrays["top_index"].flatten(), arrays["top_norm"].flatten(), strict=True)}
    for index, norm in seen.items():
        assert norm == pytest.approx(float(norms[index]), rel=1e-3)


def test_a_column_of_a_datasets_dataset_works_too(tmp_path):
    import datasets

    data = datasets.Dataset.from_dict({"pixel_values": Images().x.tolist(), "labels": Images().y.tolist()})
    indexed = with_index(data)
    assert indexed[5]["sample_index"] == 5
    callback = PerSampleNormsCallback(every=1, top_k=2, strict=True)
    train(tmp_path, callback, dataset=indexed, train_sampling_strategy="random", max_steps=2)
    assert callback.monitor.knows_indices


def test_batches_without_an_index_say_how_to_keep_one_once(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, LOGGER):
        train(tmp_path, PerSampleNormsCallback(every=1, top_k=2))
    said = [r.getMessage() for r in caplog.records if "remove_unused_columns=False" in r.getMessage()]
    assert len(said) == 1
    assert "with_index" in said[0]
    assert "keep_index" in said[0]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_collator_that_drops_the_index_can_be_told_to_keep_it(tmp_path, workers):
    callback = PerSampleNormsCallback(every=1, top_k=2, strict=True)
    settings = {"dataloader_num_workers": workers, "max_steps": 1, "train_sampling_strategy": "sequential"}
    trainer = Trainer(
        Plain(),
        plain_args(tmp_path, per_device_train_batch_size=4, remove_unused_columns=False, **settings),
        train_dataset=with_index(Images()),
        data_collator=keep_index(pixels),
    )
    trainer.add_callback(callback)
    trainer.train()
    norms, _ = brute_force(Plain(), Images().x[:4], Images().y[:4])
    assert callback.monitor.last.samples == 4
    assert callback.monitor.last.top_index[:2].tolist() == norms.topk(2).indices.tolist()
    assert keep_index(pixels)([Images()[0]]).keys() == {"pixel_values", "labels"}


def test_a_data_set_without_a_length_or_room_for_an_index_is_refused():
    class Stream(IterableDataset):
        def __iter__(self):
            yield {}

    with pytest.raises(ValueError, match="no length"):
        with_index(Stream())
    with pytest.raises(ValueError, match="has no room for an index"):
        IndexedDataset([1, 2])[0]


@pytest.mark.parametrize("made", [list, datasets.Dataset.from_list], ids=["items", "columns"])
def test_a_column_of_the_index_s_name_is_not_written_over(made):
    data = made([{"x": 1, "sample_index": 7}])
    with pytest.raises(DataError, match=r"has a column 'sample_index' already.*column="):
        with_index(data)[0]
    assert with_index(data, column="place")[0] == {"x": 1, "sample_index": 7, "place": 0}


# ---- reports ---------------------------------------------------------------------------------------------------


def test_trainers_log_has_the_models_values_on_its_own_steps(tmp_path):
    trainer = train(tmp_path, PerSampleNormsCallback(every=2, strict=True), logging_steps=2)
    entries = [e for e in trainer.state.log_history if "loss" in e]
    assert [e["step"] for e in entries] == [2, 4, 6]
    for entry in entries:
        assert entry["per_sample/norm_p05"] <= entry["per_sample/norm_p50"] <= entry["per_sample/norm_p95"]
        assert 0 <= entry["per_sample/signal_share"] <= 1


def test_tensorboard_gets_each_layer(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(tmp_path, PerSampleNormsCallback(every=1, strict=True), report_to=["tensorboard"])
    events = EventAccumulator(str(tmp_path / "runs" / FOLDER)).Reload()
    assert {"train/per_sample/R/conv", "train/per_sample/norm_p50"} <= set(events.Tags()["scalars"])
    assert [e.step for e in events.Scalars("train/per_sample/R/conv")] == [1, 2, 3, 4, 5, 6]
    assert all(0 <= e.value <= 1 + 1e-6 for e in events.Scalars("train/per_sample/R/conv"))


# ---- resuming --------------------------------------------------------------------------------------------------


def test_a_resumed_run_has_the_log_and_the_averages_of_one_that_was_not_stopped(tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 3, "max_steps": 6}
    whole = PerSampleNormsCallback(every=1, strict=True)
    train(tmp_path / "whole", whole, **settings)
    first = PerSampleNormsCallback(every=1, strict=True)

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 4

    train(tmp_path / "cut", [first, Stop()], **settings)
    again = PerSampleNormsCallback(every=1, strict=True)
    args = plain_args(tmp_path / "cut", per_device_train_batch_size=8, learning_rate=0.05, **settings)
    trainer = Trainer(Plain(), args, train_dataset=Images(), callbacks=[again])
    trainer.train(resume_from_checkpoint=str(tmp_path / "cut" / "checkpoint-3"))
    a, b = PerSampleLog.open(tmp_path / "whole").read(), PerSampleLog.open(tmp_path / "cut").read()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-9, atol=0, equal_nan=True)
    torch.testing.assert_close(again.monitor.noise.read().value, whole.monitor.noise.read().value, rtol=1e-9, atol=0)


def test_the_hardest_of_a_window_are_named_also_if_the_run_was_stopped_within_it(tmp_path):
    """The window is of steps 5 to 8, and the run resumes after step 6."""
    settings = {"max_steps": 10, "logging_steps": 4, "save_strategy": "steps", "save_steps": 6}

    def windows(resume=None):
        callback = PerSampleNormsCallback(every=1, top_k=6, strict=True)
        args = plain_args(tmp_path, **settings, per_device_train_batch_size=8, learning_rate=0.05)
        trainer = Trainer(Plain(), args, train_dataset=with_index(Images()), callbacks=[callback])
        trainer.train(resume_from_checkpoint=resume)
        lines = (tmp_path / FOLDER / "windows.jsonl").read_text().splitlines()
        return [(w["step"], [(h["step"], h["index"]) for h in w["hardest"]]) for w in map(json.loads, lines)]

    whole = windows()
    assert [step for step, _ in whole] == [4, 8, 10]
    assert {step for step, _ in whole[1][1]} & {5, 6}
    assert windows(str(tmp_path / "checkpoint-6")) == whole


def test_a_callback_that_is_added_late_says_so_and_measures_from_there(tmp_path, caplog):
    late = PerSampleNormsCallback(every=2, strict=True)

    class Adds(TrainerCallback):
        trainer = None

        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 2:
                self.trainer.add_callback(late)

    adds = Adds()
    args = plain_args(tmp_path, per_device_train_batch_size=8, max_steps=6)
    adds.trainer = Trainer(Plain(), args, train_dataset=Images(), callbacks=[adds])
    with caplog.at_level(logging.WARNING, LOGGER):
        adds.trainer.train()
    assert any("added after training began: its log begins at step 3" in r.getMessage() for r in caplog.records)
    assert PerSampleLog.open(tmp_path).read()["steps"].tolist() == [4, 6]
