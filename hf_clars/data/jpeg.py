"""JPEG decoding for random crops: only the rows that a crop needs, at the scale that it needs, bit for bit otherwise.

A baseline JPEG is coded from top to bottom, and its header says how many rows there are. With a smaller number written
there, a decoder stops after so many rows: those below a crop are never decoded. The rows above come out as they do of a
full decode, except the last one, whose colours are smoothed with the row below (so one more is decoded than is used).
A crop of at least twice the wanted size is decoded at 1/2, 1/4 or 1/8 of its size, which libjpeg does while decoding.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from typing import NamedTuple

import torch
import torch.utils.data
from PIL import ExifTags, Image
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.transforms.v2 import functional as F

_BASELINE = (0xC0, 0xC1)  # frames that are coded in one pass from top to bottom
_OTHER_FRAMES = (0xC2, 0xC3, *range(0xC5, 0xC8), *range(0xC9, 0xCC), *range(0xCD, 0xD0))
_EXIF, _SCAN = 0xE1, 0xDA
_EXTRA_ROWS = 2  # one is needed; two where colours have half the rows


class Box(NamedTuple):
    """A crop, in pixels of the full image."""

    top: int
    left: int
    height: int
    width: int


@dataclass(frozen=True)
class JpegHeader:
    """What a crop must know of a JPEG file.

    Attributes:
        height: Rows.
        width: Columns.
        height_at: Where in the file the number of rows stands (2 bytes, big-endian).
        has_exif: Whether there are Exif data, which may say that the image is rotated.
    """

    height: int
    width: int
    height_at: int
    has_exif: bool


def read_jpeg_header(data: bytes) -> JpegHeader | None:
    """Read the header of a JPEG file that `decode_crop` can decode.

    Args:
        data: The file.

    Returns:
        The header; None for anything but a baseline JPEG of 8 bits, one scan, and one (grey) or three components.
    """
    place, has_exif, frame = 2, False, None
    if data[:2] != b"\xff\xd8":
        return None
    while place + 4 <= len(data) and data[place] == 0xFF:
        marker, size = data[place + 1], int.from_bytes(data[place + 2 : place + 4], "big")
        segment = data[place + 4 : place + 2 + size]
        if marker in _OTHER_FRAMES or size < 2:
            return None
        if marker == _EXIF:
            has_exif |= segment[:4] == b"Exif"
        elif marker in _BASELINE and len(segment) >= 6:
            precision, height, width, components = struct.unpack(">BHHB", segment[:6])
            if precision != 8 or components not in (1, 3) or not height or not width:
                return None
            frame = JpegHeader(height, width, place + 5, False), components
        elif marker == _SCAN:
            if frame is None or not segment or segment[0] != frame[1]:
                return None
            found = frame[0]
            return JpegHeader(found.height, found.width, found.height_at, has_exif)
        place += 2 + size
    return None


def is_upright(data: bytes, header: JpegHeader) -> bool:
    """Whether the pixels are stored as they are to be seen; cameras note a rotation in the Exif data."""
    if not header.has_exif:
        return True
    return Image.open(BytesIO(data)).getexif().get(ExifTags.Base.Orientation, 1) == 1


def decode_crop(data: bytes, header: JpegHeader, box: Box, size: int) -> Tensor:
    """Decode a crop and resize it.

    A crop of less than twice `size` gives what a full decode with torchvision, `resized_crop` and bilinear
    interpolation with antialiasing give, bit for bit. Larger ones are decoded at a fraction of their size, which filters
    in another way: on photographs the mean difference is about 1 of 255 levels.

    Args:
        data: The file.
        header: Of the file.
        box: Which part.
        size: Height and width of the result.

    Returns:
        uint8 [3, size, size], its memory in the order height, width, channel.

    Raises:
        RuntimeError: torchvision cannot decode it.
        OSError: Pillow cannot decode it.
    """
    rows = min(header.height, box.top + box.height + _EXTRA_ROWS)
    fraction = min(box.height, box.width) // size
    if fraction >= 2:
        return _decode_reduced(_with_height(data, header, rows), box, size, fraction)
    if torch.utils.data.get_worker_info() is None:
        pixels = decode_jpeg(_as_tensor(bytearray(data)), mode=ImageReadMode.RGB)
    else:
        with _no_messages_of_libjpeg():
            pixels = decode_jpeg(_as_tensor(_with_height(data, header, rows)), mode=ImageReadMode.RGB)
    crop = pixels[None, :, box.top : box.top + box.height, box.left : box.left + box.width]
    # Torch resizes three interleaved channels twice as fast as three planes.
    crop = crop.contiguous(memory_format=torch.channels_last)
    return F.resize(crop, [size, size], antialias=True)[0]


def _decode_reduced(data: bytearray, box: Box, size: int, fraction: int) -> Tensor:
    """Decode at 1/8, 1/4 or 1/2, the smallest that leaves `size` pixels, and resize the rest."""
    image = Image.open(BytesIO(data), formats=("JPEG",))
    full = image.size
    image.draft("RGB", (full[0] // fraction, full[1] // fraction))
    across, down = image.width / full[0], image.height / full[1]
    edges = (box.left * across, box.top * down, (box.left + box.width) * across, (box.top + box.height) * down)
    edges = (edges[0], edges[1], min(edges[2], image.width), min(edges[3], image.height))
    small = image.convert("RGB").resize((size, size), Image.Resampling.BILINEAR, box=edges)
    return F.pil_to_tensor(small)


def _with_height(data: bytes, header: JpegHeader, rows: int) -> bytearray:
    copy = bytearray(data)
    copy[header.height_at : header.height_at + 2] = rows.to_bytes(2, "big")
    return copy


def _as_tensor(data: bytearray) -> Tensor:
    return torch.frombuffer(data, dtype=torch.uint8)


@contextmanager
def _no_messages_of_libjpeg() -> Iterator[None]:
    """Let libjpeg not write to stderr, as it does about the rows that are left over; for data-loader workers only.

    A worker runs one thread that decodes: there is nobody else whose message could be lost meanwhile.
    """
    global _stderr
    if _stderr is None:
        _stderr = (os.open(os.devnull, os.O_WRONLY), os.dup(2))
    os.dup2(_stderr[0], 2)
    try:
        yield
    finally:
        os.dup2(_stderr[1], 2)


_stderr: tuple[int, int] | None = None
