"""Promise: the verdict on SignalLARS is what the rule written before the runs says, and open where runs lack."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from research.cifar10.choosing import RATES, SEEDS, Runs, Seeds, ours, rivals
from research.cifar10.plan import Done, stages
from research.cifar10.settings import Settings
from research.cifar10.verdict import MET, NOT_MET, OPEN, decide, in_setting, words

RULE = yaml.safe_load((Path(__file__).parents[1] / "research" / "cifar10" / "verdict.yaml").read_text("utf-8"))


def row(settings, accuracy):
    return {**vars(settings), "accuracy": accuracy, "device": "cuda"}


def run(parts, accuracy):
    """Rows of all runs that these parts of the plan do, where `accuracy` decides how they end."""
    done, rows = Done(), []
    for stage in stages(parts):
        for settings in stage(done):
            rows.append(row(settings, accuracy(settings)))
            done.add(rows[-1])
    return rows


def model(gap=0.0, ours_falls=1.0, rival_falls=1.0, seed_noise=0.1):
    """Accuracy peaks at 0.064; ours lies `gap` above; both fall by so many points at twice and half the rate."""

    def accuracy(s):
        away = abs(math.log2(s.rate / 0.064))
        spread = seed_noise * ((s.seed + 1) % 3 - 1)
        if s.method == "signal_lars":
            return 70 + gap - ours_falls * away + spread
        return 70 - rival_falls * away - (0 if s.warmup == 3 else 0.3 if s.warmup else 3) + spread

    return accuracy


def states(rows):
    return [clause.state for clause in decide(rows).clauses]


def test_the_program_has_the_rules_numbers():
    text = " ".join([*RULE["better_if_any"], RULE["seeds"], RULE["rival"]])
    for words_of_the_rule in ("at least 0.5 points above", "mean +- 2 standard errors", "B = 512, 2048 and 8192",
                              "5 at the best rate", "chosen on seed 0", "1, 3 or 5 epochs"):  # fmt: skip
        assert words_of_the_rule in text
    assert RULE["batch_size"] == 2048
    assert len(SEEDS) == 5
    assert 0 not in SEEDS
    assert len(RATES) == 7
    assert Seeds(Settings("lars", 1.0), (1.0, 3.0)).interval == pytest.approx((0.0, 4.0))


def test_one_part_of_the_plan_decides_the_first_two_clauses():
    rows = run(["verdict"], model())
    assert len(rows) == 116
    assert states(rows)[:2] == [NOT_MET, NOT_MET]
    assert states(rows)[2] == OPEN
    warmups = {(r["network"], r["warmup"]) for r in rows if r["method"] == "lars"}
    assert warmups == {(network, w) for network in ("resnet8", "resnet20") for w in (1.0, 3.0, 5.0)}


def test_both_parts_leave_nothing_open():
    assert OPEN not in states(run(["verdict", "one-setting"], model()))
    assert decide(run(["verdict", "one-setting"], model(gap=-2, ours_falls=2))).state == "not better"


def test_a_clear_lead_on_both_networks_is_better():
    verdict = decide(run(["verdict"], model(gap=0.8)))
    assert verdict.clauses[0].state == MET
    assert verdict.state == "better"


@pytest.mark.parametrize(("gap", "noise", "state"), [(0.51, 0.1, MET), (0.49, 0.1, NOT_MET), (0.8, 1.5, NOT_MET)])
def test_the_lead_must_be_half_a_point_and_the_intervals_apart(gap, noise, state):
    assert states(run(["verdict"], model(gap=gap, seed_noise=noise)))[0] == state


def test_a_lead_on_one_network_is_none():
    def accuracy(s):
        return model(gap=0.8 if s.network == "resnet8" else -0.8)(s)

    assert states(run(["verdict"], accuracy))[:2] == [NOT_MET, NOT_MET]


@pytest.mark.parametrize(
    ("falls", "gap", "state"), [(0.5, 0, MET), (0.55, 0, NOT_MET), (0.4, -0.45, MET), (0.4, -0.55, NOT_MET)]
)
def test_half_the_rivals_loss_and_no_more_than_half_a_point_below_is_better_too(falls, gap, state):
    assert states(run(["verdict"], model(gap=gap, ours_falls=falls)))[1] == state


def test_seed_zero_chooses_and_does_not_decide():
    def accuracy(s):
        lucky = 5 if s.method == "signal_lars" and s.seed == 0 else 0
        return model(gap=-1)(s) + lucky

    assert states(run(["verdict"], accuracy))[:2] == [NOT_MET, NOT_MET]


def test_the_rival_is_the_best_of_its_warmups_at_its_own_rate():
    def accuracy(s):
        return model()(s) + (3 if (s.method, s.warmup, s.rate) == ("lars", 5.0, 0.128) else 0)

    found = decide(run(["verdict"], accuracy)).clauses[0].found
    assert all("a = 0.128, warmup 5" in text for text in found)


def test_a_run_that_lacks_is_named_and_leaves_the_clause_open():
    rows = run(["verdict"], model(gap=0.8))
    lacking = replace(ours(network="resnet20")[0], rate=0.064, seed=4)
    rows = [r for r in rows if Settings.of(r) != lacking]
    clause = decide(rows).clauses[0]
    assert clause.state == OPEN
    assert clause.missing == [
        "resnet20, B = 2,048: SignalLARS without warmup at 0.064 on 5 seeds beside seed 0 (4 there)"
    ]
    assert clause.missing[0] in words(decide(rows))


def test_a_network_on_which_it_fails_decides_though_the_other_was_not_run():
    rows = [r for r in run(["verdict"], model(gap=-1)) if r["network"] == "resnet8"]
    assert states(rows)[:2] == [NOT_MET, NOT_MET]


@pytest.mark.parametrize("change", [{"device": "cpu"}, {"epochs": 4}, {"width": 8}])
def test_runs_of_another_setting_do_not_count(change):
    rows = [r | change for r in run(["verdict"], model(gap=0.8))]
    assert not any(in_setting(r) for r in rows)
    assert states(rows) == [OPEN, OPEN, OPEN]


def shifted(ours_moves, rival_moves):
    """The best rate of each moves by so many octaves a 4-fold batch size."""

    def accuracy(s):
        moved = math.log2(s.batch / 2048) / 2
        moves = ours_moves if s.method == "signal_lars" else rival_moves
        return model()(replace(s, rate=s.rate / 2 ** (moves * moved)))

    return accuracy


@pytest.mark.parametrize(("ours_moves", "rival_moves", "state"), [(0, 2, MET), (0, 0, NOT_MET), (2, 2, NOT_MET)])
def test_one_setting_for_all_batch_sizes(ours_moves, rival_moves, state):
    rows = run(["verdict", "one-setting"], shifted(ours_moves, rival_moves))
    assert states(rows)[2] == state


def test_rates_tie_to_the_smaller():
    runs = Runs([row(replace(s, rate=rate), 50.0) for s in rivals() for rate in (0.128, 0.064)])
    assert runs.best(rivals()).rate == 0.064
