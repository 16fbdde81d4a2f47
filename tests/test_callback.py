"""Promise: in any Trainer, with any optimizer, the callback measures exactly, changes nothing, and never ends a run."""

import importlib
import json
import logging

import pytest
import torch
from torch import nn
from torch.utils.data import IterableDataset
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainerCallback

from hf_clars.errors import ConfigError, HfClarsError
from hf_clars.grad_norms import PerSampleGradNorms
from hf_clars.grad_norms.graph.taint import DataTaint
from hf_clars.per_sample import IndexedDataset, NormMonitor, PerSampleLog, PerSampleNormsCallback, with_index
from hf_clars.per_sample.log import FOLDER
from tests.trainer_kit import Images, Plain, plain_args

LOGGER = "hf_clars.per_sample"


def train(folder, callback, *, model=None, dataset=None, **settings):
    model = Plain() if model is None else model
    settings = {"per_device_train_batch_size": 8, "max_steps": 6, "learning_rate": 0.05, **settings}
    dataset = Images() if dataset is None else dataset
    callbacks = [callback] if isinstance(callback, TrainerCallback) else callback
    trainer = Trainer(model, plain_args(folder, **settings), train_dataset=dataset, callbacks=callbacks)
    trainer.train()
    return trainer


def hooks_on(model):
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    return hooks + sum(len(p._post_accumulate_grad_hooks or ()) for p in model.parameters())


