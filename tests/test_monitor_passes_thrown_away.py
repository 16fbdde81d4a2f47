"""Promise: passes that a loop throws away, or that fail, count for nothing: norms, places, indices and the loss."""

import contextlib

import pytest
import torch

from hf_clars.per_sample import NormMonitor
from tests.callback_kit import brute_force
from tests.trainer_kit import Images, Plain

DATA = Images(32)


class Fails(Exception):
    pass


def one_pass(model, monitor, rows, *, last=False, fails=None):
    with monitor.batch(torch.tensor(rows), last=last):
        if fails == "before":
            raise Fails
        loss = model(DATA.x[rows].double(), DATA.y[rows])["loss"]
        if fails == "between":
            raise Fails
        (loss / 2).backward()
        if fails == "after":
            raise Fails


def check(model, last, rows):
    """Both passes that were kept, of one size, are what the step is made of."""
    order, x, y = rows[0] + rows[1], DATA.x.double(), DATA.y
    norms, square = brute_force(model, x[order], y[order])
    places = norms.argsort(descending=True)
    assert last.samples == len(order)
    torch.testing.assert_close(last.top_norm[: len(order)], norms[places], rtol=1e-9, atol=0)
    torch.testing.assert_close(last.batch_square.sum(), square, rtol=1e-9, atol=0)
    assert last.top_index[: len(order)].tolist() == [order[i] for i in places]
    assert last.top_micro_batch[: len(order)].tolist() == [int(i) // len(rows[0]) for i in places]
    loss = model(x[order], y[order])["loss"].detach()
    torch.testing.assert_close(last.loss.double(), loss, rtol=1e-6, atol=0)


@pytest.mark.parametrize("thrown", [[0, 1, 2], [0, 1, 2, 3, 4], list(range(9))], ids=len)
@pytest.mark.parametrize("fails", [None, "before", "between", "after"])
def test_gradients_that_are_cleared_between_two_passes_take_their_samples_along(thrown, fails):
    model = Plain().double()
    with NormMonitor(model, every=1, top_k=20, strict=True) as monitor:
        for start in (9, 14, 19):
            kept = [[start + i for i in range(5)], [(start + 5 + i) % 32 for i in range(5)]]
            with contextlib.suppress(Fails):
                one_pass(model, monitor, thrown, fails=fails)
            model.zero_grad()
            one_pass(model, monitor, kept[0])
            one_pass(model, monitor, kept[1], last=True)
            check(model, monitor.last, kept)
            model.zero_grad()
