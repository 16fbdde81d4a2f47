"""Promise: data in ImageNet's Hub layout train in a random order that a resumed run goes on with, in flat memory."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from hf_clars.bench.input import held_memory
from hf_clars.data import DevicePixels, PixelSettings, PixelTransform, collate_images, load_image_data, trainable
from hf_clars.image_classification.run import parse_run, train_image_classifier
from hf_clars.trainer import ClarsTrainer
from tests.imagenet_like import class_names, imagenet_like
from tests.trainer_kit import clars_args

SETTINGS = PixelSettings(image_size=16)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return imagenet_like(tmp_path_factory.mktemp("imagenet"))


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def offline(monkeypatch, cache):
    monkeypatch.setattr("datasets.config.HF_DATASETS_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", cache)


def rows_of(folder, *, streaming=False, train=True, **options):
    data = load_image_data(str(folder), streaming=streaming)
    columns = {"image_column": data.image_column, "label_column": data.label_column}
    split, transform = (data.train if train else data.eval), PixelTransform(SETTINGS, train=train)
    return trainable(split, transform, on_device=True, **columns, **options)


def test_shards_splits_and_all_1000_names_are_found(folder):
    data = load_image_data(str(folder))
    assert (data.train_size, data.eval_size, data.eval_split) == (600, 40, "validation")
    assert data.label_names == class_names()
    assert (data.image_column, data.label_column) == ("image", "label")
    assert [int(row["labels"]) for _, row in zip(range(5), rows_of(folder), strict=False)] == [0, 7, 14, 21, 28]


def test_workers_give_the_pixels_that_one_process_gives(folder):
    rows = rows_of(folder)
    alone, shared = (
        [
            batch
            for _, batch in zip(range(4), DataLoader(rows, 16, num_workers=n, collate_fn=collate_images), strict=False)
        ]
        for n in (0, 2)
    )
    for one, other in zip(alone, shared, strict=True):
        assert one["pixel_values"].dtype == torch.uint8
        assert one["pixel_values"].is_contiguous(memory_format=torch.channels_last)
        assert all(torch.equal(one[name], other[name]) for name in ("pixel_values", "flip", "labels"))


def test_nothing_is_written_to_stderr_by_decoders_in_workers(folder, capfd):
    for _ in DataLoader(rows_of(folder), 50, num_workers=2, collate_fn=collate_images):
        pass
    assert "JPEG" not in capfd.readouterr().err


def test_streaming_gives_the_same_images(folder):
    stream, rows = rows_of(folder, streaming=True, train=False), rows_of(folder, train=False)
    streamed = list(stream)
    assert len(streamed) == len(rows) == 40
    for i in (0, 17, 39):
        assert torch.equal(streamed[i]["pixel_values"], rows[i]["pixel_values"])
        assert int(streamed[i]["labels"]) == int(rows[i]["labels"])


class Seen(nn.Module):
    """Remembers the labels of each training pass."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.head = nn.Linear(3, 1000)
        self.orders = []

    def forward(self, pixel_values, labels=None):
        if self.training:
            self.orders.append((labels.tolist(), float(pixel_values.sum())))
        logits = self.head(pixel_values.mean((2, 3)))
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def trainer_for(folder, output, **changes):
    model = Seen()
    DevicePixels(SETTINGS).attach(model)
    args = clars_args(
        output,
        num_train_epochs=2,
        per_device_train_batch_size=50,
        train_sampling_strategy="random",
        save_strategy="steps",
        save_steps=7,
        **changes,
    )
    return model, ClarsTrainer(model, args, train_dataset=rows_of(folder), data_collator=collate_images)


def test_each_epoch_is_a_new_whole_shuffle_and_a_resumed_run_goes_on_in_it(folder, tmp_path):
    model, trainer = trainer_for(folder, tmp_path / "whole")
    trainer.train()
    first, second = model.orders[:12], model.orders[12:]
    assert len(second) == 12
    labels = [[label for batch, _ in epoch for label in batch] for epoch in (first, second)]
    # 600 images, each once an epoch; image i has the label 7 i, so a label tells the place in the files.
    assert sorted(labels[0]) == sorted(labels[1]) == sorted(7 * i % 1000 for i in range(600))
    places = [[label * 143 % 1000 for label in epoch] for epoch in labels]  # 7 * 143 = 1001
    for order in (*places, [(a - b) % 600 for a, b in zip(*places, strict=True)]):
        assert abs(np.corrcoef(order, range(600))[0, 1]) < 0.15  # 3.6 standard deviations of a random order
    assert abs(np.corrcoef(*places)[0, 1]) < 0.15
    resumed, trainer = trainer_for(folder, tmp_path / "whole")
    trainer.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-7"))
    assert resumed.orders == model.orders[7:]


def test_it_trains_end_to_end_by_the_script_s_function(folder, tmp_path):
    settings = parse_run(
        [
            f"--dataset={folder}",
            f"--output_dir={tmp_path / 'run'}",
            "--model=resnet8",
            "--image_size=16",
            "--per_device_train_batch_size=50",
            "--global_batch_size=100",
            "--max_steps=2",
            "--channels_last=true",
            "--save_strategy=steps",
            "--save_steps=1",
            "--dataloader_num_workers=1",
            "--report_to=none",
            "--use_cpu=true",
            "--disable_tqdm=true",
        ]
    )
    results = train_image_classifier(settings)
    assert 0 <= results["eval_accuracy"] <= 1
    assert np.isfinite(results["eval_loss"])


def testheld_memory_is_flat_over_epochs(folder):
    loader = DataLoader(rows_of(folder), 20, num_workers=1, collate_fn=collate_images, persistent_workers=True)
    held = []
    for _ in range(6):
        for _ in loader:
            pass
        held.append(held_memory())
    assert held[0] > 0
    assert max(held[2:]) - held[2] < 8  # MiB; an epoch's images have 4 MB as files and 0.5 MB as batches
