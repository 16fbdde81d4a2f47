"""Promise: the page shows a log's own values in a real browser, from one small file that runs no code but its own."""

import base64
import json
import re
import warnings

import numpy as np
import pytest
import torch

from hf_clars.plots import PlotError, open_runs, write_page
from hf_clars.plots.columns import common_prefix
from hf_clars.plots.page_data import FIRST, PageRun, page_data
from hf_clars.records import QUANTITIES, LayerRateLog
from tests import browser

CTRL = 2  # DevTools' number of the key

HOSTILE = [
    "</script><script>window.hacked = 1</script>",
    "<img src=x onerror='window.hacked = 2'>",
    "\"'`${window.hacked = 3}` @@script@@ \\u003c",
    "a\u2028b <!-- \x00 ]]> &lt;",
    "constructor",
    "__proto__",
]


def make_log(folder, *, steps=40, layers=6, names=None, seed=0, method="clars", change=None):
    names = names or [f"encoder.stages.{k}.convolution" for k in range(layers)]
    random = np.random.default_rng(seed)
    values = np.exp(random.normal(-2, 2, (steps, len(QUANTITIES), len(names)))).astype(np.float32)
    values[:, 4] = random.uniform(0.01, 1, values[:, 4].shape)
    if method != "clars":
        values[:, 3:] = np.nan
    if change is not None:
        change(values)
    log = LayerRateLog.create(folder, layers=names, settings={"method": method, "eta": 0.01}, flush_every=1000)
    for step in range(steps):
        log.append(step + 1, torch.from_numpy(values[step]))
    log.close()
    return log


def embedded(page):
    return json.loads(re.search(r'id="data">(.*?)</script>', page.read_text("utf-8"), re.DOTALL)[1])


def decoded(stored, layers):
    """Read a 16-bit quantity as the page's own script does, written out anew."""
    codes = np.frombuffer(base64.b64decode(stored["data"]), "<u2").reshape(layers, -1).T.astype(np.float64)
    values = stored["low"] * (stored["high"] / stored["low"]) ** ((codes - FIRST) / (65535 - FIRST))
    return np.select([codes == 0, codes == 1, codes == 2], [np.nan, 0, np.inf], values)


# ---- the file -------------------------------------------------------------------------------------------------------


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


# ---- in a browser ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    if browser.PATH is None:
        pytest.skip("no Chromium is installed (on Debian: apt-get install chromium)")
    page = browser.Browser(tmp_path_factory.mktemp("profile"))
    yield page
    page.close()


def point_at(chromium, across, down, selector="canvas.map"):
    """Move the mouse to a fraction of the first map's cells (its names take the left part of the canvas)."""
    box = chromium.box(selector)
    inner = chromium.run("mapBox(canvases[0])")
    x = box["x"] + inner["left"] + across * inner["width"]
    y = box["y"] + inner["top"] + down * inner["height"]
    chromium.mouse("mouseMoved", x, y)
    return x, y


def read(chromium):
    """What the readout says: layer, and (run, value, first step, last step) of each run."""
    layer, *lines = chromium.text("#readout").split("\n")
    found = []
    for line in lines:
        match = re.fullmatch(r"(.+): \S+ = (\S+)(?: \(± (\S+) %\))?, steps? ([\d,]+)(?: to ([\d,]+) \(median\))?", line)
        name, value, error, first, last = match.groups()
        steps = [int(text.replace(",", "")) for text in (first, last or first)]
        found.append((name, float(value), float(error or 0) / 100, *steps))
    return layer.removeprefix("layer "), found


@pytest.mark.parametrize("quantity", QUANTITIES)
def test_hovering_reads_the_logged_value_of_layer_and_step(chromium, tmp_path, quantity):
    log = make_log(tmp_path / "run", steps=50)
    chromium.open(write_page(open_runs([tmp_path / "run"]), tmp_path / "p.html"))
    chromium.run(f"quantity.value = '{quantity}', quantity.dispatchEvent(new Event('change'))")
    for across, down, step, row in ((0.01, 0.1, 1, 0), (0.5, 0.9, 26, 5), (0.99, 0.45, 50, 2)):
        point_at(chromium, across, down)
        layer, ((name, value, error, first, last),) = read(chromium)
        assert (layer, name, first, last) == (log.layers[row], "run", step, step)
        assert error == 0
        assert value == pytest.approx(log[quantity][step - 1, row], rel=1e-6)
    assert not chromium.complaints()


