"""Promise: an image that cannot be decoded is named, or passed over as chosen; odd but sound ones are read."""

import io
import multiprocessing
import re
import resource
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image
from PIL import Image as PILImage
from torch.utils.data import DataLoader

from hf_clars.data import PixelSettings, PixelTransform, collate_images, load_image_data, trainable
from hf_clars.data.decoding import MAX_IN_A_ROW, BadImageError, ImageDecoder, open_image
from hf_clars.data.pixels import to_uint8
from hf_clars.errors import DataError
from tests.image_files import CLASSES, picture
from tests.processes import GROUP


def encoded(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def png_of_size(width, height):
    """A PNG that says it is so large, and holds next to nothing: a decompression bomb."""

    def chunk(name, content):
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b"\0" * 1000))
        + chunk(b"IEND", b"")
    )


JPEG = encoded(picture(0, (40, 50)), "JPEG")
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n"

BAD = {
    "zero bytes": b"",
    "no image": b"this is text, not an image",
    "truncated": JPEG[: len(JPEG) // 2],
    "only a header": JPEG[:30],
    "corrupt": JPEG[:200] + b"\0" * 300,
    "a bomb": png_of_size(20_000, 20_000),
    "a larger bomb": png_of_size(2**31 - 1, 2**31 - 1),
    "a program for a printer": EPS,
}

SIXTEEN = PILImage.fromarray(np.asarray(picture(0, mode="L")).astype(np.uint16) << 8)
FRAMES = [picture(i) for i in range(3)]
GOOD = {
    "CMYK JPEG": encoded(picture(0).convert("CMYK"), "JPEG"),
    "16-bit PNG": encoded(SIXTEEN, "PNG"),
    "grey JPEG": encoded(picture(0, mode="L"), "JPEG"),
    "animated GIF": encoded(FRAMES[0], "GIF", save_all=True, append_images=FRAMES[1:]),
    "animated WebP": encoded(FRAMES[0], "WEBP", save_all=True, append_images=FRAMES[1:]),
    "palette with transparency": encoded(picture(0).convert("P"), "PNG", transparency=3),
}


def dataset(images, labels=None):
    features = Features({"image": Image(), "label": ClassLabel(names=CLASSES)})
    labels = [i % 3 for i in range(len(images))] if labels is None else labels
    rows = {"image": [{"bytes": b, "path": f"{n}.img"} for n, b in enumerate(images)], "label": labels}
    return Dataset.from_dict(rows, features=features)


def prepared(split, *, streaming=False, train=True, **options):
    split = split.to_iterable_dataset() if streaming else split
    transform = PixelTransform(PixelSettings(image_size=8), train=train)
    columns = {"image_column": "image", "label_column": "label"}
    return trainable(split, transform, classes=3, **columns, **options)


@pytest.mark.parametrize("kind", GOOD)
def test_odd_but_sound_images_are_read(kind):
    image = open_image({"bytes": GOOD[kind], "path": None})
    assert image.size == (24, 20)
    pixels = prepared(dataset([GOOD[kind]]))[0]["pixel_values"]
    assert pixels.shape == (3, 8, 8)
    assert pixels.isfinite().all()
    assert pixels.std() > 0.1


def test_an_animation_gives_its_first_frame():
    first = open_image({"bytes": encoded(FRAMES[0], "PNG"), "path": None}).convert("RGB")
    animated = open_image(
        {"bytes": encoded(FRAMES[0], "WEBP", save_all=True, append_images=FRAMES[1:], lossless=True), "path": None}
    )
    assert np.array_equal(np.asarray(first), np.asarray(animated.convert("RGB")))


def test_an_orientation_in_the_file_is_applied():
    exif = PILImage.Exif()
    exif[0x0112] = 6  # rotated by a quarter
    assert open_image({"bytes": encoded(picture(0), "JPEG", exif=exif), "path": None}).size == (20, 24)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", BAD)
def test_a_bad_image_is_named_in_one_sentence(kind, streaming):
    rows = prepared(dataset([JPEG, BAD[kind], JPEG]), streaming=streaming)
    with pytest.raises(
        BadImageError, match=r"Image 1 of the training split \(1\.img\) cannot be decoded: .*--bad_images"
    ) as e:
        [row for row, _ in zip(rows, range(3), strict=False)]
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("kind", BAD)
def test_bad_images_are_passed_over_counted_and_reported_once(kind, caplog):
    rows = prepared(dataset([JPEG, BAD[kind], JPEG, BAD[kind]], labels=[0, 1, 2, 1]), bad_images="skip")
    for _ in range(2):
        assert [int(rows[i]["labels"]) for i in range(4)] == [0, 2, 2, 0]
    assert rows.skipped_images == 4
    assert len(re.findall(r"Image 1 of the training split", caplog.text)) == 1
    endless = prepared(dataset([JPEG, BAD[kind], JPEG], labels=[0, 1, 2]), streaming=True, bad_images="skip")
    assert [int(row["labels"]) for row, _ in zip(endless, range(4), strict=False)] == [0, 2, 0, 2]


def test_workers_count_together():
    rows = prepared(dataset([JPEG, b""] * 8), bad_images="skip")
    loader = DataLoader(rows, batch_size=2, num_workers=2, collate_fn=collate_images)
    assert sum(len(batch["labels"]) for batch in loader) == 16
    assert rows.skipped_images == 8


def test_a_data_set_of_nothing_but_bad_images_ends():
    with pytest.raises(BadImageError, match=f"{MAX_IN_A_ROW} images in a row"):
        prepared(dataset([b""] * 3), bad_images="skip")[0]
    rows = prepared(dataset([b""] * 3), streaming=True, bad_images="skip")
    assert list(rows) == []


def test_a_bad_image_held_in_memory_is_named():
    with pytest.raises(BadImageError, match=r"Image 1 of the training split"):
        prepared(dataset([JPEG, b"", JPEG]), in_memory=True)
    assert len(prepared(dataset([JPEG, b"", JPEG]), in_memory=True, bad_images="skip")) == 3


# ---- labels --------------------------------------------------------------------------------------------------------


def saved(folder, labels):
    dataset([JPEG] * len(labels), labels).save_to_disk(str(folder))
    return str(folder)


@pytest.mark.parametrize("label", [-1, 3])
def test_a_label_out_of_range_is_refused_before_training(tmp_path, label):
    features = Features({"image": Image(), "label": ClassLabel(names=CLASSES)})
    rows = {"image": [{"bytes": JPEG, "path": None}] * 3, "label": [0, 1, 2]}
    good = Dataset.from_dict(rows, features=features)
    # `datasets` checks labels that it encodes, but not those that a file already holds as numbers.
    bad = good.with_format("arrow").map(lambda table: table.set_column(1, "label", [[0, label, 2]]), batched=True)
    bad = Dataset(bad.data, info=good.info)
    bad.save_to_disk(str(tmp_path / "d"))
    with pytest.raises(DataError, match=rf"label {label}.*3 classes"):
        load_image_data(str(tmp_path / "d"))
    stream = prepared(bad, streaming=True)
    with pytest.raises(DataError, match=rf"Image 1 of the training split has the label {label}"):
        list(zip(stream, range(3), strict=False))


def test_a_class_without_images_is_reported_and_training_can_go_on(tmp_path, caplog):
    data = load_image_data(saved(tmp_path / "d", [0, 2, 0, 2]))
    assert data.label_names == CLASSES
    assert re.search(r"1 of the 3 classes has no training image: dog", caplog.text)


# ---- augmentation --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"in_memory": True}])
@pytest.mark.parametrize("workers", [0, 2])
def test_augmentation_depends_on_seed_epoch_and_image_alone(options, workers):
    split = dataset([encoded(picture(i, (20, 24)), "PNG") for i in range(8)])

    def epoch(number, start=0, seed=0, disturbance=0):
        torch.manual_seed(disturbance)
        rows = prepared(split, seed=seed, **options)
        rows.set_epoch(number)
        subset = torch.utils.data.Subset(rows, range(start, 8))
        loader = DataLoader(subset, batch_size=2, num_workers=workers, collate_fn=collate_images)
        return torch.cat([batch["pixel_values"] for batch in loader])

    whole = epoch(3)
    assert torch.equal(whole[4:], epoch(3, start=4, disturbance=1))
    assert not torch.equal(whole, epoch(4))
    assert not torch.equal(whole, epoch(3, seed=1))


def test_augmenting_leaves_the_global_generator_alone():
    rows = prepared(dataset([JPEG]))
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    rows[0]
    assert torch.equal(torch.rand(3), expected)


def test_persistent_workers_see_the_epoch():
    rows = prepared(dataset([encoded(picture(i, (20, 24)), "PNG") for i in range(4)]))
    loader = DataLoader(rows, batch_size=2, num_workers=1, persistent_workers=True, collate_fn=collate_images)
    seen = []
    for epoch in (0, 1, 0):
        rows.set_epoch(epoch)
        seen.append(torch.cat([batch["pixel_values"] for batch in loader]))
    assert torch.equal(seen[0], seen[2])
    assert not torch.equal(seen[0], seen[1])


def decode(file, shape, found):
    """Decode a file; `found` gets the bytes that this took at most."""
    decoder, content = ImageDecoder(3), file.read_bytes()

    def peak():  # of this program alone: `ru_maxrss` would begin at that of the process that started it
        status = Path("/proc/self/status")
        in_kb = re.search(r"VmHWM:\s*(\d+) kB", status.read_text()) if status.exists() else None
        return int(in_kb[1]) if in_kb else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    used = peak()
    assert decoder.decode({"bytes": content, "path": None}).shape == shape
    found.value = 1024 * (peak() - used)


@GROUP
@pytest.mark.parametrize(
    ("mode", "kind", "width", "height"),
    [
        ("RGBA", "PNG", 9331, 6530),
        pytest.param("CMYK", "JPEG", 9331, 6530, marks=pytest.mark.slow),
        pytest.param("I;16", "PNG", 9331, 6530, marks=pytest.mark.slow),
        pytest.param("RGB", "BMP", 9331, 6530, marks=pytest.mark.slow),
        pytest.param("RGB", "JPEG2000", 8000, 5000, marks=pytest.mark.slow),
    ],
)
def test_the_largest_images_take_less_than_a_gigabyte(tmp_path, mode, kind, width, height):
    """In a process of its own: what this one has used before would hide it."""
    file = tmp_path / "large"
    PILImage.new(mode, (width, height)).save(file, kind)
    processes = multiprocessing.get_context("forkserver")
    found = processes.Value("q", 0)
    process = processes.Process(target=decode, args=(file, (3, height, width), found))
    process.start()
    process.join()
    assert process.exitcode == 0
    assert 100e6 < found.value < 1e9


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "P", "CMYK", "I;16", "I", "1", "LA"])
def test_strips_of_a_large_image_are_the_whole(monkeypatch, mode, channels):
    noise = np.random.default_rng(0).integers(0, 256, (37, 23, 4), dtype=np.uint8)
    colours = PILImage.fromarray(noise, "RGBA")
    image = PILImage.fromarray(noise[..., 0].astype(np.uint16) * 257) if mode.startswith("I") else colours.convert(mode)
    image = image.convert("I") if mode == "I" else image
    whole = to_uint8(image, channels)
    assert whole.shape == (channels, 37, 23)
    monkeypatch.setattr("hf_clars.data.pixels._STRIP", 100)
    assert torch.equal(to_uint8(image, channels), whole)
