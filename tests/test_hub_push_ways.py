"""Promise: Trainer, the script and the command share the same files, and leave a card as it is."""

import runpy
import sys
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from hf_clars.cli.commands import main
from hf_clars.data import PixelSettings, build_image_processor, collate_images
from hf_clars.errors import ConfigError
from hf_clars.hub import HubError
from hf_clars.trainer import ClarsTrainer
from tests.hub_kit import SHARED, finished_run, local_hub
from tests.trainer_kit import Images, clars_args, tiny_resnet

run = pytest.fixture(finished_run)
hub = pytest.fixture(local_hub)

pytestmark = pytest.mark.draws


def trained(folder, **changes):
    args = clars_args(folder, max_steps=2, per_device_train_batch_size=16, log_layer_rates=True, **changes)
    trainer = ClarsTrainer(
        tiny_resnet(),
        args,
        train_dataset=Images(),
        eval_dataset=Images(16),
        data_collator=collate_images,
        processing_class=build_image_processor(PixelSettings(image_size=8, num_channels=1)),
    )
    trainer.train()
    trainer.evaluate()
    return trainer


def test_the_trainer_pushes_the_same_files_and_writes_the_card_that_is_missing(tmp_path, hub):
    trainer = trained(tmp_path / "my-run", save_strategy="steps", save_steps=1)
    trainer.push_to_hub(license="mit", dataset="random images")
    files = hub.repos["me/my-run"]["main"]
    assert set(files) == {
        "model.safetensors",
        "config.json",
        "preprocessor_config.json",
        "README.md",
        "layer_rates.safetensors",
        "layer_rates.png",
        "layer_rates.html",
    }
    card = ModelCard(files["README.md"].decode())
    assert card.data.license == "mit"
    loss = next(r.metric_value for r in card.data.eval_results if r.metric_type == "loss")
    assert loss == pytest.approx([e["eval_loss"] for e in trainer.state.log_history if "eval_loss" in e][-1])
    assert not any(str(tmp_path).encode() in content for content in files.values())
    assert (tmp_path / "my-run" / "checkpoint-2").is_dir()


def test_a_card_that_is_there_is_pushed_as_it_is(tmp_path, hub):
    trainer = trained(tmp_path / "run")
    card = "---\nlicense: mit\n---\n\n# Mine\n"
    (tmp_path / "run" / "README.md").write_text(card)
    with pytest.raises(ConfigError, match="has a card already"):
        trainer.push_to_hub(license="apache-2.0")
    trainer.push_to_hub(blocking=False).result(timeout=60)
    assert hub.repos["me/run"]["main"]["README.md"].decode() == card


def test_push_to_hub_in_the_arguments_shares_the_end_and_fails_before_training_without_a_token(
    tmp_path, hub, monkeypatch
):
    trainer = trained(tmp_path / "run", push_to_hub=True, save_strategy="steps", save_steps=1)
    assert hub.commits == []
    trainer.save_model()
    assert [commit[2] for commit in hub.commits] == ["Model save"]
    assert not any("checkpoint" in name or "args" in name for name in hub.commits[0][3])
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(HubError, match="does not know the token"):
        trained(tmp_path / "other", push_to_hub=True)
    with pytest.raises(ConfigError, match="hub_strategy=every_save would push checkpoints"):
        clars_args(tmp_path / "x", push_to_hub=True, hub_strategy="every_save")


# ---- the command -----------------------------------------------------------------------------------------------------


def test_the_script_shows_what_would_be_pushed(run, monkeypatch, capsys):
    script = str(Path(__file__).parent.parent / "scripts" / "push_to_hub.py")
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")  # where nothing listens
    monkeypatch.setenv("HF_TOKEN", "")
    monkeypatch.setattr(sys, "argv", [script, str(run), "--repo-id", "owner/name", "--dry-run"])
    with pytest.raises(SystemExit) as end:  # in this process, which has the imports done
        runpy.run_path(script, run_name="__main__")
    shown = capsys.readouterr()
    assert not end.value.code, shown.err
    assert all(name in shown.out for name in SHARED)
    assert "Nothing was sent to owner/name." in shown.out


def test_the_command_pushes_and_reports_in_one_line(run, hub, capsys, monkeypatch):
    assert main(["push", str(run), "--repo-id", "owner/name", "--private"]) == 0
    assert "/owner/name/commit/" in capsys.readouterr().out
    assert set(hub.repos["owner/name"]["main"]) == SHARED
    assert hub.private["owner/name"] is True
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    assert main(["push", str(run), "--repo-id", "owner/name"]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: http://127.0.0.1")
    assert "hf auth login" in error


def test_the_card_command_keeps_a_card_unless_told_otherwise(run, capsys):
    assert main(["card", str(run), "--license", "mit"]) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert main(["card", str(run), "--license", "mit", "--title", "New", "--overwrite"]) == 0
    data = ModelCard.load(run / "README.md").data
    assert (data.license, data.model_name) == ("mit", "New")
