"""Promise: every arm of a study has the same budget, and its value is chosen by held-out images alone."""

import textwrap
from pathlib import Path

import pytest
import yaml

from hf_clars.errors import ConfigError
from research.study.plan import best, two_more
from research.study.study_file import read_study

STUDY = """
about: small
common: {dataset: tiny, batch_size: 8, micro_batch: 4, epochs: 2, image_size: 8}
networks:
  cnn: {model: clars-cnn}
  fcn: {model: fcn5}
arms:
  mnag: {method: nag, tune: learning_rate, values: [0.1, 1.0, 0.01]}
  clars: {method: clars, tune: eta, values: [0.01, 0.1, 1.0]}
held_out: 6
extend: edge
seeds: [1, 2]
"""


def study(tmp_path, text=STUDY, **more):
    path = tmp_path / "study.yaml"
    path.write_text(textwrap.dedent(text), encoding="utf-8")
    return read_study(path, **more)


class Results:
    """Results that a function of the run decides: accuracy on held-out images, or None for a divergence."""

    def __init__(self, accuracy):
        self.accuracy, self.found = accuracy, {}

    def finish(self, runs):
        for run in runs:
            value = self.accuracy(run)
            diverged = None if value is not None else 3
            self.found[run.settings.key] = {"diverged_at": diverged, "accuracy": [0.99, value] if value else []}

    def __call__(self, key):
        return self.found.get(key)


def done_in_rounds(plan, accuracy):
    """All runs, finished in the rounds in which they become known."""
    results = Results(accuracy)
    while len(results.found) < len(plan.known_runs(results)):
        results.finish(plan.known_runs(results))
    return plan.known_runs(results), results


def stages(runs, name, network="cnn"):
    chosen = [run for run in runs if run.arm.name == name and run.arm.network == network]
    return {stage: [run for run in chosen if run.stage == stage] for stage in ("grid", "extension", "final")}


def peak_at(where):
    """Accuracy falls with the distance (in decades) from a value that depends on the arm."""
    import math

    return lambda run: 0.9 - 0.1 * abs(math.log10(run.value / where[run.arm.name]))


def test_an_inner_best_needs_no_extension(tmp_path):
    runs, _ = done_in_rounds(study(tmp_path), peak_at({"mnag": 0.1, "clars": 0.1}))
    for name in ("mnag", "clars"):
        found = stages(runs, name)
        assert [run.value for run in found["grid"]] == sorted(run.value for run in found["grid"])
        assert not found["extension"]
        assert [(run.value, run.settings.seed) for run in found["final"]] == [(0.1, 1), (0.1, 2)]


def test_one_edge_extends_every_arm_of_that_network_alike(tmp_path):
    runs, _ = done_in_rounds(study(tmp_path), peak_at({"mnag": 10.0, "clars": 0.1}))
    mnag, clars = stages(runs, "mnag"), stages(runs, "clars")
    assert [run.value for run in mnag["extension"]] == [10.0, 100.0]
    assert [run.value for run in clars["extension"]] == [0.03162, 0.3162]
    assert {run.value for run in mnag["final"]} == {10.0}
    assert len(mnag["grid"] + mnag["extension"]) == len(clars["grid"] + clars["extension"])


def test_extension_in_any_case(tmp_path):
    plan = study(tmp_path, STUDY.replace("extend: edge", "extend: always"))
    runs, _ = done_in_rounds(plan, peak_at({"mnag": 0.1, "clars": 0.1}))
    assert [run.value for run in stages(runs, "mnag")["extension"]] == [0.03162, 0.3162]
    assert len(runs) == plan.most_runs()


def test_extension_downwards(tmp_path):
    runs, _ = done_in_rounds(study(tmp_path), peak_at({"mnag": 0.0001, "clars": 0.1}))
    assert [run.value for run in stages(runs, "mnag")["extension"]] == [0.0001, 0.001]


def test_networks_are_extended_apart(tmp_path):
    def accuracy(run):
        return peak_at({"mnag": 10.0 if run.arm.network == "cnn" else 0.1, "clars": 0.1})(run)

    runs, _ = done_in_rounds(study(tmp_path), accuracy)
    assert stages(runs, "clars", "cnn")["extension"]
    assert not stages(runs, "clars", "fcn")["extension"]


