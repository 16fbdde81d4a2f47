"""Promises of `build_model`: what it takes from where, and what it refuses, with a message that helps."""

import json

import huggingface_hub.constants
import pytest
import torch
from transformers import ResNetConfig, ResNetForImageClassification, ResNetModel
from transformers.models.timm_wrapper import modeling_timm_wrapper

from hf_clars.errors import ConfigError
from hf_clars.models import (
    CifarResNetConfig,
    FullyConnectedConfig,
    SigmoidCnnConfig,
    SmallCnnConfig,
    Vgg11Config,
    build_model,
)


@pytest.fixture(autouse=True)
def _offline(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


def tiny(classes=3):
    torch.manual_seed(0)
    return ResNetConfig(embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], layer_type="basic", num_labels=classes)


@pytest.fixture
def pretrained(tmp_path):
    ResNetForImageClassification(tiny()).save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def test_a_folder_gives_its_weights_and_takes_the_data_s_label_names(pretrained):
    model = build_model(pretrained, num_labels=3, label_names=["x", "y", "z"])
    saved = ResNetForImageClassification.from_pretrained(pretrained)
    assert model.training
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), saved.parameters(), strict=True))
    assert model.config.id2label == {0: "x", 1: "y", 2: "z"}
    assert model.config.label2id == {"x": 0, "y": 1, "z": 2}


def test_replace_head_renews_the_classifier_and_nothing_else(pretrained):
    model = build_model(pretrained, num_labels=5, replace_head=True)
    saved = ResNetForImageClassification.from_pretrained(pretrained)
    assert model(torch.randn(2, 3, 32, 32)).logits.shape == (2, 5)
    assert model.config.num_labels == 5
    for (key, p), q in zip(model.resnet.named_parameters(), saved.resnet.parameters(), strict=True):
        assert torch.equal(p, q), key


def test_from_scratch_takes_the_architecture_only(pretrained):
    torch.manual_seed(1)
    model = build_model(pretrained, from_scratch=True, num_labels=7, num_channels=1)
    saved = ResNetForImageClassification.from_pretrained(pretrained)
    assert model(torch.randn(2, 1, 32, 32)).logits.shape == (2, 7)
    assert model.config.hidden_sizes == [4, 8]
    last = "resnet.encoder.stages.1.layers.0.layer.1.convolution.weight"
    assert model.get_parameter(last).shape == saved.get_parameter(last).shape
    assert not torch.equal(model.get_parameter(last), saved.get_parameter(last))


def test_model_kwargs_reach_the_configuration(pretrained):
    assert build_model("clars-cnn", num_labels=2, image_size=8, model_kwargs={"widths": [4]}).config.widths == [4]
    assert build_model(pretrained, from_scratch=True, num_labels=2, model_kwargs={"depths": [2, 1]}).config.depths == [
        2,
        1,
    ]


def test_a_timm_network_keeps_its_weights_labels_and_logits_through_a_folder(tmp_path):
    labels = {"num_labels": 3, "num_channels": 1, "label_names": ["x", "y", "z"]}
    built = build_model("densenet121", **labels).eval()
    built.save_pretrained(tmp_path)
    again = build_model(str(tmp_path), **labels).eval()
    assert again.config.id2label == {0: "x", 1: "y", 2: "z"}
    for name, value in built.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    x = torch.randn(1, 1, 32, 32, dtype=torch.float64)  # in float32 a library may sum in an order of its own each time
    torch.testing.assert_close(again.double()(x).logits, built.double()(x).logits)


def test_a_short_name_means_new_weights_even_beside_a_folder_of_that_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    build_model("resnet8", num_labels=7, image_size=32).save_pretrained("resnet8")
    assert build_model("resnet8", num_labels=3, image_size=32).config.num_labels == 3
    assert build_model("./resnet8", num_labels=7).config.num_labels == 7


def test_other_classes_are_refused_with_both_numbers_and_the_way_out(pretrained):
    with pytest.raises(ConfigError, match=r"3 classes.*has 5.*replace_head"):
        build_model(pretrained, num_labels=5)


def test_other_channels_are_refused_with_both_numbers(pretrained):
    with pytest.raises(ConfigError, match=r"of 3 channels.*num_channels is 1"):
        build_model(pretrained, num_labels=3, num_channels=1)


