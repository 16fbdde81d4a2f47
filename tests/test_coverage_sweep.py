"""Promise: the coverage sweep outlives what it sweeps, goes on where it stopped, and says what is right and wrong."""

import json
import multiprocessing
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn

from benchmarks.coverage import sweep as sweeping
from benchmarks.coverage import transformers_models
from benchmarks.coverage.judge import expected, is_coupled, judge
from benchmarks.coverage.oracle import one_copy_a_sample
from benchmarks.coverage.page import word_of, write_page
from benchmarks.coverage.subject import Subject, to_float64
from benchmarks.coverage.tiny_config import VOCAB, WIDTH, tiny_config
from tests.oracle import per_sample_grads
from tests.processes import GROUP

pytestmark = GROUP
ROOT = Path(__file__).parents[1]


@pytest.fixture
def swept(tmp_path, monkeypatch):
    monkeypatch.setitem(sweeping.SUITES, "own", "tests.coverage_subjects")
    # A process has one fork server, which must have imported what other tests need, and has what the sweep needs.
    server = multiprocessing.get_context("forkserver")
    monkeypatch.setattr(server, "set_forkserver_preload", lambda names: None)
    process = server.Process(target=int)  # so that what it imports at its start is in no subject's time
    process.start()
    process.join()
    path = tmp_path / "results.json"

    def run(*names, seconds=30.0):
        lines = []
        sweeping.sweep([f"own/{n}" for n in names], path, seconds, 8, say=lines.append)
        return json.loads(path.read_text())["rows"], lines

    return run


@pytest.mark.parametrize(
    ("name", "words"), [("dies", "SIGSEGV"), ("is greedy", "memory"), ("raises", "IndexError: out of range")]
)
def test_what_the_engine_dies_of_is_a_row(swept, name, words):
    rows, _ = swept(name, "is well")
    assert rows[f"own/{name}"]["float32"]["verdict"] == "crashed"
    assert words in rows[f"own/{name}"]["float32"]["why"]
    assert word_of(rows["own/is well"]) in ("exact", "slow")


def test_what_does_not_end_is_a_row(swept):
    rows, _ = swept("sleeps", seconds=1)
    assert "not done after 10 s" in rows["own/sleeps"]["float32"]["why"]


def test_what_takes_too_long_is_not_judged(swept):
    rows, _ = swept("computes without end", seconds=2)
    assert word_of(rows["own/computes without end"]) == "not judged"
    assert rows["own/computes without end"]["float32"]["why"] == "took longer than 2 s"


def test_what_cannot_be_built_is_a_row(swept):
    rows, _ = swept("cannot be built")
    assert word_of(rows["own/cannot be built"]) == "not judged"
    assert "no such model" in rows["own/cannot be built"]["why"]


def test_it_goes_on_where_it_stopped(swept):
    swept("is well")
    _, lines = swept("is well", "cannot be built")
    assert [line.partition(":")[0] for line in lines] == ["own/cannot be built"]


class Folded(nn.Module):
    """Tokens folded into the batch, then BatchNorm: no rule of shapes finds a sample's part, the definition does."""

    def __init__(self):
        super().__init__()
        self.layer, self.conv, self.bn = nn.Linear(8, 8), nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)

    def forward(self, x):  # [B, 8, 4, 4]
        tokens = x.permute(0, 2, 3, 1).reshape(len(x) * 4, 4, 8)
        self.out = self.layer(tokens)
        return self.bn(self.conv(self.out.tanh().reshape(len(x), 4, 4, 8).permute(0, 3, 1, 2)))


def test_copies_are_the_definition():
    """What reaches a weight through a sample's rows of the layer's output, taken directly."""
    torch.manual_seed(0)
    subject = Subject(Folded().double(), {"": (torch.randn(3, 8, 4, 4, dtype=torch.float64),)})
    assert is_coupled(Subject(Folded(), {"": (torch.randn(3, 8, 4, 4),)}))
    losses = subject.losses(subject.model, subject.batch)
    g = torch.autograd.grad(losses.sum(), subject.model.out)[0]
    want = g.reshape(3, 4, 4, 8).sum((1, 2)).norm(dim=1)
    found = one_copy_a_sample(subject.model, lambda: subject.losses(subject.model, subject.batch), subject.batch, 1e-9)
    torch.testing.assert_close(found["layer.bias"], want)


