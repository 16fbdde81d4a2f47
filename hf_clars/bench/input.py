"""How fast images come: the loader of this library, those of others, and the bare decoding of the same files.

Every way is a torch `DataLoader` (or makes one) with the same number of workers that live on, over the same files in a
random order; one epoch warms up, later ones are timed in turn. The limit does nothing but read and decode.
"""

from __future__ import annotations

import multiprocessing
import os
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import simplejpeg
import torch
from datasets import load_dataset
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision import datasets as tv_datasets
from torchvision.io import ImageReadMode, decode_jpeg, read_file
from torchvision.transforms import v2

from hf_clars.bench.timing import alternate
from hf_clars.data import DevicePixels, PixelSettings, PixelTransform, collate_images, trainable
from hf_clars.data.pixel_settings import IMAGENET_MEAN, IMAGENET_STD

SIZE = 224
LIMIT = "decode, Pillow"
"""The decoder of the other loaders; the table has faster ones beside it."""
OURS = "hf_clars"
_TICKS = os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 100


@dataclass(frozen=True)
class InputRow:
    """What one way did.

    Attributes:
        way: Its name.
        seconds: Of each timed epoch.
        cpu_seconds: Processor time of each, of all processes.
        images: An epoch.
        of_limit: Its speed as a part of Pillow's bare decoding, median over epochs timed in the same round.
        cpu_of_limit: The same by processor time, which other programs on the machine change less.
        note: What it does, or why it did not run.
    """

    way: str
    seconds: Sequence[float]
    cpu_seconds: Sequence[float]
    images: int
    of_limit: float | None
    cpu_of_limit: float | None
    note: str

    @property
    def speed(self) -> float | None:
        """Images a second, median."""
        return self.images / statistics.median(self.seconds) if self.seconds else None

    @property
    def cpu_milliseconds(self) -> float | None:
        """Processor time an image, median."""
        return 1000 * statistics.median(self.cpu_seconds) / self.images if any(self.cpu_seconds) else None


class Decoded(Dataset):
    """Reads and decodes files, and gives nothing: the limit."""

    def __init__(self, files: Sequence[Path], decode: Callable[[Path], object]) -> None:
        self.files = files
        self.decode = decode

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> int:
        self.decode(self.files[index])
        return 0


def decode_with_torchvision(path: Path) -> object:
    """Read and decode, all rows, at full size."""
    return decode_jpeg(read_file(str(path)), mode=ImageReadMode.RGB)


def decode_with_simplejpeg(path: Path) -> object:
    """The same with simplejpeg, which this library's random crops use."""
    return simplejpeg.decode_jpeg(path.read_bytes())


def decode_with_pillow(path: Path) -> object:
    """The same with Pillow."""
    return Image.open(BytesIO(path.read_bytes())).convert("RGB")


Make = Callable[[Path, Sequence[Path], dict[str, Any]], Iterable[Any]]


def _limit(decode: Callable[[Path], object]) -> Make:
    def make(root: Path, files: Sequence[Path], options: dict[str, Any]) -> Iterable[Any]:
        return DataLoader(Decoded(files, decode), shuffle=True, **options)

    return make


def _hf_clars(root: Path, files: Sequence[Path], options: dict[str, Any]) -> Iterable[Any]:
    split = load_dataset("parquet", data_files=str(root / "train.parquet"), split="train", cache_dir=str(root / "hf"))
    transform = PixelTransform(PixelSettings(image_size=SIZE), train=True)
    rows = trainable(split, transform, image_column="image", label_column="label", on_device=True)
    return DataLoader(rows, shuffle=True, collate_fn=collate_images, **options)


class _Finished:
    """Our loader, and what the device does after it, here on the CPU."""

    def __init__(self, loader: Iterable[Any]) -> None:
        self.loader = loader
        self.finish = DevicePixels(PixelSettings(image_size=SIZE))

    def __iter__(self) -> Any:
        for batch in self.loader:
            yield self.finish(batch["pixel_values"], batch["flip"]), batch["labels"]


def _hf_clars_finished(root: Path, files: Sequence[Path], options: dict[str, Any]) -> Iterable[Any]:
    return _Finished(_hf_clars(root, files, options))


def _image_folder(root: Path, files: Sequence[Path], options: dict[str, Any]) -> Iterable[Any]:
    transform = v2.Compose(
        [
            v2.RandomResizedCrop(SIZE, antialias=True),
            v2.RandomHorizontalFlip(),
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(IMAGENET_MEAN, IMAGENET_STD),
        ]
    )
    return DataLoader(tv_datasets.ImageFolder(str(root / "train"), transform), shuffle=True, **options)


