"""Promise: random crops straight from JPEG files are those of a full decode, and evaluation decodes in full."""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2 import functional as F

from hf_clars.bench.jpegs import photo_like
from hf_clars.data import PixelSettings, PixelTransform
from hf_clars.data.augmenting import random_numbers_from
from hf_clars.data.decoding import ImageDecoder
from hf_clars.data.jpeg import Box, decode_crop, read_jpeg_header
from hf_clars.data.pixels import to_uint8
from hf_clars.data.samples import Samples


def jpeg(image, **options):
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", **{"quality": 90, **options})
    return buffer.getvalue()


def decoded(data):
    return to_uint8(Image.open(io.BytesIO(data)), 3)


PHOTO = photo_like(0)
CODINGS = {
    "4:4:4": jpeg(PHOTO, subsampling=0),
    "4:2:2": jpeg(PHOTO, subsampling=1),
    "4:2:0": jpeg(PHOTO, subsampling=2),
    "odd size": jpeg(PHOTO.crop((0, 0, 333, 251))),
    "restart markers": jpeg(PHOTO, restart_marker_rows=1),
    "low quality": jpeg(PHOTO, quality=20),
    "grey": jpeg(PHOTO.convert("L")),
}
SETTINGS, LARGE = PixelSettings(image_size=224), PixelSettings(image_size=128)


@pytest.mark.parametrize("coding", CODINGS)
def test_every_row_of_a_shortened_file_is_that_of_the_whole_one(coding):
    data = CODINGS[coding]
    header, whole = read_jpeg_header(data), decoded(data)
    assert (header.height, header.width) == whole.shape[1:]
    for bottom in [*range(3, 40), 100, header.height - 2, header.height - 1, header.height]:
        box = Box(bottom - 3, 5, 3, 3)  # smaller than the result: no reduced decoding
        expected = whole[:, bottom - 3 : bottom, 5:8]
        got = decode_crop(data, header, box, 3)
        assert torch.equal(got, expected), bottom


@pytest.mark.parametrize("size", [64, 63, 100])
def test_a_crop_stays_as_it_is_when_the_next_image_is_decoded(size):
    first, second = (jpeg(photo_like(seed, width=64, height=64)) for seed in (1, 2))
    header = read_jpeg_header(first)
    crop = decode_crop(first, header, Box(0, 0, 64, 64), size)
    kept = crop.clone()
    assert not torch.equal(decode_crop(second, header, Box(0, 0, 64, 64), size), kept)
    assert torch.equal(crop, kept)


@pytest.mark.parametrize("coding", CODINGS)
def test_the_crop_is_the_one_that_a_full_decode_would_give_bit_for_bit(coding):
    data, transform = CODINGS[coding], PixelTransform(SETTINGS, train=True)
    whole = decoded(data)
    for seed in range(25):
        with random_numbers_from(seed):
            fast, after_fast = transform.crop_file(data), torch.get_rng_state()
        with random_numbers_from(seed):
            full, after_full = transform.geometry(whole), torch.get_rng_state()
        assert torch.equal(fast, full)
        assert torch.equal(after_fast, after_full)  # so the flip that is drawn next is the same too


def test_large_crops_are_decoded_reduced_and_stay_close():
    data, transform = jpeg(photo_like(1, width=1200, height=900)), PixelTransform(LARGE, train=True)
    whole, differences, reduced = decoded(data), [], 0
    for seed in range(30):
        with random_numbers_from(seed):
            fast = transform.crop_file(data)
        with random_numbers_from(seed):
            full = transform.geometry(whole)
        assert fast.shape == full.shape == (3, 128, 128)
        difference = (fast.float() - full.float()).abs()
        reduced += bool(difference.any())
        differences.append(difference.mean().item())
    assert reduced > 20
    assert max(differences) < 2


def test_a_reduced_crop_has_no_offset():
    ramp = np.linspace(0, 255, 1024).astype(np.uint8)
    across = Image.fromarray(np.broadcast_to(ramp, (1024, 1024)).copy()).convert("RGB")
    for image, axis in ((across, 2), (across.transpose(Image.Transpose.ROTATE_270), 1)):
        data = jpeg(image, quality=100)
        box, whole = Box(101, 203, 707, 659), decoded(data)
        got = decode_crop(data, read_jpeg_header(data), box, 64).float()
        crop = F.crop(whole, *box)
        expected = F.resize(crop, [64, 64], antialias=True).float()
        assert (got - expected).mean().abs() < 0.3, axis  # one pixel of the result is 2.5 levels


def rotated():
    exif = Image.Exif()
    exif[0x0112] = 6
    return jpeg(PHOTO, exif=exif)


UNFIT = {
    "png": lambda: (b := io.BytesIO(), PHOTO.save(b, "PNG"))[0].getvalue(),
    "progressive": lambda: jpeg(PHOTO, progressive=True),
    "cmyk": lambda: jpeg(PHOTO.convert("CMYK")),
    "rotated by its Exif": rotated,
    "cut off": lambda: CODINGS["4:2:0"][:20_000],
    "cut off in the header": lambda: CODINGS["4:2:0"][:100],
    "empty": lambda: b"",
    "no image": lambda: b"\xff\xd8 no image",
}


@pytest.mark.parametrize("kind", UNFIT)
def test_other_files_are_left_to_the_full_decode(kind):
    assert PixelTransform(SETTINGS, train=True).crop_file(UNFIT[kind]()) is None


def test_exif_data_without_a_rotation_do_not_matter():
    exif = Image.Exif()
    exif[0x0112] = 1
    assert PixelTransform(SETTINGS, train=True).crop_file(jpeg(PHOTO, exif=exif)) is not None


def test_only_random_resized_crops_of_colour_images_take_this_way():
    data = CODINGS["4:2:0"]
    assert PixelTransform(PixelSettings(augment="cifar"), train=True).crop_file(data) is None
    assert PixelTransform(PixelSettings(num_channels=1), train=True).crop_file(data) is None
    assert PixelTransform(SETTINGS, train=False).crop_file(data) is None


@pytest.mark.parametrize("size", [(500, 375), (1600, 1200)])
def test_evaluation_is_exact(size):
    data = jpeg(photo_like(2, width=size[0], height=size[1]))
    transform = PixelTransform(SETTINGS, train=False)
    samples = Samples(
        transform, ImageDecoder(3), image_column="image", label_column="label", classes=None, seed=0, on_device=True
    )
    got = samples.read({"bytes": data, "path": None}, 0)
    assert set(got) == {"pixel_values"}
    assert torch.equal(got["pixel_values"], transform.geometry(decoded(data)))


def test_damaged_files_never_do_more_than_fall_back():
    transform, generator = PixelTransform(PixelSettings(image_size=32), train=True), np.random.default_rng(0)
    data = jpeg(photo_like(3, width=120, height=90))
    found = 0
    for _ in range(600):
        damaged = bytearray(data)
        for place in generator.integers(0, len(data) if generator.random() < 0.5 else 700, 4):
            damaged[place] = generator.integers(0, 256)
        crop = transform.crop_file(bytes(damaged))
        assert crop is None or crop.shape == (3, 32, 32)
        found += crop is None
    assert 0 < found < 600
