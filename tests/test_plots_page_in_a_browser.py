"""Promise: in a real browser the page shows a log's own values, and names run nothing."""

import re

import numpy as np
import pytest

from hf_clars.plots import open_runs, write_page
from hf_clars.records import QUANTITIES
from tests.page_kit import HOSTILE, NET, embedded, make_log, open_browser, point_at, read, with_losses

chromium = pytest.fixture(scope="module")(open_browser)


CTRL = 2  # DevTools' number of the key


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
