"""Size and normalisation of a run's images: as set, else as the pretrained weights were trained, else by default."""

from __future__ import annotations

from pathlib import Path

from hf_clars.data import read_checkpoint_pixels
from hf_clars.image_classification.arguments import DataArguments, ModelArguments
from hf_clars.models import model_names

DEFAULT, CHECKPOINT, SET = "the default", "the checkpoint's", "as set"


def choose_pixels(model: ModelArguments, data: DataArguments) -> str:
    """Fill in what the settings leave open, from the image processor beside pretrained weights.

    Args:
        model: Which weights.
        data: Its `image_size`, `image_mean` and `image_std` are filled in.

    Returns:
        Which are used and where they come from, in words.
    """
    new = model.model in model_names() or model.from_scratch
    found = None if new else read_checkpoint_pixels(model.model)
    sources = {"size": SET, "mean": SET, "deviation": SET}
    if data.image_size is None:
        size = None if found is None else found.size
        sources["size"] = DEFAULT if size is None else CHECKPOINT
        data.image_size = size or data.pixel_settings().image_size
    if not data.image_mean:
        data.image_mean, sources["mean"] = _per_channel(None if found is None else found.mean, data.num_channels)
    if not data.image_std:
        data.image_std, sources["deviation"] = _per_channel(None if found is None else found.std, data.num_channels)
    used = data.pixel_settings()
    mean, std = (" ".join(f"{v:.4g}" for v in values) for values in (used.channel_mean, used.channel_std))
    missing = "" if new or found is not None else f"; {Path(model.model).name} has no image processor"
    return (
        f"{used.image_size} x {used.image_size} ({sources['size']}), mean {mean} ({sources['mean']}), deviation {std} "
        f"({sources['deviation']}){missing}"
    )


def _per_channel(values: tuple[float, ...] | None, channels: int) -> tuple[list[float], str]:
    """The checkpoint's values, if they are for so many channels, and where they come from."""
    return (list(values), CHECKPOINT) if values is not None and len(values) == channels else ([], DEFAULT)
