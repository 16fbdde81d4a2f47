"""Promise: the page is one small file that holds a log's own values and runs no code but its own."""

import base64
import re
import warnings

import numpy as np
import pytest

from hf_clars.plots import PlotError, open_runs, write_page
from hf_clars.plots.columns import common_prefix
from hf_clars.plots.page_data import FIRST, PageRun, page_data
from hf_clars.records import QUANTITIES
from tests.page_kit import HOSTILE, NET, embedded, make_log, with_losses


def decoded(stored, layers):
    """Read a 16-bit quantity as the page's own script does, written out anew."""
    codes = np.frombuffer(base64.b64decode(stored["data"]), "<u2").reshape(layers, -1).T.astype(np.float64)
    values = stored["low"] * (stored["high"] / stored["low"]) ** ((codes - FIRST) / (65535 - FIRST))
    return np.select([codes == 0, codes == 1, codes == 2], [np.nan, 0, np.inf], values)


def test_ten_thousand_steps_of_161_layers_stay_under_three_megabytes_even_two_runs(tmp_path):
    make_log(tmp_path / "a", steps=10_000, layers=161)
    make_log(tmp_path / "b", steps=10_000, layers=161, seed=1)
    assert write_page(open_runs([tmp_path / "a"]), tmp_path / "one.html").stat().st_size < 3e6
    page = write_page(open_runs([tmp_path / "a", tmp_path / "b"]), tmp_path / "two.html")
    assert page.stat().st_size < 3e6
    assert len(embedded(page)["runs"][0]["first_steps"]) >= 500  # and are still fine enough to be worth looking at


def test_a_short_log_is_in_the_page_to_the_last_bit(tmp_path):
    log = make_log(tmp_path)
    (run,) = page_data([PageRun("r", log)])["runs"]
    for quantity in QUANTITIES:
        stored = run["quantities"][quantity]
        values = np.frombuffer(base64.b64decode(stored["data"]), "<f4").reshape(6, 40).T
        np.testing.assert_array_equal(values, log[quantity])
        assert stored["error"] == 0


def test_a_long_log_is_within_the_error_that_the_page_states(tmp_path):
    def odd(values):
        values[:20, 0, 0], values[:20, 0, 1], values[:20, 0, 2] = np.nan, 0, np.inf
        values[:, 1] *= 1e-30
        values[::2, 1] *= 1e32

    log = make_log(tmp_path, steps=4000, layers=60, change=odd)
    (run,) = page_data([PageRun("r", log)])["runs"]
    width = run["last_steps"][0]
    assert width > 1
    for quantity in QUANTITIES:
        stored = run["quantities"][quantity]
        with np.errstate(all="ignore"), warnings.catch_warnings(action="ignore"):
            expected = np.nanmedian(log[quantity].reshape(-1, width, 60), axis=1)
        np.testing.assert_allclose(decoded(stored, 60), expected, rtol=1.001 * stored["error"] + 1e-7)
        assert 0 < stored["error"] < 0.004
    assert run["first_steps"][1] == run["last_steps"][0] + 1
    assert run["last_steps"][-1] == 4000


def test_the_page_holds_no_address_and_no_markup_from_names(tmp_path):
    make_log(tmp_path, names=HOSTILE)
    page = write_page(open_runs([tmp_path]), tmp_path / "p.html", title=HOSTILE[0])
    text = page.read_text("utf-8")
    assert embedded(page)["runs"][0]["layers"] == HOSTILE
    assert len(re.findall(r"<script", text)) == 2
    assert "<img" not in text
    markup = re.sub(r'(?s)id="data">.*?</script>', "", text)
    assert not re.search(r"(src|href)\s*=|https?:|url\(|@import|fetch\(|XMLHttp", markup)


def test_runs_without_a_log_and_unwritable_places_are_errors(tmp_path):
    make_log(tmp_path / "run")
    with pytest.raises(PlotError, match="could not be saved"):
        write_page(open_runs([tmp_path / "run"]), tmp_path / "nowhere" / "p.html")
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / "trainer_state.json").write_text('{"log_history": [{"step": 1, "loss": 1.0}]}')
    with pytest.raises(PlotError, match="kept no layer-rate log"):
        write_page(open_runs([tmp_path / "plain"]), tmp_path / "p.html")


def test_the_losses_are_in_the_page_where_a_run_logged_them(tmp_path):
    make_log(tmp_path / "run")
    assert embedded(write_page(open_runs([tmp_path / "run"]), tmp_path / "p.html"))["runs"][0]["loss"] == []
    with_losses(tmp_path / "run", [(1, 2.5), (2, float("nan")), (3, 0.5)], [(3, 0.75)])
    run = embedded(write_page(open_runs([tmp_path / "run"]), tmp_path / "p.html"))["runs"][0]
    assert (run["loss"], run["eval_loss"]) == ([[1, 2.5], [3, 0.5]], [[3, 0.75]])
    with_losses(tmp_path / "run", [(step, 1 / step) for step in range(1, 100_000)])
    run = embedded(write_page(open_runs([tmp_path / "run"]), tmp_path / "p.html"))["runs"][0]
    assert len(run["loss"]) <= 1000
    assert run["loss"][-1][0] == 99_999


@pytest.mark.parametrize(
    ("names", "prefix"),
    [
        (["module.a.w", "module.a.b", "module.c"], "module."),
        (["encoder.0", "encoder.1"], ""),
        (["net.layers.0.w", "net.layers.1.w"], "net."),
        (["a", "b"], ""),
        (["only.one"], ""),
        (["m.a", "a"], ""),
        (NET, "resnet.encoder."),
        ([*NET, "embedder.x", "embedder.y"], ""),
    ],
)
def test_the_common_beginning_of_names(names, prefix):
    assert common_prefix(names) == prefix
