"""Image folders: which folder is a split and which a class follows from where folders lie, not from words in names.

`datasets` looks for words such as "train" anywhere in a path, and leaves out what has none. A class of that name, or
one file, would then stand for the whole data set. Here the layout is found first, and `datasets` is told the files.
"""

from __future__ import annotations

import glob
import logging
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from hf_clars.errors import DataError, name_list

logger = logging.getLogger(__name__)

SPLIT_NAMES = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
"""The split that a folder of this name holds."""
LAYOUT = (
    "Expected is one folder a class (DATA/cat/1.jpg, DATA/dog/2.jpg), with folders for the splits above them if there "
    "are several (DATA/train/cat/1.jpg, DATA/val/cat/2.jpg), or a metadata.csv beside the images"
)
METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
ARCHIVES = (".zip", ".tar", ".gz", ".tgz", ".bz2", ".xz", ".7z", ".rar", ".zst")
DATA_FILES = (".parquet", ".arrow", ".tar", ".jsonl", ".json", ".csv")


@dataclass
class _Folder:
    """One folder with what lies directly in it, and the folders below."""

    path: Path
    images: int = 0
    others: Counter[str] = field(default_factory=Counter)
    metadata: list[str] = field(default_factory=list)
    below: dict[str, _Folder] = field(default_factory=dict)

    def walk(self, depth: int = 0) -> Iterator[tuple[int, _Folder]]:
        """This folder and all below, with how deep each lies."""
        yield depth, self
        for name in sorted(self.below):
            yield from self.below[name].walk(depth + 1)

    @property
    def all_images(self) -> int:
        """Images here and below."""
        return sum(folder.images for _, folder in self.walk())

    @property
    def has_metadata(self) -> bool:
        """Whether a metadata file lies here or below."""
        return any(folder.metadata for _, folder in self.walk())

    @property
    def image_folders(self) -> list[str]:
        """The names of folders below that hold images, themselves or deeper."""
        return [name for name in sorted(self.below) if self.below[name].all_images]

    def files(self, endings: Iterable[str]) -> list[str]:
        """Files of some endings, here and below, that are neither images nor metadata."""
        wanted = tuple(endings)
        return [name for _, folder in self.walk() for name in sorted(folder.others) if name.lower().endswith(wanted)]


@dataclass(frozen=True)
class FolderSplits:
    """How an image folder is to be read.

    Attributes:
        patterns: The patterns of each split's files, as `datasets` takes them.
        part_of: The folder of each split, where one metadata file above them lists the images of all; then `patterns`
            has the single entry "train" with everything.
        images: How many images lie in the folder of each split.
        labels_from_folders: Whether the classes are the folders that the images lie in.
    """

    patterns: dict[str, list[str]]
    part_of: dict[str, str] | None
    images: dict[str, int]
    labels_from_folders: bool


def find_image_folders(root: Path, named: Iterable[str | None] = ()) -> FolderSplits | None:
    """Tell splits and classes of a folder of images.

    Args:
        root: The folder.
        named: Splits that the user named: folders of these names are splits too.

    Returns:
        How to read it; None where it is no folder of images (parquet files, a data set that declares its own files).

    Raises:
        DataError: It holds images, or archives of them, in another layout; the message says what was found.
    """
    if _declares_its_files(root):
        return None
    base = _scan(root)
    if base.files((".parquet", ".arrow")) or not base.all_images:
        archives = base.files(ARCHIVES)
        if archives and not base.files(DATA_FILES):
            raise DataError(
                f"{root} holds no images, but {name_list(archives, 3)}: unpack it, and give the folder. {LAYOUT}."
            )
        return None
    _report_other_files(base)
    also = {str(name) for name in named if name}
    while not base.images and not base.metadata and len(base.image_folders) == 1:
        only = base.below[base.image_folders[0]]
        if _split_of(only.path.name, also) or not only.image_folders:
            break
        base = only  # a folder that wraps all the others
    return _splits(base, also)


def _declares_its_files(root: Path) -> bool:
    card = root / "README.md"
    return card.is_file() and "\nconfigs:" in card.read_text(encoding="utf-8", errors="replace")[:20_000]


def _scan(path: Path, above: frozenset[str] = frozenset()) -> _Folder:
    """Read a tree of folders, links followed, but for those to a folder that is above them (`above`).

    Hidden ones are passed over, as `datasets` does.
    """
    folder, images = _Folder(path), set(Image.registered_extensions())
    above |= {os.path.realpath(path)}
    with os.scandir(path) as entries:
        for entry in entries:
            if entry.name.startswith((".", "__")):
                continue
            if entry.is_dir():
                if os.path.realpath(entry.path) not in above:
                    folder.below[entry.name] = _scan(Path(entry.path), above)
            elif entry.name in METADATA:
                folder.metadata.append(entry.name)
            elif os.path.splitext(entry.name)[1].lower() in images:
                folder.images += 1
            else:
                folder.others[entry.name] += 1
    return folder


def _report_other_files(base: _Folder) -> None:
    others = [name for _, folder in base.walk() for name in folder.others]
    if others:
        kinds = Counter(os.path.splitext(name)[1].lower() or "no ending" for name in others)
        logger.warning(
            "%s holds %d files that are no images by their names (%s); they are not used.",
            base.path,
            len(others),
            ", ".join(f"{count} with {kind}" for kind, count in kinds.most_common(4)),
        )


