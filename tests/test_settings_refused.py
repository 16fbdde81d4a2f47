"""Promise: a setting that cannot work or has no effect ends the command in one paragraph and code 2, untrained."""

import os

import pytest
import yaml

from hf_clars.cli.train import main
from hf_clars.errors import ConfigError
from hf_clars.trainer import ClarsTrainer, value_checks
from tests.image_files import image_folder
from tests.trainer_kit import Images, Plain, clars_args


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return str(image_folder(tmp_path_factory.mktemp("data") / "images"))


@pytest.fixture
def command(images, tmp_path, monkeypatch, capsys):
    """Runs a spoiled configuration; nothing may be trained. Gives (exit code, what stderr says last)."""
    monkeypatch.setattr(ClarsTrainer, "train", lambda *_, **__: pytest.fail("training began"))

    def run(change, *flags):
        config = {
            "dataset": images,
            "model": "resnet8",
            "image_size": 16,
            "per_device_train_batch_size": 4,
            "global_batch_size": 8,
            "num_train_epochs": 1,
            "output_dir": str(tmp_path / "run"),
            "use_cpu": True,
            "save_strategy": "no",
        }
        file = tmp_path / "config.yaml"
        file.write_text(yaml.safe_dump({**config, **change}))
        code = main(["--config", str(file), *flags])
        return code, capsys.readouterr().err.strip().splitlines()[-1]

    return run


CANNOT_WORK = {
    "a negative trust coefficient": ({"eta": -1}, "eta=-1.0 must be above 0"),
    "an infinite one": ({"eta": float("inf")}, "eta=inf must be finite"),
    "an infinite rate": ({"learning_rate": float("inf")}, "learning_rate=inf must be finite"),
    "a negative rate": ({"learning_rate": -1}, "learning_rate=-1.0 must not be negative"),
    "a momentum of one": ({"momentum": 1}, "momentum=1.0 must be at least 0 and below 1"),
    "a momentum that is no number": ({"momentum": float("nan")}, "momentum=nan must be finite"),
    "a negative decay": ({"weight_decay": -0.1}, "weight_decay=-0.1"),
    "a signal below one": ({"method": "signal_lars", "signal_n": 0.5}, "signal_n=0.5 must be at least 1"),
    "no samples in a pass": ({"per_device_train_batch_size": 0}, "per_device_train_batch_size=0"),
    "a negative batch": ({"global_batch_size": -8}, "global_batch_size=-8 must be above 0"),
    "no passes": ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps=0"),
    "no epochs": ({"num_train_epochs": 0}, "num_train_epochs=0.0 must be above 0"),
    "negative epochs": ({"num_train_epochs": -1}, "num_train_epochs=-1.0 must be above 0"),
    "no steps": ({"max_steps": 0}, "max_steps=0 must be above 0"),
    "a seed below zero": ({"seed": -1}, "seed=-1"),
    "no steps between logs": ({"logging_steps": 0}, "logging_steps=0.0 must be above 0"),
    "no steps between checkpoints": ({"save_strategy": "steps", "save_steps": 0}, "save_steps=0.0 must be above 0"),
    "a rate that falls before the start": ({"lr_step_epochs": [-1]}, "lr_step_epochs=[-1.0] must all be above 0"),
    "smoothing of all": ({"label_smoothing_factor": 1.0}, "label_smoothing_factor=1.0"),
    "a negative number of workers": ({"dataloader_num_workers": -1}, "dataloader_num_workers=-1"),
    "a misspelt tracker": ({"report_to": "tensorbord"}, "Did you mean 'tensorboard'"),
    "no as a tracker": ({"report_to": False}, "report_to=false is no tracker. Use none"),
    "a tracker beside none": ({"report_to": ["tensorboard", "none"]}, "keep one of the two"),
    "a schedule that there is not": ({"lr_scheduler_type": "polynomal"}, "polynomal is not a valid"),
    "a setting that the schedule lacks": ({"lr_scheduler_kwargs": {"powr": 2}}, "keyword argument 'powr'"),
    "a rate that ends above its start": ({"lr_scheduler_kwargs": {"lr_end": 9.0}}, "lr_end (9.0) must be smaller"),
    "a number as a word": ({"lr_scheduler_kwargs": '{"lr_end": "1e-4"}'}, "lr_end='1e-4', which is a word"),
    "a metric that is not measured": ({"metric_for_best_model": "f1"}, "f1 is measured in no evaluation of this run"),
    "top 5 of three classes": ({"metric_for_best_model": "top5_accuracy"}, "choose one of loss, accuracy"),
    "a best model without evaluations": ({"load_best_model_at_end": True}, "load_best_model_at_end has no effect"),
    "noise for words": ({"neftune_noise_alpha": 5.0}, "neftune_noise_alpha"),
    "a compiler that there is not": ({"torch_compile_backend": "nope"}, "The settings do not fit"),
    "an image size of zero": ({"image_size": 0}, "image_size=0 must be at least 1"),
    "a mean of one channel": ({"image_mean": [0.5]}, "image_mean has 1 numbers"),
    "a deviation of zero": ({"image_std": [1, 1, 0]}, "image_std=[1.0, 1.0, 0.0] must be above 0"),
    "no images at all": ({"max_train_samples": 0}, "max_train_samples=0 must be at least 1"),
    "a negative time": ({"max_hours": -1}, "max_hours=-1.0"),
    "a list for the model": ({"model_kwargs": "[1]"}, "model_kwargs=[1] must be names and values"),
    "no data set": ({"dataset": None}, "The settings lack dataset"),
    "workers that there are not": ({"dataloader_persistent_workers": True}, "set dataloader_num_workers above 0"),
    "a way of compiling that there is not": ({"torch_compile_mode": "nope"}, "torch_compile_mode=nope: Unrecognized"),
    "checkpointing that the model lacks": ({"gradient_checkpointing": True}, "does not support it"),
    "kernels that are not installed": ({"use_liger_kernel": True}, "pip install liger-kernel"),
    "an empty data set": ({"dataset": ""}, "dataset is empty"),
    "a batch below one pass": ({"global_batch_size": 3}, "The smallest that works is 4"),
    "a word in a list of numbers": ({"lr_step_epochs": [1, "a"]}, "has 'a' in it, which must be a number"),
    "clipping": ({"max_grad_norm": 1.0}, "would clip the gradients"),
}

