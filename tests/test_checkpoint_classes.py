"""A pretrained classifier meets data by the names of its classes, and what its checkpoint says of pixels is used."""

from dataclasses import replace

import pytest
import torch
import yaml
from transformers import AutoImageProcessor, ConvNextImageProcessor, ViTImageProcessor

from hf_clars.data import PixelSettings, build_image_processor, read_checkpoint_pixels
from hf_clars.errors import ConfigError
from hf_clars.hub import HubError
from hf_clars.image_classification.arguments import ModelArguments
from hf_clars.image_classification.card import _base_model, _origin
from hf_clars.image_classification.run import parse_run, train_image_classifier
from hf_clars.models import build_model, pretrained_classes
from tests.image_files import CLASSES, image_folder

SAYS_EEL = ["eel", "cat", "dog"]


def checkpoint(folder, names, *, model="clars-cnn", says="eel"):
    """A classifier that answers one class whatever it sees."""
    net = build_model(model, num_labels=len(names), image_size=16, label_names=names)
    with torch.no_grad():
        head = [m for m in net.modules() if isinstance(m, torch.nn.Linear)][-1]
        head.weight.zero_()
        head.bias.fill_(-5.0)
        head.bias[names.index(says)] = 5.0
    net.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def config(tmp_path):
    root = image_folder(tmp_path / "images")
    for name in ("cat", "dog"):  # evaluation knows eels alone
        for file in (root / "validation" / name).iterdir():
            file.unlink()
    return {
        "dataset": str(root),
        "image_size": 16,
        "augment": "none",
        "per_device_train_batch_size": 4,
        "global_batch_size": 4,
        "norm_samples": 0,
        "max_steps": 1,
        "learning_rate": 1e-9,
        "output_dir": str(tmp_path / "run"),
        "use_cpu": True,
        "report_to": "none",
        "save_strategy": "no",
    }


def run(config, tmp_path, **more):
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump({**config, **more}))
    return train_image_classifier(parse_run(["--config", str(file)]))


@pytest.mark.parametrize("names", [SAYS_EEL, CLASSES])
def test_data_is_numbered_as_the_checkpoint_numbers_it(config, tmp_path, names, capsys):
    results = run(config, tmp_path, model=checkpoint(tmp_path / "old", names))
    assert results["eval_accuracy"] == 1.0
    assert pretrained_classes(str(tmp_path / "run")) == names
    assert f"3, with training images: {', '.join(f'{name} (4)' for name in names)}" in capsys.readouterr().out


def test_other_names_are_refused_with_both_lists(config, tmp_path):
    model = checkpoint(tmp_path / "old", ["eel", "ant", "bee"])
    with pytest.raises(ConfigError, match=r"eel, ant, bee.*cat, dog, eel.*'cat', 'dog' not among.*replace_head"):
        run(config, tmp_path, model=model)


def test_other_names_are_kept_by_number_if_the_user_says_so(config, tmp_path):
    model = checkpoint(tmp_path / "old", ["n01", "n02", "n03"], says="n03")
    assert run(config, tmp_path, model=model, keep_numbers=True)["eval_accuracy"] == 1.0


@pytest.mark.parametrize("model", ["clars-cnn", "densenet121", "resnet-50"])
def test_replace_head_renews_a_classifier_of_other_classes_and_nothing_else(tmp_path, model):
    path = checkpoint(tmp_path / "old", ["ant", "bee", "eel"], model=model)
    old = build_model(path, num_labels=3).state_dict()
    new = build_model(path, num_labels=3, label_names=CLASSES, replace_head=True)
    changed = [key for key, value in new.state_dict().items() if not torch.equal(value, old[key])]
    assert len(changed) == 2
    assert all(old[key].shape[0] == 3 for key in changed)
    assert new.config.id2label == dict(enumerate(CLASSES))


def test_replace_head_keeps_a_classifier_of_the_same_classes(config, tmp_path):
    model = checkpoint(tmp_path / "old", SAYS_EEL)
    assert run(config, tmp_path, model=model, replace_head=True)["eval_accuracy"] == 1.0


def test_a_checkpoint_that_only_numbers_its_classes_is_taken_by_number(tmp_path):
    build_model("clars-cnn", num_labels=3, image_size=16).save_pretrained(tmp_path / "old")
    assert pretrained_classes(str(tmp_path / "old")) is None
    assert build_model(str(tmp_path / "old"), num_labels=3, label_names=CLASSES).config.id2label[2] == "eel"
    assert pretrained_classes("clars-cnn") is None


# ---- pixels ----------------------------------------------------------------------------------------------------------


