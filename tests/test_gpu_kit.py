"""Promise: every stage of the kit for a GPU runs, writes its rows as they come, and makes its report anywhere."""

import contextlib
import io
import json
import subprocess
import sys
from pathlib import Path

import pytest

from hf_clars.bench.gpu import run as kit
from hf_clars.bench.gpu.networks import NETWORKS
from hf_clars.bench.gpu.stages import STAGES
from hf_clars.cli.commands import main as command_line
from tests.test_imports import run as run_hiding

ROOT = Path(__file__).parent.parent
ELSEWHERE = {"simplejpeg", "mlxtend", "matplotlib", "datasets", "evaluate", "accelerate"}
STARTS_TESTS = "exactness"


@pytest.fixture
def in_this_process(monkeypatch):
    """Stages without processes of their own, each of which would import torch again."""

    def stage(command, seconds):
        assert command[1:3] == ["-m", "hf_clars.bench.gpu.run"]
        with contextlib.redirect_stdout(io.StringIO()) as shown:
            code = kit.main(command[3:])
        return code, shown.getvalue(), ""

    monkeypatch.setattr(kit, "_process", stage)


def check(folder, stages):
    results = json.loads((folder / kit.RESULTS).read_text())
    assert results["tiny"]
    assert list(results["stages"]) == stages
    for name, figures in results["stages"].items():
        assert "error" not in figures, (name, figures)
    for name in set(NETWORKS) & set(stages):
        assert results["stages"][name]["gradients differ by"] < 1e-4, name
        assert results["stages"][name]["ratio"] > 0
    report = (folder / "gpu.md").read_text()
    assert "measures nothing" in report
    assert all(name in report for name in stages)
    assert (folder / "gpu.png").read_bytes().startswith(b"\x89PNG")


def test_every_stage_writes_its_rows_and_the_report_can_be_made_again(in_this_process, tmp_path):
    stages = [name for name in STAGES if name != STARTS_TESTS]
    assert not command_line(
        ["bench", "--gpu", "--tiny", "--minutes", "9", "--output", str(tmp_path), "--stages", *stages]
    )
    check(tmp_path, stages)
    (tmp_path / "gpu.md").unlink()
    assert not kit.main(["--report-only", "--output", str(tmp_path)])
    check(tmp_path, stages)


def test_a_stage_that_fails_is_a_row_and_the_next_one_runs(monkeypatch, tmp_path):
    answers = iter([(1, "", "out of memory"), (0, '{"ms": 1}', "")])
    monkeypatch.setattr(kit, "_process", lambda *_: next(answers))
    first, second = list(STAGES)[1:3]
    kit.main(["--tiny", "--output", str(tmp_path), "--stages", first, second])
    rows = json.loads((tmp_path / kit.RESULTS).read_text())["stages"]
    assert rows[first].pop("seconds") >= 0
    assert rows[first] == {"error": "out of memory"}
    assert rows[second]["ms"] == 1


SLOW_STAGE = """
import json, subprocess, sys, time
print(json.dumps({"ratio": 1.5}), flush=True)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print(f"child {child.pid}", flush=True)
print('{"ratio": 1.', end="", flush=True)
time.sleep(600)
"""


def test_what_a_stage_found_before_its_time_was_up_is_kept_and_what_it_started_ends():
    code, output, _ = kit._process([sys.executable, "-c", SLOW_STAGE], 5)
    assert code is None
    assert kit._last_figures(output) == {"ratio": 1.5}
    child = Path("/proc") / output.split("child ")[1].split()[0] / "stat"
    assert not child.exists() or child.read_text().split()[2] in "ZX"


def test_a_stage_needs_no_images_no_pictures_and_no_trainer():
    code = "from hf_clars.bench.gpu.run import main; main(['--stage', 'optimizer step', '--tiny'])"
    done = run_hiding(code, hidden=ELSEWHERE)
    assert json.loads(done.stdout)["LARS"]["ms"] > 0, done.stderr


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_whole_kit_runs_as_its_script_in_processes_of_its_own(tmp_path):
    script = [sys.executable, str(ROOT / "scripts" / "benchmark_gpu.py")]
    command = [*script, "--tiny", "--minutes", "15", "--output", str(tmp_path)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=1000)
    assert not done.returncode, done.stderr
    check(tmp_path, list(STAGES))
