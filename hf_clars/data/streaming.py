"""A streaming split as a Trainer takes it: without end in training, in an order that seed and pass decide."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch.utils.data
from datasets import IterableDataset

from hf_clars.data.augmenting import sample_seed
from hf_clars.data.samples import Samples, leave_stop_signals_to_the_main_process


class ImageStream(torch.utils.data.IterableDataset):
    """A streaming split. In training it goes on without end, shuffled anew in each pass; in evaluation it is one pass.

    To resume, the samples that were used are read, transformed and thrown away: exact, at the price of reading them
    again. (The saved state of a shuffled stream in `datasets` leaves out the rows that wait in its shuffle buffer.)

    Args:
        split: The split.
        samples: How its rows become samples.
        endless: Whether to begin again after the last row.
        shuffle_buffer: Rows to shuffle among; 0: none.
    """

    def __init__(self, split: IterableDataset, samples: Samples, *, endless: bool, shuffle_buffer: int) -> None:
        self._split = samples.undecoded(split)
        self._samples = samples
        self._endless = endless
        self._buffer = shuffle_buffer

    @property
    def skipped_images(self) -> int:
        """How many bad images were passed over."""
        return self._samples.decoder.skipped

    def __iter__(self) -> Iterator[dict[str, Any]]:
        leave_stop_signals_to_the_main_process()
        worker = torch.utils.data.get_worker_info()
        number = 0 if worker is None else worker.id  # each worker reads files of its own, and counts from 0
        index = passes = 0

        def read(value: Any) -> dict[str, Any]:
            return self._samples.read(value, number, index)

        while True:
            before = index
            for row, pixels in self._one_pass(passes, read):
                yield self._samples.labelled(pixels, row[self._samples.label_column], index)
                index += 1
            passes += 1
            if not self._endless or index == before:  # a worker beyond the number of files has nothing to read
                return

    def _one_pass(
        self, number: int, read: Callable[[Any], dict[str, Any]]
    ) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
        samples, split, position = self._samples, self._split, -1
        if self._buffer:
            split = split.shuffle(seed=sample_seed(samples.seed, number) % 2**32, buffer_size=self._buffer)
        rows = iter(split)

        def following(_: int) -> dict[str, Any]:
            nonlocal position
            position += 1
            return next(rows)

        while True:
            try:
                row = following(0)
                yield samples.decoder.first_good(row, position, samples.image_column, following, read)
            except StopIteration:  # bad images before the end are passed over too
                return
