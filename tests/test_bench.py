"""The benchmark measures what it says: full work by every way, honest labels, ratios of the same round."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torchvision.ops import Conv2dNormActivation

from hf_clars.bench import growth, memory
from hf_clars.bench.check import agrees, check_way
from hf_clars.bench.cost import CostRow, measure_cost
from hf_clars.bench.figures import save_cost_page, save_growth_page
from hf_clars.bench.networks import NETWORKS, Network, has_batch_norm, with_group_norm
from hf_clars.bench.optimizer_step import measure_optimizers
from hf_clars.bench.peers import BackPack, OpacusGhost, OpacusHooks, VmapGrad
from hf_clars.bench.report import JSON_NAME, save_json, text_table
from hf_clars.bench.subset import measure_subset
from hf_clars.bench.timing import Ratio, alternate, peak_memory, ratio, ratios
from hf_clars.bench.ways import HfClars, OneByOne, Plain, SquaredNorms, Way

SCRIPT = Path(__file__).parents[1] / "scripts" / "benchmark_grad_norms.py"
PEERS = {OpacusHooks: "opacus", OpacusGhost: "opacus", BackPack: "backpack", VmapGrad: "torch"}


def _make(image_size: int, num_labels: int, groups: int = 1) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1),
        nn.GroupNorm(2, 6),
        nn.ReLU(inplace=True),
        nn.Conv2d(6, 6, 3, groups=groups),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, num_labels),
    )


TINY = Network("tiny", _make, image_size=8, batch=3, num_labels=4)
DEPTHWISE = Network("depthwise", lambda size, labels: _make(size, labels, groups=6), 8, 3, 4)


class Failing(Way):
    """Raises in its first step."""

    name = "failing"

    def step(self) -> SquaredNorms:
        raise KeyError("no rule for this layer\nand a second line")


class Doubled(HfClars):
    """Has norms that are wrong by a factor."""

    name = "doubled"

    def step(self) -> SquaredNorms:
        return {name: 4 * squares for name, squares in super().step().items()}


class Shrunk(HfClars):
    """Leaves a gradient that is not the batch's."""

    name = "shrunk"

    def step(self) -> SquaredNorms:
        squares = super().step()
        for param in self.model.parameters():
            param.grad = param.grad / 2 if param.grad is not None else None
        return squares


@pytest.mark.parametrize("network", [TINY, DEPTHWISE, NETWORKS["resnet20"].resized(image_size=8, batch=3)])
def test_ours_is_right(network: Network) -> None:
    verdict = check_way(HfClars, network)
    assert verdict.good
    assert not verdict.note


def test_ours_leaves_the_plain_gradient() -> None:
    model, other = TINY.build(), TINY.build()
    Plain(model, *TINY.data()).step()
    squares = HfClars(other, *TINY.data()).step()
    assert set(squares) == {"0", "1", "3", "6"}
    for expected, param in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(param.grad, expected.grad)


@pytest.mark.parametrize("peer", PEERS, ids=lambda peer: peer.name)
def test_peers_do_the_full_work(peer: type[Way]) -> None:
    pytest.importorskip(PEERS[peer])
    verdict = check_way(peer, TINY)
    assert verdict.good, verdict.note
    assert verdict.note == ("norms of 6 of 8 tensors" if peer is BackPack else "")


@pytest.mark.parametrize("peer", PEERS, ids=lambda peer: peer.name)
def test_peers_refuse_batch_norm_by_name(peer: type[Way]) -> None:
    pytest.importorskip(PEERS[peer])
    verdict = check_way(peer, NETWORKS["resnet20"].resized(image_size=8, batch=2))
    assert not verdict.good
    assert verdict.note.startswith("refused: ")
    assert "\n" not in verdict.note


@pytest.mark.parametrize(
    ("way", "start"),
    [
        (Failing, "refused: KeyError: 'no rule for this layer"),
        (Doubled, "wrong norms: 4 of 4"),
        (Shrunk, "wrong p.grad: "),
    ],
)
def test_what_fails_is_reported_and_not_timed(way: type[Way], start: str) -> None:
    plain, ours, bad = measure_cost(TINY, 1, [HfClars, way])
    assert plain.ratio == Ratio(1.0, 1.0, 1.0)
    assert ours.ratio is not None
    assert len(ours.seconds) == 1
    assert bad.ratio is None
    assert not bad.seconds
    assert bad.note.startswith(start)


def test_agreement_compares_modules_with_tensors() -> None:
    model, data = TINY.build(), TINY.data()
    assert agrees(OneByOne(model, *data), HfClars(TINY.build(), *data)).good


def test_a_package_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opacus.grad_sample", None)
    assert check_way(OpacusHooks, TINY).note == "not installed (opacus.grad_sample)"


