"""Promise: docs/structure.md names the files and functions that a convolution passes on its way to its rate."""

import re
import sys
from pathlib import Path

import torch
from torch import nn

from hf_clars import CLARS

ROOT = Path(__file__).parent.parent
STOP = re.compile(r"^\| +\d+ \| `([\w/]+\.py)` \| `(\w+)` \|", re.MULTILINE)


def test_a_convolution_passes_every_stop_in_this_order():
    stops = STOP.findall((ROOT / "docs" / "structure.md").read_text(encoding="utf-8"))
    assert len(stops) == 12
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Conv2d(16, 32, 3, padding=1), nn.ReLU()), torch.randn(64, 16, 14, 14)
    optimizer = CLARS(model, lr=0.1)

    def step():
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()

    for _ in range(4):
        step()
    called = []

    def note(frame, event, argument):
        if event == "call" and "hf_clars" in frame.f_code.co_filename:
            path = Path(frame.f_code.co_filename).as_posix().split("hf_clars/")[-1]
            kind = type(frame.f_locals.get("self")).__mro__
            called.append((path, {frame.f_code.co_name, *(cls.__name__ for cls in kind)}))

    with torch.autograd.set_multithreading_enabled(False):  # the backward pass on this thread, to be seen
        sys.setprofile(note)
        try:
            step()
        finally:
            sys.setprofile(None)
    rest = iter(called)
    for path, function in stops:
        assert any(path == p and function in names for p, names in rest), f"{function} of {path} is not passed there"