NO_EFFECT = {
    "another optimizer": ({"optim": "sgd"}, "optim=sgd would have no effect"),
    "transformers' own optimizer": ({"optim": "adamw_torch_fused"}, "optim=adamw_torch_fused would have no effect"),
    "Adam's beta": ({"adam_beta1": 0.95}, "momentum is `momentum`"),
    "Adam's epsilon": ({"adam_epsilon": 1e-6}, "adam_epsilon=1e-06 would have no effect"),
    "no training": ({"do_train": False}, "do_train=False leaves nothing to do"),
    "predictions": ({"do_predict": True}, "do_predict=True would have no effect"),
    "samples that LARS does not measure": (
        {"method": "lars", "norm_samples": 8},
        "clars and signal_lars alone read it",
    ),
    "a trust coefficient for NAG": ({"method": "nag", "eta": 0.1}, "eta=0.1 has no effect with method=nag"),
    "a norm for SignalLARS": ({"method": "signal_lars", "norm": "rms"}, "clars alone reads it"),
    "a factor without epochs": ({"lr_step_factor": 0.5}, "lr_step_factor has no effect"),
    "layers that are never held": ({"head_layers": ["fc"]}, "head_layers has no effect"),
}


@pytest.mark.parametrize("case", CANNOT_WORK)
def test_a_value_that_cannot_work_is_refused(command, case):
    change, message = CANNOT_WORK[case]
    code, said = command(change)
    assert code == 2
    assert said.startswith("error: ")
    assert message in said