def _timm(root: Path, files: Sequence[Path], options: dict[str, Any]) -> Iterable[Any]:
    from timm.data import create_loader, create_dataset  # noqa: I001

    no_more: dict[str, Any] = {"color_jitter": None}  # the same crops and flips as the others
    return create_loader(
        create_dataset("", root=str(root / "train")),
        input_size=(3, SIZE, SIZE),
        batch_size=options["batch_size"],
        is_training=True,
        interpolation="bilinear",
        num_workers=options["num_workers"],
        device=torch.device("cpu"),
        pin_memory=False,
        persistent_workers=options["persistent_workers"],
        **no_more,
    )


WAYS: dict[str, tuple[Make, str]] = {
    "decode, simplejpeg": (_limit(decode_with_simplejpeg), "reads and decodes whole files, nothing else"),
    "decode, torchvision": (_limit(decode_with_torchvision), "reads and decodes whole files, nothing else"),
    LIMIT: (_limit(decode_with_pillow), "reads and decodes whole files, nothing else"),
    OURS: (_hf_clars, "parquet by `datasets`; crops as uint8, the rest is the device's"),
    "hf_clars, finished on the CPU": (_hf_clars_finished, "the same, with flip and normalisation on the same cores"),
    "torchvision ImageFolder": (_image_folder, "Pillow, v2 transforms, float32"),
    "timm": (_timm, "its training loader, uint8, normalised after it on the CPU"),
}


class _Epoch:
    """One pass over a loader; keeps what each cost the processor, over all processes."""

    def __init__(self, loader: Iterable[Any]) -> None:
        self.loader = loader
        self.cpu: list[float] = []

    def __call__(self) -> None:
        before = _cpu_seconds()
        for _ in self.loader:
            pass
        self.cpu.append(_cpu_seconds() - before)


def _processes() -> list[int]:
    return [os.getpid(), *(child.pid for child in multiprocessing.active_children() if child.pid is not None)]


def _cpu_seconds() -> float:
    """Processor time of this process and its workers; 0 where the system does not tell."""
    return sum(sum(map(int, _proc(pid, "stat").rpartition(")")[2].split()[11:13])) for pid in _processes()) / _TICKS


def memory_over_an_epoch(root: Path, *, workers: int, batch: int, parts: int = 10) -> list[float]:
    """What this library's loader holds while an epoch goes on.

    Args:
        root: As for `measure`.
        workers: Processes that decode.
        batch: Images a batch.
        parts: How often to look.

    Returns:
        MiB of this process and its workers after each part of the epoch, the second of two: the first fills caches.
        Pages of mapped files are not counted.
    """
    loader = _hf_clars(root, (), _options(workers, batch))
    for _ in loader:
        pass
    held: list[float] = []
    batches = len(loader)  # type: ignore[arg-type]
    for number, _ in enumerate(loader, 1):
        if number * parts // batches > len(held):
            held.append(held_memory())
    return held


def held_memory() -> float:
    """MiB that this process and its workers hold themselves, mapped files not counted; 0 where it cannot be told."""
    lines = [line.split() for pid in _processes() for line in _proc(pid, "status").splitlines()]
    return sum(int(line[1]) for line in lines if line[0] in ("RssAnon:", "RssShmem:")) / 1024


def _options(workers: int, batch: int) -> dict[str, Any]:
    return {"num_workers": workers, "batch_size": batch, "persistent_workers": workers > 0}


def _proc(pid: int, name: str) -> str:
    file = Path(f"/proc/{pid}/{name}")
    return file.read_text() if file.exists() else ")" + " 0" * 13 if name == "stat" else ""


def measure(root: Path, files: Sequence[Path], *, workers: int, batch: int, rounds: int) -> list[InputRow]:
    """Time every way.

    Args:
        root: Holds `train/` (folders of images) and `train.parquet`, of the same files.
        files: The files.
        workers: Processes that decode.
        batch: Images a batch.
        rounds: Timed epochs of each way.

    Returns:
        One row a way, the limits first.
    """
    options = _options(workers, batch)
    epochs, notes = {}, {name: note for name, (_, note) in WAYS.items()}
    for name, (make, _) in WAYS.items():
        try:
            epochs[name] = _Epoch(make(root, files, options))
        except ImportError as error:
            notes[name] = f"not installed: {error.name}"
    seconds = alternate(epochs, rounds, label="epochs")
    rows = []
    for name in WAYS:
        if name not in epochs:
            rows.append(InputRow(name, (), (), len(files), None, None, notes[name]))
            continue
        cpu, limit_cpu = epochs[name].cpu[1:], epochs[LIMIT].cpu[1:]  # the first warmed up
        rows.append(
            InputRow(
                name,
                seconds[name],
                cpu,
                len(files),
                _median_ratio(seconds[LIMIT], seconds[name]),
                _median_ratio(limit_cpu, cpu) if all(cpu) else None,
                notes[name],
            )
        )
    return rows


def _median_ratio(limit: Sequence[float], own: Sequence[float]) -> float:
    return statistics.median(b / s for b, s in zip(limit, own, strict=True))
