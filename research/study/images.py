"""Where a run's passes come from: sets held in memory, or a data loader for those that are not."""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import torch
from datasets import Dataset
from torch import Tensor
from torch.utils.data import DataLoader, RandomSampler

from hf_clars.data import (
    ImageData,
    ImageTensors,
    PixelSettings,
    PixelTransform,
    collate_images,
    decode_images,
    load_image_data,
)
from hf_clars.data.loading import trainable
from hf_clars.errors import DataError
from research.study.settings import RunSettings

Pass = tuple[Tensor, Tensor]
"""Images float32 [b, C, H, W] and labels int64 [b]."""

DATA_VARIABLE = "HF_CLARS_TEST_DATA"
HELD_OUT_SEED = 0
EVALUATION_PASS = 1000


class Images(Protocol):
    """The images of one run."""

    label_names: list[str]

    @property
    def train_size(self) -> int:
        """N, training images."""

    def training_passes(self, size: int, *, seed: int, epoch: int) -> Iterator[Pass]:
        """One epoch in a new random order, in passes of `size`; a last, smaller part is dropped."""

    def evaluation_passes(self) -> Iterator[Pass]:
        """The images that are evaluated on, once."""


class MemoryImages:
    """Sets held as uint8 tensors.

    Args:
        train: Training images.
        evaluation: The images that are evaluated on.
        label_names: One a class.
    """

    def __init__(self, train: ImageTensors, evaluation: ImageTensors, label_names: list[str]) -> None:
        self.train = train
        self.evaluation = evaluation
        self.label_names = label_names

    @property
    def train_size(self) -> int:
        """N, training images."""
        return len(self.train)

    def training_passes(self, size: int, *, seed: int, epoch: int) -> Iterator[Pass]:
        """One epoch in an order, and with augmentation, that seed and epoch decide."""
        generator = epoch_generator(seed, epoch)
        order = torch.randperm(self.train_size, generator=generator).to(self.train.labels.device)
        for start in range(0, self.train_size - size + 1, size):
            yield self.train.batch(order[start : start + size], generator)

    def evaluation_passes(self) -> Iterator[Pass]:
        """The images that are evaluated on, once."""
        every = torch.arange(len(self.evaluation), device=self.evaluation.labels.device)
        for indices in every.split(EVALUATION_PASS):
            yield self.evaluation.batch(indices)