def _split_of(name: str, also: set[str]) -> str | None:
    return name if name in also and name.lower() not in SPLIT_NAMES else SPLIT_NAMES.get(name.lower())


def _splits(base: _Folder, also: set[str]) -> FolderSplits:
    tops = base.image_folders
    split_of = {name: split for name in tops if (split := _split_of(name, also))}
    flat = [name for name in split_of if not base.below[name].image_folders and not base.below[name].has_metadata]
    if base.metadata:
        return _below_one_metadata_file(base, split_of)
    if len(flat) == len(split_of) < len(tops) or not split_of:  # a class may be called train
        return _one_split(base)
    if base.images or flat or len(split_of) < len(tops):
        _check_beside_splits(base, split_of, flat)
    folders: dict[str, str] = {}
    for name, split in split_of.items():
        if split in folders:
            raise DataError(f"{base.path} holds {folders[split]} and {name}, both {split} splits: keep one of them.")
        folders[split] = name
    kinds = {name: base.below[name].has_metadata for name in split_of}
    if len(set(kinds.values())) > 1:
        with_file = [name for name, has in kinds.items() if has]
        raise DataError(
            f"Of the splits in {base.path} only {name_list(with_file)} has a metadata file: give each one. {LAYOUT}."
        )
    for name in split_of:
        _check_classes(base.below[name])
    ordered = sorted(folders, key=lambda split: (split != "train", split))
    return FolderSplits(
        {split: _patterns(base.below[folders[split]]) for split in ordered},
        None,
        {split: base.below[folders[split]].all_images for split in ordered},
        labels_from_folders=not any(kinds.values()),
    )


def _one_split(base: _Folder) -> FolderSplits:
    _check_classes(base)
    images = {"train": base.all_images}
    return FolderSplits({"train": _patterns(base)}, None, images, labels_from_folders=not base.has_metadata)


def _below_one_metadata_file(base: _Folder, split_of: dict[str, str]) -> FolderSplits:
    """One metadata file lists the images of all splits, if there are such folders."""
    _check_archives(base)
    whole = split_of and not base.images and len(split_of) == len(base.image_folders)
    part_of = {split: name for name, split in split_of.items()} if whole else None
    images = {"train": base.all_images}
    return FolderSplits({"train": _patterns(base)}, part_of, images, labels_from_folders=False)


def _check_beside_splits(base: _Folder, split_of: dict[str, str], flat: list[str]) -> None:
    """Refuse what cannot be told to be splits; name folders that are left out."""
    beside = [name for name in base.image_folders if name not in split_of]
    if flat:
        name = flat[0]
        raise DataError(
            f"{base.below[name].path} holds {base.below[name].images:,} images and no folders of classes, so that they "
            f"have no labels. {LAYOUT}."
        )
    if base.images or "train" not in split_of.values() or len(split_of) < 2:
        found = f"{base.images:,} images" if base.images else f"the folders {name_list(beside)}"
        raise DataError(
            f"{base.path} holds {name_list(list(split_of))}, which look like splits, and beside them {found}. Name a "
            "split of another name with --train_split or --eval_split; if all of them are classes, their images must "
            f"lie directly in them. {LAYOUT}."
        )
    logger.warning(
        "%s holds the splits %s; the images in %s beside them are not used.",
        base.path,
        name_list(list(split_of)),
        name_list(beside),
    )


def _check_archives(split: _Folder) -> None:
    """`datasets` would read a zip in the place of a class: an archive kept beside its own images would count twice."""
    if archives := split.files((".zip",)):
        raise DataError(
            f"{split.path} holds {name_list(archives, 3)} beside images: unpack it into the layout, or move it away. "
            f"{LAYOUT}."
        )


def _check_classes(split: _Folder) -> None:
    """Refuse images that lie at several depths, or in no folder; say so where classes lie deeper than one folder."""
    _check_archives(split)
    if split.has_metadata:
        return
    held = [(depth, folder) for depth, folder in split.walk() if folder.images]
    depths = sorted({depth for depth, _ in held})
    if depths[0] == 0:
        more = f" and the folders {name_list(split.image_folders)}" if len(held) > 1 else ""
        raise DataError(
            f"{split.path} holds {split.images:,} images directly{more}, so that they have no labels. {LAYOUT}."
        )
    if len(depths) > 1:
        shallow, deep = (next(folder.path for at, folder in held if at == depth) for depth in (depths[0], depths[-1]))
        raise DataError(
            f"Images lie at several depths in {split.path}: in {shallow.relative_to(split.path)} and in "
            f"{deep.relative_to(split.path)}, so that it is not clear which folders are the classes. {LAYOUT}."
        )
    if depths[0] > 1:
        names = Counter(folder.path.name for _, folder in held)
        merged = [name for name, count in names.items() if count > 1]
        logger.warning(
            "Images lie %d folders below %s, for example in %s. The innermost folders are taken as the classes.%s",
            depths[0],
            split.path,
            held[0][1].path.relative_to(split.path),
            f" Folders of one name are one class: {name_list(merged)}." if merged else "",
        )


def _patterns(folder: _Folder) -> list[str]:
    """One of all that is below, and one for each link to a folder, which `datasets` would not follow."""
    links = [inner.path for depth, inner in folder.walk() if depth and inner.path.is_symlink()]
    return [_pattern(path) for path in (folder.path, *links)]


def _pattern(path: Path) -> str:
    return os.path.join(glob.escape(os.path.abspath(path)), "**")  # a link keeps its name: it may be that of a class
