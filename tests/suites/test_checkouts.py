"""Promise: what passes in the field's own suites with their classes passes with ours, but for what is listed.

Set HF_CLARS_SUITES to a folder with checkouts (`transformers`, `timm`, `pytorch`, `accelerate`, `peft`, `trl`,
`lightning`), each of the version that is installed.
"""

import pytest

from tests.suites.checkouts import SUITES, Suite, checkout_of, new_failures, outcomes, read_report


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("suite", SUITES, ids=lambda s: f"{s.name}-{s.tests[0].rpartition('/')[2]}")
def test_suite(suite, tmp_path):
    checkout = checkout_of(suite)
    if checkout is None:
        pytest.skip(f"no checkout of {suite.name}: set HF_CLARS_SUITES to a folder that holds it")
    baseline = outcomes(suite, checkout, "", tmp_path / "baseline.xml")
    assert "passed" in baseline.values(), "nothing passes with the original classes: the baseline says nothing"
    ours = outcomes(suite, checkout, suite.stand_in, tmp_path / "ours.xml")
    assert not new_failures(suite, baseline, ours)


# What the comparison itself promises, on a suite made here.
OWN_TEST = """
import torch

def problem():
    w = torch.nn.Parameter(torch.ones(3, 2))
    return w, lambda: (w @ torch.ones(2)).square().sum()

def test_goes_down():
    w, loss = problem()
    optimizer = torch.optim.SGD([w], lr=0.01, momentum=0.9, dampening=0.0)
    first = loss(); first.backward(); optimizer.step()
    assert loss() < first

def test_is_torchs_own():
    assert torch.optim.SGD.__module__.startswith("torch.")

def test_figures():
    assert torch.optim.SGD.__module__.startswith("torch.")

def test_fails_anyway():
    assert False
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    folder = tmp_path / "own" / "tests"
    folder.mkdir(parents=True)
    (folder / "test_own.py").write_text(OWN_TEST)
    monkeypatch.setenv("HF_CLARS_SUITES", str(tmp_path))
    return Suite("own", ("tests/test_own.py",), "nag", expected={"*figures*": "the figures are SGD's"})


def test_a_new_failure_is_reported_and_an_expected_or_an_old_one_is_not(own, tmp_path):
    checkout = checkout_of(own)
    baseline = outcomes(own, checkout, "", tmp_path / "a.xml")
    ours = outcomes(own, checkout, "nag", tmp_path / "b.xml")
    assert sorted(baseline.values()) == ["failed", "passed", "passed", "passed"]
    assert [t.rpartition("::")[2] for t in new_failures(own, baseline, ours)] == ["test_is_torchs_own"]


def test_a_checkout_of_another_version_is_named(own, tmp_path):
    with pytest.raises(FileNotFoundError, match="test_other"):
        outcomes(Suite("own", ("tests/test_other.py",), "nag"), checkout_of(own), "", tmp_path / "a.xml")


def test_a_test_that_is_gone_counts_as_failed(own, tmp_path):
    assert new_failures(own, {"a::b": "passed"}, {}) == ["a::b"]


def test_reports_are_read(tmp_path):
    report = tmp_path / "r.xml"
    report.write_text(
        '<testsuites><testsuite><testcase classname="m" name="a"/>'
        '<testcase classname="m" name="b"><failure/></testcase>'
        '<testcase classname="m" name="c"><skipped/></testcase></testsuite></testsuites>'
    )
    assert read_report(report) == {"m::a": "passed", "m::b": "failed", "m::c": "skipped"}
