"""Promise: a finished run is never run again, a killed one is, and processes that share a folder do not collide."""

import json
import multiprocessing
import os
import signal
import time

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Features, Image
from PIL import Image as PILImage

from hf_clars.errors import DataError
from hf_clars.records import LayerRateLog, RecordError
from research.study import driver
from research.study.images import locate
from research.study.results import ResultsFolder
from research.study.study_file import read_study

STUDY = """
about: tiny
common: {dataset: tiny, batch_size: 16, micro_batch: 8, epochs: 2, image_size: 8}
networks: {cnn: {model: clars-cnn, model_kwargs: {widths: [2], norm: none}}}
arms:
  mnag: {method: nag, tune: learning_rate, values: [0.01, 0.1, 1.0e+30]}
  clars: {method: clars, tune: eta, values: [0.01, 0.1, 1.0]}
held_out: 8
seeds: [1, 2]
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder that holds a small parquet set under its name."""
    home = tmp_path_factory.mktemp("data")
    (home / "tiny").mkdir()
    numbers = np.random.default_rng(0)
    features = Features({"image": Image(), "label": ClassLabel(names=["a", "b", "c"])})
    for split, count in (("train", 48), ("test", 20)):
        images = [PILImage.fromarray(numbers.integers(0, 255, (8, 8), dtype=np.uint8)) for _ in range(count)]
        rows = {"image": images, "label": numbers.integers(0, 3, count).tolist()}
        Dataset.from_dict(rows, features=features).to_parquet(home / "tiny" / f"{split}-00000-of-00001.parquet")
    return home


@pytest.fixture
def study(tmp_path):
    path = tmp_path / "study.yaml"
    path.write_text(STUDY, encoding="utf-8")
    return read_study(path)


def test_a_study_runs_to_its_end_and_never_again(study, data, tmp_path, monkeypatch):
    results = tmp_path / "results"
    driver.work(study, results, data, 1)
    folder = ResultsFolder(results)
    runs = study.known_runs(folder.get)
    assert len(runs) == 6 + 4
    found = [folder.get(run.settings.key) for run in runs]
    assert sum(result["diverged_at"] is not None for result in found) == 1
    assert all(len(result["accuracy"]) == 2 for result in found if result["diverged_at"] is None)
    for run in runs:
        log = folder.log_folder(run.settings.key)
        assert (log / "layer_rates.safetensors").exists() == (run.stage == "final")
    final = next(run for run in runs if run.stage == "final" and run.arm.name == "mnag")
    log = LayerRateLog.open(folder.log_folder(final.settings.key))
    assert log["ratio"].shape == (2 * (48 // 16), 2)
    assert ((log["ratio"] > 0) & (log["ratio"] <= 1 + 1e-6)).all()  # measured for mNAG too
    monkeypatch.setattr(driver, "do", lambda *_: pytest.fail("a finished run was run again"))
    driver.work(study, results, data, 1)


def test_after_an_interruption_only_what_is_missing_is_done(study, data, tmp_path, monkeypatch):
    done, do = [], driver.do

    def until_the_third(run, folder, home):
        if len(done) == 3:
            raise KeyboardInterrupt
        done.append(run.settings.key)
        return do(run, folder, home)

    monkeypatch.setattr(driver, "do", until_the_third)
    with pytest.raises(KeyboardInterrupt):
        driver.work(study, tmp_path / "results", data, 1)
    again = []
    monkeypatch.setattr(driver, "do", lambda run, *rest: again.append(run.settings.key) or do(run, *rest))
    driver.work(study, tmp_path / "results", data, 1)
    assert not set(done) & set(again)
    assert len(done) + len(again) == 10


def _hold(path, key, held):
    with ResultsFolder(path).claim(key) as mine:
        (ResultsFolder(path).log_folder(key) / "layer_rates").mkdir(parents=True)
        held.value = int(mine)
        time.sleep(60)


def test_a_killed_run_is_free_at_once_and_leaves_nothing_behind(tmp_path):
    context = multiprocessing.get_context("fork")  # quick: the child only holds a lock
    held = context.Value("i", -1)
    process = context.Process(target=_hold, args=(tmp_path, "k", held))
    process.start()
    while held.value < 0:
        time.sleep(0.02)
    assert held.value == 1
    folder = ResultsFolder(tmp_path)
    with folder.claim("k") as mine:
        assert not mine
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    with folder.claim("k") as mine:
        assert mine
        assert not folder.fresh_log_folder("k").exists()
        folder.put("k", {"accuracy": [0.5]})
    with folder.claim("k") as mine:
        assert not mine  # finished


@pytest.mark.slow
def test_several_processes_do_each_run_once(study, data, tmp_path):
    driver.run_study(study, tmp_path / "results", data=data, jobs=2)
    folder = ResultsFolder(tmp_path / "results")
    assert all(folder.get(run.settings.key) for run in study.known_runs(folder.get))
    assert len(list((tmp_path / "results" / "runs").iterdir())) == 10


@pytest.mark.slow
def test_a_process_that_fails_is_reported_and_what_is_done_stays(study, tmp_path):
    (tmp_path / "tiny").mkdir()  # found, but holds nothing
    with pytest.raises(driver.StudyIncompleteError, match="Start the same command again"):
        driver.run_study(study, tmp_path / "results", data=tmp_path, jobs=1)


def test_data_that_is_missing_is_said_before_any_process_starts(study, tmp_path):
    with pytest.raises(DataError, match="neither holds nor is"):
        driver.run_study(study, tmp_path / "results", data=tmp_path / "nowhere", jobs=1)


def test_data_that_is_not_where_it_was_said_to_be_is_an_error_not_another_set(data, monkeypatch):
    assert locate("tiny", data) == str(data / "tiny") == locate("hub-user/tiny", data) == locate("tiny", data / "tiny")
    with pytest.raises(DataError, match="neither holds nor is"):
        locate("other", data)
    monkeypatch.setenv("HF_CLARS_TEST_DATA", str(data))
    assert locate("tiny", None) == str(data / "tiny")
    assert locate("other", None) == "other"


def test_a_set_smaller_than_a_batch_is_refused(data, study):
    run = study.known_runs(lambda key: None)[0]
    settings = run.settings.replace(batch_size=4096, micro_batch=512)
    with pytest.raises(DataError, match="lower batch_size"):
        driver.open_images(settings, data, "cpu")


def test_keys_depend_on_every_setting_and_on_nothing_else(study):
    settings = study.known_runs(lambda key: None)[0].settings
    assert settings.key == settings.replace().key
    changes = {"seed": 9, "held_out": 1, "epochs": 3, "model_kwargs": {"widths": [3]}, "warmup_epochs": 1.0}
    keys = {settings.replace(**{name: value}).key for name, value in changes.items()}
    assert len(keys | {settings.key}) == len(changes) + 1


def test_results_are_whole_or_absent(tmp_path):
    folder = ResultsFolder(tmp_path)
    with pytest.raises(RecordError):
        folder.put("k", {"accuracy": [float("nan")]})
    assert folder.get("k") is None
    (tmp_path / "runs" / "k.json").write_text('{"key": "k", "acc')
    with pytest.raises(RecordError, match="not valid JSON"):
        folder.get("k")
    (tmp_path / "runs" / "k.json").write_text(json.dumps({"key": "other"}))
    with pytest.raises(RecordError, match="delete it"):
        folder.get("k")