def brute_force(model, x, y):
    """Whole-network norms one by one, and the batch gradient's square, by plain autograd."""
    rows = []
    for i in range(len(x)):
        loss = model(pixel_values=x[i : i + 1], labels=y[i : i + 1])["loss"]
        rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))]))
    g = torch.stack(rows)
    return g.norm(dim=1), g.mean(0).square().sum()


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("clip", [0.0, 1e-3])
def test_norms_and_noise_are_exact_under_accumulation_and_clipping(tmp_path, accumulation, clip):
    class Head(Plain):
        """Says that it takes no num_items_in_batch, as Trainer wants of such a head."""

        accepts_loss_kwargs = False

    callback = PerSampleNormsCallback(every=1, top_k=16, strict=True)
    settings = {"gradient_accumulation_steps": accumulation, "max_grad_norm": clip, "max_steps": 1}
    train(tmp_path, callback, model=Head(), per_device_train_batch_size=16 // accumulation, **settings)
    data = Images()
    norms, square = brute_force(Head(), data.x[:16], data.y[:16])
    last = callback.monitor.last
    assert last.samples == 16
    torch.testing.assert_close(last.top_norm.float(), norms.sort(descending=True).values, rtol=1e-4, atol=0)
    torch.testing.assert_close(last.batch_square.sum().float(), square, rtol=1e-4, atol=0)
    order = norms.argsort(descending=True)
    places = last.top_micro_batch * (16 // accumulation) + last.top_row
    assert torch.equal(places, order)


def test_only_every_nth_step_is_measured_and_the_first(tmp_path):
    train(tmp_path, PerSampleNormsCallback(every=4, strict=True), max_steps=9)
    assert PerSampleLog.open(tmp_path).read()["steps"].tolist() == [1, 4, 8]


def test_between_measured_steps_the_engine_is_paused_and_at_the_end_no_hook_is_on_the_model(tmp_path, monkeypatch):
    begun, paused = [], []
    original = PerSampleGradNorms._begin
    monkeypatch.setattr(PerSampleGradNorms, "_begin", lambda self, *a: (begun.append(1), original(self, *a)))
    callback = PerSampleNormsCallback(every=3, strict=True)

    class Watch(TrainerCallback):
        def on_step_begin(self, args, state, control, model=None, **kwargs):
            paused.append(callback.monitor._attached.paused)

    trainer = train(tmp_path, [callback, Watch()], max_steps=6)
    assert paused == [False, True, False, True, True, False]
    assert len(begun) == 3
    assert hooks_on(trainer.model) == 0


def test_what_is_learned_of_the_model_is_learned_once(tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr("hf_clars.grad_norms.hooked_norms.DataTaint", lambda: made.append(1) or DataTaint())
    train(tmp_path, PerSampleNormsCallback(every=1, strict=True), max_steps=4)
    assert len(made) == 1


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


@pytest.mark.parametrize("precision", [{}, {"bf16": True}, {"gradient_checkpointing": True}])
def test_weights_are_those_of_a_run_without(tmp_path, precision):
    def weights(callbacks):
        torch.manual_seed(0)
        model = BertForSequenceClassification(bert()) if "gradient_checkpointing" in precision else Plain()
        data = Sentences() if "gradient_checkpointing" in precision else Images()
        return train(tmp_path, callbacks, model=model, dataset=data, **precision).model.state_dict()

    callback = PerSampleNormsCallback(every=2, strict=True)
    with_it, without = weights([callback]), weights([])
    assert callback.monitor.noise.steps == 4
    near = {"rtol": 0.05, "atol": 0.01} if "bf16" in precision else {"rtol": 1e-4, "atol": 1e-6}  # 8 bits
    for name in without:
        torch.testing.assert_close(with_it[name], without[name], **near)


def bert():
    return BertConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=16,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        num_labels=3,
    )


class Sentences(Images):
    """Padded sequences of different lengths."""

    def __init__(self, count=64):
        generator = torch.Generator().manual_seed(0)
        self.lengths = torch.randint(3, 13, (count,), generator=generator)
        self.ids = torch.randint(1, 50, (count, 12), generator=generator)
        self.x, self.y = self.ids, torch.randint(0, 3, (count,), generator=generator)

    def __getitem__(self, i):
        mask = (torch.arange(12) < self.lengths[i]).long()
        return {"input_ids": self.ids[i] * mask, "attention_mask": mask, "labels": self.y[i]}


class LowRank(nn.Module):
    """A frozen linear layer and its low-rank adapter, as LoRA has it."""

    def __init__(self, linear, rank=2):
        super().__init__()
        self.base = linear.requires_grad_(False)
        self.a = nn.Linear(linear.in_features, rank, bias=False)
        self.b = nn.Linear(rank, linear.out_features, bias=False)

    def forward(self, x):
        return self.base(x) + self.b(self.a(x))


def test_adapters_and_padded_sequences_with_checkpointing_are_exact(tmp_path):
    torch.manual_seed(0)
    model = BertForSequenceClassification(bert())
    model.requires_grad_(False)
    for layer in model.bert.encoder.layer:
        layer.attention.self.query = LowRank(layer.attention.self.query)
    callback = PerSampleNormsCallback(every=1, top_k=8, strict=True)
    data = Sentences()
    trainer = train(
        tmp_path, callback, model=model, dataset=data, max_steps=1, learning_rate=0.0, gradient_checkpointing=True
    )
    assert all(".a" in layer.name or ".b" in layer.name for layer in callback.monitor.layers)
    model.gradient_checkpointing_disable()
    params = [p for p in trainer.model.parameters() if p.requires_grad]
    norms = []
    for i in range(8):
        item = {k: v[None] for k, v in data[i].items()}
        grads = torch.autograd.grad(model(**item).loss, params)
        norms.append(torch.cat([g.flatten() for g in grads]).norm())
    expected = torch.stack(norms).sort(descending=True).values
    torch.testing.assert_close(callback.monitor.last.top_norm.float(), expected, rtol=1e-4, atol=1e-9)


# ---- indices ---------------------------------------------------------------------------------------------------


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


def test_a_data_set_without_a_length_or_room_for_an_index_is_refused():
    class Stream(IterableDataset):
        def __iter__(self):
            yield {}

    with pytest.raises(ValueError, match="no length"):
        with_index(Stream())
    with pytest.raises(ValueError, match="has no room for an index"):
        IndexedDataset([1, 2])[0]


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


def test_a_tracker_that_fails_is_told_once_and_the_run_goes_on(tmp_path, caplog, monkeypatch):
    from hf_clars.per_sample.reporting import Reporter

    monkeypatch.setattr(Reporter, "_to_tensorboard", lambda *a: 1 / 0)
    with caplog.at_level(logging.WARNING, LOGGER):
        trainer = train(tmp_path, PerSampleNormsCallback(every=1), report_to=["tensorboard"])
    assert trainer.state.global_step == 6
    assert sum("tensorboard took no per-sample norms" in r.getMessage() for r in caplog.records) == 1


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


# ---- bad input -------------------------------------------------------------------------------------------------


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


def test_an_evaluation_between_steps_is_not_measured(tmp_path):
    settings = {"eval_strategy": "steps", "eval_steps": 1, "max_steps": 3}
    callback = PerSampleNormsCallback(every=1, strict=True)
    args = plain_args(tmp_path, per_device_train_batch_size=8, **settings)
    Trainer(Plain(), args, train_dataset=Images(), eval_dataset=Images(16), callbacks=[callback]).train()
    assert PerSampleLog.open(tmp_path).read()["samples"].tolist() == [8, 8, 8]


# ---- loops of one's own ----------------------------------------------------------------------------------------


def test_a_plain_loop_and_an_accelerate_loop_measure_what_trainer_does(tmp_path):
    from accelerate import Accelerator
    from torch.utils.data import DataLoader

    def logs_of(run):
        torch.manual_seed(0)
        model = Plain()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        with NormMonitor(model, every=1, strict=True, folder=tmp_path / run.__name__) as monitor:
            run(model, optimizer, monitor, DataLoader(with_index(Images()), batch_size=8))
        assert hooks_on(model) == 0
        return PerSampleLog.open(tmp_path / run.__name__).read()

    def plain(model, optimizer, monitor, loader):
        for number, batch in enumerate(loader):
            last = number % 2 == 1
            with monitor.batch(batch.pop("sample_index"), last=last):
                (model(**batch)["loss"] / 2).backward()
            if last:
                optimizer.step()
                optimizer.zero_grad()

    def accelerated(model, optimizer, monitor, loader):
        accelerator = Accelerator(gradient_accumulation_steps=2, cpu=True)
        wrapped, optimizer, loader = accelerator.prepare(model, optimizer, loader)
        for batch in loader:
            with accelerator.accumulate(wrapped):
                with monitor.batch(last=accelerator.sync_gradients):
                    accelerator.backward(wrapped(**batch)["loss"])
                optimizer.step()
                optimizer.zero_grad()

    a, b = logs_of(plain), logs_of(accelerated)
    assert a["steps"].tolist() == [1, 2, 3, 4]
    assert sorted(a["top_index"][0].tolist())[-1] == 15
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-6, atol=1e-9, equal_nan=True)


def test_a_second_monitor_on_a_model_is_refused_until_the_first_is_closed():
    model = Plain()
    with NormMonitor(model), pytest.raises(ConfigError, match="Another monitor"):
        NormMonitor(model)
    NormMonitor(model).close()


def test_a_loss_scale_is_out_of_norms_and_an_overflow_leaves_the_noise_scale_alone():
    """As fp16 trains: the loss is scaled; a step whose gradients overflow is told as not finite."""

    def measured(scale, overflows):
        torch.manual_seed(0)
        model, data = Plain(), Images(16)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale, enabled=scale != 1)
        found = []
        with NormMonitor(model, every=1, strict=True) as monitor:
            for number in range(3):
                with monitor.batch(loss_scale=scaler.get_scale()):
                    loss = model(data.x, data.y)["loss"]
                    scaler.scale(loss * float("inf") if number == 1 and overflows else loss).backward()
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad()
                found.append(monitor.last)
        return found, monitor.noise.read().value

    plain, _ = measured(1, overflows=False)
    scaled, value = measured(1024.0, overflows=True)
    for one, other in ((plain[0], scaled[0]), (plain[1], scaled[2])):  # the overflow's step was skipped
        for name in ("sample_square", "batch_square", "top_norm", "quantiles"):
            torch.testing.assert_close(getattr(other, name), getattr(one, name), rtol=1e-4, atol=0, equal_nan=True)
    assert not scaled[1].finite
    assert bool(value.isfinite().any())
