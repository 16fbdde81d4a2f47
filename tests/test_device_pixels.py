"""Promise: mirroring and normalising on the device gives the pixels that the workers would have given."""

import pytest
import torch
from torch import nn
from torchvision.transforms import v2

from hf_clars import PerSampleGradNorms
from hf_clars.data import DevicePixels, PixelSettings, PixelTransform, collate_images
from hf_clars.models import build_model
from tests.trainer_kit import Images, Plain, clars_args

SETTINGS = PixelSettings(image_size=16)


def batch(count=6, channels=3, side=16):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (count, channels, side, side), dtype=torch.uint8, generator=generator)
    return images, torch.arange(count) % 2 == 1


def expected(images, flip, settings):
    finish = v2.Compose(
        [v2.ToDtype(torch.float32, scale=True), v2.Normalize(settings.channel_mean, settings.channel_std)]
    )
    return torch.stack([finish(x.flip(-1) if f else x) for x, f in zip(images, flip, strict=True)])


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("channels_last", [False, True])
def test_pixels_are_those_of_torchvision_bit_for_bit(channels, channels_last):
    settings = PixelSettings(image_size=16, num_channels=channels)
    images, flip = batch(channels=channels)
    for layout in (torch.contiguous_format, torch.channels_last):
        got = DevicePixels(settings, channels_last=channels_last)(images.contiguous(memory_format=layout), flip)
        assert torch.equal(got, expected(images, flip, settings))
        wanted = torch.channels_last if channels_last else torch.contiguous_format
        assert got.is_contiguous(memory_format=wanted)


def test_whole_samples_are_those_of_the_workers(tmp_path):
    images, _ = batch(1, side=40)
    transform = PixelTransform(SETTINGS, train=True)
    flips = set()
    for seed in range(12):
        torch.manual_seed(seed)
        whole = transform(images[0])
        torch.manual_seed(seed)
        rows = [{"pixel_values": transform.geometry(images[0]), "flip": transform.draw_flip(), "labels": 3}]
        made = collate_images(rows)
        assert made["pixel_values"].dtype == torch.uint8
        assert torch.equal(DevicePixels(SETTINGS)(made["pixel_values"], made["flip"])[0], whole)
        flips.add(bool(made["flip"]))
    assert flips == {True, False}


def test_a_model_takes_uint8_after_attaching_and_float_as_before():
    model = Plain()
    images, flip = torch.randint(0, 256, (4, 1, 8, 8), dtype=torch.uint8), torch.tensor([True, False, True, False])
    settings = PixelSettings(image_size=8, num_channels=1)
    pixels = DevicePixels(settings)
    keys = list(model.state_dict())
    handle = pixels.attach(model)
    want = model(pixel_values=pixels(images, flip))["logits"]
    assert torch.equal(model(pixel_values=images, flip=flip)["logits"], want)
    assert list(model.state_dict()) == keys
    handle.remove()
    with pytest.raises((RuntimeError, TypeError)):
        model(pixel_values=images, flip=flip)


def test_pixels_have_the_type_of_the_weights():
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 2)).bfloat16()
    seen = []

    class Takes(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self, pixel_values):
            seen.append(pixel_values.dtype)
            return self.inner(pixel_values)

    outer = Takes()
    DevicePixels(SETTINGS).attach(outer)
    outer(pixel_values=batch()[0])
    assert seen == [torch.bfloat16]


def test_norms_do_not_depend_on_who_normalises_or_on_the_memory_layout():
    model = build_model("resnet20", num_labels=3, image_size=16).double()
    images, flip = batch(8)
    labels = torch.arange(8) % 3
    with PerSampleGradNorms(model) as norms:
        model(pixel_values=DevicePixels(SETTINGS)(images, flip).double(), labels=labels)["loss"].backward()
    want = {name: value.clone() for name, value in norms.per_sample.items()}
    model.zero_grad()
    handle = DevicePixels(SETTINGS, channels_last=True).attach(model)
    model.to(memory_format=torch.channels_last)
    with PerSampleGradNorms(model) as norms:
        model(pixel_values=images, flip=flip, labels=labels)["loss"].backward()
    handle.remove()
    for name, value in want.items():
        torch.testing.assert_close(norms.per_sample[name], value, rtol=1e-9, atol=1e-12)


def test_training_on_uint8_gives_the_weights_of_training_on_float(tmp_path):
    from hf_clars.trainer import ClarsTrainer

    class Uint8(Images):
        def __init__(self):
            super().__init__()
            self.x = torch.randint(0, 256, self.x.shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
            self.flip = torch.arange(len(self.x)) % 3 == 0

        def __getitem__(self, i):
            return {"pixel_values": self.x[i], "labels": self.y[i], "flip": self.flip[i]}

    data, settings = Uint8(), PixelSettings(image_size=8, num_channels=1)
    pixels = DevicePixels(settings)

    class Float(Images):
        def __getitem__(self, i):
            return {"pixel_values": pixels(data.x[i : i + 1], data.flip[i : i + 1])[0], "labels": data.y[i]}

    weights = []
    for dataset, attach in ((data, True), (Float(), False)):
        model = Plain()
        if attach:
            pixels.attach(model)
        args = clars_args(tmp_path / str(attach), max_steps=3, per_device_train_batch_size=16)
        trainer = ClarsTrainer(model, args, train_dataset=dataset, eval_dataset=dataset, data_collator=collate_images)
        trainer.train()
        weights.append((dict(model.state_dict()), trainer.evaluate()["eval_loss"]))
    assert all(torch.equal(weights[0][0][name], weights[1][0][name]) for name in weights[0][0])
    assert weights[0][1] == weights[1][1]
