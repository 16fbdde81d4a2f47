"""From a row to a sample: the label checked, the pixels augmented from the sample's own seed."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
import torch.utils.data
from datasets import Image
from torch import Tensor

from hf_clars.data.augmenting import random_numbers_from, sample_seed
from hf_clars.data.decoding import ImageDecoder
from hf_clars.data.device_pixels import FLIP, IMAGES
from hf_clars.data.pixels import PixelTransform
from hf_clars.errors import DataError


class Samples:
    """How the rows of one split become samples.

    Args:
        transform: For this split.
        decoder: Of its images.
        image_column: Column of the images.
        label_column: Column of the labels.
        classes: How many there are; None: not checked.
        seed: Of the augmentation.
        on_device: Give uint8 pixels, and whether to mirror them: `DevicePixels` does the rest.
    """

    def __init__(
        self,
        transform: PixelTransform,
        decoder: ImageDecoder,
        *,
        image_column: str,
        label_column: str,
        classes: int | None,
        seed: int,
        on_device: bool = False,
    ) -> None:
        self.transform = transform
        self.decoder = decoder
        self.image_column = image_column
        self.label_column = label_column
        self.classes = classes
        self.seed = seed
        self.on_device = on_device

    def undecoded(self, split: Any) -> Any:
        """The split with images as bytes or paths: they are decoded where their number is known."""
        return split.cast_column(self.image_column, Image(decode=False))

    def make(self, pixels: Tensor, label: Any, index: int, *place: int) -> dict[str, Any]:
        """One sample of an image that is decoded already.

        Args:
            pixels: uint8 [C, H, W].
            label: Its class.
            index: What messages call it.
            place: What its augmentation depends on beside the seed.

        Returns:
            `{"pixel_values", "labels"}`, and `"flip"` with `on_device`.

        Raises:
            DataError: The label is none of the classes.
        """
        return self.labelled(self._augmented(lambda: self.transform.geometry(pixels), place), label, index)

    def read(self, value: Any, *place: int) -> dict[str, Any]:
        """The pixels of one image, of which no more is decoded than they need.

        Args:
            value: As `datasets` stores it, see `ImageDecoder`.
            place: What its augmentation depends on beside the seed.

        Returns:
            `{"pixel_values"}`, and `"flip"` with `on_device`.

        Raises:
            BadImageError: It cannot be decoded.
        """
        return self._augmented(lambda: self._crop(value), place)

    def labelled(self, pixels: dict[str, Any], label: Any, index: int) -> dict[str, Any]:
        """A sample of what `read` returned.

        Args:
            pixels: From `read`.
            label: Its class.
            index: What messages call it.

        Returns:
            The pixels, and `"labels"`.

        Raises:
            DataError: The label is none of the classes.
        """
        if self.classes is not None and not 0 <= int(label) < self.classes:
            raise DataError(
                f"Image {index} of the {self.decoder.name} has the label {label}, but there are {self.classes} classes "
                f"(0 to {self.classes - 1}): mend the column {self.label_column!r}, or choose another split."
            )
        return {**pixels, "labels": label}

    def _crop(self, value: Any) -> Tensor:
        cropped = self.transform.crop_file(self.decoder.content(value)) if self.transform.random else None
        return self.transform.geometry(self.decoder.decode(value)) if cropped is None else cropped

    def _augmented(self, crop: Callable[[], Tensor], place: tuple[int, ...]) -> dict[str, Any]:
        seeded = random_numbers_from(sample_seed(self.seed, *place)) if self.transform.random else nullcontext()
        with seeded:
            cropped, flip = crop(), self.transform.draw_flip()
        if self.on_device:
            return {IMAGES: cropped, FLIP: flip} if self.transform.random else {IMAGES: cropped}
        return {IMAGES: self.transform.finish(cropped[None], torch.tensor([flip]))[0]}


_shielded: set[int] = set()


def leave_stop_signals_to_the_main_process() -> None:
    """In a data-loader worker, go on after a SIGTERM or SIGINT that is not from the main process; elsewhere do nothing.

    A scheduler, or Ctrl-C, signals every process of a run. A worker that ended at once would take down the step which
    the main process still has to finish before it can save.
    """
    if os.getpid() in _shielded or torch.utils.data.get_worker_info() is None:
        return
    _shielded.add(os.getpid())
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # Linux: tells who sent a signal
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_with_the_main_process, args=(os.getppid(),), daemon=True).start()


def _end_with_the_main_process(main: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != main:
        pass
    os._exit(0)
