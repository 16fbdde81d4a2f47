"""Promise: on a GPU what was measured decides a layer's form; all processes and resumed runs take the same."""

import json
import logging
from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch import nn

from hf_clars.errors import ConfigError
from hf_clars.grad_norms.choice import FormChoices, forms, layer_forms, tables, timing
from hf_clars.grad_norms.rules.costs import SHIPPED, WeightUse, fastest, predicted
from hf_clars.trainer import trainer
from hf_clars.trainer.callbacks import SharedFormsCallback
from tests.processes import GROUP, leave, results_of_two
from tests.trainer_kit import Images, Plain, clars_args

pytestmark = pytest.mark.usefixtures("fresh_forms")
USE = WeightUse(3, 20, 16, 24, element_size=2)
H100 = tables.machine() | SHIPPED["machine"]


def choice_of(choices, kind="linear", use=USE, runs=None):
    choices.take(kind, use, runs)
    return choices.look_up(kind, use)


def clock_of(**times):
    """Forms that take this long; None: there is no memory for it."""

    def run(ms):
        if ms is None:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return ms

    return {form: partial(run, ms) for form, ms in times.items()}


# ---- in which order ----------------------------------------------------------------------------------------------


def test_memory_then_disk_then_shipped_then_a_measurement_then_the_model(monkeypatch):
    monkeypatch.setattr(timing, "_clock", lambda run: run())
    name, times = next((n, t) for n, t in SHIPPED["times"]["linear"].items() if t["gram"] < 0.8 * t["product"])
    use = WeightUse.named(name)
    unknown = choice_of(FormChoices(), use=USE)
    assert (unknown.why, unknown.form) == ("model", fastest(predicted("linear", USE)))
    other = "gram" if unknown.form == "product" else "product"
    measured = choice_of(FormChoices(60), runs=clock_of(**{other: 1.0, unknown.form: 2.0}))
    assert (measured.why, measured.form) == ("measured", other)
    assert measured.measured == {other: 1.0, unknown.form: 2.0}
    assert choice_of(FormChoices(), use=USE).why == "disk"
    ships = choice_of(FormChoices(60), use=use, runs=clock_of(gram=9.0, product=1.0))
    assert (ships.why, ships.form, ships.measured) == ("shipped", "gram", times)
    tables.write({"linear": {name: {"gram": 5.0, "product": 4.0}}})
    on_disk = choice_of(FormChoices(), use=use)
    assert (on_disk.why, on_disk.form) == ("disk", "product")
    resumed = FormChoices()
    resumed.restore({"linear": {name: "gram"}})
    assert (choice_of(resumed, use=use).why, choice_of(resumed, use=use).form) == ("memory", "gram")


def test_a_shape_is_decided_once(monkeypatch):
    monkeypatch.setattr(timing, "_clock", lambda run: run())
    choices = FormChoices(60)
    assert choices.take("linear", USE, clock_of(gram=1.0, product=2.0)) == "gram"
    assert choices.take("linear", USE, clock_of(gram=2.0, product=1.0)) == "gram"


def test_nothing_is_measured_unless_it_is_allowed_and_no_longer_than_that(monkeypatch):
    def forbidden():
        raise AssertionError("measured")

    runs = {"gram": forbidden, "product": forbidden}
    assert choice_of(FormChoices(), runs=runs).why == "model"
    monkeypatch.setenv(tables.SECONDS, "0.05")
    monkeypatch.setattr(timing, "_clock", lambda run: run())
    monkeypatch.setattr(forms, "milliseconds", lambda runs: (timing.milliseconds(runs)[0], 0.06))
    choices = FormChoices()
    assert choice_of(choices, runs=clock_of(gram=1.0, product=2.0)).why == "measured"
    assert choice_of(choices, use=WeightUse(4, 20, 16, 24), runs=runs).why == "model"
    monkeypatch.setenv(tables.SECONDS, "yes")
    with pytest.raises(ConfigError, match=f"{tables.SECONDS}='yes'"):
        choice_of(FormChoices(), use=WeightUse(5, 20, 16, 24), runs=runs)


def test_a_form_that_finds_no_memory_is_dropped_and_tried_again_another_day(monkeypatch):
    monkeypatch.setattr(timing, "_clock", lambda run: run())
    best = fastest(predicted("linear", USE))
    other = "gram" if best == "product" else "product"
    assert choice_of(FormChoices(60), runs=clock_of(**{best: None, other: 3.0})).form == other
    nothing = choice_of(FormChoices(60), use=USE, runs=clock_of(gram=None, product=None))
    assert (nothing.why, nothing.form) == ("model", best)
    assert tables.read() == {}


