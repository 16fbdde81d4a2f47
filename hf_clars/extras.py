"""Packages that come with an extra of this one: where one is missing, a sentence says what to install."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from hf_clars.errors import HfClarsError

EXTRA_OF = {
    "PIL": "images",
    "torchvision": "images",
    "simplejpeg": "images",
    "matplotlib": "images",
    "mlxtend": "quickstart",
    "timm": "timm",
    "deepspeed": "deepspeed",
    "opacus": "bench",
    "backpack": "bench",
    "pytorch_optimizer": "bench",
}
"""Name of the import: name of the extra in pyproject.toml."""


class MissingExtraError(HfClarsError, ModuleNotFoundError):
    """A package of an extra is not installed."""


@contextmanager
def needing_an_extra(what: str) -> Iterator[None]:
    """Import what may be missing inside this context.

    Args:
        what: What needs the package, as the beginning of a sentence.

    Raises:
        MissingExtraError: If a package of an extra is missing. Any other missing package is an error as it is.
    """
    try:
        yield
    except MissingExtraError:  # a part that this one is built on has said it
        raise
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in EXTRA_OF:
            raise
        raise MissingExtraError(
            f"{what} needs the package {package}, which is not installed: pip install 'hf_clars[{EXTRA_OF[package]}]'.",
            name=error.name,
        ) from error
