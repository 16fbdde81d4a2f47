"""What of a run's folder goes to the Hub: a fixed list of names; all else (checkpoints, states, logs) stays at home."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hf_clars.hub.errors import HubError

CARD = "README.md"
PICTURE_ENDINGS = (".png", ".svg")
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
_SHARED = (
    *_WEIGHTS,
    "model-*-of-*.safetensors",  # a large model is saved in numbered pieces
    "config.json",
    "preprocessor_config.json",
    CARD,
    "layer_rates.safetensors",
    "*.png",
    "*.svg",
    "*.html",
    ".eval_results/*.yaml",
    "all_results.json",
)
_FIRST_PICTURE = "layer_rates"


@dataclass(frozen=True)
class SharedFile:
    """A file as it will be on the Hub.

    Attributes:
        name: Its path in the repository, with "/".
        content: Where it lies, or its bytes where they differ from those on disk.
        size: In bytes.
    """

    name: str
    content: Path | bytes
    size: int


def shared_files(folder: str | Path) -> list[SharedFile]:
    """The files of a finished run that belong on the Hub, and no others.

    These are the model (`model.safetensors`, or its numbered pieces with their index), `config.json`,
    `preprocessor_config.json`, the card, `layer_rates.safetensors`, pictures (png, svg) and pages (html) of the top
    folder, `.eval_results/*.yaml`, and `all_results.json`.

    Args:
        folder: The run's folder.

    Returns:
        The files by name.

    Raises:
        HubError: There is no such folder, it lacks the model, its config or its card, or a name is a link that leads
            out of the folder.
    """
    root = Path(folder).expanduser()
    if not root.is_dir():
        raise HubError(f"There is no run to share in {root}: give the folder that training wrote (--output_dir).")
    found = {path for pattern in _SHARED for path in root.glob(pattern) if path.is_file()}
    for path in found:
        if not path.resolve().is_relative_to(root.resolve()):
            raise HubError(
                f"{path.name} in {root} is a link that leads out of the folder, and only the run's own files are "
                "shared. Replace the link by the file, or remove it."
            )
    files = [SharedFile(path.relative_to(root).as_posix(), path, path.stat().st_size) for path in sorted(found)]
    _check_complete(root, {file.name for file in files})
    return files


def _check_complete(root: Path, names: set[str]) -> None:
    if not names & set(_WEIGHTS):
        raise HubError(
            f"{root} holds no model.safetensors, so there is no model to share. Give the folder of a finished run; a "
            "run that was stopped is continued with --resume_from_checkpoint true."
        )
    if "config.json" not in names:
        raise HubError(f"{root} holds no config.json, without which nobody can load the model: save the model again.")
    if CARD not in names:
        raise HubError(f"{root} has no README.md, the model's card. Write one with `hf-clars card {root}`.")


def find_pictures(folder: Path) -> Sequence[str]:
    """Names of the pictures that a card shows: layer rates first, then by name; of a png and its svg, the png."""
    by_stem: dict[str, str] = {}
    for ending in reversed(PICTURE_ENDINGS):
        by_stem |= {path.stem: path.name for path in sorted(folder.glob(f"*{ending}"))}
    return [by_stem[stem] for stem in sorted(by_stem, key=lambda stem: (stem != _FIRST_PICTURE, stem))]


def find_pages(folder: Path) -> Sequence[str]:
    """Names of the interactive pages that a card links to."""
    return sorted(path.name for path in folder.glob("*.html"))