def test_the_clock_tells_a_long_form_from_a_short_one():
    a = torch.ones(400, 400)
    times, seconds = timing.milliseconds({"gram": lambda: a @ a @ a @ a @ a, "product": lambda: None})
    assert times["gram"] > times["product"] > 0
    assert seconds > times["gram"] / 1e3


@pytest.mark.parametrize("changed", ["torch", "triton", "driver", "card"])
def test_times_of_another_version_are_ignored_and_it_is_said_once(monkeypatch, caplog, changed):
    tables.write({"linear": {str(USE): {"gram": 1.0, "product": 2.0}}})
    monkeypatch.setattr(tables, "machine", lambda: {**H100, changed: "other"})
    choices = FormChoices()
    with caplog.at_level(logging.WARNING):
        assert choice_of(choices).why == "model"
        choice_of(choices, use=WeightUse(4, 20, 16, 24))
    assert [changed in r.message and "ignored" in r.message for r in caplog.records] == [True]


@pytest.mark.parametrize(
    "content",
    ["{", "[]", '{"machine": {}}', json.dumps({"machine": H100, "times": {"linear": {str(USE): {"rows": 1.0}}}})],
)
def test_a_file_that_is_none_is_ignored_and_it_is_said(tmp_path, caplog, content):
    (tmp_path / "forms.json").write_text(content)
    assert choice_of(FormChoices()).why == "model"
    assert "no file of measured forms" in caplog.text


def test_a_place_that_cannot_be_written_does_not_end_a_run(monkeypatch, tmp_path, caplog):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(tables.PLACE, str(tmp_path / "file" / "forms.json"))
    monkeypatch.setattr(timing, "_clock", lambda run: run())
    assert choice_of(FormChoices(60), runs=clock_of(gram=1.0, product=2.0)).form == "gram"
    assert tables.PLACE in caplog.text


def test_the_shipped_times_hold_for_their_card_only(monkeypatch):
    use = WeightUse.named(next(iter(SHIPPED["times"]["linear"])))
    assert choice_of(FormChoices(), use=use).why == "shipped"
    monkeypatch.setattr(tables, "machine", lambda: {**H100, "card": "NVIDIA A100"})
    monkeypatch.setattr(tables, "capability", lambda: "8.0")
    assert choice_of(FormChoices(), use=use).why == "model"


def test_a_card_of_the_same_capability_takes_the_shipped_times_where_only_the_model_is_left(monkeypatch):
    monkeypatch.setattr(tables, "machine", lambda: {**H100, "card": "NVIDIA H200"})
    monkeypatch.setattr(tables, "capability", lambda: "9.0")
    monkeypatch.setattr(timing, "_clock", lambda run: run())
    name, times = next((n, t) for n, t in SHIPPED["times"]["linear"].items() if t["gram"] < 0.8 * t["product"])
    use = WeightUse.named(name)
    like = choice_of(FormChoices(), use=use)
    assert (like.why, like.form, like.measured) == ("shipped, like card", "gram", times)
    assert choice_of(FormChoices(), use=USE).why == "model"
    anew = FormChoices()
    anew.measure_anew(0.0)
    assert choice_of(anew, use=use).why == "model"
    own = choice_of(FormChoices(60), use=use, runs=clock_of(gram=2.0, product=1.0))
    assert (own.why, own.form) == ("measured", "product")
    on_disk = choice_of(FormChoices(), use=use)
    assert (on_disk.why, on_disk.form, on_disk.measured) == ("disk", "product", {"gram": 2.0, "product": 1.0})


