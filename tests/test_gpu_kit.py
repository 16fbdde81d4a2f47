"""Promise: every stage of the kit for a GPU runs, writes its rows as they come, and makes its report anywhere."""

import contextlib
import io
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from hf_clars.bench.gpu import peers, stages
from hf_clars.bench.gpu import run as kit
from hf_clars.bench.gpu.measuring import in_turn
from hf_clars.bench.gpu.networks import NETWORKS
from hf_clars.bench.gpu.peers import measure as measure_peers
from hf_clars.bench.gpu.report import table_of_rows
from hf_clars.bench.gpu.stages import STAGES
from hf_clars.bench.gpu.trainer import TURNS
from hf_clars.bench.gpu.trainer import trainer as trainer_stage
from hf_clars.bench.networks import NETWORKS as PEERS_NETWORKS
from hf_clars.bench.peers import WAYS, VmapGrad
from hf_clars.cli.commands import main as command_line
from tests.test_imports import run as run_hiding

ROOT = Path(__file__).parent.parent
ELSEWHERE = {"simplejpeg", "mlxtend", "matplotlib", "datasets", "evaluate", "accelerate"}
STARTS_TESTS = "exactness"


@pytest.fixture
def in_this_process(monkeypatch):
    """Stages without processes of their own, each of which would import torch again; they time as little as can be."""

    def stage(command, seconds):
        assert command[1:3] == ["-m", "hf_clars.bench.gpu.run"]
        with contextlib.redirect_stdout(io.StringIO()) as shown:
            code = kit.main(command[3:])
        return code, shown.getvalue(), ""

    monkeypatch.setattr(kit, "_process", stage)
    monkeypatch.setattr(stages, "in_turn", lambda *steps, seconds: in_turn(*steps, seconds=0.0))
    monkeypatch.setattr(peers, "measure", lambda *what, seconds: measure_peers(*what, seconds=0.01))


def check(folder, stages):
    results = json.loads((folder / kit.RESULTS).read_text())
    assert results["tiny"]
    assert list(results["stages"]) == stages
    for name, figures in results["stages"].items():
        assert "error" not in figures, (name, figures)
    for name in set(NETWORKS) & set(stages):
        assert results["stages"][name]["gradients differ by"] < 1e-4, name
        assert results["stages"][name]["ratio"] > 0
    check_rows(results["stages"])
    report = (folder / "gpu.md").read_text()
    assert "measures nothing" in report
    assert all(name in report for name in stages)
    assert (folder / "gpu.png").read_bytes().startswith(b"\x89PNG")


def check_rows(stages):
    """What measures several things on each network."""
    for network, rows in stages.get("peers", {}).items():
        if network != "seconds":
            assert set(rows) == set(WAYS), network
            for name in ("plain", "hf_clars", "vmap(grad)"):
                assert rows[name]["ratio"] > 0, (network, name, rows[name])
            assert all(row.keys() & {"ratio", "skipped", "error"} for row in rows.values()), rows
    for network, rows in stages.get("trainer", {}).items():
        if network != "seconds":
            assert {name for name, row in rows.items() if row.get("of Trainer's", 0) > 0} == set(TURNS), rows


def test_every_stage_writes_its_rows_and_the_report_can_be_made_again(in_this_process, tmp_path):
    names = [name for name in STAGES if name != STARTS_TESTS]
    assert not command_line(
        ["bench", "--gpu", "--tiny", "--minutes", "9", "--output", str(tmp_path), "--stages", *names]
    )
    check(tmp_path, names)
    (tmp_path / "gpu.md").unlink()
    assert not kit.main(["--report-only", "--output", str(tmp_path)])
    check(tmp_path, names)


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
    end = time.monotonic() + 30  # a process that was killed may be seen for a moment
    while runs(child) and time.monotonic() < end:
        time.sleep(0.05)
    assert not runs(child)


def runs(stat):
    try:
        return stat.read_text().split()[2] not in "ZX"
    except OSError:
        return False


def test_a_stage_needs_no_images_no_pictures_and_no_trainer():
    code = "from hf_clars.bench.gpu.run import main; main(['--stage', 'optimizer step', '--tiny'])"
    done = run_hiding(code, hidden=ELSEWHERE)
    assert json.loads(done.stdout)["LARS"]["ms"] > 0, done.stderr


def test_the_trainers_need_no_images_and_are_skipped_by_name_where_a_package_lacks(monkeypatch):
    # Frozen, so that the collections of garbage after each run need not look through all modules.
    code = "import gc, hf_clars.bench.gpu.trainer; from hf_clars.bench.gpu.run import main; gc.freeze(); "
    code += "main(['--stage', 'trainer', '--tiny'])"
    done = run_hiding(code, hidden={*ELSEWHERE, "timm", "opacus"} - {"accelerate"})
    check_rows({"trainer": json.loads(done.stdout.splitlines()[-1])})
    monkeypatch.setitem(sys.modules, "accelerate", None)
    assert STAGES["trainer"][1](True) == {"skipped": "needs the package accelerate"}


def test_a_peer_that_finds_no_memory_is_a_row_and_the_others_go_on(monkeypatch):
    steps = iter([None] * 4)  # the check, and those before the first round

    def step(self, honest=VmapGrad.step):
        if next(steps, "later") == "later":
            raise torch.OutOfMemoryError("CUDA out of memory")
        return honest(self)

    monkeypatch.setattr(VmapGrad, "step", step)
    rows, said = {}, []
    measure_peers(PEERS_NETWORKS["resnet20-gn"].quick(), rows, lambda: said.append(str(rows)), seconds=0.01)
    assert "out of memory" in rows["vmap(grad)"]["error"]
    assert rows["hf_clars"]["rounds"] >= 1
    assert "out of memory" in said[-1]
    steps = iter([])
    measure_peers(PEERS_NETWORKS["resnet20-gn"].quick(), rows, lambda: None, seconds=0.01)
    assert "out of memory" in rows["vmap(grad)"]["error"]
    assert "ratio" not in rows["vmap(grad)"]
    assert rows["hf_clars"]["rounds"] >= 1
    table = table_of_rows({"resnet20-gn": rows, "seconds": 1.0})
    assert sum("out of memory" in line for line in table) == 1


def test_a_trainer_that_fails_is_a_row_and_the_others_go_on(monkeypatch):
    def fails(*_):
        raise RuntimeError("refuses")

    monkeypatch.setitem(TURNS, "ClarsTrainer, lars", fails)
    for name in ("Trainer, SGD", "ClarsTrainer, nag", "ClarsTrainer, clars (512 samples)"):
        monkeypatch.setitem(TURNS, name, lambda *_: 2.0)
    rows = trainer_stage(True)["resnet8 B2048"]
    assert "refuses" in rows["ClarsTrainer, lars"]["error"]
    assert rows["ClarsTrainer, nag"]["of Trainer's"] == 1.0


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_whole_kit_runs_as_its_script_in_processes_of_its_own(tmp_path):
    script = [sys.executable, str(ROOT / "scripts" / "benchmark_gpu.py")]
    command = [*script, "--tiny", "--minutes", "15", "--output", str(tmp_path)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=1000)
    assert not done.returncode, done.stderr
    check(tmp_path, list(STAGES))
