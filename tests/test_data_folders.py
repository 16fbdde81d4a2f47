"""An image folder has one class a folder, whatever folders and files are called, and no image is lost in silence."""

import csv
import json
import shutil
from collections import Counter

import pytest

from hf_clars.data import load_image_data
from hf_clars.data.folders import find_image_folders
from hf_clars.errors import DataError
from tests.image_files import dataset_dict, picture

PICTURE = picture(0, (8, 8))


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    monkeypatch.setattr("datasets.config.HF_DATASETS_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def put(root, *files):
    for file in files:
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        PICTURE.save(root / file)
    return root


def classes(split, names):
    return dict(Counter(names[label] for label in split["label"]))


def loaded(root, **options):
    data = load_image_data(str(root), **options)
    evaluation = None if data.eval is None else classes(data.eval, data.label_names)
    return classes(data.train, data.label_names), evaluation


@pytest.mark.parametrize(
    "name", ["train", "test", "val", "bullet_train", "validation", "eval", "a [b] *", "class.train", "dev-set", "été"]
)
def test_a_class_may_have_any_name(tmp_path, name):
    root = put(tmp_path / "d", f"{name}/1.png", f"{name}/2.png", "bus/1.png", "car/1.png")
    assert loaded(root) == ({name: 2, "bus": 1, "car": 1}, None)


@pytest.mark.parametrize("name", ["train", "test", "bullet_train"])
def test_a_class_below_splits_may_have_any_name(tmp_path, name):
    root = put(tmp_path / "d", f"train/{name}/1.png", "train/bus/1.png", f"val/{name}/1.png", "val/bus/1.png")
    assert loaded(root) == ({name: 1, "bus": 1}, {name: 1, "bus": 1})


@pytest.mark.parametrize("file", ["1_train.png", "train-00000.png", "test.png", "x.validation.png", "[1].png"])
def test_a_file_may_have_any_name(tmp_path, file):
    root = put(tmp_path / "d", f"bus/{file}", "bus/2.png", "car/1.png")
    assert loaded(root) == ({"bus": 2, "car": 1}, None)
    root = put(tmp_path / "e", f"training/bus/{file}", "training/car/1.PNG", f"valid/bus/{file}", "valid/car/2.png")
    assert loaded(root) == ({"bus": 1, "car": 1}, {"bus": 1, "car": 1})


def test_classes_splits_and_images_may_be_links(tmp_path):
    """A choice of classes is often made of links, whose own names are the classes'; no image is lost."""
    real = put(tmp_path / "real", "train/n01/1.png", "train/n01/2.png", "train/car/1.png", "x/1.png")
    some = put(tmp_path / "some", "car/1.png")
    (some / "bus").symlink_to(real / "train" / "n01")
    (some / "car" / "2.png").symlink_to(real / "x" / "1.png")
    assert loaded(some) == ({"bus": 2, "car": 2}, None)
    both = tmp_path / "both"
    both.mkdir()
    (both / "train").symlink_to(some)
    (both / "val").mkdir()
    (both / "val" / "bus").symlink_to(real / "train" / "n01")
    (both / "val" / "car").symlink_to(real / "train" / "car")
    (both / "val" / "again").symlink_to(both)  # a circle
    assert loaded(both) == ({"bus": 2, "car": 2}, {"bus": 2, "car": 1})


def test_the_folder_itself_may_have_any_name(tmp_path):
    root = put(tmp_path / "my_test [set]", "bus/1.png", "car/1.png")
    assert loaded(root) == ({"bus": 1, "car": 1}, None)


@pytest.mark.parametrize("streaming", [False, True])
def test_streams_of_folders_have_the_same_classes(tmp_path, streaming):
    root = put(tmp_path / "d", "train/train/1.png", "train/bus/2_test.png", "test/bus/1.png", "test/train/1_train.png")
    data = load_image_data(str(root), streaming=streaming)
    assert data.label_names == ["bus", "train"]
    assert [row["label"] for row in data.train] == [0, 1]
    assert sorted(row["label"] for row in data.eval) == [0, 1]


def test_splits_may_lie_in_a_folder_of_their_own_and_be_named_by_their_folder(tmp_path):
    root = put(tmp_path / "d", "flowers/train/a/1.png", "flowers/train/b/1.png", "flowers/val/a/1.png")
    assert loaded(root) == ({"a": 1, "b": 1}, {"a": 1})
    assert loaded(root / "flowers", eval_split="val") == ({"a": 1, "b": 1}, {"a": 1})


def test_splits_of_other_names_are_found_when_the_user_names_them(tmp_path):
    root = put(tmp_path / "d", "day/a/1.png", "day/b/1.png", "night/b/1.png", "night/a/1.png")
    assert loaded(root, train_split="day", eval_split="night") == ({"a": 1, "b": 1}, {"a": 1, "b": 1})


def test_classes_deeper_than_one_folder_are_the_innermost_and_are_named(tmp_path, caplog):
    root = put(tmp_path / "d", "animals/cat/1.png", "animals/misc/1.png", "plants/rose/1.png", "plants/misc/1.png")
    assert loaded(root) == ({"cat": 1, "misc": 2, "rose": 1}, None)
    assert "animals/cat" in caplog.text
    assert "one class: misc" in caplog.text


# ---- what is refused -------------------------------------------------------------------------------------------------


def refused(root, match, **options):
    with pytest.raises(DataError, match=f"(?s){match}.*one folder a class"):
        load_image_data(str(root), **options)


def test_a_flat_split_is_refused_with_what_was_found(tmp_path):
    refused(
        put(tmp_path / "d", "train/a/1.png", "train/b/1.png", "val/1.png", "val/2.png"), "val holds 2 images and no"
    )
    refused(put(tmp_path / "e", "train/a.1.png", "test/2.png"), "holds 1 images and no folders")
    refused(put(tmp_path / "f", "1.png", "2.png"), "holds 2 images directly")


def test_one_class_alone_is_refused_with_its_name(tmp_path):
    refused(put(tmp_path / "d", "bus/1.png", "bus/2.png"), "one class only.*'bus'")
    refused(put(tmp_path / "e", "train/bus/1.png", "val/bus/2.png"), "one class only.*'bus'")


def test_images_at_several_depths_are_refused(tmp_path):
    refused(put(tmp_path / "d", "cat/1.png", "cat/kitten/1.png", "dog/1.png"), "several depths.*in cat .*cat/kitten")
    refused(put(tmp_path / "e", "1.png", "cat/1.png", "dog/1.png"), "1 images directly and the folders cat, dog")


def test_folders_that_are_half_splits_are_refused(tmp_path):
    refused(put(tmp_path / "d", "train/ice/1.png", "train/tgv/1.png", "bus/x/1.png"), "beside them the folders bus")
    with pytest.raises(DataError, match="both validation splits"):
        load_image_data(str(put(tmp_path / "e", "train/a/1.png", "val/a/1.png", "valid/b/1.png")))


def test_folders_beside_splits_are_named(tmp_path, caplog):
    root = put(tmp_path / "d", "train/a/1.png", "train/b/1.png", "val/a/1.png", "unlabelled/x.png")
    assert loaded(root) == ({"a": 1, "b": 1}, {"a": 1})
    assert "images in unlabelled beside them are not used" in caplog.text


def test_archives_are_refused_and_named(tmp_path):
    put(tmp_path / "x", "bus/1.png", "car/1.png")
    archive = shutil.make_archive(str(tmp_path / "photos"), "zip", tmp_path / "x")
    refused(archive, r"photos.zip is an archive: unpack it")
    (tmp_path / "d").mkdir()
    shutil.copy(archive, tmp_path / "d")
    refused(tmp_path / "d", r"no images, but photos.zip: unpack it")
    shutil.copy(archive, tmp_path / "x" / "photos.zip")
    refused(tmp_path / "x", r"photos.zip beside images")


def test_files_that_are_no_images_are_counted(tmp_path, caplog):
    root = put(tmp_path / "d", "bus/1.png", "car/1.png")
    (root / "car" / "2.heif9").write_bytes(b"x")
    (root / "notes.txt").write_text("x")
    assert loaded(root) == ({"bus": 1, "car": 1}, None)
    assert "2 files that are no images" in caplog.text
    assert "1 with .heif9" in caplog.text


def test_the_cause_of_a_failure_is_told(tmp_path):
    root = tmp_path / "d"
    root.mkdir()
    (root / "train-00000-of-00001.parquet").write_bytes(b"PAR1 this is no parquet file PAR1")
    refused(root, r"(Parquet|footer|magic)")
    (tmp_path / "file.parquet").write_bytes(b"nothing")
    refused(tmp_path / "file.parquet", r"(Parquet|footer|magic|small)")


def test_a_parquet_file_that_no_split_takes_is_refused(tmp_path):
    root = tmp_path / "d"
    root.mkdir()
    for name in ("part1.parquet", "part2_train.parquet"):
        dataset_dict(splits=("train",))["train"].to_parquet(str(root / name))
    with pytest.raises(DataError, match=r"2 parquet files, of which part1.parquet would belong to no split"):
        load_image_data(str(root))


def test_folders_that_declare_their_own_files_are_left_to_datasets(tmp_path):
    root = put(tmp_path / "d", "bus/1.png")
    (root / "README.md").write_text("---\nconfigs:\n- config_name: default\n---\n")
    assert find_image_folders(root) is None


# ---- metadata files --------------------------------------------------------------------------------------------------


def metadata(folder, rows, kind):
    folder.mkdir(parents=True, exist_ok=True)
    if kind == "csv":
        with (folder / "metadata.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerows([("file_name", "label"), *rows])
    else:
        lines = [json.dumps({"file_name": name, "label": label}) for name, label in rows]
        (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    put(folder, *(name for name, _ in rows))


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_metadata_files_give_the_labels_of_each_split(tmp_path, kind):
    root = tmp_path / "d"
    metadata(root / "train", [("1_test.png", "dog"), ("2.png", "cat"), ("3.png", "cat")], kind)
    metadata(root / "val", [("1_train.png", "dog")], kind)
    assert loaded(root) == ({"cat": 2, "dog": 1}, {"dog": 1})


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_one_metadata_file_without_splits_is_the_training_split(tmp_path, kind):
    root = tmp_path / "d"
    metadata(root, [("1_test.png", "dog"), ("images/2_train.png", "cat"), ("3.png", "cat")], kind)
    assert loaded(root) == ({"cat": 2, "dog": 1}, None)


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_one_metadata_file_above_the_splits_keeps_them_apart(tmp_path, kind):
    root = tmp_path / "d"
    metadata(root, [("train/1.png", "dog"), ("test/2.png", "cat"), ("train/3.png", "cat")], kind)
    assert loaded(root) == ({"cat": 1, "dog": 1}, {"cat": 1})
    with pytest.raises(DataError, match="give each of these folders its own"):
        load_image_data(str(root), streaming=True)


def test_images_that_the_metadata_leaves_out_are_counted(tmp_path, caplog):
    metadata(tmp_path / "d", [("1.png", "dog"), ("2.png", "cat")], "csv")
    put(tmp_path / "d", "3.png")
    assert loaded(tmp_path / "d") == ({"cat": 1, "dog": 1}, None)
    assert "lists 2 images of the 3" in caplog.text


def test_a_metadata_file_in_one_split_only_is_refused(tmp_path):
    metadata(tmp_path / "d" / "train", [("1.png", "dog"), ("2.png", "cat")], "csv")
    put(tmp_path / "d", "val/cat/1.png")
    with pytest.raises(DataError, match="only train has a metadata file"):
        load_image_data(str(tmp_path / "d"))


def test_a_missing_image_of_the_metadata_is_told(tmp_path):
    metadata(tmp_path / "d", [("1.png", "dog"), ("2.png", "cat")], "csv")
    (tmp_path / "d" / "2.png").unlink()
    with pytest.raises(DataError, match=r"2\.png"):
        load_image_data(str(tmp_path / "d"))
