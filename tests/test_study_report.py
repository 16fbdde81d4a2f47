"""Promise: tables and pictures are made from the kept runs alone, and each figure can be recomputed from them."""

import math
import statistics
from pathlib import Path

import numpy as np
import pytest

from hf_clars.records import RecordError
from research.study import driver
from research.study.layer_summary import over_epochs
from research.study.parquet import read_parquet
from research.study.report import accuracy_text, put_between_markers, results_text, verdict
from research.study.report_files import write_pages, write_report, write_why
from research.study.results import ResultsFolder
from research.study.rows import COLUMNS, by_arm, epochs_to
from research.study.study_file import read_study
from research.study.why import early_over_late, ratio_sentence, robustness_table
from tests.test_study_resume import STUDY, data  # noqa: F401 - a fixture


@pytest.fixture(scope="module")
def report(data, tmp_path_factory):  # noqa: F811 - the fixture
    """(study, results folder, report folder) of a whole tiny study."""
    home = tmp_path_factory.mktemp("report")
    (home / "study.yaml").write_text(STUDY, encoding="utf-8")
    study = read_study(home / "study.yaml")
    driver.work(study, home / "results", data, 1)
    files = write_report([study], home / "results", home / "report")
    assert all(file.stat().st_size for file in files)
    return study, ResultsFolder(home / "results"), home / "report"


def test_every_run_is_kept_with_its_curve(report):
    study, folder, output = report
    rows = read_parquet(output / "runs.parquet")
    runs = study.known_runs(folder.get)
    assert [row["key"] for row in rows] == [run.settings.key for run in runs]
    assert set(rows[0]) == set(COLUMNS)
    for row in rows:
        kept = folder.get(row["key"])
        assert row["accuracy"] == kept["accuracy"]
        assert row["diverged"] == (kept["diverged_at"] is not None)
    assert sum(row["diverged"] for row in rows) == 1
    for arm in by_arm(rows)["cnn", 16]:
        assert {row["value"] for row in arm.final} == {row["value"] for row in arm.tuning if row["selected"]}
        assert {row["evaluated_on"] for row in arm.final} == {"test images"}


def test_the_table_says_what_the_rows_say(report):
    rows = read_parquet(report[2] / "runs.parquet")
    text = (report[2] / "README.md").read_text(encoding="utf-8")
    assert results_text(rows) in text
    assert text.index("CLARS without warmup reaches") < text.index("| method |")
    for arm in by_arm(rows)["cnn", 16]:
        last = [100 * row["accuracy"][-1] for row in arm.final]
        expected = f"{statistics.mean(last):.2f} ± {statistics.stdev(last):.2f}"
        line = next(line for line in text.splitlines() if line.startswith(f"| {arm.name} |"))
        assert expected in line
        lost = sum(row["diverged"] for row in arm.tuning)
        assert f"| {lost} of 3 |" in line


def row(stage, value, accuracy, *, diverged=False, name="clars", seed=0):
    return {
        "network": "n",
        "batch_size": 8,
        "arm": name,
        "stage": stage,
        "value": value,
        "seed": seed,
        "accuracy": accuracy,
        "diverged": diverged,
        "tuned": "eta",
        "parameters": 10,
        "selected": False,
    }


def test_means_deviations_epochs_and_counts_by_hand():
    rows = [row("grid", 0.1, [0.5, 0.8]), row("grid", 1.0, [], diverged=True), row("grid", 0.01, [0.1, 0.12])]
    rows += [row("final", 0.1, curve, seed=s) for s, curve in enumerate([[0.81, 0.9], [0.5, 0.84], [0.7, 0.86]])]
    arm = by_arm(rows)["n", 8][0]
    assert accuracy_text(arm) == "86.67 ± 3.06"
    assert [epochs_to(r, 0.8) for r in arm.final] == [1, 2, 2]
    line = results_text(rows).splitlines()[-1]
    assert (
        line == "| clars | eta, 3 values | 0.1 | 80.00 | 86.67 ± 3.06 | 1.7 | 2.0 (2 of 3) | 1 of 3 | 0 of 3 | 1 of 6 |"
    )


def finals(name, accuracies):
    return [row("final", 0.1, [accuracy], name=name, seed=s) for s, accuracy in enumerate(accuracies)]


def test_the_first_thing_said_is_whether_clars_wins():
    rows = finals("clars", [0.80, 0.82]) + finals("lars", [0.84, 0.86]) + finals("mnag+warmup", [0.795, 0.805])
    said = verdict(by_arm(rows)["n", 8])[0].splitlines()
    assert said[0] == "- CLARS without warmup reaches 81.00 ± 1.41 %."
    assert said[1].startswith("- The best other method, lars: 85.00 ± 1.41 %; CLARS is 4.00 points below it (more than")
    assert said[2].startswith("- mnag+warmup: 80.00 ± 0.71 %; CLARS is 1.00 points above it (within two")
    assert len(said) == 3
    assert not verdict(by_arm(finals("lars", [0.8]))["n", 8])