def test_a_diverged_run_is_never_chosen_and_of_equals_the_smallest_is(tmp_path):
    plan = study(tmp_path)
    results = Results(lambda run: None if run.value == 0.1 else 0.5)
    results.finish(plan.known_runs(results))
    grid = stages(plan.known_runs(results), "mnag")["grid"]
    assert best(grid, results).value == 0.01
    results = Results(lambda run: None)
    results.finish(plan.known_runs(results))
    assert best(grid, results).value == 0.01  # all diverged: the next values to try are below
    assert two_more(grid, results) == [0.0001, 0.001]


def test_the_last_epoch_decides_not_the_best(tmp_path):
    """`Results` gives every run 0.99 in its first epoch."""
    runs, results = done_in_rounds(study(tmp_path), peak_at({"mnag": 0.1, "clars": 0.1}))
    assert best(stages(runs, "mnag")["grid"], results).value == 0.1


def test_grid_runs_hold_images_out_and_final_runs_train_on_all(tmp_path):
    runs, _ = done_in_rounds(study(tmp_path), peak_at({"mnag": 10.0, "clars": 0.1}))
    assert {run.settings.held_out for run in runs if run.stage != "final"} == {6}
    assert {run.settings.held_out for run in runs if run.stage == "final"} == {0}
    assert {run.settings.seed for run in runs if run.stage != "final"} == {0}


def test_nothing_is_run_twice_and_the_count_is_known_before(tmp_path):
    plan = study(tmp_path)
    runs, _ = done_in_rounds(plan, peak_at({"mnag": 10.0, "clars": 0.1}))
    keys = [run.settings.key for run in runs]
    assert len(keys) == len(set(keys))
    assert len([run for run in runs if run.arm.network == "cnn"]) == plan.most_runs() / 2


def test_only_some_networks_or_another_data_set(tmp_path):
    chosen = study(tmp_path, networks=["fcn"], dataset="other")
    assert {arm.network for arm in chosen.arms} == {"fcn"}
    assert {arm.base.dataset for arm in chosen.arms} == {"other"}


def test_arms_without_tuning_run_their_seeds_at_every_batch_size_and_their_own_once(tmp_path):
    text = """
    common: {dataset: tiny, epochs: 1, micro_batch: 4}
    networks: {cnn: {model: clars-cnn}}
    batch_sizes: [8, 16]
    arms: {lars: {method: lars, eta: 0.001}, small: {method: nag, batch_size: 4}}
    """
    runs = study(tmp_path, text).known_runs(lambda key: None)
    assert [(r.arm.name, r.settings.batch_size, r.stage) for r in runs] == [
        ("lars", 8, "final"),
        ("small", 4, "final"),
        ("lars", 16, "final"),
    ]
    assert runs[0].settings.rate == pytest.approx(0.1 * 8 / 128)


BROKEN = {
    "unknown setting": ("epochs: 2", "epoch: 2", "Did you mean 'epochs'"),
    "unknown method": ("method: clars", "method: klars", "Did you mean"),
    "unknown section": ("held_out: 6", "heldout: 6", "Did you mean 'held_out'"),
    "one value": ("values: [0.01, 0.1, 1.0]", "values: [0.01]", "at least two"),
    "tuned and set": ("method: clars,", "method: clars, eta: 1.0,", "tuned and set"),
    "nothing held out": ("held_out: 6", "", "set held_out"),
    "no such extension": ("extend: edge", "extend: true", "never, edge, always"),
    "uneven passes": ("micro_batch: 4", "micro_batch: 3", "not a multiple"),
    "no epochs": ("epochs: 2,", "", "lacks epochs"),
    "no arms": ("arms:", "seeds2:", "unknown section"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_cannot_work_is_refused_with_advice(name, tmp_path):
    old, new, message = BROKEN[name]
    assert old in STUDY
    with pytest.raises(ConfigError, match=message):
        study(tmp_path, STUDY.replace(old, new))


CONFIGS = sorted((Path(__file__).parents[1] / "configs" / "study").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_parses_and_names_real_things(path):
    """Methods, networks and settings exist (`read_study` checks them), every network can be built, nothing is local."""
    from hf_clars.models import build_model, model_names

    plan = read_study(path)
    assert plan.known_runs(lambda key: None)
    for arm in plan.arms:
        assert arm.base.model in model_names()
    text = path.read_text(encoding="utf-8")
    assert "/tmp" not in text
    assert set(yaml.safe_load(text)) >= {"about", "networks", "arms"}
    for group in plan.groups:
        if group[0].base.in_memory:
            base = group[0].base
            build_model(
                base.model,
                num_labels=10,
                image_size=base.image_size,
                num_channels=base.num_channels,
                model_kwargs=base.model_kwargs,
            )


def test_there_are_configs():
    assert len(CONFIGS) >= 1