def test_a_pretrained_body_without_a_classifier_is_refused_until_a_new_one_is_asked_for(tmp_path):
    ResNetModel(tiny(2)).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"classifier.*replace_head"):
        build_model(str(tmp_path), num_labels=2)
    assert build_model(str(tmp_path), num_labels=2, replace_head=True).config.num_labels == 2


@pytest.mark.parametrize(
    ("wrong", "meant"), [("resnet-20", "resnet20"), ("densenet-121", "densenet121"), ("clarscnn", "clars-cnn")]
)
def test_a_misspelt_name_is_answered_with_the_nearest(wrong, meant):
    with pytest.raises(ConfigError, match=f"no model '{wrong}'.*Did you mean '{meant}'"):
        build_model(wrong, num_labels=10)


@pytest.mark.parametrize(
    ("name", "kwargs", "message"),
    [
        ("clars-cnn", {"widhts": [4]}, "widhts, which clars-cnn does not know"),
        ("resnet20", {"depth": 56}, "depth, which the name 'resnet20' already decides"),
        ("clars-cnn", {"num_channels": 1}, "num_channels, which the data decides"),
        ("some/model", {"trust_remote_code": True}, "never runs code from the Hub"),
    ],
)
def test_settings_that_would_be_ignored_are_refused(name, kwargs, message):
    with pytest.raises(ConfigError, match=message):
        build_model(name, num_labels=10, model_kwargs=kwargs)


def test_an_unknown_setting_of_a_folder_s_architecture_is_refused(pretrained):
    with pytest.raises(ConfigError, match="dephts"):
        build_model(pretrained, from_scratch=True, num_labels=3, model_kwargs={"dephts": [1]})


def test_label_names_must_be_as_many_as_labels():
    with pytest.raises(ConfigError, match=r"num_labels=3, but 2 label_names"):
        build_model("clars-cnn", num_labels=3, label_names=["a", "b"])


def test_code_beside_the_weights_is_never_run(tmp_path):
    (tmp_path / "evil.py").write_text("raise SystemExit('ran')")
    auto_map = {"AutoConfig": "evil.Config", "AutoModelForImageClassification": "evil.Model"}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "evil", "auto_map": auto_map}))
    with pytest.raises(ConfigError, match=r"trust_remote_code|custom code"):
        build_model(str(tmp_path), num_labels=3)


def test_without_timm_the_message_says_how_to_get_it(monkeypatch):
    def missing(obj, backends):
        raise ImportError(f"{type(obj).__name__} requires the timm library")

    monkeypatch.setattr(modeling_timm_wrapper, "requires_backends", missing)
    with pytest.raises(ConfigError, match=r"densenet121 needs a package.*timm.*hf_clars\[timm\]"):
        build_model("densenet121", num_labels=3)


@pytest.mark.parametrize(
    ("config", "settings", "message"),
    [
        (CifarResNetConfig, {"depth": 18}, r"depth is 18.*6n \+ 2"),
        (CifarResNetConfig, {"depth": 2}, "at least 8"),
        (CifarResNetConfig, {"norm": "none"}, "choose one of batch, group"),
        (CifarResNetConfig, {"shortcut": "C"}, "choose one of A, B"),
        (Vgg11Config, {"width": 0}, "width is 0"),
        (SmallCnnConfig, {"widths": []}, r"widths is \[\]"),
        (SmallCnnConfig, {"widths": [16, -1]}, r"widths is \[16, -1\]"),
        (SmallCnnConfig, {"pooling": "max"}, "choose one of flatten, average"),
        (FullyConnectedConfig, {"hidden_size": 1.5}, "hidden_size is 1.5"),
        (SigmoidCnnConfig, {"image_size": True}, "image_size is True"),
    ],
)
def test_configurations_that_cannot_work_are_refused_when_made(config, settings, message):
    with pytest.raises(ConfigError, match=message):
        config(**settings)


@pytest.mark.parametrize(
    ("name", "shape"), [("fcn5", [2, 1, 32, 32]), ("clars-cnn", [2, 3, 28, 28]), ("resnet8", [28, 28])]
)
def test_images_of_another_shape_are_refused_with_both_shapes(name, shape):
    model = build_model(name, num_labels=10, image_size=28, num_channels=1)
    with pytest.raises(ConfigError, match=rf"\[batch, 1, .*was given \[{', '.join(map(str, shape))}\]"):
        model(torch.zeros(shape))