def test_of_one_run_each_nothing_is_called_more_than_chance():
    rows = finals("clars", [0.80]) + finals("lars", [0.84])
    said = verdict(by_arm(rows)["n", 8])[0]
    assert said.endswith("4.00 points below it (of one run, so what is chance is not known).")
    text = results_text(rows)
    assert "nothing is tuned; one seed." in text
    assert "tuned |" not in text


def test_the_kept_page_of_figures_1_and_3_is_what_its_runs_give():
    kept = Path(__file__).parents[1] / "model_cards" / "figures_1_and_3"
    assert results_text(read_parquet(kept / "runs.parquet")) in (kept / "README.md").read_text(encoding="utf-8")


def test_a_seed_that_diverged_counts_as_0_and_an_edge_is_named():
    rows = [row("grid", 0.1, [0.8]), row("grid", 1.0, [0.7]), row("final", 0.1, [0.8]), row("final", 0.1, [], seed=1)]
    rows[-1]["diverged"] = True
    line = results_text(rows).splitlines()[-1]
    assert "0.1 (edge)" in line
    assert "40.00 ± 56.57" in line
    assert "| 1 of 2 |" in line
    assert "Unfinished" not in results_text(rows)
    assert "**Unfinished**: no final runs yet of clars." in results_text(rows[:2])


def test_the_layer_summary_is_the_median_of_each_epoch(report):
    from hf_clars.records import LayerRateLog

    study, folder, output = report
    entries = [e for e in read_parquet(output / "layers.parquet") if e["arm"] == "clars"]
    finals = [r for r in study.known_runs(folder.get) if r.stage == "final" and r.arm.name == "clars"]
    logs = [LayerRateLog.open(folder.log_folder(run.settings.key)) for run in finals]
    layers, ratio = over_epochs(entries, "ratio")
    assert layers == list(logs[0].layers)
    by_hand = [[np.median(log["ratio"][3 * e : 3 * e + 3, 0]) for e in range(2)] for log in logs]
    for epoch in range(2):
        assert ratio[epoch, 0] == pytest.approx(math.sqrt(by_hand[0][epoch] * by_hand[1][epoch]), rel=1e-6)


def test_sentences_follow_the_numbers():
    rising = np.linspace(0.1, 1.0, 20)[:, None] * np.array([1.0, 0.5])
    assert (early_over_late(rising) < 1).all()
    assert "below that of the last 5 in 2 of 2 layers and above it in 0" in ratio_sentence("clars", ["a", "b"], rising)
    falling = rising[::-1]
    text = ratio_sentence("clars", ["a", "b"], falling)
    assert "in 0 of 2 layers and above it in 2" in text
    assert "last layer's R_k is 0.50 times the first layer's" in text


def test_usable_values_are_those_near_the_best():
    rows = [row("grid", v, [a]) for v, a in ((0.01, 0.80), (0.1, 0.81), (1.0, 0.795), (10.0, 0.5))]
    line = robustness_table(by_arm(rows)["n", 8]).splitlines()[-1]
    assert "| 0.01, 0.1, 1 | 100 (2.0 decades) | 4 from 0.01 to 10 |" in line


def test_pages_are_made_again_from_parquet_alone_and_keep_what_people_wrote(report):
    output = report[2]
    page = output / "README.md"
    generated = page.read_text(encoding="utf-8")
    page.write_text(f"# Mine\n\nText.\n\n{generated}\nMore text.\n", encoding="utf-8")
    pictures = [output / name for name in ("curves.png", "tuning.png", "layer_rates.png", "layer_ratios.png")]
    for picture in pictures:
        picture.unlink()
    write_pages(output)
    write_why(output)
    assert all(picture.read_bytes()[:4] == b"\x89PNG" for picture in pictures)
    assert page.read_text(encoding="utf-8") == f"# Mine\n\nText.\n\n{generated}\nMore text.\n"


def test_markers():
    first = put_between_markers("# Page\n", "old")
    assert put_between_markers(first, "new") == put_between_markers("# Page\n", "new")
    assert put_between_markers("", "x").count("x") >= 1


def test_a_study_that_has_just_begun_has_a_report_too(report, tmp_path):
    study = report[0]
    run = study.known_runs(lambda key: None)[0]
    with pytest.raises(RecordError, match="nothing to report"):
        write_report([study], tmp_path / "results", tmp_path / "report")
    folder = ResultsFolder(tmp_path / "results")
    folder.put(run.settings.key, report[1].get(run.settings.key))
    write_report([study], tmp_path / "results", tmp_path / "report")
    assert len(read_parquet(tmp_path / "report" / "runs.parquet")) == 1
