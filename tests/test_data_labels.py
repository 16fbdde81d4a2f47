"""A label means the same class in training, in evaluation and in the checkpoint, whatever number a split gave it."""

import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Value

from hf_clars.data import PixelSettings, PixelTransform, collate_images, load_image_data, trainable
from hf_clars.errors import DataError
from tests.image_files import picture

TRAIN = ["cat", "dog", "eel"]
IMAGES = [picture(i, (8, 8)) for i in range(6)]


def split(kind, values, column="label", image="image"):
    features = Features({image: Image(), column: kind})
    return Dataset.from_dict({image: IMAGES[: len(values)], column: values}, features=features)


def stored(folder, train, test):
    DatasetDict({"train": train, "test": test}).save_to_disk(str(folder))
    return str(folder)


def names_seen(data):
    """The name of every evaluation label, read as a trainer reads them."""
    rows = trainable(
        data.eval,
        PixelTransform(PixelSettings(image_size=8, augment="none"), train=False),
        image_column=data.image_column,
        label_column=data.label_column,
        classes=len(data.label_names),
    )
    return [data.label_names[int(row["labels"])] for row in rows]


NAMED = split(ClassLabel(names=TRAIN), [0, 1, 2, 0, 1, 2])
STRINGS = split(Value("string"), ["cat", "dog", "eel", "cat", "dog", "eel"])
NUMBERS = split(Value("int64"), [0, 1, 2, 0, 1, 2])
DIGITS = split(ClassLabel(names=["0", "1", "2"]), [0, 1, 2, 0, 1, 2])

ALIGNED = {
    "another order": (NAMED, split(ClassLabel(names=["eel", "cat", "dog"]), [0, 1, 2]), ["eel", "cat", "dog"]),
    "fewer": (NAMED, split(ClassLabel(names=["dog", "eel"]), [1, 0, 0]), ["eel", "dog", "dog"]),
    "more, unused": (NAMED, split(ClassLabel(names=["ant", "eel", "dog", "cat"]), [3, 1]), ["cat", "eel"]),
    "strings against names": (NAMED, split(Value("string"), ["eel", "cat"]), ["eel", "cat"]),
    "large strings": (NAMED, split(Value("large_string"), ["eel", "cat"]), ["eel", "cat"]),
    "names against strings": (STRINGS, split(ClassLabel(names=["eel", "cat"]), [0, 1, 1]), ["eel", "cat", "cat"]),
    "strings against strings": (STRINGS, split(Value("string"), ["eel", "dog"]), ["eel", "dog"]),
    "names that are digits against numbers": (DIGITS, split(Value("int32"), [2, 0]), ["2", "0"]),
    "numbers against digits in another order": (NUMBERS, split(ClassLabel(names=["2", "0"]), [0, 1]), ["2", "0"]),
    "numbers against strings of digits": (NUMBERS, split(Value("string"), ["2", "0"]), ["2", "0"]),
    "numbers that only fit as names": (
        split(Value("string"), ["10", "20", "30"]),
        split(Value("int64"), [30, 10]),
        ["30", "10"],
    ),
    "numbers against numbers": (NUMBERS, split(Value("int32"), [2, 0]), ["2", "0"]),
    "truth values": (split(Value("bool"), [True, False]), split(Value("bool"), [False, True]), ["False", "True"]),
    "truth values against words": (
        split(Value("bool"), [True, False]),
        split(ClassLabel(names=["True", "False"]), [0, 1]),
        ["True", "False"],
    ),
}


@pytest.mark.parametrize("case", ALIGNED)
def test_evaluation_labels_are_aligned_by_name(tmp_path, case):
    train, test, expected = ALIGNED[case]
    data = load_image_data(stored(tmp_path / "d", train, test))
    assert names_seen(data) == expected


