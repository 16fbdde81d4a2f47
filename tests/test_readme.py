"""Promise: the code in README and docs runs as printed, page by page."""

import re
from pathlib import Path

import pytest
import torch

from hf_clars.data import PixelSettings, build_image_processor
from hf_clars.models import build_model
from tests.trainer_kit import Images, Plain

pytestmark = pytest.mark.draws
ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"


def blocks(page):
    return re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL)


PAGES = [page for page in sorted((ROOT / "docs").glob("*.md")) if blocks(page)]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A trained folder, as far as loading goes."""
    folder = tmp_path_factory.mktemp("readme") / "run"
    build_model("clars-cnn", num_labels=3, image_size=28, num_channels=1).save_pretrained(folder)
    build_image_processor(PixelSettings(image_size=28, num_channels=1)).save_pretrained(folder)
    return folder


@pytest.fixture
def names(run, tmp_path, monkeypatch):
    """What the text calls `your own model and data`; runs write to a folder of their own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("transformers.TrainingArguments.use_cpu", not torch.cuda.is_available(), raising=False)
    data = Images(count=2048)
    batches = [{"pixel_values": data.x[i : i + 8], "labels": data.y[i : i + 8]} for i in range(0, 64, 8)]
    return {"model": Plain(), "dataset": data, "batches": batches, "run": str(run)}


def execute(page, names):
    """Run a page's blocks one after the other; the names at its end."""
    scope = dict(names)
    for block in blocks(page):
        if "Trainer(model" in block:
            scope["model"] = Plain()
        exec(compile(block, str(page), "exec"), scope)
    return scope


def test_the_readme_runs(names, tmp_path):
    assert len(blocks(README)) >= 4
    scope = execute(README, names)
    assert scope["norms"].per_sample["conv"].shape == (8,)
    assert scope["classifier"].config.num_labels == 3
    assert (tmp_path / "runs" / "mine" / "layer_rates.png").exists()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_page_runs(page, names):
    execute(page, names)


def test_pages_with_code_are_found():
    assert {"three-ways-in.md", "per-sample-norms.md", "reading-the-picture.md"} <= {page.name for page in PAGES}


def test_the_layer_rule_of_the_engines_readme_is_exact():
    scope = execute(ROOT / "hf_clars" / "grad_norms" / "README.md", {})
    model, x = scope["Gain"](4), torch.randn(5, 4)
    with scope["PerSampleGradNorms"](model) as norms:
        model(x).square().sum(1).mean().backward()
    torch.testing.assert_close(norms.per_sample["Gain"], (2 * x * x).norm(dim=1))
