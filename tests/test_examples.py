"""Promise: the scripts in scripts/examples/ run on small real data, and their pages show what they print."""

import re
import runpy
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "scripts" / "examples"


@pytest.fixture
def run_here(tmp_path, monkeypatch, capsys):
    """Runs a script as a main program, in this process, which has the imports done; what it prints."""

    def run(name, *arguments):
        monkeypatch.syspath_prepend(EXAMPLES)
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [name, "--output", str(tmp_path), *arguments])
        capsys.readouterr()
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    return run


def test_the_useful_batch_size_is_printed_and_drawn(tmp_path, run_here):
    settings = ["--samples", "300", "--batch", "16", "--steps", "12", "--every", "2"]
    said = run_here("useful_batch_size.py", *settings)
    assert len(re.findall(r"^\| \d+ \|", said, re.MULTILINE)) >= 5
    assert (tmp_path / "noise_scale.png").stat().st_size > 20_000


def test_planted_labels_are_looked_for(tmp_path, run_here):
    said = run_here("examples_that_hurt.py", *["--samples", "500", "--epochs", "4", "--flipped", "0.02"])
    rows = dict(re.findall(r"^\| (gradient norm|loss|random) \| ([\d.]+) \|", said, re.MULTILINE))
    assert float(rows["gradient norm"]) > 0.3 > float(rows["random"])
    assert (tmp_path / "examples_that_hurt.png").stat().st_size > 20_000


def test_a_language_model_is_measured_and_its_hardest_texts_are_named(tmp_path, run_here):
    said = run_here(
        "language_model.py", *["--samples", "120", "--steps", "8", "--every", "2", "--batch", "8", "--length", "32"]
    )
    assert len(re.findall(r"^norm [\d.]+, loss [\d.]+, \w+\.py:\d+", said, re.MULTILINE)) == 5
    assert (tmp_path / "noise_scale.png").stat().st_size > 20_000


def test_of_a_language_model_adapters_alone_are_measured(run_here):
    pytest.importorskip("peft")
    said = run_here("language_model.py", *["--lora", "--samples", "60", "--steps", "4", "--every", "2", "--batch", "8"])
    assert "norm " in said
