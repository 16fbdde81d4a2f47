"""From the bytes of an image file to pixels, where the bytes may be damaged, hostile, or no image at all.

`datasets` hands out images undecoded (`Image(decode=False)`), so that whatever is wrong with one is found here, where
its place in the data set is known, and is answered with one sentence or, if the user chose so, with another image.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable
from io import BytesIO
from typing import Any, Literal

import torch
from datasets.utils.file_utils import xopen
from PIL import Image, ImageOps
from torch import Tensor

from hf_clars.data.pixels import to_uint8
from hf_clars.errors import DataError

BadImages = Literal["raise", "skip"]

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "JPEG2000")
"""What is opened. Pillow knows more formats, among them ones (EPS) for which it starts another program."""

MAX_PIXELS = 62_000_000
"""A larger image is refused before it is decoded, so that none takes more than 1 GB: the largest of ImageNet has 61
million pixels."""

MAX_PIXELS_OF = {"JPEG2000": 40_000_000}
"""Formats whose decoder takes more: 18 bytes a pixel."""

MAX_IN_A_ROW = 100
"""So many bad images in a row are a bad data set."""

logger = logging.getLogger(__name__)


class BadImageError(DataError):
    """An image cannot be decoded; the message says which one and why."""


def open_image(value: Any) -> Image.Image:
    """Decode one image as `datasets` stores it.

    Animations give their first frame; an orientation noted in the file is applied, as `datasets` does.

    Args:
        value: `{"bytes": ..., "path": ...}`, one of them None; or an image that is decoded already.

    Returns:
        The image, wholly decoded.

    Raises:
        BadImageError: The bytes are missing, cut off, no image of `FORMATS`, or more than `MAX_PIXELS`.
    """
    if isinstance(value, Image.Image):
        return value
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about odd metadata; sizes are checked here
            image = Image.open(BytesIO(_content(value)), formats=FORMATS)
            most = MAX_PIXELS_OF.get(image.format or "", MAX_PIXELS)
            if image.width * image.height > most:
                raise BadImageError(f"it has {image.width} x {image.height} pixels; at most {most:,} are decoded")
            image.load()
            ImageOps.exif_transpose(image, in_place=True)
            return image
    except BadImageError:
        raise
    except MemoryError as error:
        raise BadImageError("decoding it takes more memory than there is") from error
    except Exception as error:  # Pillow's decoders raise whatever a damaged file leads them to
        reason = (str(error).splitlines() or [""])[0].split("<")[0].strip()
        raise BadImageError(f"{type(error).__name__}: {reason}" if reason else type(error).__name__) from error


def _content(value: Any) -> bytes:
    content, path = (value.get("bytes"), value.get("path")) if isinstance(value, dict) else (None, None)
    if content is None and path is not None:
        # xopen also reads inside archives and from the network, but takes ten times as long on a local file.
        with (open if os.path.isfile(path) else xopen)(str(path), "rb") as file:
            content = file.read()
    if not content:
        raise BadImageError("it has no bytes" if content is None else "it is an empty file")
    return bytes(content)


class ImageDecoder:
    """Decodes the images of one split, and answers for bad ones; picklable, for data-loader workers.

    Args:
        num_channels: 1 or 3.
        bad_images: `"raise"` (default), or `"skip"`: the next good image takes the place of a bad one, so that batches
            keep their size. Each is named in a warning, and counted over all workers.
        name: What messages call the split.
    """

    def __init__(self, num_channels: int, bad_images: BadImages = "raise", name: str = "training split") -> None:
        self.num_channels = num_channels
        self.bad_images = bad_images
        self.name = name
        # In memory that all workers share; each counts in a place of its own, so that no count is lost.
        self._skipped = torch.zeros(64, dtype=torch.int64).share_memory_()
        self._warned: set[int] = set()

    @property
    def skipped(self) -> int:
        """How many bad images were passed over so far, those met in several epochs counted each time."""
        return int(self._skipped.sum())

    def decode(self, value: Any) -> Tensor:
        """One image as uint8 [num_channels, H, W].

        Raises:
            BadImageError: It cannot be decoded.
        """
        image = open_image(value)
        try:
            return to_uint8(image, self.num_channels)
        except Exception as error:  # a mode or palette that Pillow cannot convert
            raise BadImageError(f"its mode {image.mode} cannot be converted ({error})") from error

    def content(self, value: Any) -> bytes:
        """The bytes of one image file; empty where they cannot be had, for which `decode` then gives the reason."""
        try:
            return b"" if isinstance(value, Image.Image) else _content(value)
        except (BadImageError, OSError):
            return b""

    def first_good(
        self,
        row: dict[str, Any],
        index: int,
        column: str,
        following: Callable[[int], Any],
        read: Callable[[Any], Any] | None = None,
    ) -> Any:
        """Decode the image of a row or, when bad images are skipped, of the next row that has a good one.

        Args:
            row: The row.
            index: Its place in the split.
            column: Of the image.
            following: Gives the row so many places further.
            read: How to decode; None: `decode`.

        Returns:
            (the row that was used, what `read` made of its image).

        Raises:
            BadImageError: It is bad and `bad_images="raise"`, or `MAX_IN_A_ROW` images in a row are bad.
        """
        for ahead in range(MAX_IN_A_ROW):
            try:
                return row, (read or self.decode)(row[column])
            except BadImageError as error:
                self._pass_over(row[column], index + ahead, error)
            row = following(ahead + 1)
        raise BadImageError(
            f"{MAX_IN_A_ROW} images in a row of the {self.name}, from number {index} on, cannot be decoded: this is no "
            "data set of images. Look at the warnings above for the reasons."
        )

    def _pass_over(self, value: Any, index: int, error: BadImageError) -> None:
        path = value.get("path") if isinstance(value, dict) else None
        which = f"Image {index} of the {self.name}" + (f" ({path})" if path else "")
        if self.bad_images == "raise":
            raise BadImageError(
                f"{which} cannot be decoded: {error}. Mend or remove it, or train without such images with "
                "--bad_images skip."
            ) from error
        worker = torch.utils.data.get_worker_info()
        self._skipped[0 if worker is None else (worker.id + 1) % len(self._skipped)] += 1
        if index not in self._warned:
            self._warned.add(index)
            logger.warning("%s cannot be decoded and is passed over: %s.", which, error)