def test_hovering_a_long_log_reads_the_median_of_the_named_steps_within_the_named_error(chromium, tmp_path):
    log = make_log(tmp_path / "run", steps=3000, layers=161)
    chromium.open(write_page(open_runs([tmp_path / "run"]), tmp_path / "p.html"))
    for across, down in ((0.003, 0.003), (0.31, 0.7), (0.997, 0.997)):
        point_at(chromium, across, down)
        layer, ((_, value, error, first, last),) = read(chromium)
        expected = np.median(log["rate"][first - 1 : last, log.layers.index(layer)])
        assert abs(first / 3000 - across) < 0.01
        assert abs(log.layers.index(layer) / 161 - down) < 0.01
        assert 0 < error < 0.004
        assert value == pytest.approx(expected, rel=error)
    assert not chromium.complaints()


def test_two_runs_stand_side_by_side_and_are_matched_by_the_layers_name(chromium, tmp_path):
    one = make_log(tmp_path / "one", names=["a", "b", "c"], steps=30)
    two = make_log(tmp_path / "two", names=["c", "b"], steps=20, seed=3)
    chromium.open(write_page(open_runs([tmp_path / "one", tmp_path / "two"]), tmp_path / "p.html"))
    point_at(chromium, 0.35, 0.9)
    layer, values = read(chromium)
    assert layer == "c"
    step = values[0][3]
    assert [value[:2] for value in values] == [
        ("one", pytest.approx(one["rate"][step - 1, 2], rel=1e-6)),
        ("two", pytest.approx(two["rate"][step - 1, 0], rel=1e-6)),
    ]
    point_at(chromium, 0.35, 0.1)
    assert chromium.text("#readout").endswith("two: has no such layer")
    point_at(chromium, 0.95, 0.5)
    assert chromium.text("#readout").endswith("two: has no such step")
    chromium.run("second.value = '-1', second.dispatchEvent(new Event('change'))")
    assert chromium.run("[...document.querySelectorAll('figure:has(.map)')].map((f) => f.hidden)") == [False, True]
    chromium.run("first.value = '1', first.dispatchEvent(new Event('change'))")
    point_at(chromium, 0.01, 0.1)
    assert read(chromium) == ("c", [("two", pytest.approx(two["rate"][0, 0], rel=1e-6), 0, 1, 1)])
    assert not chromium.complaints()


def test_wheel_drag_and_keys_zoom_and_the_zoomed_cell_still_reads_right(chromium, tmp_path):
    log = make_log(tmp_path / "run", steps=100)
    chromium.open(write_page(open_runs([tmp_path / "run"]), tmp_path / "p.html"))
    assert chromium.text("#range") == "steps 1 to 100, layers 1 to 6"
    x, y = point_at(chromium, 0.5, 0.5)
    chromium.mouse("mouseWheel", x, y, deltaX=0, deltaY=-100, modifiers=CTRL)
    assert chromium.text("#range") == "steps 11 to 90, layers 1 to 6"
    chromium.run("reset.click()")
    start, end = point_at(chromium, 0.2, 0.02), point_at(chromium, 0.4, 0.49)
    chromium.mouse("mousePressed", *start, button="left", clickCount=1)
    chromium.mouse("mouseMoved", *end, button="left")
    chromium.mouse("mouseReleased", *end, button="left", clickCount=1)
    found = re.fullmatch(r"steps (\d+) to (\d+), layers 1 to 3", chromium.text("#range"))
    assert abs(int(found[1]) - 21) <= 1
    assert abs(int(found[2]) - 40) <= 1
    point_at(chromium, 0.5, 0.9)
    layer, ((_, value, _, step, _),) = read(chromium)
    assert layer == log.layers[2]
    assert 29 <= step <= 32
    assert value == pytest.approx(log["rate"][step - 1, 2], rel=1e-6)
    chromium.run("document.querySelector('canvas.map').focus()")
    chromium.key("ArrowRight")
    chromium.key("ArrowDown")
    layer, ((_, value, _, after, _),) = read(chromium)
    assert (layer, after) == (log.layers[3], step + 1)
    assert value == pytest.approx(log["rate"][step, 3], rel=1e-6)
    assert chromium.text("#range").endswith("layers 2 to 4")  # the view follows the keys
    chromium.key("Enter")
    assert chromium.text("#layer-caption").startswith(f"γₖ of layer {log.layers[3]} (held)")
    chromium.key("Escape")
    assert chromium.text("#range") == "steps 1 to 100, layers 1 to 6"
    assert not chromium.complaints()


