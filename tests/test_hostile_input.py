"""Promise: no content of a file, whoever made it, does more than raise an error of this library, in bounded memory.

`python -m tests.test_hostile_input 100000` tries so many cases of each kind and prints time and peak memory.
"""

import io
import json
import logging
import random
import resource
import struct
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image as PILImage
from safetensors.numpy import save_file

from hf_clars.data import PixelSettings, PixelTransform
from hf_clars.data.decoding import BadImageError, ImageDecoder
from hf_clars.data.samples import Samples
from hf_clars.errors import HfClarsError
from hf_clars.image_classification.arguments import DataArguments, ModelArguments, OutputArguments
from hf_clars.records import (
    QUANTITIES,
    LayerRateLog,
    RecordError,
    checkpoints,
    load_optimizer_state,
    save_optimizer_state,
)
from hf_clars.records.differences import described_file, tensor_differences
from hf_clars.trainer.config import parse_config
from tests.image_files import picture
from tests.trainer_kit import Plain

CASES_IN_CI = 300
MEMORY = 2**30  # bytes that all of it may take beyond what the imports do


def mutated(chance: random.Random, content: bytes) -> bytes:
    """One to four small accidents or tricks: bits, cuts, repeats, swaps, large numbers."""
    data = bytearray(content)
    for _ in range(chance.randint(1, 4)):
        at = chance.randrange(len(data) + 1)
        kind = chance.randrange(7)
        if kind == 0 and data:
            data[at % len(data)] ^= 1 << chance.randrange(8)
        elif kind == 1:
            del data[at:]
        elif kind == 2:
            data[at:at] = data[at : at + chance.randrange(64)]
        elif kind == 3:
            data[at : at + chance.randrange(16)] = chance.randbytes(chance.randrange(16))
        elif kind == 4:
            number = chance.choice([0, 1, 2**31 - 1, 2**32, 2**40, 2**63, 2**64 - 1])
            data[at : at + 8] = struct.pack("<Q", number)
        elif kind == 5:
            data[at:at] = str(chance.choice([-1, 0, 2**31, 2**62, 1e308])).encode()
        else:
            del data[at : at + chance.randrange(32)]
    return bytes(data)


def hostile_header(chance: random.Random) -> bytes:
    """A safetensors file whose header lies: lengths, offsets, names, types, nesting."""
    size = chance.choice([0, 4, 8, 64])
    number = [-1, 0, 1, size, size + 1, 2**31, 2**40, 2**62, 2**64, "4", None, 1.5]
    name = ["a", "steps", "rate", "__metadata__", "../../x", "/etc/passwd", "a\0b", "x" * 1000, ""]

    def tensor():
        return {
            "dtype": chance.choice(["F32", "I64", "F8", "U8", "BOOL", "??", None]),
            "shape": [chance.choice(number) for _ in range(chance.randrange(4))],
            "data_offsets": [chance.choice(number) for _ in range(chance.choice([0, 1, 2, 2, 2, 3]))],
        }

    entries = [f"{json.dumps(chance.choice(name))}: {json.dumps(tensor())}" for _ in range(chance.randrange(5))]
    if chance.random() < 0.5:
        values = ["hf_clars.layer_rates", "1", "[" * 1000, '["a"]', "{}", "9" * 400, '["../../x", "/etc"]']
        metadata = {key: chance.choice(values) for key in ("format", "version", "layers", "settings", "tree")}
        entries.append(f'"__metadata__": {json.dumps(metadata)}')
    text = ("{" + ", ".join(entries) + "}").encode()  # duplicate names too, which no JSON library would write
    if chance.random() < 0.2:
        text = b"[" * chance.choice([10, 10_000]) + text
    length = chance.choice([len(text)] * 6 + [0, len(text) + 1, 2**32, 2**63, 2**64 - 1])
    return struct.pack("<Q", length) + text + bytes(size)


