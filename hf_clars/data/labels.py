"""Labels as class numbers that mean the same in every split: they are aligned by the names of the classes."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

from datasets import ClassLabel, Dataset, Features, Image, IterableDataset, Value

from hf_clars.errors import DataError, name_list

logger = logging.getLogger(__name__)

_INTEGERS = ("int", "uint")
_CLASS_TYPES = (*_INTEGERS, "string", "large_string", "bool")


def split_features(split: Dataset | IterableDataset, dataset: str) -> dict[str, Any]:
    """The columns of a split and their types.

    Args:
        split: Map-style or streaming.
        dataset: What messages call the data.

    Returns:
        `datasets` features by column.

    Raises:
        DataError: A stream does not tell.
    """
    features = split.features if split.features is not None else split.resolve_features().features
    if features is None:
        raise DataError(f"The columns of {dataset} cannot be told from the stream: use it without --streaming.")
    return dict(features)


def number_classes(train: Any, column: str, dataset: str) -> tuple[Any, list[str]]:
    """Give the classes of a training split their numbers.

    Args:
        train: The split. Its labels are a `ClassLabel`, integers from 0, strings or booleans.
        column: Of the labels.
        dataset: What messages call the data.

    Returns:
        (the split with class numbers as labels, one name a class). Integers are their own names.

    Raises:
        DataError: The column holds no classes, a row has no label, or a stream does not name its classes.
    """
    feature = split_features(train, dataset)[column]
    if isinstance(feature, ClassLabel):
        return train, list(feature.names)
    _check_kind(feature, column, dataset)
    if not isinstance(train, Dataset):
        raise DataError(
            f"Column {column!r} of the stream {dataset} does not name its classes, and counting them would take a "
            "whole pass: use it without --streaming, or give the column a ClassLabel feature."
        )
    values = _labels_in(train, column)
    if None in values:
        raise DataError(
            f"Some rows of the training split of {dataset} have no label in column {column!r}: remove those rows, or "
            "choose --label_column."
        )
    if feature.dtype.startswith(_INTEGERS):
        if min(values) < 0:
            raise DataError(f"Column {column!r} of {dataset} has the label {min(values)}: classes count from 0.")
        return train, [str(i) for i in range(max(values) + 1)]
    names = sorted(map(str, values))
    return align_labels(train, column, names, which="training split", dataset=dataset), names


def align_labels(
    split: Any, column: str, names: Sequence[str], *, which: str, dataset: str, stored: Sequence[str] | None = None
) -> Any:
    """Make the labels of a split numbers into `names`, by the names that they have in the split.

    Args:
        split: Map-style or streaming.
        column: Of its labels.
        names: One a class, in the order that the numbers shall have.
        which: What messages call the split.
        dataset: What messages call the data.
        stored: Names of the numbers that the column holds. Default: those of its `ClassLabel`, if it is one.

    Returns:
        The split; the same object where the labels are right already. A stream is translated as it is read.

    Raises:
        DataError: A label has no name among `names`; for a stream, when that row is read.
    """
    feature = split_features(split, dataset)[column]
    if isinstance(feature, ClassLabel):
        stored = list(feature.names) if stored is None else stored
    else:
        _check_kind(feature, column, dataset)
    words = None if stored is None else list(stored)
    if words == list(names):
        return split
    numbers = words is None and feature.dtype.startswith(_INTEGERS)
    if numbers and list(names) == [str(i) for i in range(len(names))]:
        return split
    found = _labels_in(split, column) if isinstance(split, Dataset) else None
    if numbers and not _numbers_are_names(found, names):
        raise _unaligned(
            which, dataset, None if found is None else _in_order(found), names, "whose numbers may count otherwise"
        )
    place = _translation(words, names, which, dataset, found)
    return _translated(split, column, ClassLabel(names=list(names)), place, found)


def class_counts(split: Any, column: str, classes: int) -> list[int] | None:
    """How many images of each class a split has.

    Args:
        split: Its labels are class numbers.
        column: Of the labels.
        classes: How many there are.

    Returns:
        One count a class; None for a stream.
    """
    if not isinstance(split, Dataset):
        return None
    counted = {entry["values"]: entry["counts"] for entry in _label_table(split, column).value_counts().to_pylist()}
    return [int(counted.get(number, 0)) for number in range(classes)]


def check_labels(split: Dataset, column: str, names: Sequence[str], which: str, *, report_empty: bool) -> None:
    """Refuse labels that are no class; streams are checked as they run.

    Args:
        split: Its labels are class numbers.
        column: Of the labels.
        names: One a class.
        which: What messages call the split.
        report_empty: Whether to warn of classes without an image.

    Raises:
        DataError: A label is no class.
    """
    found = _labels_in(split, column)
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


def _check_kind(feature: Any, column: str, dataset: str) -> None:
    if not (isinstance(feature, Value) and feature.dtype.startswith(_CLASS_TYPES)):
        raise DataError(f"Column {column!r} of {dataset} holds {feature}, not one class a row: choose --label_column.")


def _label_table(split: Dataset, column: str) -> Any:
    """The labels as an Arrow column, no other column read."""
    return split.select_columns([column]).with_format("arrow")[:][column]


def _labels_in(split: Dataset, column: str) -> set[Any]:
    return set(_label_table(split, column).unique().to_pylist())


def _in_order(values: set[Any]) -> list[Any]:
    return sorted(values, key=lambda value: (value is not None, value if value is not None else 0))


def _numbers_are_names(found: set[Any] | None, names: Sequence[str]) -> bool:
    """Whether bare integers can be read as names of classes in one way only.

    They could also be places in the list of names. Where both readings are possible and differ, nobody can tell.
    """
    if found is None or any(value is None or str(value) not in names for value in found):
        return False
    as_places = all(0 <= value < len(names) for value in found)
    return not as_places or all(names[value] == str(value) for value in found)


def _translation(
    words: list[str] | None, names: Sequence[str], which: str, dataset: str, found: set[Any] | None
) -> Callable[[Any], int | None]:
    """From a label of the split to its number; a label that is none at all (None, -1) stays what it is."""
    number = {name: i for i, name in enumerate(names)}
    theirs = words if words is not None else None if found is None else list(map(str, _in_order(found)))

    def place(label: Any) -> int | None:
        if label is None:
            return None
        if words is not None and not 0 <= label < len(words):
            return int(label) if label < 0 else len(names)
        name = words[label] if words is not None else str(label)
        if name not in number:
            raise _unaligned(which, dataset, theirs, names, f"and {name!r} is not among them")
        return number[name]

    return place


def _unaligned(which: str, dataset: str, theirs: Sequence[Any] | None, names: Sequence[str], why: str) -> DataError:
    has = "labels without a list of names" if theirs is None else f"the classes {name_list(theirs)}"
    return DataError(
        f"The labels of the {which} of {dataset} cannot be aligned with the model's classes: it has {has}; the "
        f"classes to align with are {name_list(names)}, {why}. Give both the same class names (a ClassLabel feature), "
        "or choose another split."
    )


def _translated(split: Any, column: str, feature: ClassLabel, place: Callable[[Any], Any], found: Any) -> Any:
    if isinstance(split, Dataset):
        # A new column beside the others: `map` and `cast` would write every image anew.
        numbers = {label: place(label) for label in found}
        labels = [numbers[label] for label in _label_table(split, column).to_pylist()]
        return split.remove_columns(column).add_column(column, labels, feature=feature)
    features = split_features(split, "the stream")
    images = [name for name, kind in features.items() if isinstance(kind, Image)]
    for name in images:  # so that they pass through undecoded
        split = split.cast_column(name, Image(decode=False))
    undecoded = split_features(split, "the stream")
    undecoded[column] = feature
    split = split.map(lambda label: {column: place(label)}, input_columns=[column], features=Features(undecoded))
    for name in images:
        split = split.cast_column(name, features[name])
    return split