def test_wheel_and_finger_scroll_the_page_and_not_the_map(chromium, tmp_path):
    make_log(tmp_path / "run", steps=100)
    chromium.open(write_page(open_runs([tmp_path / "run"]), tmp_path / "p.html"))
    chromium.run("document.body.style.paddingBottom = '3000px'")
    x, y = point_at(chromium, 0.5, 0.5)
    chromium.mouse("mouseWheel", x, y, deltaX=0, deltaY=200)
    chromium.wait_for("window.scrollY > 100")
    chromium.run("window.scrollTo(0, 0)")
    x, y = point_at(chromium, 0.5, 0.5)
    chromium.call("Input.dispatchTouchEvent", type="touchStart", touchPoints=[{"x": x, "y": y}])
    for moved in range(15, 165, 15):
        chromium.call("Input.dispatchTouchEvent", type="touchMove", touchPoints=[{"x": x, "y": y - moved}])
    chromium.call("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])
    chromium.wait_for("window.scrollY > 50")
    assert chromium.text("#range") == "steps 1 to 100, layers 1 to 6"
    chromium.run("window.scrollTo(0, 0)")
    assert not chromium.complaints()


def test_a_tap_reads_and_holds_a_cell_and_buttons_zoom_there(chromium, tmp_path):
    log = make_log(tmp_path / "run", steps=100, layers=40)
    chromium.open(write_page(open_runs([tmp_path / "run"]), tmp_path / "p.html"))
    x, y = point_at(chromium, 0.505, 0.51)
    chromium.call("Input.synthesizeTapGesture", x=x, y=y, gestureSourceType="touch")
    layer, ((_, value, _, step, _),) = read(chromium)
    assert layer == log.layers[20]
    assert value == pytest.approx(log["rate"][step - 1, 20], rel=1e-6)
    assert "(held)" in chromium.text("#layer-caption")
    chromium.run("nearer.click()")
    assert chromium.text("#range") == "steps 26 to 75, layers 11 to 31"
    chromium.run("farther.click()")
    assert chromium.text("#range") == "steps 1 to 100, layers 1 to 40"
    chromium.run("nearer.click(), reset.click()")
    assert chromium.text("#range") == "steps 1 to 100, layers 1 to 40"
    assert chromium.text("#reset") == "Reset zoom"


# ---- the loss, and names ---------------------------------------------------------------------------------------------


def with_losses(folder, losses, evaluations=()):
    entries = [{"step": step, "epoch": 1.0, "loss": loss} for step, loss in losses]
    entries += [{"step": step, "epoch": 1.0, "eval_loss": loss} for step, loss in evaluations]
    (folder / "trainer_state.json").write_text(json.dumps({"log_history": entries}))


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


def test_the_loss_stands_beside_the_map_and_is_hidden_where_there_is_none(chromium, tmp_path):
    make_log(tmp_path / "run", steps=3)
    chromium.open(write_page(open_runs([tmp_path / "run"]), tmp_path / "p.html"))
    assert chromium.run("losses.hidden")
    with_losses(tmp_path / "run", [(1, 2.5), (3, 0.5)], [(3, 0.75)])
    chromium.open(write_page(open_runs([tmp_path / "run"]), tmp_path / "p.html"))
    assert not chromium.run("losses.hidden")
    loss, heat_map = chromium.box("#loss"), chromium.box("canvas.map")
    assert loss["left"] >= heat_map["right"]
    assert abs(loss["top"] - heat_map["top"]) < 30
    assert chromium.text("#loss-caption") == "Loss (lines: training, dots: evaluation): run (solid)"
    assert not chromium.complaints()


NET = [f"resnet.encoder.stages.{i}.layers.{j}.convolution" for i in range(3) for j in range(3)] + ["classifier.1"]


def test_labels_leave_out_what_names_have_in_common_and_the_reading_does_not(chromium, tmp_path):
    make_log(tmp_path / "run", steps=3, names=NET)
    page = write_page(open_runs([tmp_path / "run"]), tmp_path / "p.html")
    run = embedded(page)["runs"][0]
    assert run["layers"] == NET
    assert run["labels"] == [name.removeprefix("resnet.encoder.") for name in NET]
    chromium.open(page)
    point_at(chromium, 0.5, 0.05)
    assert read(chromium)[0] == NET[0]
    assert "names without resnet.encoder" in chromium.text("figcaption")


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


@pytest.mark.parametrize("width", [320, 375, 1400])
def test_no_label_leaves_its_canvas_on_a_phone_or_a_screen(chromium, tmp_path, width):
    make_log(tmp_path / "run", steps=3000, names=NET, change=lambda values: np.multiply(values, 1e-7, out=values))
    page = write_page(open_runs([tmp_path / "run"]), tmp_path / "p.html")
    phone = width < 500
    chromium.call("Emulation.setDeviceMetricsOverride", width=width, height=700, deviceScaleFactor=2, mobile=phone)
    try:
        chromium.open(page)
        chromium.run(SPY)
        chromium.run("draw()")
        texts = chromium.run("texts")
        assert len(texts) > 15
        assert [text for text, left, right, wide in texts if left < 0 or right > wide] == []
        assert any(text.endswith("convolution") for text, *_ in texts)
        assert chromium.run("document.documentElement.scrollWidth") <= width
    finally:
        chromium.call("Emulation.clearDeviceMetricsOverride")


SPY = """
var texts = [], plain = CanvasRenderingContext2D.prototype.fillText;
CanvasRenderingContext2D.prototype.fillText = function (text, x, y) {
  const wide = this.measureText(text).width, left = { left: x, center: x - wide / 2, right: x - wide }[this.textAlign];
  if (left !== undefined) texts.push([text, left, left + wide, this.canvas.clientWidth]);
  return plain.call(this, text, x, y);
};
"""


def test_hostile_names_are_shown_as_they_are_and_run_nothing(chromium, tmp_path):
    make_log(tmp_path / "run", names=HOSTILE)
    chromium.open(write_page(open_runs([tmp_path / "run"]), tmp_path / "p.html", title=HOSTILE[0]))
    for row, name in enumerate(HOSTILE):
        point_at(chromium, 0.5, (row + 0.5) / len(HOSTILE))
        assert chromium.text("#readout").split("\nrun: ")[0] == f"layer {name}"
    assert chromium.text("h1") == HOSTILE[0]
    assert chromium.run("window.hacked === undefined")
    assert chromium.run("document.querySelectorAll('script').length") == 2
    # Were one to slip through all the same, the page's policy would not run it.
    chromium.run("document.body.append(Object.assign(document.createElement('script'), {text: 'window.hacked = 4'}))")
    assert chromium.run("window.hacked === undefined")
    assert not chromium.complaints()


def test_a_method_without_per_sample_norms_says_so(chromium, tmp_path):
    make_log(tmp_path / "run", method="lars")
    chromium.open(write_page(open_runs([tmp_path / "run"]), tmp_path / "p.html"))
    chromium.run("quantity.value = 'ratio', quantity.dispatchEvent(new Event('change'))")
    point_at(chromium, 0.5, 0.5)
    assert "not measured in this run" in chromium.text("#readout")
    assert not chromium.complaints()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_follows_the_readers_colour_scheme_and_is_not_blank(chromium, tmp_path, scheme):
    make_log(tmp_path / "run")
    chromium.colours(scheme)
    chromium.open(write_page(open_runs([tmp_path / "run"]), tmp_path / "p.html"))
    paper = chromium.run("getComputedStyle(document.body).backgroundColor")
    assert paper == {"light": "rgb(255, 255, 255)", "dark": "rgb(21, 23, 26)"}[scheme]
    colours = chromium.run("""(() => {
        const box = mapBox(canvases[0]), found = new Set();
        const { data } = canvases[0].getContext("2d").getImageData(box.left, box.top, box.width, box.height);
        for (let i = 0; i < data.length; i += 4) found.add(data.slice(i, i + 3).join());
        return found.size;
    })()""")
    assert colours > 50
    chromium.colours("light")
