"""Promise: the notebook's cells run from top to bottom."""

import json
from pathlib import Path

import matplotlib
import pytest
import torch

pytestmark = pytest.mark.draws
NOTEBOOK = Path(__file__).parent.parent / "scripts" / "quickstart.ipynb"


def test_every_cell_runs_and_the_model_learns(tmp_path, monkeypatch, capsys):
    matplotlib.use("Agg")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("transformers.TrainingArguments.use_cpu", not torch.cuda.is_available(), raising=False)
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    assert code[0].startswith("%pip install")
    scope = {}
    for cell in code[1:]:
        exec(compile(cell.replace("EPOCHS = 12", "EPOCHS = 3"), str(NOTEBOOK), "exec"), scope)
    assert scope["EPOCHS"] == 3
    assert scope["results"]["eval_accuracy"] > 0.5  # of ten classes, after three epochs
    shown = capsys.readouterr().out
    assert "conv1" in shown or "rate 0." in shown
    assert "model.safetensors" in shown
    assert all(not cell.get("outputs") for cell in cells)
