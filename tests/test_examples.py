"""Promise: the scripts in scripts/examples/ run on small real data, and their pages show what they print."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "scripts" / "examples"


def run(name, tmp_path, *flags, **settings):
    arguments = [*flags, *(f"--{key}={value}" for key, value in settings.items())]
    command = [sys.executable, str(EXAMPLES / name), "--output", str(tmp_path), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=280, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_the_useful_batch_size_is_printed_and_drawn(tmp_path):
    said = run(
        "useful_batch_size.py", tmp_path, *["--samples", "300", "--batch", "16", "--steps", "12", "--every", "2"]
    )
    assert len(re.findall(r"^\| \d+ \|", said, re.MULTILINE)) >= 5
    assert (tmp_path / "noise_scale.png").stat().st_size > 20_000


def test_planted_labels_are_looked_for(tmp_path):
    said = run("examples_that_hurt.py", tmp_path, samples=500, epochs=4, flipped=0.02)
    rows = dict(re.findall(r"^\| (gradient norm|loss|random) \| ([\d.]+) \|", said, re.MULTILINE))
    assert float(rows["gradient norm"]) > 0.3 > float(rows["random"])
    assert (tmp_path / "examples_that_hurt.png").stat().st_size > 20_000


def test_a_language_model_is_measured_and_its_hardest_texts_are_named(tmp_path):
    said = run(
        "language_model.py",
        tmp_path,
        *["--samples", "120", "--steps", "8", "--every", "2", "--batch", "8", "--length", "32"],
    )
    assert len(re.findall(r"^norm [\d.]+, loss [\d.]+, \w+\.py:\d+", said, re.MULTILINE)) == 5
    assert (tmp_path / "noise_scale.png").stat().st_size > 20_000


@pytest.mark.parametrize("name", ["peft", "trl"])
def test_the_libraries_that_the_page_names_are_measured(name, tmp_path):
    pytest.importorskip(name)
    if name == "peft":
        said = run(
            "language_model.py",
            tmp_path,
            *["--lora", "--samples", "60", "--steps", "4", "--every", "2", "--batch", "8"],
        )
        assert "norm " in said
    else:
        import datasets
        from trl import SFTConfig, SFTTrainer

        sys.path.insert(0, str(EXAMPLES))
        from language_model import byte_model

        from hf_clars import PerSampleNormsCallback

        data = datasets.Dataset.from_dict({"input_ids": [[1, 2, 3, 4, 5, 6, 7, 8]] * 32})
        callback = PerSampleNormsCallback(every=1, strict=True)
        args = SFTConfig(str(tmp_path), max_steps=2, use_cpu=True, report_to="none", per_device_train_batch_size=4)
        SFTTrainer(byte_model(16), args=args, train_dataset=data, callbacks=[callback]).train()
        assert callback.monitor.last.samples == 4
