"""Small image data sets on disk, in the layouts that the loader promises to read."""

from __future__ import annotations

from pathlib import Path

import datasets.config
import numpy as np
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Value
from PIL import Image as PILImage

datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN = 0.1  # 5 seconds at the end of each pass over parquet files

CLASSES = ["cat", "dog", "eel"]


def picture(seed, size=(20, 24), mode="RGB"):
    shape = (*size, 3) if mode == "RGB" else size
    return PILImage.fromarray(np.random.default_rng(seed).integers(0, 255, shape, dtype=np.uint8))


def image_folder(root: Path, splits=("train", "validation"), per_class=4) -> Path:
    for split in splits:
        for c, name in enumerate(CLASSES):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(per_class):
                picture(10 * c + i).save(folder / f"{i}.png")
    return root


def dataset_dict(splits=("train", "test"), rows=12, labels="class") -> DatasetDict:
    kinds = {
        "class": ClassLabel(names=CLASSES),
        "int": Value("int64"),
        "string": Value("string"),
        "float": Value("float32"),
    }
    values = {
        "class": [i % 3 for i in range(rows)],
        "int": [i % 3 for i in range(rows)],
        "string": [CLASSES[i % 3] for i in range(rows)],
        "float": [i / 2 for i in range(rows)],
    }
    features = Features({"image": Image(), "label": kinds[labels]})
    made = {
        split: Dataset.from_dict(
            {"image": [picture(i) for i in range(rows)], "label": values[labels]}, features=features
        )
        for split in splits
    }
    return DatasetDict(made)


def parquet_folder(root: Path, **kinds) -> Path:
    """The Hub's layout: one folder, `train-00000-of-00001.parquet`."""
    root.mkdir(parents=True, exist_ok=True)
    for name, split in dataset_dict(**kinds).items():
        split.to_parquet(str(root / f"{name}-00000-of-00001.parquet"))
    return root
