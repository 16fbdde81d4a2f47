"""Logs to make pages of, and a browser that reads them."""

import json
import re

import numpy as np
import pytest
import torch

from hf_clars.records import QUANTITIES, LayerRateLog
from tests import browser

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


def open_browser(tmp_path_factory):
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


def with_losses(folder, losses, evaluations=()):
    entries = [{"step": step, "epoch": 1.0, "loss": loss} for step, loss in losses]
    entries += [{"step": step, "epoch": 1.0, "eval_loss": loss} for step, loss in evaluations]
    (folder / "trainer_state.json").write_text(json.dumps({"log_history": entries}))


NET = [f"resnet.encoder.stages.{i}.layers.{j}.convolution" for i in range(3) for j in range(3)] + ["classifier.1"]
