"""Promise: what goes beyond the paper's recipe is off by default, and does what its library says."""

import dataclasses
import json

import numpy as np
import pytest
import torch
import yaml
from torchvision.transforms import v2

from hf_clars.cli.train import main
from hf_clars.data import PixelSettings, PixelTransform, load_image_data, trainable
from hf_clars.data.strong_augment import MixedImages, StrongAugment, StrongPixelTransform, collate_mixed
from hf_clars.errors import DataError
from hf_clars.image_classification.held_out import hold_out
from hf_clars.image_classification.run import parse_run
from hf_clars.image_classification.soft_targets import SoftTargetLoss
from hf_clars.trainer import ClarsTrainer
from hf_clars.trainer.config import recipe_names
from tests.image_files import image_folder, picture
from tests.imagenet_like import imagenet_like
from tests.trainer_kit import Images, Plain, clars_args

PIXELS = PixelSettings(image_size=16)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return imagenet_like(tmp_path_factory.mktemp("imagenet"), rows=60)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return image_folder(tmp_path_factory.mktemp("images") / "images", per_class=8)


def settings_of(images, output, **changes):
    return {
        "dataset": str(images),
        "model": "resnet8",
        "image_size": 16,
        "per_device_train_batch_size": 4,
        "global_batch_size": 8,
        "norm_samples": 0,
        "num_train_epochs": 2,
        "output_dir": str(output),
        "use_cpu": True,
        "save_strategy": "no",
        "disable_tqdm": True,
        **changes,
    }


def command(tmp_path, config, *flags):
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(config))
    return main(["--config", str(file), *flags])


@pytest.mark.parametrize("name", recipe_names())
def test_the_recipes_have_none_of_it(name, tmp_path):
    settings = parse_run(["--config", name, "--use_cpu", "true", f"--output_dir={tmp_path}"])
    assert settings.data.strong_augment() == StrongAugment()
    assert settings.data.eval_share == settings.model.ema_decay == settings.training.label_smoothing_factor == 0
    assert not settings.training.evaluate_only


def test_without_it_pixels_are_what_they_were():
    image = torch.from_numpy(np.array(picture(1))).permute(2, 0, 1)
    torch.manual_seed(0)
    before = PixelTransform(PIXELS, train=True)(image)
    torch.manual_seed(0)
    assert torch.equal(StrongPixelTransform(PIXELS, StrongAugment())(image), before)


# ---- one image ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("augment", ["imagenet", "cifar", "none"])
def test_randaugment_and_erasing_follow_the_crop_as_torchvision_does_them(augment):
    settings = PixelSettings(image_size=16, augment=augment, num_channels=3)
    image = torch.from_numpy(np.array(picture(1, size=(16, 16)))).permute(2, 0, 1)
    transform = StrongPixelTransform(settings, StrongAugment(randaugment=9, random_erasing=1.0))
    assert transform.random
    torch.manual_seed(3)
    got = transform.geometry(image)
    torch.manual_seed(3)
    expected = PixelTransform(settings, train=True).geometry(image)
    expected = v2.RandAugment(magnitude=9)(expected)
    expected = v2.RandomErasing(p=1.0, value=[124, 116, 104])(expected)
    assert torch.equal(got, expected)
    assert got.dtype == torch.uint8


def test_what_is_erased_is_nearly_zero_for_the_model():
    transform = StrongPixelTransform(dataclasses.replace(PIXELS, augment="none"), StrongAugment(random_erasing=1.0))
    seen = transform(torch.full((3, 16, 16), 255, dtype=torch.uint8))
    assert (seen.abs() < 0.01).all(dim=0).any()


def test_a_crop_that_is_decoded_alone_is_augmented_too(folder):
    """JPEG files take a way of their own, on which only the rows of the crop are decoded."""
    data = load_image_data(str(folder))
    content = data.train.cast_column("image", data.train.features["image"].__class__(decode=False))[0]["image"]["bytes"]
    torch.manual_seed(0)
    plain = PixelTransform(PIXELS, train=True).crop_file(content)
    torch.manual_seed(0)
    strong = StrongPixelTransform(PIXELS, StrongAugment(randaugment=15, random_erasing=1.0)).crop_file(content)
    assert plain is not None
    assert not torch.equal(plain, strong)


