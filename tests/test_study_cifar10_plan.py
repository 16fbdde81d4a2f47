"""Promise: the CIFAR-10 study does each run once, goes on where it stopped, and gives every method the same budget."""

import json
from collections import Counter
from pathlib import Path

import pytest

from research.cifar10.plan import BATCHES, PARTS, Done, baselines, stages, stages_of, variants
from research.cifar10.settings import METHODS, Settings, kind
from tests.test_study_cifar10_verdict import model, run

CIFAR10 = Path(__file__).parents[1] / "research" / "cifar10"


@pytest.mark.parametrize("part", PARTS)
def test_a_part_does_no_run_twice_and_leaves_nothing_for_a_second_time(part):
    rows = run([part], model())
    settings = [Settings.of(r) for r in rows]
    assert len(settings) == len(set(settings))
    assert not any(stage(Done(rows)) for stage in stages([part]))


def test_parts_do_not_repeat_one_anothers_runs():
    settings = [Settings.of(r) for r in run(list(PARTS), model())]
    assert len(settings) == len(set(settings))


@pytest.mark.parametrize("part", PARTS)
def test_a_part_that_was_cut_off_goes_on_with_what_is_left(part):
    rows = run([part], model())
    done, again = Done(rows[:20]), []
    for stage in stages([part]):
        for settings in stage(done):
            again.append(settings)
            done.add({**vars(settings), "accuracy": model()(settings)})
    assert {Settings.of(r) for r in rows} == {Settings.of(r) for r in rows[:20]} | set(again)
    assert not set(again) & {Settings.of(r) for r in rows[:20]}


def test_every_baseline_has_seven_rates_and_five_seeds_and_all_methods_are_there():
    rows = run(["baselines"], model())
    on_zero = Counter(kind(r) for r in rows if r["seed"] == 0)
    on_others = Counter(kind(r) for r in rows if r["seed"] != 0)
    assert set(on_zero.values()) == {7}
    assert set(on_others.values()) == {5}
    assert len(on_zero) == len(baselines()) == 12
    known = {s.method for s, _ in baselines()} | {"lars_times_ratio"}  # the last is of the prototype's runs alone
    assert known == set(METHODS)
    assert {s.schedule for s, _ in baselines() if s.method == "clars"} == {"poly-2", "constant", "cosine", "steps"}


def test_the_variants_are_n_powers_averages_and_the_derived_factor_with_its_momentum():
    found = variants()
    assert {s.n for s in found if s.form == "gain"} >= {4.0, 16.0, 64.0}
    assert {s.power for s in found if s.form == "gain"} == {0.5, 1.0, 2.0}
    assert {s.decay for s in found} >= {0.8, 0.9, 0.99}
    derived = {s.momentum: s.n for s in found if s.form == "sum" and s.power == 0.5 and s.n != 50}
    assert derived == pytest.approx({0.8: 9.0, 0.9: 19.0, 0.95: 39.0})


def test_one_setting_is_tuned_at_one_batch_size_and_run_untuned_at_all():
    rows = run(["batches"], model())
    best = {kind({**r, "batch": 512}) for r in rows}
    assert {r["batch"] for r in rows} == set(BATCHES)
    moved = [r for r in rows if r["method"] == "signal_lars" and r["epochs"] == 12 and r["rate"] == 0.064]
    assert {r["batch"] for r in moved} == set(BATCHES)
    nesterov = {r["batch"]: r["rate"] for r in rows if r["method"] == "nag" and r["epochs"] == 12 and r["batch"] != 512}
    assert len({rate / batch for batch, rate in nesterov.items()}) == 1
    updates = {(r["batch"], r["epochs"]): r["epochs"] / r["batch"] for r in rows if r["epochs"] != 12}
    assert set(updates.values()) == {12 / 512}
    assert all(r["chunk"] <= r["batch"] for r in rows)
    assert len(best) >= 5


def test_a_line_that_a_killed_run_cut_off_is_done_again(tmp_path):
    settings = Settings("lars", 0.1)
    line = json.dumps({**vars(settings), "accuracy": 50.0})
    (tmp_path / "runs.jsonl").write_text(line + "\n" + line[:20], encoding="utf-8")
    done = Done.read([tmp_path / "runs.jsonl"])
    assert settings in done.runs
    assert len(done.runs.accuracy) == 1


@pytest.mark.parametrize("path", sorted(set(CIFAR10.glob("*.yaml")) - {CIFAR10 / "verdict.yaml"}), ids=lambda p: p.stem)
def test_a_plan_in_a_file_names_runs_that_exist(path):
    found = [settings for stage in stages_of(path) for settings in stage(Done())]
    assert found
    assert len(found) == len(set(found))
