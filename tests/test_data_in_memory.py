"""Promise: images held as tensors become the same pixels as images read one by one, and are augmented as published."""

import pytest
import torch
from datasets import Dataset, Features, Image, Value

from hf_clars.data import ImageTensors, PixelSettings, PixelTransform, decode_images
from hf_clars.data.in_memory import crop_and_flip
from hf_clars.errors import DataError
from tests.image_files import picture


def split_of(sizes, mode="RGB"):
    features = Features({"image": Image(), "label": Value("int64")})
    pictures = [picture(i, size, mode) for i, size in enumerate(sizes)]
    return Dataset.from_dict({"image": pictures, "label": [i % 3 for i in range(len(sizes))]}, features=features)


@pytest.mark.parametrize("sizes", [[(20, 20)] * 5, [(20, 24), (30, 16), (20, 20)]], ids=["one size", "several sizes"])
@pytest.mark.parametrize(("side", "channels"), [(20, 3), (14, 1), (32, 3)])
def test_the_same_pixels_as_the_evaluation_transform(sizes, side, channels):
    settings = PixelSettings(image_size=side, num_channels=channels, augment="none")
    split = split_of(sizes)
    held = decode_images(split, settings, image_column="image", label_column="label")
    assert held.pixels.dtype == torch.uint8
    x, y = held.batch(torch.arange(len(sizes)))
    transform = PixelTransform(settings, train=False)
    torch.testing.assert_close(x, torch.stack([transform(row["image"]) for row in split]), rtol=0, atol=1e-6)
    assert y.tolist() == split["label"][:]


def test_subset_and_batch_follow_their_indices():
    settings = PixelSettings(image_size=6, num_channels=1, augment="none")
    held = ImageTensors(
        torch.arange(8, dtype=torch.uint8).view(8, 1, 1, 1).expand(8, 1, 6, 6), torch.arange(8), settings
    )
    part = held.subset(torch.tensor([5, 2]))
    assert len(part) == 2
    assert part.batch(torch.tensor([1, 0]))[1].tolist() == [2, 5]
    x, _ = held.batch(torch.tensor([7]))
    assert x[0, 0, 0, 0].item() == pytest.approx((7 / 255 - 0.5) / 0.5)


def test_crops_and_flips_are_windows_of_the_padded_image():
    count, side = 60, 6
    pixels = torch.arange(count * 3 * side * side).view(count, 3, side, side) + 1
    out = crop_and_flip(pixels, torch.Generator().manual_seed(0))
    assert out.shape == pixels.shape
    padded = torch.nn.functional.pad(pixels, (4, 4, 4, 4))
    seen = set()
    for i in range(count):
        windows = {
            (top, left, flip): padded[i, :, top : top + side, left : left + side].flip(2)
            if flip
            else padded[i, :, top : top + side, left : left + side]
            for top in range(9)
            for left in range(9)
            for flip in (False, True)
        }
        found = [key for key, window in windows.items() if torch.equal(window, out[i])]
        assert len(found) == 1
        seen.add(found[0])
    tops, lefts, flips = (set(values) for values in zip(*seen, strict=True))
    assert tops == lefts == set(range(9))
    assert flips == {False, True}


def test_augmentation_is_drawn_anew_but_the_same_for_the_same_generator():
    settings = PixelSettings(image_size=8, num_channels=3, augment="cifar")
    held = decode_images(split_of([(8, 8)] * 4), settings, image_column="image", label_column="label")
    generator = torch.Generator().manual_seed(3)
    indices = torch.arange(4)
    first, second = held.batch(indices, generator)[0], held.batch(indices, generator)[0]
    assert not torch.equal(first, second)
    assert torch.equal(first, held.batch(indices, torch.Generator().manual_seed(3))[0])
    plain = held.batch(indices)[0]
    transform = PixelTransform(settings, train=False)
    torch.testing.assert_close(plain[0], transform(picture(0, (8, 8))), rtol=0, atol=1e-6)


def test_crops_of_whole_images_are_refused():
    with pytest.raises(DataError, match="in_memory"):
        decode_images(split_of([(8, 8)]), PixelSettings(image_size=8), image_column="image", label_column="label")
