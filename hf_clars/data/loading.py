"""What a Trainer is given: datasets whose rows are `{"pixel_values", "labels"}`, and the collator for them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.utils.data
from datasets import Dataset, IterableDataset
from torch import Tensor

from hf_clars.data.augmenting import SharedEpoch
from hf_clars.data.decoding import BadImages, ImageDecoder
from hf_clars.data.device_pixels import FLIP, IMAGES
from hf_clars.data.pixels import PixelTransform
from hf_clars.data.samples import Samples, leave_stop_signals_to_the_main_process
from hf_clars.data.streaming import ImageStream
from hf_clars.errors import DataError


class _ImagesByNumber(torch.utils.data.Dataset):
    """What the two map-style data sets share."""

    def __init__(self, samples: Samples) -> None:
        self._samples = samples
        self._epoch = SharedEpoch()

    def set_epoch(self, epoch: int) -> None:
        """Begin an epoch: each has its own augmentation.

        Args:
            epoch: From 0.
        """
        self._epoch.set(epoch)

    @property
    def skipped_images(self) -> int:
        """How many bad images were passed over."""
        return self._samples.decoder.skipped

    def _good(
        self, split: Dataset, row: dict[str, Any], index: int, read: Callable[[Any], Any] | None = None
    ) -> tuple[dict[str, Any], Any]:
        """(the row, its pixels as `read`); those of the next good one where bad images are skipped."""
        return self._samples.decoder.first_good(
            row, index, self._samples.image_column, lambda ahead: split[(index + ahead) % len(split)], read
        )


class MapImages(_ImagesByNumber):
    """A map-style split, decoded and transformed at every access.

    Args:
        split: The split.
        samples: How its rows become samples.
    """

    def __init__(self, split: Dataset, samples: Samples) -> None:
        super().__init__(samples)
        self._split = samples.undecoded(split)

    def __len__(self) -> int:
        return len(self._split)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < len(self):
            raise IndexError(f"There is no image {index}: the {self._samples.decoder.name} has {len(self)}.")
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        """The samples of a batch, their rows read at one go; torch's data loader calls this."""
        leave_stop_signals_to_the_main_process()
        epoch, columns = self._epoch.get(), self._split[list(indices)]
        rows = [{name: values[n] for name, values in columns.items()} for n in range(len(indices))]
        return [self._sample(row, index, epoch) for row, index in zip(rows, indices, strict=True)]

    def _sample(self, row: dict[str, Any], index: int, epoch: int) -> dict[str, Any]:
        def read(value: Any) -> dict[str, Any]:
            return self._samples.read(value, epoch, index)

        used, pixels = self._good(self._split, row, index, read)
        return self._samples.labelled(pixels, used[self._samples.label_column], index)


class InMemoryImages(_ImagesByNumber):
    """A small data set decoded once and held as tensors, so that tiny images are not bound by their decoding.

    Args:
        split: Map-style split.
        samples: How its rows become samples. A transform that is not random is applied once.

    Raises:
        DataError: If images differ in size, or one is bad.
    """

    def __init__(self, split: Dataset, samples: Samples) -> None:
        super().__init__(samples)
        plain = samples.undecoded(split)
        used = [self._good(plain, plain[index], index) for index in range(len(plain))]
        sizes = {tuple(pixels.shape) for _, pixels in used}
        if len(sizes) != 1:
            raise DataError(
                f"in_memory needs images of one size, but this split has {len(sizes)}: leave out --in_memory."
            )
        made = [(row[samples.label_column], pixels) for row, pixels in used]
        if not samples.transform.random:
            made = [(label, samples.make(pixels, label, i)["pixel_values"]) for i, (label, pixels) in enumerate(made)]
        self._pixels = torch.stack([pixels for _, pixels in made])
        self._labels = torch.tensor([int(label) for label, _ in made])

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        leave_stop_signals_to_the_main_process()
        pixels, label = self._pixels[index], self._labels[index]
        if not self._samples.transform.random:
            return {"pixel_values": pixels, "labels": label}
        return self._samples.make(pixels, label, index, self._epoch.get(), index)


def trainable(
    split: Dataset | IterableDataset,
    transform: PixelTransform,
    *,
    image_column: str,
    label_column: str,
    in_memory: bool = False,
    shuffle_buffer: int = 0,
    seed: int = 0,
    classes: int | None = None,
    bad_images: BadImages = "raise",
    on_device: bool = False,
) -> Any:
    """A split as a Trainer takes it.

    Augmentation depends on `seed`, the epoch and the sample alone, so that a resumed run sees what the uninterrupted
    one would have seen. `ClarsTrainer` sets the epoch; with another loop call `set_epoch` at its start.

    Args:
        split: Map-style or streaming.
        transform: For this split.
        image_column: Column of images.
        label_column: Column of labels.
        in_memory: Decode a small map-style set once. Default False.
        shuffle_buffer: Rows to shuffle among when streaming; 0: none. Map-style sets are shuffled by the Trainer.
        seed: For that shuffling and for augmentation.
        classes: How many classes there are, to refuse other labels; None (default): not checked.
        bad_images: What to do about images that cannot be decoded: `"raise"` (default) or `"skip"`, see `ImageDecoder`.
        on_device: Leave mirroring and normalisation to `DevicePixels`: `pixel_values` are uint8 then, and random
            transforms give `"flip"` too. Default False.

    Returns:
        A dataset of `{"pixel_values": float32 [C, H, W], "labels": int}`. Map-style sets are shuffled wholly by the
        Trainer's sampler, by seed and epoch: every order is equally likely, and a resumed run goes on in the order that
        it began. A stream is shuffled by files and within its buffer only: images of one class that lie together in a
        file stay near each other, so store the files shuffled. A stream to train on has no end.

    Raises:
        DataError: If a stream is to be held in memory; while it is read, for images and labels that are wrong.
    """
    if in_memory and not isinstance(split, Dataset):
        raise DataError("A stream cannot be held in memory: choose --streaming or --in_memory.")
    name = "training split" if transform.train else "evaluation split"
    samples = Samples(
        transform,
        ImageDecoder(transform.settings.num_channels, bad_images, name),
        image_column=image_column,
        label_column=label_column,
        classes=classes,
        seed=seed,
        on_device=on_device,
    )
    if in_memory:
        return InMemoryImages(split, samples)
    if isinstance(split, Dataset):
        return MapImages(split, samples)
    return ImageStream(split, samples, endless=transform.train, shuffle_buffer=shuffle_buffer)


def collate_images(rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
    """Rows to a batch.

    Args:
        rows: Of `{"pixel_values": [C, H, W], "labels": int}`, and perhaps `"flip"`.

    Returns:
        `{"pixel_values": [B, C, H, W], "labels": int64 [B]}`, pixels of the rows' type, and `"flip"`: bool [B], if the
        rows have it.
    """
    # default_collate stacks straight into the memory that a worker shares with the main process.
    stack = torch.utils.data.default_collate
    pixels = [torch.as_tensor(row[IMAGES]) for row in rows]
    if pixels[0].dtype == torch.uint8:  # decoders interleave the channels; in that order images are copied whole
        stacked = stack([image.permute(1, 2, 0) for image in pixels]).permute(0, 3, 1, 2)
    else:
        stacked = stack(pixels)
    batch = {IMAGES: stacked, "labels": torch.tensor([int(row["labels"]) for row in rows])}
    return batch | {FLIP: torch.tensor([row[FLIP] for row in rows])} if FLIP in rows[0] else batch