def test_a_machine_without_a_card_has_no_capability(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    tables.capability.cache_clear()
    assert tables.capability() == "none"
    tables.capability.cache_clear()


# ---- for people, from run to run, from process to process --------------------------------------------------------


def test_one_call_lists_form_reason_and_times_of_every_layer_and_leaves_the_model_alone(fresh_forms, monkeypatch):
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(2), nn.Linear(36, 7), nn.Flatten(), nn.Linear(56, 2)
    )
    before = {name: t.clone() for name, t in model.state_dict().items()}
    x = torch.randn(2, 3, 8, 8)
    shown = str(layer_forms(model, x)).splitlines()
    assert [line.split()[0] for line in shown] == ["layer", "0", "3", "5"]
    assert "model" in shown[1]
    assert "outer" in shown[3]
    monkeypatch.setattr("hf_clars.grad_norms.rules.linear.on_cuda", lambda t: True)
    monkeypatch.setattr("hf_clars.grad_norms.rules.linear.form_choices", fresh_forms)
    name = str(WeightUse(2, 8, 36, 7))
    tables.write({"torch": {name: {"gram": 0.25, "product": 0.125}}})
    row = layer_forms(model, x).rows[1]
    assert (row.layer, row.use, row.choice.form, row.choice.why) == ("3", name, "product", "disk")
    assert "gram 0.250 product 0.125" in str(layer_forms(model, x))
    assert row.choice.predicted == predicted("torch", WeightUse(2, 8, 36, 7))
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert all(m.training and not m._forward_hooks for m in model.modules())
    assert fresh_forms.export() == {}


def test_a_resumed_run_takes_the_same_forms_through_plain_json(fresh_forms):
    first, second = FormChoices(), FormChoices()
    first.restore({"linear": {str(USE): "gram"}})
    choice_of(first, "torch", WeightUse(2, 8, 36, 7))
    second.restore(json.loads(json.dumps(first.export())))
    assert choice_of(second).form == "gram"
    assert second.export() == first.export()
    assert choice_of(second, "torch", WeightUse(2, 8, 36, 7)).why == "memory"
    for stored in ({"linear": {"B": "magic"}}, {"magic": {}}, {"linear": {"B": "grouped"}}, {"cpu": {"B": "gram"}}):
        with pytest.raises(ConfigError, match="not of this hf_clars"):
            second.restore(stored)


def work(rank, world, port, folder):
    """Rank 0 has measured, and knows times on its disk that rank 1 does not."""
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    tables.place = lambda: None
    timing._clock = lambda run: run()
    choices = FormChoices(60)
    best = fastest(predicted("linear", USE))
    other = "gram" if best == "product" else "product"
    later, seen = WeightUse(4, 20, 16, 24), []
    choices._known = {"disk": {"linear": {str(later): {best: 2.0, other: 1.0}}} if rank == 0 else {}}
    seen.append(choices.take("linear", USE, clock_of(**{other: 1.0, best: 2.0})))
    choices.share()
    seen += [choices.take("linear", USE), choices.take("linear", later), choices.look_up("linear", USE).why]
    leave({"seen": seen, "best": best, "other": other}, folder, rank)


@GROUP
@pytest.mark.distributed
def test_only_rank_0_measures_and_all_take_its_forms(tmp_path):
    first, second = results_of_two(work, tmp_path)
    best, other = first["best"], first["other"]
    assert first["seen"] == [other, other, other, "measured"]
    assert second["seen"] == [best, other, other, "memory"]


def test_a_process_alone_shares_with_nobody(fresh_forms):
    fresh_forms.take("linear", USE)
    fresh_forms.share()
    assert next(iter(fresh_forms))[2].why == "model"


def test_training_shares_at_its_begin_and_after_the_first_step_on_gpus_only(monkeypatch, fresh_forms):
    shared = []
    monkeypatch.setattr(FormChoices, "share", lambda self: shared.append(self))
    for gpu, times in ((False, []), (True, [fresh_forms] * 2)):
        monkeypatch.setattr(torch.cuda, "is_available", lambda gpu=gpu: gpu)
        callback = SharedFormsCallback()
        callback.on_train_begin(None, None, None)
        for _ in range(3):
            callback.on_step_end(None, None, None)
        assert shared == times


def test_a_checkpoint_keeps_the_forms_and_a_run_that_resumes_takes_them(tmp_path, fresh_forms, caplog):
    def made():
        args = clars_args(tmp_path, max_steps=2, save_strategy="steps", save_steps=1)
        return trainer.ClarsTrainer(model=Plain(), args=args, train_dataset=Images(16))

    made().train()
    manifest = tmp_path / "checkpoint-1" / "checkpoint.json"
    assert "forms" not in json.loads(manifest.read_text())["settings"]  # a CPU's
    fresh_forms.restore({"linear": {str(USE): "gram"}})
    made().train()
    assert json.loads(manifest.read_text())["settings"]["forms"] == {"linear": {str(USE): "gram"}}
    fresh_forms.restore({"linear": {str(USE): "product"}})
    made().train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert choice_of(fresh_forms).form == "gram"
    assert "other settings" not in caplog.text
