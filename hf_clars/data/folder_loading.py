"""A folder of images, whose layout is known, through `datasets`; every image is accounted for."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

from datasets import Dataset, Image, load_dataset

from hf_clars.data.folders import FolderSplits
from hf_clars.errors import DataError

logger = logging.getLogger(__name__)


def load_image_folders(path: Path, found: FolderSplits, streaming: bool) -> dict[str, Any]:
    """Load a folder of images.

    Args:
        path: The folder.
        found: Its layout, from `find_image_folders`.
        streaming: Whether to give streams.

    Returns:
        The splits by name.

    Raises:
        DataError: Images would be left out, or a metadata file lists some that are not there.
    """
    # Images of one class alone, or at several depths, would lose their labels without `drop_labels=False`.
    drop = False if found.labels_from_folders else None
    splits = dict(load_dataset("imagefolder", data_files=found.patterns, drop_labels=drop, streaming=streaming))
    if streaming:
        if found.part_of:
            raise DataError(
                f"One metadata file in {path} lists the images of {', '.join(found.part_of)}: give each of these "
                "folders its own, or leave out --streaming."
            )
        return splits
    for name, split in splits.items():
        if found.labels_from_folders and len(split) != found.images[name]:
            raise DataError(
                f"{path} holds {found.images[name]:,} images for the split {name!r}, but `datasets` reads "
                f"{len(split):,} of them: look for image files with unusual endings."
            )
        if not found.labels_from_folders:
            _check_listed_images(split, found.images[name], path)
    return splits if found.part_of is None else _parts(splits["train"], found.part_of, path)


def _image_files(split: Dataset) -> list[str]:
    """The path of each row's image."""
    column = next(name for name, feature in split.features.items() if isinstance(feature, Image))
    plain = split.cast_column(column, Image(decode=False)).select_columns([column])
    return [str(row[column]["path"]) for row in plain]


def _check_listed_images(split: Dataset, there: int, path: Path) -> None:
    """Compare what a metadata file lists with the images that lie in its folder."""
    files = set(_image_files(split))
    missing = sorted(file for file in files if not Path(file).is_file())
    if missing:
        raise DataError(f"The metadata in {path} lists {len(missing):,} images that are not there: {missing[0]}.")
    if len(files) < there:
        logger.warning(
            "The metadata in %s lists %s images of the %s that are there; the others are not used.",
            path,
            f"{len(files):,}",
            f"{there:,}",
        )


def _parts(whole: Dataset, part_of: dict[str, str], path: Path) -> dict[str, Any]:
    """The rows of one metadata file by the split folder that their image lies in."""
    folders = set(part_of.values())

    def folder(file: str) -> str | None:
        """The split folder nearest to the top in the file's path below the data."""
        below = Path(os.path.relpath(file, path.resolve())).parts
        return next((part for part in below if part in folders), None)

    held = [folder(file) for file in _image_files(whole)]
    parts = {split: [i for i, of in enumerate(held) if of == name] for split, name in part_of.items()}
    return {split: whole.select(rows) for split, rows in parts.items()}