def test_copies_agree_with_the_other_oracle():
    """Both know BatchNorm; they share no code."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3)).double()
    subject = Subject(model, to_float64({"": (torch.randn(3, 3, 8, 8),)}))
    found = one_copy_a_sample(model, lambda: subject.losses(model, subject.batch), subject.batch, 1e-9)
    other = per_sample_grads(model, lambda m: subject.losses(m, subject.batch).sum(), 3)
    for name, grads in other.items():
        torch.testing.assert_close(found[name], grads.flatten(1).norm(dim=1), msg=name)


class AcrossTheBatch(nn.Module):
    """Attends over the samples by mistake, to values that are all alike: LayerNorm of one number is its bias."""

    def __init__(self):
        super().__init__()
        self.layer, self.norm = nn.Linear(8, 1), nn.LayerNorm(1)
        nn.init.ones_(self.norm.bias)

    def forward(self, x):  # [B, 4, 8]
        x = self.layer(x)
        values = self.norm(x)[..., 0]
        return x[..., 0].tanh() * (1 + (values @ values.T).softmax(-1) @ values)


def test_coupling_is_seen_where_no_value_shows_it():
    torch.manual_seed(0)
    subject = Subject(AcrossTheBatch(), {"": (torch.randn(3, 4, 8),)})
    assert is_coupled(subject)
    right = expected(subject, ["float32"])["float32"]
    row = judge(subject, "float32", right, enough=0)
    assert row["verdict"] == "exact", row


@pytest.mark.parametrize("name", ["BertConfig", "Gemma3Config", "MixtralConfig"])
def test_configurations_become_tiny_by_the_names_of_their_fields(name):
    config = tiny_config(getattr(transformers, name), pad_token_id=0)
    inner = getattr(config, "text_config", None) or config
    assert getattr(inner, "hidden_size", WIDTH) <= 4 * WIDTH
    assert getattr(inner, "vocab_size", VOCAB) <= VOCAB
    for field in ("hidden_dropout_prob", "attention_dropout", "drop_path_rate"):
        assert not getattr(inner, field, 0)


@pytest.mark.parametrize("name", ["BertForSequenceClassification", "ResNetForImageClassification"])
def test_a_model_is_judged(name):
    torch.set_num_threads(1)
    subject = transformers_models.build(name)
    assert sum(p.numel() for p in subject.model.parameters()) < 100_000
    for precision, right in expected(subject, ["float32", "bf16"]).items():
        row = judge(subject, precision, right, enough=0)
        assert row["verdict"] == "exact", row


def test_the_page_says_what_the_results_say(tmp_path):
    exact = {"verdict": "exact", "cost": 1.5, "first": 3.0, "ways": {"rule": 3}, "coupled": False, "note": ""}
    rows = {
        "transformers/Fine": {"float32": exact, "bf16": exact},
        "timm/bad": {"float32": exact, "bf16": {"verdict": "wrong", "why": "w: 1 for 2", "pass": 2}},
        "timm/half": {"float32": exact, "bf16": {"verdict": "unjudged", "why": "took longer than 60 s"}},
        "timm/no": {"verdict": "unjudged", "why": "NotRunnable: takes | boxes"},
    }
    write_page({"rows": rows, "versions": {"torch": "2"}}, tmp_path / "page.md", 10)
    text = (tmp_path / "page.md").read_text()
    assert "| Fine | exact | 1.5 / 1.5 | rule 3 |" in text
    assert "| bad | wrong | bf16, pass 2: w: 1 for 2 |" in text
    assert "| no | not judged | takes / boxes |" in text
    assert "| half | exact | 1.5 | bf16 not judged: took longer than 60 s |" in text
    assert "4 of 10" in text


def test_the_page_in_the_docs_is_that_of_the_results():
    """Nobody has edited the page, or forgotten it after a sweep."""
    results = sweeping.load(ROOT / "benchmarks" / "coverage" / "results.json")
    text = (ROOT / "docs" / "coverage.md").read_text()
    for name, row in results["rows"].items():
        assert f"| {name.partition('/')[2]} | {word_of(row)} |" in text


@pytest.mark.slow
@pytest.mark.timeout(20000)
def test_no_model_is_worse_than_the_page_says(tmp_path):
    """The whole sweep again."""
    before = sweeping.load(ROOT / "benchmarks" / "coverage" / "results.json")["rows"]
    path = tmp_path / "results.json"
    script = [sys.executable, str(ROOT / "scripts" / "sweep_coverage.py"), "--results", str(path), "--no-page"]
    subprocess.run(script, check=True)
    after = sweeping.load(path)["rows"]
    good = ("exact", "slow")
    worse = {
        n: after[n] for n, row in before.items() if word_of(row) in good and word_of(after.get(n, row)) not in good
    }
    assert not worse
