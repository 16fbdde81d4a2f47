"""A finished run to share, and a Hub that is no further than this process."""

import json

from hf_clars.data import PixelSettings, build_image_processor
from hf_clars.hub import RunSummary, write_card
from tests.hub_server import TOKEN, hub_server
from tests.trainer_kit import tiny_resnet

SUMMARY = RunSummary(
    model_name="tiny",
    architecture="ResNetForImageClassification",
    parameters=1000,
    dataset="ImageNet",
    method="clars",
    recipe={"global_batch": 16384},
    results={"eval_accuracy": 0.7512, "eval_loss": 1.25},
    dataset_id="ILSVRC/imagenet-1k",
    eval_split="validation",
)
SHARED = {
    "model.safetensors",
    "config.json",
    "preprocessor_config.json",
    "README.md",
    "layer_rates.safetensors",
    "layer_rates.png",
    "accuracy.svg",
    "layer_rates.html",
    ".eval_results/imagenet-1k.yaml",
    "all_results.json",
}
KEPT = (
    "checkpoint-3/model.safetensors",
    "checkpoint-3/optimizer.safetensors",
    "layer_rates/0001.safetensors",
    "optimizer.pt",
    "training_args.bin",
    "training_args.json",
    "trainer_state.json",
    "train_results.json",
    "notes.txt",
    ".env",
    "runs/events.out.tfevents.1",
)


def finished_run(tmp_path):
    """The folder of a finished run, with all that a run can leave and more."""
    folder = tmp_path / "secret-place" / "run"
    tiny_resnet().save_pretrained(folder)
    build_image_processor(PixelSettings(image_size=8, num_channels=1)).save_pretrained(folder)
    for name in KEPT:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"not for sharing: {name}")
    for name in ("layer_rates.safetensors", "layer_rates.png", "accuracy.svg", "layer_rates.html"):
        (folder / name).write_bytes(name.encode() * 100)
    (folder / "all_results.json").write_text(json.dumps(SUMMARY.results))
    write_card(folder, SUMMARY)
    return folder


def local_hub(monkeypatch):
    """A server that the client in this process talks to, with a token that it knows."""
    with hub_server() as (address, state):
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address)
        # The clients that Trainer makes repositories with took their address when they were made: that behind
        # `huggingface_hub.create_repo` at import, transformers' own (from 5.24 on) at its first use.
        monkeypatch.setattr("huggingface_hub.hf_api.api.endpoint", address)
        monkeypatch.setattr("transformers.utils.hub._hf_api", None, raising=False)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda _: None)  # between the client's retries
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield state