def test_alternating_times_each_round_and_gives_ratios() -> None:
    order: list[str] = []
    steps = {name: (lambda name=name: order.append(name)) for name in ("plain", "other")}
    prepared: list[str] = []
    seconds = alternate(steps, 3, warmup=1, prepare={"other": lambda: prepared.append("other")})
    assert {name: len(own) for name, own in seconds.items()} == {"plain": 3, "other": 3}
    assert all(sorted(order[k : k + 2]) == ["other", "plain"] for k in range(0, 8, 2))
    assert len(prepared) == 4
    assert ratios(seconds)["plain"].median == 1
    assert ratio([2.0, 6.0, 4.0, 40.0, 10.0], [1.0, 2.0, 1.0, 8.0, 2.0]) == Ratio(4.0, 3.0, 5.0)


def test_group_norm_replaces_every_batch_norm_and_nothing_else() -> None:
    class Special(nn.BatchNorm2d):
        pass

    model = nn.Sequential(Conv2dNormActivation(3, 8), nn.ModuleDict({"norm": Special(5)}), nn.BatchNorm2d(64))
    changed = with_group_norm(model)
    assert not has_batch_norm(changed)
    assert has_batch_norm(model)
    norms = [module for module in changed.modules() if isinstance(module, nn.GroupNorm)]
    assert [(norm.num_groups, norm.num_channels) for norm in norms] == [(4, 8), (1, 5), (32, 64)]
    assert list(changed.state_dict()) == [
        key for key in model.state_dict() if "running" not in key and "num" not in key
    ]
    assert not set(map(id, changed.parameters())) & set(map(id, model.parameters()))


def test_subset_measures_the_first_samples_only() -> None:
    row = measure_subset(NETWORKS["resnet20"].resized(image_size=8, batch=1), 1, total=16, micro=4, samples=6)
    assert (row.total, row.samples) == (16, 6)
    assert len(row.seconds) == len(row.plain_seconds) == 1
    assert row.ratio.median > 0


def test_optimizers_step_and_keep_one_number_a_weight() -> None:
    rows = {row.optimizer: row for row in measure_optimizers(TINY, 1)}
    for name in ("torch SGD", "hf_clars LARS", "hf_clars CLARS"):
        assert rows[name].ratio is not None
        assert rows[name].numbers_per_weight == pytest.approx(1, abs=0.1)


def test_peak_memory_asks_a_process_and_reads_its_answer(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        assert command[:3] == [sys.executable, "-m", "hf_clars.bench.memory"]
        monkeypatch.setattr(sys, "argv", command[2:])
        return subprocess.CompletedProcess(command, memory.main(), capsys.readouterr().out, "")

    monkeypatch.setattr(subprocess, "run", run)  # a real one would import torch again, for seconds
    figures, note = peak_memory("resnet20", "hf_clars", batch=16, image_size=32, threads=torch.get_num_threads())
    assert not note
    assert figures["peak"] > 0
    assert figures["highest"] == pytest.approx(figures["baseline"] + figures["peak"])


def test_a_process_without_an_answer_is_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "false")
    assert peak_memory("resnet20", "plain", batch=1, image_size=8, threads=1) == ({}, "ended with code 1: no output")


def test_report_writes_tables_json_and_pictures(tmp_path: Path) -> None:
    rows = [
        CostRow("tiny", "plain", 3, 8, [0.1], Ratio(1.0, 1.0, 1.0)),
        CostRow("tiny", "hf_clars", 3, 8, [0.12], Ratio(1.2, 1.1, 1.3)),
        CostRow("tiny", "other", 3, 8, note="refused: KeyError: a | b"),
    ]
    points = growth.measure_growth(1, {"width": (4, 6)}, growth.TINY_BASE)
    save_json(tmp_path, "cost", rows)
    saved = json.loads(save_json(tmp_path, "growth", points).read_text())
    assert set(saved) == {"cost", "growth"}
    assert saved["cost"]["rows"][1]["seconds"] == [0.12]
    assert saved["growth"]["rows"][1]["value"] == 6
    assert saved["growth"]["machine"]["torch"] == torch.__version__
    assert (tmp_path / JSON_NAME).exists()
    for path in (save_cost_page(rows, tmp_path / "cost.png"), save_growth_page(points, tmp_path / "growth.png")):
        assert path.read_bytes().startswith(b"\x89PNG")
    lines = text_table(rows, {"way": lambda row: row.way, "note": lambda row: row.note}).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert "refused: KeyError: a / b" in lines[4]


def test_the_script_explains_itself(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmark_grad_norms.py", "--help"])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    assert end.value.code == 0
    shown = capsys.readouterr().out
    assert "--quick" in shown
    assert "resnet20-gn" in shown
