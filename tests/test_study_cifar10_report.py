"""Promise: the CIFAR-10 study keeps every run, and each table and picture is made from the kept runs by one command."""

import io
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from research.cifar10.plan import Done
from research.cifar10.report import (
    batch_table,
    best_by_batch,
    draw,
    envelope,
    one_setting,
    page,
    run_with_shares,
)
from research.cifar10.rows import product_row, prototype_row, read_runs, write_runs
from research.cifar10.run import Workers, decode, run_all
from research.cifar10.settings import Settings
from research.cifar10.tables import agreement, method_table
from research.cifar10.train import Images, train
from tests.test_study_cifar10_verdict import model, run

KEPT = Path(__file__).parents[1] / "model_cards" / "cifar10"
TINY = Settings("signal_lars", 0.05, batch=64, chunk=32, epochs=1, width=4)


@pytest.fixture(scope="module")
def images():
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(0, 256, (192, 40, 40, 3), generator=generator, dtype=torch.uint8)
    y = torch.arange(192) % 10
    return Images(x, y, x[:64, 4:36, 4:36].clone(), y[:64])


def kept_row(settings, accuracy, device="cuda"):
    found = {"accuracy": accuracy, "diverged": False, "seconds": 1.0, "curve": [[0, 2.3, 0.9, 0.1], [5, 2.0, 0.5, 0.1]]}
    return product_row({**vars(settings), **found, "device": device, "layers": ["a"], "signal": [[0.9], [0.5]]})


def test_the_picture_of_shares_is_of_a_run_that_measured_them():
    ours = kept_row(Settings("signal_lars", 0.064), 48.0)
    better = kept_row(Settings("lars", 0.064), 49.0) | {"signal": [[], []]}
    assert run_with_shares([better, ours]) is ours
    assert run_with_shares([better]) is None


def test_a_run_keeps_its_settings_its_curve_and_every_layers_share(images):
    found = train(TINY, images)
    assert Settings.of(found) == TINY
    assert len(found["curve"]) == len(found["signal"]) == 3
    assert len(found["layers"]) == len(found["signal"][0]) == 15
    assert all(0 <= s <= 1 for point in found["signal"] for s in point)
    for point, shares in zip(found["curve"], found["signal"], strict=True):
        assert point[2] == pytest.approx(float(torch.tensor(shares).median()), abs=1e-4)
    assert found["device"] == "cpu"


@pytest.mark.parametrize("method", ["nag", "vr_lars", "adascale"])
def test_runs_of_other_methods_end_in_rows_that_can_be_kept(images, method, tmp_path):
    settings = replace(TINY, method=method, rate=0.01)
    write_runs([product_row(train(settings, images))], tmp_path / "runs.parquet")
    (row,) = read_runs(tmp_path / "runs.parquet")
    assert Settings.of(row) == settings
    assert (row["made_by"], row["device"]) == ("product", "cpu")
    assert math.isnan(row["curve"][0][2]) == (method != "adascale")


def test_runs_come_back_from_the_file_once_each_and_in_one_order(tmp_path):
    rows = [kept_row(replace(TINY, rate=rate, seed=seed), 50 + rate) for rate in (0.1, 0.2) for seed in (0, 1)]
    write_runs([*rows, rows[0]], tmp_path / "a.parquet")
    write_runs(rows[::-1], tmp_path / "b.parquet")
    assert read_runs(tmp_path / "a.parquet") == read_runs(tmp_path / "b.parquet")
    assert len(read_runs(tmp_path / "a.parquet")) == 4
    assert (tmp_path / "a.parquet").read_bytes() == (tmp_path / "b.parquet").read_bytes()


@pytest.mark.parametrize(
    ("name", "p", "expected"),
    [
        ("LARS", 0, {"method": "lars"}),
        ("LARS x R^p", 1.0, {"method": "clars"}),
        ("LARS x R^p", -0.5, {"method": "lars_times_ratio", "power": -0.5}),
        ("LARS x [1+(p-1)(1-s)]/p", 16, {"method": "signal_lars", "n": 16.0, "form": "gain", "power": 1.0}),
        ("LARS x [1+(p-1)s]^-1/2", 50, {"method": "signal_lars", "n": 50.0, "form": "sum", "power": 0.5}),
    ],
)
def test_the_prototypes_runs_are_kept_in_this_studys_words(name, p, expected):
    given = {"network": "resnet8", "width": 16, "batch": 2048, "epochs": 12, "method": name, "p": p, "rate": 0.1,
             "schedule": "poly-2", "warmup_epochs": 3, "seed": 2, "accuracy": 70.0, "diverged": False,
             "loss": [[0, 2.3]], "median_R": [0.1], "median_s": [0.9]}  # fmt: skip
    row = prototype_row(given)
    assert Settings.of(row) == Settings(rate=0.1, warmup=3.0, seed=2, **expected)
    assert row["made_by"] == "prototype"
    assert row["curve"] == [[0, 2.3, 0.9, 0.1]]


def test_the_page_that_is_kept_is_what_the_kept_runs_give(tmp_path):
    rows = read_runs(KEPT / "runs.parquet")
    assert sum(r["made_by"] == "prototype" for r in rows) == 148
    names = draw(rows, tmp_path)
    assert page(rows, names) == (KEPT / "README.md").read_text(encoding="utf-8")
    assert {p.name for p in KEPT.glob("*.png")} == set(names)