def test_what_was_refused_does_not_follow_the_next_run(tmp_path):
    """transformers notes FSDP in the environment before it refuses it, where a notebook's next cell would find it."""
    with pytest.raises(ValueError, match="fsdp only works in distributed training"):
        ClarsTrainer(Plain(), clars_args(tmp_path, fsdp="full_shard"), train_dataset=Images())
    before = dict(os.environ)
    with pytest.raises(ConfigError, match="would clip the gradients"):
        clars_args(tmp_path, bf16=True, max_grad_norm=1.0)
    assert dict(os.environ) == before
    ClarsTrainer(Plain(), clars_args(tmp_path, max_steps=1), train_dataset=Images())


def test_checkpointing_of_a_bare_module_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="Plain does not support it"):
        ClarsTrainer(Plain(), clars_args(tmp_path, gradient_checkpointing=True), train_dataset=Images())


@pytest.mark.parametrize("case", NO_EFFECT)
def test_a_setting_without_effect_is_refused(command, case):
    change, message = NO_EFFECT[case]
    code, said = command(change)
    assert code == 2
    assert said.startswith("error: ")
    assert message in said


def test_a_file_may_serve_several_methods_and_a_flag_may_not(command, monkeypatch, caplog):
    """What a file has for CLARS is told, not refused, when a flag chooses LARS."""
    monkeypatch.setattr(ClarsTrainer, "train", lambda *_, **__: (_ for _ in ()).throw(ConfigError("as far as here")))
    code, said = command({"norm_samples": 8}, "--method", "lars")
    assert (code, said) == (2, "error: as far as here")
    assert "norm_samples=8 has no effect with method=lars" in caplog.text
    code, said = command({}, "--method", "lars", "--norm_samples", "8")
    assert code == 2
    assert "norm_samples=8 has no effect" in said


def test_a_tracker_that_is_not_installed_is_named(command, monkeypatch):
    class Missing:
        def __init__(self):
            raise RuntimeError("WandbCallback requires wandb to be installed. Run `pip install wandb`.")

    monkeypatch.setattr(value_checks, "get_reporting_integration_callbacks", lambda _: [Missing])
    code, said = command({"report_to": "wandb"})
    assert code == 2
    assert "report_to=wandb needs a package that is not installed" in said


@pytest.mark.parametrize(
    ("missing", "message"), [("deepspeed", r"pip install 'hf_clars\[deepspeed\]'"), ("mpi4py", "accelerate launch")]
)
def test_deepspeed_without_its_package_or_a_launcher_is_refused(tmp_path, monkeypatch, missing, message):
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr(value_checks, "find_spec", lambda name: None if name == missing else object())
    with pytest.raises(ConfigError, match=message):
        clars_args(tmp_path, deepspeed={"zero_optimization": {"stage": 1}})


def test_the_size_of_a_trained_model_is_told(command, tmp_path):
    """A vision transformer for 32 pixels is shown images of 16."""
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        image_size=32, patch_size=8, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    config.num_labels = 3
    ViTForImageClassification(config).save_pretrained(tmp_path / "vit")
    code, said = command({"model": str(tmp_path / "vit"), "augment": "none"})
    assert code == 2
    assert "cannot take images of 16 x 16 pixels" in said


WORDS = {
    "batch_size": "'per_device_train_batch_size' or 'global_batch_size'",
    "lr": "'learning_rate'",
    "epochs": "'num_train_epochs'",
    "optimizer": "'method'",
    "warmup_ratio": "'warmup_epochs'",
    "model_name_or_path": "'model'",
    "num_workers": "'dataloader_num_workers'",
    "momentun": "'momentum'",
}


@pytest.mark.parametrize("word", WORDS)
def test_a_hint_names_what_was_meant(command, word):
    for code, said in (command({word: 1}), command({}, f"--{word}", "1")):
        assert code == 2
        assert f"an unknown setting, {word!r}. Did you mean {WORDS[word]}?" in said


@pytest.mark.parametrize("word", ["gpus", "patience", "frobnicate", "ema_power"])
def test_no_hint_is_better_than_a_wrong_one(command, word):
    code, said = command({word: 1})
    assert code == 2
    assert said.endswith(f"an unknown setting, {word!r}. --help lists every setting.")


def test_a_word_that_belongs_to_no_flag_is_named(command):
    code, said = command({}, "extra")
    assert code == 2
    assert "'extra', which belongs to no setting" in said
