"""A part of the training images held out for evaluation, where a data set brings no validation split."""

from __future__ import annotations

import logging
from dataclasses import replace

from datasets import Dataset

from hf_clars.data import ImageData
from hf_clars.errors import ConfigError, DataError

SEED = 0
"""The same images whatever the run's seed: runs that are compared are measured on the same."""

logger = logging.getLogger(__name__)


def check_share(share: float, *, streaming: bool, eval_split: str | None) -> None:
    """Refuse a share that cannot be held out.

    Args:
        share: Of the training images; 0: none.
        streaming: Whether the data are a stream.
        eval_split: The split to evaluate on, if one was named.

    Raises:
        ConfigError: Naming both settings.
    """
    if not 0 <= share < 1:
        raise ConfigError(f"eval_share={share} must be at least 0 and below 1.")
    if share and streaming:
        raise ConfigError("eval_share needs the number of images, which a stream does not tell: name an eval_split.")
    if share and eval_split:
        raise ConfigError(f"eval_share={share} and eval_split={eval_split} both say what to evaluate on: keep one.")


def hold_out(data: ImageData, share: float) -> ImageData:
    """Split the training images into a part to train on and a part to evaluate on, class by class.

    Args:
        data: A map-style data set. Its own evaluation split is left aside: it stays unseen until the end.
        share: Of the training images to evaluate on, above 0.

    Returns:
        The same data with another `train` and `eval`; `eval_split` is called "held out".

    Raises:
        DataError: One of the two would be empty.
    """
    assert isinstance(data.train, Dataset)
    count = round(share * len(data.train))
    if not 0 < count < len(data.train):
        raise DataError(f"eval_share={share} of {len(data.train)} images leaves a split empty: choose another share.")
    try:
        parts = data.train.train_test_split(test_size=count, seed=SEED, stratify_by_column=data.label_column)
    except ValueError as error:  # a class with one image, or labels that are plain numbers
        logger.warning("The held-out images are drawn at random, not class by class (%s).", error)
        parts = data.train.train_test_split(test_size=count, seed=SEED)
    return replace(
        data,
        train=parts["train"],
        eval=parts["test"],
        eval_split="held out",
        train_size=len(parts["train"]),
        eval_size=len(parts["test"]),
    )