def test_grey_images_can_be_augmented():
    settings = PixelSettings(image_size=16, num_channels=1, augment="none")
    transform = StrongPixelTransform(settings, StrongAugment(randaugment=9, random_erasing=0.5))
    for seed in range(30):
        torch.manual_seed(seed)
        assert transform(torch.full((1, 16, 16), 90, dtype=torch.uint8)).shape == (1, 16, 16)


# ---- mixed images -------------------------------------------------------------------------------------------------


def mixed_rows(folder, strong, seed=0):
    data = load_image_data(str(folder))
    columns = {"image_column": data.image_column, "label_column": data.label_column, "on_device": True}
    plain = trainable(data.train, PixelTransform(PIXELS, train=True), seed=seed, **columns)
    return MixedImages(plain, strong, PIXELS, classes=1000, seed=seed), plain


@pytest.mark.parametrize("strong", [StrongAugment(mixup=0.2), StrongAugment(cutmix=1.0), StrongAugment(0, 0, 0.8, 1.0)])
def test_a_pass_is_mixed_as_torchvision_mixes_it_and_labels_keep_their_sum(folder, strong):
    rows, _ = mixed_rows(folder, strong)
    batch = collate_mixed(rows.__getitems__(list(range(8))))
    assert batch["pixel_values"].shape == (8, 3, 16, 16)
    assert batch["pixel_values"].dtype == batch["labels"].dtype == torch.float32
    assert batch["labels"].shape == (8, 1000)
    assert torch.allclose(batch["labels"].sum(1), torch.ones(8))
    assert ((batch["labels"] > 0).sum(1) <= 2).all()


def test_a_mixed_image_is_the_blend_that_its_label_says(folder):
    rows, plain = mixed_rows(folder, StrongAugment(mixup=1.0))
    batch = collate_mixed(rows.__getitems__([0, 1]))
    alone = collate_mixed([plain[0], plain[1]])
    from hf_clars.data import DevicePixels

    pixels = DevicePixels(PIXELS)(alone["pixel_values"], alone["flip"])
    share = batch["labels"][0, 0]
    assert torch.allclose(batch["pixel_values"][0], share * pixels[0] + (1 - share) * pixels[1], atol=1e-5)


def test_mixing_depends_on_seed_epoch_and_images_alone(folder):
    rows, _ = mixed_rows(folder, StrongAugment(mixup=1.0))
    first = collate_mixed(rows.__getitems__([3, 4, 5]))
    torch.rand(100)
    assert torch.equal(collate_mixed(rows.__getitems__([3, 4, 5]))["labels"], first["labels"])
    rows.set_epoch(1)
    assert not torch.equal(collate_mixed(rows.__getitems__([3, 4, 5]))["labels"], first["labels"])


def test_the_loss_is_cross_entropy_smoothed_in_training_only():
    logits, labels = torch.randn(4, 3, requires_grad=True), torch.tensor([0, 2, 1, 1])
    soft, loss = torch.nn.functional.one_hot(labels, 3).float(), SoftTargetLoss(0.1)
    plain, smooth = (torch.nn.functional.cross_entropy(logits, labels, label_smoothing=s) for s in (0.0, 0.1))
    assert torch.allclose(loss({"logits": logits}, labels), smooth)
    assert torch.allclose(loss({"logits": logits}, soft), smooth)
    assert torch.allclose(loss({"logits": logits}, labels, num_items_in_batch=8), smooth / 2)
    with torch.no_grad():
        assert torch.allclose(loss({"logits": logits}, labels), plain)


@pytest.mark.parametrize("soft", [False, True])
def test_accumulated_passes_of_such_a_loss_are_one_batch(tmp_path, soft):
    """The same weights from 2 passes of 8 as from one of 16."""

    class Soft(Images):
        def __getitem__(self, i):
            row = super().__getitem__(i)
            label = torch.nn.functional.one_hot(row["labels"], 3).float()
            return {**row, "labels": 0.7 * label + 0.3 * label.roll(1)} if soft else row

    models = []
    for size, passes in ((16, 1), (8, 2)):
        args = clars_args(
            tmp_path / str(size),
            max_steps=3,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=passes,
        )
        trainer = ClarsTrainer(
            Plain(), args, train_dataset=Soft(), data_collator=collate_mixed, compute_loss_func=SoftTargetLoss(0.1)
        )
        trainer.train()
        models.append(trainer.model)
    for one, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


# ---- held-out images, and evaluation alone ------------------------------------------------------------------------