SIDE = {"height": 24, "width": 24}
PROCESSORS = {
    "ViT": (
        lambda: ViTImageProcessor(size={"height": 24, "width": 24}, image_mean=[0.5] * 3, image_std=[0.25] * 3),
        (24, (0.5,) * 3, (0.25,) * 3),
    ),
    "ConvNeXt": (
        lambda: ConvNextImageProcessor(size={"shortest_edge": 16}, image_mean=[0.1] * 3, image_std=[0.2] * 3),
        (16, (0.1,) * 3, (0.2,) * 3),
    ),
    "our own": (
        lambda: build_image_processor(PixelSettings(image_size=20, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))),
        (20, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)),
    ),
    "our own grey": (
        lambda: build_image_processor(PixelSettings(image_size=20, num_channels=1, mean=(0.1,), std=(0.4,))),
        (20, (0.1,), (0.4,)),
    ),
    "one that does not normalise": (
        lambda: ViTImageProcessor(size={"height": 24, "width": 24}, do_normalize=False),
        (24, (0.0,) * 3, (1.0,) * 3),
    ),
    "one that scales to 2": (
        lambda: ViTImageProcessor(
            size={"height": 24, "width": 24}, rescale_factor=2 / 255, image_mean=[1.0] * 3, image_std=[0.5] * 3
        ),
        (24, (0.5,) * 3, (0.25,) * 3),
    ),
}


@pytest.mark.parametrize("kind", PROCESSORS)
def test_what_a_checkpoint_says_of_pixels_is_read(tmp_path, kind):
    make, expected = PROCESSORS[kind]
    make().save_pretrained(tmp_path)
    found = read_checkpoint_pixels(str(tmp_path))
    assert found.size == expected[0]
    assert found.mean == pytest.approx(expected[1])
    assert found.std == pytest.approx(expected[2])


def test_no_processor_is_no_answer(tmp_path):
    assert read_checkpoint_pixels(str(tmp_path)) is None


def test_fine_tuning_sees_what_the_checkpoint_saw_unless_set_and_says_which(config, tmp_path, capsys):
    model = checkpoint(tmp_path / "old", CLASSES)
    build_image_processor(PixelSettings(image_size=16, mean=(0.1,) * 3, std=(0.2,) * 3)).save_pretrained(model)
    del config["image_size"]
    run(config, tmp_path, model=model)
    said = capsys.readouterr().out
    assert "16 x 16 (the checkpoint's)" in said
    assert "mean 0.1 0.1 0.1 (the checkpoint's), deviation 0.2 0.2 0.2 (the checkpoint's)" in said
    saved = AutoImageProcessor.from_pretrained(tmp_path / "run")
    assert list(saved.image_mean) == [0.1] * 3
    more = {"image_mean": [0.3] * 3, "image_std": [0.4] * 3, "existing_output": "number"}
    run(config, tmp_path, model=model, **more)
    assert "mean 0.3 0.3 0.3 (as set), deviation 0.4 0.4 0.4 (as set)" in capsys.readouterr().out


def test_without_a_processor_the_defaults_are_used_and_that_is_said(config, tmp_path, capsys):
    run(config, tmp_path, model=checkpoint(tmp_path / "old", CLASSES))
    assert "mean 0.485 0.456 0.406 (the default)" in (said := capsys.readouterr().out)
    assert "old has no image processor" in said


# ---- the card --------------------------------------------------------------------------------------------------------


def test_the_card_says_where_the_weights_came_from(config, tmp_path):
    run(config, tmp_path, model=checkpoint(tmp_path / "old", CLASSES))
    text = (tmp_path / "run" / "README.md").read_text()
    assert "trained from the weights of a checkpoint that is not on the Hub on images" in text
    assert "scratch" not in text
    assert str(tmp_path) not in text
    run(config, tmp_path, model="clars-cnn", output_dir=str(tmp_path / "new"))
    assert "trained from scratch on images" in (tmp_path / "new" / "README.md").read_text()


@pytest.mark.parametrize("name", ["owner/net", "net"])
def test_a_name_on_the_hub_is_a_base_model_with_a_slash_or_without(name):
    args = ModelArguments(model=name)
    assert (_base_model(args), _origin(args)) == (name, None)
    args = replace(args, from_scratch=True)
    assert (_base_model(args), _origin(args)) == (None, "scratch")


def test_a_licence_that_the_hub_does_not_know_is_refused_before_training(config, tmp_path):
    with pytest.raises(HubError, match=r"'apache 2' is no licence.*Did you mean 'apache-2.0'"):
        run(config, tmp_path, model="clars-cnn", license="apache 2")
    assert not (tmp_path / "run").exists()
