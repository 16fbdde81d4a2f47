"""Promise: what cannot work is refused in one paragraph, with exit code 2, before anything is trained."""

import dataclasses
import runpy
import sys
from collections import namedtuple
from pathlib import Path

import pytest
import yaml

from hf_clars.errors import ConfigError, HfClarsError
from hf_clars.image_classification.arguments import DataArguments, ModelArguments, OutputArguments
from hf_clars.image_classification.run import parse_run, train_image_classifier
from hf_clars.trainer import ClarsTrainer, ClarsTrainingArguments
from hf_clars.trainer import preflight as preflight_module
from hf_clars.trainer.preflight import OutputError, claim_output_dir
from tests.image_files import image_folder
from tests.trainer_kit import Images, Plain, plain_args

ROOT = Path(__file__).parent.parent


@pytest.fixture
def config(tmp_path):
    """A run that would work, as a dict to spoil."""
    return {
        "dataset": str(image_folder(tmp_path / "images")),
        "model": "resnet8",
        "image_size": 16,
        "augment": "none",
        "per_device_train_batch_size": 4,
        "global_batch_size": 8,
        "norm_samples": 0,
        "num_train_epochs": 1,
        "output_dir": str(tmp_path / "run"),
        "use_cpu": True,
        "report_to": "none",
        "save_strategy": "no",
    }


def run(config, tmp_path, *flags):
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(config))
    return train_image_classifier(parse_run(["--config", str(file), *flags]))


SPOILED = {
    "a misspelt key": ({"per_device_train_batchsize": 4}, "Did you mean 'per_device_train_batch_size'"),
    "an unheard-of key": ({"zzzzqqqq": 4}, "unknown setting, 'zzzzqqqq'. --help"),
    "a value of a wrong type": ({"num_train_epochs": "many"}, "num_train_epochs.*many"),
    "an unknown choice": ({"method": "adam"}, "method.*adam"),
    "a missing data set": ({"dataset": "no/where"}, "'no/where' was not found"),
    "a missing split": ({"train_split": "training"}, "no split 'training'; it has 'train', 'validation'"),
    "an indivisible batch": ({"global_batch_size": 10}, "not a multiple of the 4 samples.*8 and 12"),
    "a contradicted batch": ({"gradient_accumulation_steps": 5}, "gradient_accumulation_steps=5"),
    "too many norm samples": ({"norm_samples": 9}, "norm_samples=9 is larger than the batch of 8"),
    "clipping": ({"max_grad_norm": 1.0}, "max_grad_norm=1.0 would clip"),
    "what transformers refuses itself": ({"use_cpu": False, "fp16": True, "bf16": True}, "The settings do not fit"),
    "two warmups": ({"warmup_epochs": 1, "warmup_steps": 10}, "keep one"),
    "a batch above the data": ({"global_batch_size": 64}, "takes 64 images.* has only 12"),
    "a stream without length": ({"streaming": True}, "set --max_steps"),
    "an unknown model": ({"model": "resnet-9000"}, "resnet-9000"),
    "no checkpoint": ({"resume_from_checkpoint": "true"}, "no checkpoint to resume from"),
    "a checkpoint that is not there": ({"resume_from_checkpoint": "/nowhere/at/all"}, "is no folder"),
    "an unknown head": ({"freeze_head_epochs": 1, "head_layers": ["top"]}, "head_layers names top"),
    "a negative setting": ({"warmup_epochs": -1}, "warmup_epochs=-1.0 must not be negative"),
    "bad JSON": ({"model_kwargs": "{depth: "}, "not valid JSON"),
}


@pytest.mark.parametrize("case", SPOILED)
def test_it_is_refused_with_a_sentence_that_helps(config, tmp_path, case):
    change, message = SPOILED[case]
    with pytest.raises(HfClarsError, match=message) as caught:
        run({**config, **change}, tmp_path)
    assert "\n\n" not in str(caught.value)


def test_evaluation_without_a_split_is_refused(config, tmp_path):
    only_train = str(image_folder(tmp_path / "only_train", splits=("train",)))
    with pytest.raises(ConfigError, match="needs an evaluation split"):
        run({**config, "dataset": only_train, "eval_strategy": "epoch"}, tmp_path)


def test_the_run_itself_would_work(config, tmp_path):
    results = run(config, tmp_path)
    assert 0 <= results["eval_accuracy"] <= 1


