"""A pretrained classifier meets data by the names of its classes, and what its checkpoint says of pixels is used."""

import pytest
import torch
import yaml

from hf_clars.errors import ConfigError
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