def test_the_table_is_of_the_runs():
    rows = [
        kept_row(replace(TINY, rate=r, seed=s), a)
        for r, s, a in [(0.1, 0, 60), (0.2, 0, 70), (0.4, 0, 50), (0.2, 1, 72)]
    ]
    line = method_table(rows).splitlines()[-1]
    assert line == "| SignalLARS, n = 16 | 0.2 | 71.0 (70.0-72.0; 2) | 50.0 | 60.0 | 3 |"


def test_one_setting_is_the_best_at_512_at_every_batch_size():
    rows = [kept_row(Settings.of(r), r["accuracy"]) for r in run(["batches"], by_batch_size)]
    for equal_steps, sizes in ((False, {128, 256, 512, 1024, 2048, 4096, 8192}), (True, {128, 256, 512, 1024, 2048})):
        line = one_setting(rows, equal_steps=equal_steps)["SignalLARS, n = 16 at 0.128"]
        assert set(line) == sizes
        assert line[512] == 70
        assert line[2048] == 66  # an octave away from where it is best
    best = envelope(rows)
    assert best[2048] == 70
    table = batch_table(rows)
    assert "the best of all, tuned there" in table
    assert "the best of all" not in batch_table(rows, equal_steps=True)


def by_batch_size(s):
    """The best rate falls with the root of the batch size: 0.128 at 512, 0.064 at 2,048; 4 points an octave."""
    return 70 - 4 * abs(math.log2(s.rate / 0.128) + math.log2(s.batch / 512) / 2)


def test_repeated_runs_stand_side_by_side():
    mine = kept_row(Settings("lars", 0.064), 70.0)
    theirs = {**kept_row(Settings("lars", 0.064), 71.0), "made_by": "prototype"}
    start = "| LARS | resnet8 | 2,048 | 0.064 |"
    assert f"{start} a GPU | 71.0 | 70.0 | - | too few seeds |" in agreement([mine, theirs])
    seeds = [{**theirs, "seed": seed, "accuracy": accuracy} for seed, accuracy in enumerate((70.0, 71.0, 72.0))]
    for device, where, accuracy, words in (
        ("cpu", "a CPU", 68.5, "68.5 | -2.5 | yes"),
        ("cuda", "a GPU", 74.5, "74.5 | +3.5 | no"),
    ):
        repeated = kept_row(Settings("lars", 0.064), accuracy, device=device)
        assert f"{start} {where} | 71.0 (70.0-72.0; 3) | {words} |" in agreement([*seeds, repeated])
    assert "yet" in agreement([theirs, kept_row(Settings("lars", 0.064, width=8), 70.0)])


@pytest.mark.parametrize(("gap", "word"), [(0.8, "is better"), (-2.0, "open")])
def test_the_page_says_the_verdict_once_the_products_runs_are_there(gap, word, tmp_path):
    rows = [kept_row(Settings.of(r), r["accuracy"]) for r in run(["verdict"], model(gap=gap))]
    text = page(rows, draw(rows, tmp_path))
    assert word in text.split("### What the rule")[0].split("```")[4]


def encoded(i):
    pixels = np.random.default_rng(i).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format="PNG")
    return {"bytes": file.getvalue(), "path": None}


def test_a_session_that_was_cut_off_is_gone_on_with(tmp_path):
    count, out = 160, tmp_path / "runs.jsonl"
    table = pa.table({"img": [encoded(i) for i in range(count)], "label": [i % 10 for i in range(count)]})
    pq.write_table(table, tmp_path / "train.parquet")
    decode(tmp_path / "train.parquet", trained=128, held_out=32, folder=tmp_path)
    assert np.load(tmp_path / "x.npy").shape == (128, 40, 40, 3)
    wanted = [replace(TINY, rate=rate) for rate in (0.01, 0.02)]
    line = json.dumps({**vars(wanted[0]), "accuracy": 11.0})
    out.write_text(line + "\n" + line[:30], encoding="utf-8")
    done = run_all([lambda d: [s for s in wanted if s not in d.runs]], tmp_path, out, seconds=200, workers=1)
    assert done == 1
    assert set(Done.read([out]).runs.accuracy) == set(wanted)
    assert Done.read([out]).runs.accuracy[wanted[0]] == 11.0


def test_a_process_that_is_killed_takes_its_run_along_and_nothing_else(tmp_path):
    rng = np.random.default_rng(0)
    for name, shape in (("x", (128, 40, 40, 3)), ("held_out_x", (32, 32, 32, 3))):
        np.save(tmp_path / f"{name}.npy", rng.integers(0, 256, shape, dtype=np.uint8))
    for name, count in (("y", 128), ("held_out_y", 32)):
        np.save(tmp_path / f"{name}.npy", rng.integers(0, 10, count))
    workers = Workers(tmp_path, 1)
    try:
        workers.give([replace(TINY, rate=rate) for rate in (0.01, 0.02)])
        (process,) = workers._processes.values()
        process.kill()
        (lost,) = workers.results(60)
        assert lost["rate"] == 0.01
        assert lost["error"] == "its process ended with -9"
        found = []
        while not found:
            found = workers.results(60)
        assert (found[0]["rate"], "accuracy" in found[0], workers.pending) == (0.02, True, 0)
    finally:
        workers.end()


def test_one_picture_of_shares_is_of_one_width_and_length(tmp_path):
    small, full = replace(TINY, batch=2048, width=8, epochs=4), replace(TINY, batch=2048, width=16, epochs=12)
    rows = [kept_row(replace(small, batch=b), 40.0) for b in (512, 2048, 8192)] + [kept_row(full, 73.0)]
    assert [r["width"] for r in best_by_batch(rows, {"method": "signal_lars"}).values()] == [8, 8, 8]
    assert [r["width"] for r in best_by_batch(rows[2:], {"method": "signal_lars"}).values()] == [16]
