"""A small data set in the layout that ImageNet has on the Hub: parquet shards, an image struct, 1,000 class names."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from datasets import ClassLabel, Dataset, Features, Image

from hf_clars.bench.jpegs import jpeg_bytes, photo_like

CLASSES = 1000
SHARDS = {"train": 3, "validation": 1, "test": 1}


def class_names() -> list[str]:
    """As ImageNet's: some have commas and spaces, and one word names two classes."""
    return [f"thing {n}, number {n}" if n % 3 else f"crane {n % 2}.{n}" for n in range(CLASSES)]


def imagenet_like(root: Path, rows: int = 600, side: int = 48) -> Path:
    """Write `data/train-00000-of-00003.parquet` and so on; image i of a split has the class 7 i mod 1,000."""
    made = [jpeg_bytes(photo_like(seed, width=side + seed, height=side)) for seed in range(12)]
    features = Features({"image": Image(), "label": ClassLabel(names=class_names())})
    (root / "data").mkdir(parents=True)
    for split, shards in SHARDS.items():
        count = rows if split == "train" else 40
        numbers = np.array_split(np.arange(count), shards)
        for shard, chosen in enumerate(numbers):
            images = [{"bytes": made[i % 12], "path": f"ILSVRC2012_{split}_{i:08d}.JPEG"} for i in chosen]
            labels = [-1 if split == "test" else int(7 * i % CLASSES) for i in chosen]
            table = Dataset.from_dict({"image": images, "label": labels}, features=features)
            table.to_parquet(str(root / "data" / f"{split}-{shard:05d}-of-{shards:05d}.parquet"))
    return root