def test_flags_win_over_the_file(config, tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump({**config, "lr_scheduler_kwargs": {"power": 3.0, "lr_end": 0.0}}))
    settings = parse_run(
        ["--config", str(file), "--momentum", "0.5", "--lr_step_epochs", "1", "2", "--in_memory", "true"]
    )
    assert settings.training.momentum == 0.5
    assert settings.training.lr_step_epochs == [1.0, 2.0]
    assert settings.training.lr_scheduler_kwargs == {"power": 3.0, "lr_end": 0.0}
    assert settings.data.in_memory is True
    assert settings.training.gradient_accumulation_steps == 2
    assert settings.training.learning_rate == pytest.approx(0.1 * 8 / 128)


def test_a_flag_that_is_misspelt_names_the_right_one(config, tmp_path):
    with pytest.raises(ConfigError, match="Did you mean 'momentum'"):
        run(config, tmp_path, "--momentun", "0.5")


def test_help_is_short_and_names_this_projects_settings(capsys):
    with pytest.raises(SystemExit) as ended:
        parse_run(["--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert len(text.splitlines()) < 120
    assert max(map(len, text.splitlines())) <= 120
    in_one_line = " ".join(text.split())
    for kind in (ModelArguments, DataArguments, OutputArguments, ClarsTrainingArguments):
        for field in dataclasses.fields(kind):
            if field.init and field.name in kind.__annotations__:  # ours: in full, to the last word
                assert " ".join(field.metadata["help"].rstrip(".").split()) in in_one_line
    for name in ("--dataset", "--model", "--norm_samples", "--global_batch_size", "--output_dir", "--help_all"):
        assert name in text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a: [1, ", "not valid YAML"),
        ("- 1\n- 2", "key: value"),
        ("", "is empty"),
        ("# nothing\n", "is empty"),
        ("seed: 1\nseed: 2", "seed twice"),
        (None, "cannot be read"),
    ],
)
def test_a_config_file_that_is_none_is_refused(tmp_path, content, message):
    file = tmp_path / "broken.yaml"
    if content is not None:
        file.write_text(content)
    with pytest.raises(ConfigError, match=message):
        parse_run(["--config", str(file)])


def test_a_full_output_folder_is_left_alone_or_numbered(config, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "precious.txt").write_text("mine")
    with pytest.raises(
        OutputError, match=r"is not empty.*--output_dir.*--resume_from_checkpoint.*--existing_output number"
    ):
        run(config, tmp_path)
    assert claim_output_dir(folder, existing="number").name == "run-2"
    (tmp_path / "run-2" / "more.txt").write_text("mine too")
    assert claim_output_dir(folder, existing="number").name == "run-3"
    assert (folder / "precious.txt").read_text() == "mine"


def test_an_output_folder_that_cannot_be_made_or_written_is_refused(config, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OutputError, match="cannot be written to"):
        run({**config, "output_dir": str(tmp_path / "file" / "run")}, tmp_path)
    with pytest.raises(OutputError, match="cannot be written to"):
        claim_output_dir("/proc/hf_clars_run")


def test_a_disk_without_room_for_the_checkpoints_is_refused(config, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(preflight_module.shutil, "disk_usage", lambda _: usage(10**9, 10**9 - 1000, 1000))
    with pytest.raises(OutputError, match=r"0\.00 GiB free.*--save_total_limit"):
        run(config, tmp_path)


def test_labels_that_do_not_fit_a_pretrained_model_are_refused(config, tmp_path):
    from hf_clars.models import build_model

    build_model("resnet8", num_labels=7, image_size=16).save_pretrained(tmp_path / "seven")
    with pytest.raises(ConfigError, match=r"7.*3.*replace_head"):
        run({**config, "model": str(tmp_path / "seven")}, tmp_path)


def test_the_trainer_asks_for_its_own_arguments(tmp_path):
    with pytest.raises(ConfigError, match="needs ClarsTrainingArguments, not TrainingArguments"):
        ClarsTrainer(Plain(), plain_args(tmp_path), train_dataset=Images())


def test_the_script_ends_with_code_2_and_one_paragraph(config, tmp_path, monkeypatch, capsys):
    file, script = tmp_path / "config.yaml", str(ROOT / "scripts" / "train_imagenet.py")
    file.write_text(yaml.safe_dump({**config, "momentun": 0.9}))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [script, "--config", str(file)])
    with pytest.raises(SystemExit) as end:  # in this process, which has the imports done
        runpy.run_path(script, run_name="__main__")
    assert end.value.code == 2
    said = capsys.readouterr().err
    last = said.strip().splitlines()[-1]
    assert last.startswith("error: ")
    assert "Did you mean 'momentum'" in last
    assert "Traceback" not in said