class LoadedImages:
    """Sets read through data-loader workers, for those too large to hold.

    Args:
        data: Map-style splits.
        settings: Of the run.
        device: Where passes go.
    """

    def __init__(self, data: ImageData, settings: RunSettings, device: torch.device) -> None:
        assert isinstance(data.train, Dataset)
        train, evaluation = data.train, data.eval
        if settings.held_out:
            kept, held = held_out_split(len(train), settings.held_out)
            train, evaluation = train.select(kept.tolist()), train.select(held.tolist())
        self.label_names = data.label_names
        self.device = device
        self._train, self._evaluation = (
            trainable(
                split,
                PixelTransform(settings.pixels(), train=is_train),
                image_column=data.image_column,
                label_column=data.label_column,
            )
            for split, is_train in ((train, True), (evaluation, False))
        )

    @property
    def train_size(self) -> int:
        """N, training images."""
        return len(self._train)

    def training_passes(self, size: int, *, seed: int, epoch: int) -> Iterator[Pass]:
        """One epoch in an order that seed and epoch decide."""
        sampler = RandomSampler(self._train, generator=epoch_generator(seed, epoch))
        yield from self._passes(self._train, size, sampler)

    def evaluation_passes(self) -> Iterator[Pass]:
        """The images that are evaluated on, once."""
        yield from self._passes(self._evaluation, EVALUATION_PASS // 4, None)

    def _passes(self, rows: Any, size: int, sampler: RandomSampler | None) -> Iterator[Pass]:
        loader: DataLoader[dict[str, Tensor]] = DataLoader(
            rows,
            batch_size=size,
            sampler=sampler,
            drop_last=sampler is not None,
            num_workers=os.cpu_count() or 0,
            collate_fn=collate_images,
            pin_memory=self.device.type == "cuda",
        )
        for batch in loader:
            yield (
                batch["pixel_values"].to(self.device, non_blocking=True),
                batch["labels"].to(self.device, non_blocking=True),
            )


def epoch_generator(seed: int, epoch: int) -> torch.Generator:
    """A CPU generator that no other (seed, epoch) of a study shares."""
    return torch.Generator().manual_seed(seed * 1_000_003 + epoch)


def held_out_split(size: int, held_out: int) -> tuple[Tensor, Tensor]:
    """Indices kept for training, and held out: a random choice that is the same for every run.

    Args:
        size: N.
        held_out: How many.

    Returns:
        (indices [N - held_out], indices [held_out]), each increasing.

    Raises:
        DataError: If nothing would be left to train on.
    """
    if held_out >= size:
        raise DataError(f"held_out={held_out} leaves nothing of {size} training images: hold out fewer.")
    order = torch.randperm(size, generator=torch.Generator().manual_seed(HELD_OUT_SEED))
    return order[held_out:].sort().values, order[:held_out].sort().values


def locate(dataset: str, data: Path | None) -> str:
    """Where a data set is.

    Args:
        dataset: Its name, on the Hub or of a folder.
        data: A folder that holds a folder of that name, or is one; None: the folder that HF_CLARS_TEST_DATA names if
            it holds one, or else the Hub.

    Returns:
        What `load_image_data` takes.

    Raises:
        DataError: If `data` is given, but neither holds nor is the set.
    """
    folder = dataset.rpartition("/")[2]
    if data is None:
        home = os.environ.get(DATA_VARIABLE)
        return str(Path(home) / folder) if home and (Path(home) / folder).is_dir() else dataset
    if (data / folder).is_dir():
        return str(data / folder)
    if data.name == folder and data.exists():
        return str(data)
    raise DataError(f"{data} neither holds nor is a folder {folder!r}: check the path of the data.")


def open_images(settings: RunSettings, data: Path | None, device: torch.device) -> Images:
    """The images of a run.

    Args:
        settings: Of the run.
        data: See `locate`.
        device: Where passes go.

    Returns:
        The images.

    Raises:
        DataError: If the set is not found, has nothing to evaluate on, or is smaller than a batch.
    """
    images: Images = (_in_memory if settings.in_memory else _loaded)(settings, data, device)
    if images.train_size < settings.batch_size:
        raise DataError(
            f"One update takes {settings.batch_size} images, but {settings.dataset} has {images.train_size} to train "
            "on: lower batch_size or held_out."
        )
    return images


def _in_memory(settings: RunSettings, data: Path | None, device: torch.device) -> MemoryImages:
    train, evaluation, names = _decoded(locate(settings.dataset, data), settings.pixels())
    if settings.held_out:
        kept, held = held_out_split(len(train), settings.held_out)
        train, evaluation = train.subset(kept), train.subset(held)
    if evaluation is None:
        raise _nothing_to_evaluate_on(settings)
    return MemoryImages(train.to(device), evaluation.to(device), names)


@lru_cache(maxsize=2)
def _decoded(dataset: str, pixels: PixelSettings) -> tuple[ImageTensors, ImageTensors | None, list[str]]:
    """A worker decodes each set once."""
    data = load_image_data(dataset)
    columns = {"image_column": data.image_column, "label_column": data.label_column}
    assert isinstance(data.train, Dataset)
    evaluation = decode_images(data.eval, pixels, **columns) if isinstance(data.eval, Dataset) else None
    return decode_images(data.train, pixels, **columns), evaluation, data.label_names


def _loaded(settings: RunSettings, data: Path | None, device: torch.device) -> LoadedImages:
    loaded = load_image_data(locate(settings.dataset, data))
    if loaded.eval is None and not settings.held_out:
        raise _nothing_to_evaluate_on(settings)
    return LoadedImages(loaded, settings, device)


def _nothing_to_evaluate_on(settings: RunSettings) -> DataError:
    return DataError(f"{settings.dataset} has no split to evaluate on: set held_out.")
