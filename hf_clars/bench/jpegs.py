"""JPEG files that cost as much to decode as photographs do, made of noise whose spectrum is that of photographs."""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

import numpy as np
from datasets import ClassLabel, Dataset, Features
from datasets import Image as ImageFeature
from PIL import Image
from tqdm import tqdm

QUALITY = 90
SLOPE = 1.2
"""Amplitudes fall as 1/frequency^SLOPE. Natural images have about 1; with 1.2 a file of 500 x 375 has about 100 kB, as
those of ImageNet have (138 GB for 1.28 million)."""


def photo_like(seed: int, *, width: int = 500, height: int = 375) -> Image.Image:
    """An image without meaning but with the detail of a photograph.

    Args:
        seed: Another one, another image.
        width: In pixels.
        height: In pixels.

    Returns:
        RGB.
    """
    generator = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    amplitude = 1 / np.maximum(frequency, 1 / max(width, height)) ** SLOPE
    planes = []
    for _ in range(3):
        noise = np.fft.rfft2(generator.standard_normal((height, width))) * amplitude
        plane = np.fft.irfft2(noise, s=(height, width))
        planes.append(plane / plane.std())
    light, first, second = planes  # colours vary less than brightness
    rgb = np.stack([light + 0.5 * first, light - 0.3 * second, light - 0.5 * first + 0.3 * second], axis=-1)
    return Image.fromarray((120 + 48 * rgb).clip(0, 255).astype(np.uint8))


def jpeg_bytes(image: Image.Image, quality: int = QUALITY) -> bytes:
    """An image as a JPEG file."""
    buffer = BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def write_images(folder: Path, count: int, *, classes: int = 10, distinct: int = 200) -> Sequence[Path]:
    """Write JPEG files twice: one folder a class, and as the Hub stores data sets.

    Args:
        folder: Where to; `train/c000/00000.jpg` and so on, and `train.parquet` with the same files in it.
        count: Files.
        classes: Folders.
        distinct: So many images are made; the files repeat them, which decoders do not notice.

    Returns:
        The files.
    """
    made = [jpeg_bytes(photo_like(seed)) for seed in tqdm(range(min(count, distinct)), desc="making images")]
    files, rows = [], []
    for number in range(count):
        path = folder / "train" / f"c{number % classes:03d}" / f"{number:05d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(made[number % len(made)])
        files.append(path)
        rows.append({"image": {"bytes": path.read_bytes(), "path": path.name}, "label": number % classes})
    names = [f"c{number:03d}" for number in range(classes)]
    features = Features({"image": ImageFeature(), "label": ClassLabel(names=names)})
    Dataset.from_list(rows, features=features).to_parquet(str(folder / "train.parquet"))
    return files