def test_a_share_is_held_out_class_by_class_and_always_the_same(images):
    data = load_image_data(str(images), eval_split="validation")
    held = hold_out(data, 0.25)
    assert (held.train_size, held.eval_size, held.eval_split) == (18, 6, "held out")
    assert sorted(held.eval["label"]) == [0, 0, 1, 1, 2, 2]
    again = hold_out(load_image_data(str(images), eval_split="validation"), 0.25)
    assert [row["image"].tobytes() for row in held.eval] == [row["image"].tobytes() for row in again.eval]
    trained = {row["image"].tobytes() for row in held.train}
    assert not trained & {row["image"].tobytes() for row in held.eval}
    with pytest.raises(DataError, match="leaves a split empty"):
        hold_out(data, 0.001)


def test_a_run_with_everything_trains_evaluates_and_is_measured_again(images, tmp_path, capsys):
    config = settings_of(
        images,
        tmp_path / "run",
        randaugment=9,
        random_erasing=0.25,
        mixup=0.2,
        cutmix=1.0,
        eval_share=0.25,
        label_smoothing_factor=0.1,
        eval_strategy="epoch",
    )
    assert command(tmp_path, config, "--ema_decay", "0.9") == 0
    first = json.loads((tmp_path / "run" / "all_results.json").read_text())
    card = (tmp_path / "run" / "README.md").read_text()
    assert "mixup" in card.lower()
    assert command(tmp_path, config, "--ema_decay", "0.9", "--do_eval") == 0
    again = json.loads((tmp_path / "run" / "eval_results.json").read_text())
    assert again["eval_loss"] == pytest.approx(first["eval_loss"], rel=1e-5)
    assert again["eval_accuracy"] == first["eval_accuracy"]
    assert "6 images of held out" in capsys.readouterr().out
    assert json.loads((tmp_path / "run" / "all_results.json").read_text()) == first


def test_evaluation_alone_takes_from_the_folder_what_the_settings_leave_open(images, tmp_path):
    """Size, mean and deviation of a run are in its folder, and `image_size` need not be said again."""
    config = settings_of(images, tmp_path / "run", image_mean=[0.1, 0.2, 0.3], image_std=[0.5, 0.6, 0.7])
    assert command(tmp_path, config) == 0
    first = json.loads((tmp_path / "run" / "all_results.json").read_text())
    left_open = {k: v for k, v in config.items() if k not in ("image_size", "image_mean", "image_std", "augment")}
    assert command(tmp_path, {**left_open, "do_eval": True}) == 0
    again = json.loads((tmp_path / "run" / "eval_results.json").read_text())
    assert again["eval_loss"] == pytest.approx(first["eval_loss"], rel=1e-5)


def test_evaluation_alone_needs_a_finished_run(images, tmp_path, capsys):
    config = settings_of(images, tmp_path / "none")
    assert command(tmp_path, config, "--do_eval") == 2
    assert "holds no model: give the run's --output_dir" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def test_do_train_and_do_eval_together_train(images, tmp_path):
    settings = parse_run(
        [
            "--dataset",
            str(images),
            "--model",
            "resnet8",
            f"--output_dir={tmp_path}",
            "--do_train",
            "--do_eval",
            "--use_cpu",
            "true",
        ]
    )
    assert not settings.training.evaluate_only


CLASHES = {
    "a share and a split": ({"eval_share": 0.1, "eval_split": "validation"}, "keep one"),
    "a share of a stream": ({"eval_share": 0.1, "streaming": True, "max_steps": 2}, "a stream does not tell"),
    "a share of all": ({"eval_share": 1.0}, "eval_share=1.0"),
    "a mixed stream": ({"mixup": 0.2, "streaming": True, "max_steps": 2}, "mixup and cutmix need data"),
    "too strong": ({"randaugment": 31}, "randaugment=31"),
    "no probability": ({"random_erasing": 1.5}, "random_erasing=1.5"),
    "a negative alpha": ({"cutmix": -1.0}, "cutmix=-1.0"),
    "no decay": ({"ema_decay": 1.0}, "ema_decay=1.0"),
}


@pytest.mark.parametrize("case", CLASHES)
def test_what_does_not_go_together_is_refused(images, tmp_path, capsys, case):
    change, message = CLASHES[case]
    assert command(tmp_path, settings_of(images, tmp_path / "run", **change)) == 2
    assert message in capsys.readouterr().err.strip().splitlines()[-1]