class Cases:
    """One function a kind of input, each taking one case; all files are made once and mutated."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.file = folder / "case"
        log = LayerRateLog.create(folder / "log", layers=["conv", "fc"])
        for step in range(1, 5):
            log.append(step, torch.rand(5, 2))
        log.close()
        self.log = (folder / "log" / "layer_rates.safetensors").read_bytes()
        optimizer = torch.optim.SGD(Plain().parameters(), 0.1, momentum=0.9)
        save_optimizer_state({**optimizer.state_dict(), "x": torch.rand(3), "y": (1, None, 2.5)}, folder / "state")
        self.state = (folder / "state").read_bytes()
        save_file({name: value.numpy() for name, value in Plain().state_dict().items()}, folder / "weights")
        self.weights = (folder / "weights").read_bytes()
        self.model = Plain()
        self.images = [self._encoded(kind) for kind in ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "JPEG2000")]
        self.configs = [path.read_bytes() for path in sorted(Path("configs").glob("*.yaml"))]
        self.decoder = ImageDecoder(3)
        self.photographs = [self._photograph((16, 20)), self._photograph((90, 120)), self._photograph((40, 30), 6)]
        self.samples = Samples(
            PixelTransform(PixelSettings(image_size=8, augment="imagenet"), train=True),
            self.decoder,
            image_column="image",
            label_column="label",
            classes=3,
            seed=0,
        )

    @staticmethod
    def _encoded(kind: str) -> bytes:
        file = io.BytesIO()
        picture(0, (9, 11)).save(file, kind)
        return file.getvalue()

    @staticmethod
    def _photograph(size: tuple[int, int], orientation: int = 0) -> bytes:
        file, exif = io.BytesIO(), PILImage.Exif()
        if orientation:
            exif[0x0112] = orientation
        picture(0, size).save(file, "JPEG", exif=exif)
        return file.getvalue()

    def _with(self, content: bytes) -> Path:
        self.file.write_bytes(content)
        return self.file

    def layer_rate_log(self, chance: random.Random) -> None:
        content = hostile_header(chance) if chance.random() < 0.5 else mutated(chance, self.log)
        log = LayerRateLog.open(self._with(content))
        for quantity in QUANTITIES:
            assert log[quantity].shape == (len(log), len(log.layers))

    def optimizer_state(self, chance: random.Random) -> None:
        content = hostile_header(chance) if chance.random() < 0.5 else mutated(chance, self.state)
        assert isinstance(load_optimizer_state(self._with(content)), dict)

    def weights_file(self, chance: random.Random) -> None:
        content = hostile_header(chance) if chance.random() < 0.5 else mutated(chance, self.weights)
        assert isinstance(tensor_differences(described_file(self._with(content)), self.model), list)

    def manifest(self, chance: random.Random) -> None:
        good = {"format": checkpoints.FORMAT, "version": "1", "settings": {"a": 1}, "files": {"case": 3, "x/y": 2}}
        (self.folder / "checkpoint.json").write_bytes(mutated(chance, json.dumps(good).encode()))
        (self.folder / "trainer_state.json").write_bytes(mutated(chance, b'{"global_step": 12, "epoch": 0.5}'))
        missing = checkpoints.what_is_missing(self.folder)
        assert missing != ""
        if missing is not None:
            raise RecordError(missing)  # this is how it refuses: in words

    def image(self, chance: random.Random) -> None:
        content = mutated(chance, chance.choice(self.images)) if chance.random() < 0.9 else chance.randbytes(200)
        pixels = self.decoder.decode({"bytes": content, "path": None})
        assert pixels.dtype == torch.uint8
        assert pixels.shape[0] == 3

    def training_crop(self, chance: random.Random) -> None:
        content = mutated(chance, chance.choice(self.photographs))
        pixels = self.samples.read({"bytes": content, "path": None}, chance.randrange(1000))["pixel_values"]
        assert pixels.shape == (3, 8, 8)

    def config(self, chance: random.Random) -> None:
        path = self._with(mutated(chance, chance.choice(self.configs)))
        kinds = (ModelArguments, DataArguments, OutputArguments)
        parse_config(kinds, ["--config", str(path), "--dataset", "x", "--model", "y"])


KINDS = [name for name in vars(Cases) if not name.startswith("_")]


def attack(kind: str, count: int, seed: int, folder: Path) -> dict[str, float]:
    """Try so many cases; anything but an error of this library gets out, with the number of the case.

    Returns:
        How many were accepted and refused, the slowest in seconds.
    """
    cases = Cases(folder)
    found = {"accepted": 0, "refused": 0, "slowest": 0.0}
    for n in range(count):
        begin = time.perf_counter()
        try:
            getattr(cases, kind)(random.Random(f"{kind} {seed} {n}"))
            found["accepted"] += 1
        except (HfClarsError, BadImageError):
            found["refused"] += 1
        except BaseException as error:
            raise AssertionError(f"case {n} of {kind}, seed {seed}: {type(error).__name__}: {error}") from error
        found["slowest"] = max(found["slowest"], time.perf_counter() - begin)
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_a_few_hundred_hostile_cases_are_accepted_or_refused(kind, tmp_path):
    found = attack(kind, CASES_IN_CI, seed=0, folder=tmp_path)
    assert found["refused"] > 0
    assert found["slowest"] < 5


def test_names_of_layers_are_never_paths(tmp_path):
    """A layer of any name is data in a file; nothing is written under it."""
    names = ["../../escape", "/etc/passwd", "a/b", "..", "<script>", "\u202e", "x" * 5000]
    log = LayerRateLog.create(tmp_path / "run", layers=names)
    log.append(1, torch.ones(5, len(names)))
    log.close()
    assert LayerRateLog.open(tmp_path / "run").layers == names
    assert [p.name for p in tmp_path.rglob("*")] == ["run", "layer_rates.safetensors"]
    save_optimizer_state({"state": {"../../x": torch.ones(1)}}, tmp_path / "state.safetensors")
    assert list(load_optimizer_state(tmp_path / "state.safetensors")["state"]) == ["../../x"]


def test_remote_code_is_never_trusted_and_pickles_are_never_loaded():
    """By reading every line of the package: no switch for remote code, no pickle, no weights_only=False, no eval."""
    forbidden = (
        "trust_remote_code=True",
        "weights_only=False",
        "pickle.load",
        "torch.load(",
        "eval(",
        "exec(",
        "os.system",
    )
    lines = [
        f"{path}: {line.strip()}"
        for folder in ("hf_clars", "scripts")
        for path in Path(folder).rglob("*.py")
        for line in path.read_text(encoding="utf-8").splitlines()
        if any(word in line.replace(".eval(", "") for word in forbidden)
    ]
    assert lines == []


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("kind", KINDS)
def test_a_hundred_thousand_hostile_cases(kind, tmp_path):
    print(kind, attack(kind, 100_000, seed=1, folder=tmp_path))


def main(count: int) -> None:
    """All kinds, one after the other, under a limit of memory."""
    logging.disable(logging.CRITICAL)
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped + MEMORY, mapped + MEMORY))
    for kind in KINDS:
        with tempfile.TemporaryDirectory() as folder:
            begin = time.perf_counter()
            found = attack(kind, count, seed=1, folder=Path(folder))
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        print(
            f"{kind:16} {count:,} cases in {time.perf_counter() - begin:6.0f} s: {found['accepted']:,} accepted, "
            f"{found['refused']:,} refused, slowest {found['slowest']:.2f} s, "
            f"peak memory +{(peak - used) / 2**20:.0f} MB",
            flush=True,
        )


if __name__ == "__main__":
    np.seterr(all="ignore")
    main(int(sys.argv[1]))
