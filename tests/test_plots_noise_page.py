"""Promise: the interactive page shows the noise scale of a run, by layer and of the whole model, with its band."""

import base64

import numpy as np
import pytest

from hf_clars.per_sample import PerSampleLog
from hf_clars.plots import open_runs
from hf_clars.plots.command import main as plot
from hf_clars.plots.page import write_page
from tests.page_kit import embedded, make_log, open_browser, point_at, read
from tests.test_per_sample_log import step, written

chromium = pytest.fixture(scope="module")(open_browser)


def page_of(tmp_path):
    return write_page(open_runs([tmp_path / "run"]), tmp_path / "p.html")


def test_the_page_holds_the_logs_noise_scale_to_the_last_bit(tmp_path):
    log = written(tmp_path / "run", steps=30)
    (run,) = embedded(page_of(tmp_path))["runs"]
    steps, scale = log.noise_scale()
    stored = run["quantities"]["noise_scale"]
    assert stored["encoding"] == "float32"
    found = np.frombuffer(base64.b64decode(stored["data"]), "<f4").reshape(3, -1).T
    np.testing.assert_array_equal(found, scale.value[:, :-1].float().numpy())
    assert run["first_steps"] == steps.tolist()
    value, low, high = (float(x[-1, -1]) for x in (scale.value, scale.low, scale.high))
    assert run["noise"][-1][:3] == pytest.approx([30, value, low], rel=1e-6)
    assert run["noise"][-1][3] in (None, pytest.approx(high, rel=1e-6))
    assert {point[4] for point in run["noise"]} == {16}


def test_a_run_of_a_callback_alone_has_a_page_from_the_command(tmp_path, capsys):
    written(tmp_path, steps=20)
    assert plot([str(tmp_path), "--html"]) == 0
    assert "layer_rates.html" in capsys.readouterr().out
    assert (tmp_path / "layer_rates.html").exists()


def test_a_run_with_both_logs_shows_them_beside_each_other(tmp_path):
    make_log(tmp_path / "run")
    written(tmp_path / "run", steps=20)
    names = [run["name"] for run in embedded(page_of(tmp_path))["runs"]]
    assert names == ["run", "run, per-sample norms"]


def test_norms_without_a_batch_gradient_have_no_noise_scale(tmp_path):
    log = PerSampleLog.create(tmp_path / "run", layers=["a", "b", "c"])
    for number in range(1, 4):
        one = step(number)
        one.batch_square.fill_(float("nan"))
        log.append(one)
    log.flush()
    (run,) = embedded(page_of(tmp_path))["runs"]
    assert run["noise"] == []
    assert list(run["quantities"]) == ["mean_sample_norm"]


def test_the_curve_stands_below_the_map_and_a_cell_reads_the_noise_scale(chromium, tmp_path):
    log = written(tmp_path / "run", steps=30)
    chromium.open(page_of(tmp_path))
    assert not chromium.run("noises.hidden")
    assert chromium.box("#noise")["top"] >= chromium.box("canvas.map")["bottom"]
    assert "± 1 standard error" in chromium.text("#noise-caption")
    chromium.run("state.quantity = 'noise_scale'; draw()")
    point_at(chromium, 0.99, 0.5)
    layer, ((_, value, _, first, last),) = read(chromium)
    assert (layer, first, last) == ("b", 30, 30)
    assert value == pytest.approx(float(log.noise_scale()[1].value[-1, 1]), rel=1e-6)
    box = "noise.getContext('2d').getImageData(80, 10, 900, 150).data"
    painted = f"[...{box}].filter((v, i) => i % 4 == 3 && v > 20).length"
    assert chromium.run(painted) > 2000  # the band is there, not only a line
    assert not chromium.complaints()


def test_without_per_sample_norms_there_is_no_curve(chromium, tmp_path):
    make_log(tmp_path / "run")
    chromium.open(page_of(tmp_path))
    assert chromium.run("noises.hidden")
    assert not chromium.complaints()