REFUSED = {
    "a name unknown in training": (
        NAMED,
        split(ClassLabel(names=["cat", "ant"]), [0, 1]),
        r"cat, ant.*cat, dog, eel",
    ),
    "a string unknown in training": (NAMED, split(Value("string"), ["cat", "ant"]), r"ant, cat.*cat, dog, eel"),
    "bare numbers against names": (NAMED, split(Value("int64"), [0, 1]), r"0, 1.*cat, dog, eel"),
    "names against bare numbers": (NUMBERS, split(ClassLabel(names=TRAIN), [0, 1]), r"cat, dog, eel.*0, 1, 2"),
    "numbers that are names and places": (
        split(ClassLabel(names=["2", "1", "0"]), [0, 1, 2]),
        split(Value("int64"), [0, 2]),
        r"0, 2.*2, 1, 0",
    ),
    "a truth value against a number": (split(Value("bool"), [True, False]), NUMBERS, r"0, 1, 2.*False, True"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_labels_that_cannot_be_aligned_are_refused_with_both_lists(tmp_path, case):
    train, test, lists = REFUSED[case]
    with pytest.raises(DataError, match=f"'test'.*cannot be aligned.*{lists}"):
        load_image_data(stored(tmp_path / "d", train, test))


@pytest.mark.parametrize("column", ["labels", "target"])
def test_columns_may_have_other_names_in_evaluation(tmp_path, column):
    test = split(ClassLabel(names=["eel", "cat", "dog"]), [0, 1, 2], column, image="img")
    data = load_image_data(stored(tmp_path / "d", NAMED, test))
    assert names_seen(data) == ["eel", "cat", "dog"]


def test_a_column_named_by_the_user_may_be_absent_from_evaluation(tmp_path):
    train = NAMED.rename_column("label", "kind")
    data = load_image_data(stored(tmp_path / "d", train, STRINGS), label_column="kind")
    assert names_seen(data) == [*TRAIN, *TRAIN]


def test_a_training_row_without_label_is_refused_and_makes_no_class_called_none(tmp_path):
    with pytest.raises(DataError, match="have no label"):
        load_image_data(stored(tmp_path / "d", split(Value("string"), ["cat", None, "dog"]), STRINGS))
    with pytest.raises(DataError, match="have no label"):
        load_image_data(stored(tmp_path / "e", split(Value("int64"), [0, None, 1]), NUMBERS))


@pytest.mark.parametrize("nothing", [-1, None])
def test_an_evaluation_row_without_label_is_refused_also_where_names_differ(tmp_path, nothing):
    test = split(ClassLabel(names=["eel", "cat", "dog"]), [0, nothing, 2])
    with pytest.raises(DataError, match="some have no labels"):
        load_image_data(stored(tmp_path / "d", NAMED, test))


def test_other_columns_and_images_are_as_they_were(tmp_path):
    test = split(ClassLabel(names=["eel", "cat", "dog"]), [0, 1, 2]).add_column("number", [7, 8, 9])
    data = load_image_data(stored(tmp_path / "d", NAMED, test))
    assert data.eval["number"] == [7, 8, 9]
    assert [row.tobytes() for row in data.eval["image"]] == [image.tobytes() for image in IMAGES[:3]]


def test_one_class_alone_is_refused(tmp_path):
    one = split(Value("string"), ["cat", "cat"])
    with pytest.raises(DataError, match="one class only"):
        load_image_data(stored(tmp_path / "d", one, one))


def test_the_images_of_each_class_are_counted(tmp_path):
    data = load_image_data(stored(tmp_path / "d", split(Value("string"), ["cat", "dog", "cat"]), STRINGS.select([0])))
    assert data.class_counts == [2, 1]


# ---- streams ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["another order", "fewer", "more, unused", "strings against names"])
def test_streams_are_aligned_as_they_are_read(tmp_path, case):
    train, test, expected = ALIGNED[case]
    data = load_image_data(stored(tmp_path / "d", train, test), streaming=True)
    assert names_seen(data) == expected


def test_a_stream_stops_at_a_name_that_training_has_not(tmp_path):
    data = load_image_data(stored(tmp_path / "d", NAMED, split(Value("string"), ["cat", "ant"])), streaming=True)
    with pytest.raises(DataError, match="'ant' is not among them"):
        names_seen(data)


def test_a_stream_of_bare_numbers_against_names_is_refused_at_once(tmp_path):
    with pytest.raises(DataError, match=r"cannot be aligned.*cat, dog, eel"):
        load_image_data(stored(tmp_path / "d", NAMED, NUMBERS), streaming=True)


def test_aligning_a_stream_leaves_damaged_images_to_the_decoder(tmp_path):
    features = Features({"image": Image(), "label": ClassLabel(names=["eel", "cat", "dog"])})
    rows = {"image": [{"bytes": b"no image", "path": None}], "label": [0]}
    data = load_image_data(stored(tmp_path / "d", NAMED, Dataset.from_dict(rows, features=features)), streaming=True)
    with pytest.raises(DataError, match="Image 0 of the evaluation split cannot be decoded"):
        names_seen(data)


# ---- another order for the whole data --------------------------------------------------------------------------------


@pytest.mark.parametrize("streaming", [False, True])
def test_data_can_take_the_order_of_a_checkpoint(tmp_path, streaming):
    data = load_image_data(stored(tmp_path / "d", NAMED, STRINGS), streaming=streaming)
    turned = data.with_classes(["eel", "cat", "dog"])
    assert turned.label_names == ["eel", "cat", "dog"]
    assert names_seen(turned) == names_seen(data) == [*TRAIN, *TRAIN]
    rows = trainable(
        turned.train,
        PixelTransform(PixelSettings(image_size=8, augment="none"), train=False),
        image_column="image",
        label_column="label",
    )
    labels = collate_images([row for row, _ in zip(rows, range(6), strict=False)])["labels"]
    assert torch.equal(labels, torch.tensor([1, 2, 0, 1, 2, 0]))
