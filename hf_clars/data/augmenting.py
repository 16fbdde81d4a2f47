"""Random augmentation that depends on seed, epoch and sample alone, and so is the same after a resume.

Data-loader workers draw from generators that are seeded anew whenever an epoch's iterator is made, and which worker
gets which sample depends on where the iterator began: after a resume in the middle of an epoch both differ. Here each
sample has its own seed instead, whoever transforms it and whenever.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class SharedEpoch:
    """The epoch that a data set is in, seen by its data-loader workers too, persistent ones included."""

    def __init__(self) -> None:
        self._value = torch.zeros((), dtype=torch.int64).share_memory_()

    def set(self, epoch: int) -> None:
        """Set it, before the epoch's iterator is made.

        Args:
            epoch: From 0.
        """
        self._value.fill_(epoch)

    def get(self) -> int:
        """The epoch."""
        return int(self._value)


def sample_seed(*parts: int) -> int:
    """A 63-bit seed made of numbers such as (seed, epoch, index): neighbours have unrelated ones."""
    text = ",".join(map(str, parts)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 1


@contextmanager
def random_numbers_from(seed: int) -> Iterator[None]:
    """Let torch's CPU generator, which torchvision's transforms draw from, start at `seed`; afterwards it is as before.

    Args:
        seed: From `sample_seed`.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed the accelerators too
        yield
