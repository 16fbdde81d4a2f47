"""Small real data for the examples: images as tensors, and the bytes of Python's own sources."""

from __future__ import annotations

import sysconfig
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from hf_clars.data import PixelSettings, decode_images, load_image_data


class Images(Dataset[dict[str, Tensor]]):
    """Images [N, C, H, W] and labels [N] in memory."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.x, self.y = x, y

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, place: int) -> dict[str, Tensor]:
        return {"pixel_values": self.x[place], "labels": self.y[place]}


def load_images(dataset: str, samples: int) -> tuple[Images, int]:
    """The first images of a data set that `hf-clars train --dataset` takes, and the number of its classes."""
    data = load_image_data(dataset, max_train_samples=samples)
    first: Any = data.train[0][data.image_column]
    settings = PixelSettings(image_size=first.height, num_channels=1 if first.mode == "L" else 3, augment="none")
    images = decode_images(data.train, settings, image_column=data.image_column, label_column=data.label_column)
    x, y = images.batch(torch.arange(len(images)))
    return Images(x, y), len(data.label_names)


class Bytes(Dataset[dict[str, Tensor]]):
    """Pieces of Python's standard library, as bytes; `names` says which file a piece begins in."""

    def __init__(self, samples: int, length: int) -> None:
        files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
        pieces: list[Tensor] = []
        self.names: list[str] = []
        for file in files:
            text = torch.frombuffer(bytearray(file.read_bytes() or b" "), dtype=torch.uint8).long()
            found = list(text.split(length))[:-1]  # whole pieces only
            pieces += found
            self.names += [f"{file.name}:{number * length}" for number in range(len(found))]
        order = torch.randperm(len(pieces), generator=torch.Generator().manual_seed(0))[:samples].tolist()
        self.pieces = torch.stack([pieces[i] for i in order])
        self.names = [self.names[i] for i in order]

    def __len__(self) -> int:
        return len(self.pieces)

    def __getitem__(self, place: int) -> dict[str, Tensor]:
        return {"input_ids": self.pieces[place], "labels": self.pieces[place]}

    def text(self, place: int) -> str:
        """A piece as text."""
        return bytes(self.pieces[place].tolist()).decode("utf-8", errors="replace")
