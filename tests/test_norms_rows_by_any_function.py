"""Promise: whatever function gave rows of the batch other places, each sample's gradient is found where it is."""

import pytest
import torch
import torchvision
from torch import nn
from torch.nn import functional

from hf_clars.grad_norms import PerSampleGradNorms
from hf_clars.grad_norms.axes.place import LOST, Call, Place
from tests.oracle import layer_norms, one_by_one
from tests.three_passes import on_one_thread

one_thread = pytest.fixture(autouse=True)(on_one_thread)


def backwards(h):
    return torch.arange(len(h)).flip(0)


def turned(h):
    return torch.eye(len(h), dtype=h.dtype).flip(0)


def at_boxes(h):
    boxes = torch.tensor([0, 0, 1.0, 1.0]).expand(len(h), 4)
    boxes = torch.cat([backwards(h)[:, None], boxes], 1).to(h)
    return torchvision.ops.roi_align(h[..., None, None], boxes, 1, aligned=True)[..., 0, 0]


def sampled(h):
    there = torch.linspace(1 - 1 / len(h), 1 / len(h) - 1, len(h), dtype=h.dtype)
    grid = torch.stack([torch.zeros_like(there), there], 1)[None, :, None]
    return functional.grid_sample(h.T[None, :, :, None], grid, align_corners=False)[0, :, :, 0].T


WAYS = {
    "partners": (lambda h: h.view(-1, 2, 4).flip(1).reshape(-1, 4), None),
    "two halves": (
        lambda h: h.view(2, -1, 4).transpose(0, 1).reshape(-1, 4),
        lambda h: h.view(-1, 2, 4).transpose(0, 1).reshape(-1, 4),
    ),
    "a turn": (lambda h: torch.rot90(h[:, :, None], 2, (0, 2))[:, :, 0], None),
    "a shift": (lambda h: torch.fft.fftshift(h, 0), lambda h: torch.fft.ifftshift(h, 0)),
    "a matrix": (lambda h: turned(h) @ h, None),
    "a matrix, as a layer's weight": (lambda h: functional.linear(turned(h), h.T), None),
    "a matrix, by letters": (lambda h: torch.einsum("ij,jd->id", turned(h), h), None),
    "a sparse matrix": (lambda h: torch.sparse.mm(turned(h).to_sparse(), h), None),
    "numbers": (lambda h: torch.zeros_like(h).put(torch.arange(h.numel()).view_as(h).flip(0), h), None),
    "bags": (lambda h: functional.embedding_bag(backwards(h)[:, None], h, mode="sum"), None),
    "columns": (lambda h: h.T[:, backwards(h)].T, None),
    "columns of three axes": (lambda h: h.T[None][:, :, backwards(h)][0].T, None),
    "columns turned": (lambda h: h[:, None].movedim(0, -1).flip(-1).movedim(-1, 0)[:, 0], None),
    "boxes": (at_boxes, None),
    "a picture": (sampled, None),
}


class There(nn.Module):
    """A layer and a parameter are used on rows in other places."""

    def __init__(self, away, back):
        super().__init__()
        self.away, self.back = away, back or away
        self.first, self.layer, self.last = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 2)
        self.scale = nn.Parameter(torch.randn(4))

    def forward(self, x):
        h = self.first(x).tanh()
        return self.last(h + self.back((self.layer(self.away(h)) * self.scale).tanh()))


def losses(model, x):
    return (model(x) * torch.linspace(-1, 2, 2, dtype=x.dtype)).sin().sum(1)


@pytest.mark.filterwarnings("ignore:.*need a backward pass of this module for every sample")
@pytest.mark.parametrize("way", WAYS)
def test_rows_that_come_back(way):
    torch.manual_seed(0)
    model = There(*WAYS[way]).double()
    with PerSampleGradNorms(model, layers="tensor") as norms:
        for size in (4, 4, 4, 6):
            x = torch.randn(size, 3, dtype=torch.float64)
            model.zero_grad()
            losses(model, x).mean().backward()
            got = norms.per_sample
            norms.paused = True
            want = layer_norms(one_by_one(model, lambda m, i, x=x: losses(m, x)[i], size), norms.layers)
            norms.paused = False
            for name, expected in want.items():
                torch.testing.assert_close(
                    got[name], expected, rtol=1e-9, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}"
                )


x, image = torch.randn(4, 6, 8), torch.randn(4, 6, 8, 8)
KEPT = {
    "matmul": (torch.matmul, (x, torch.randn(8, 4))),
    "pooled": (functional.avg_pool2d, (image, 2)),
    "normalized": (functional.batch_norm, (image, torch.zeros(6), torch.ones(6))),
    "axes moved behind it": (torch.movedim, (image, 1, 3)),
    "axes joined behind it": (torch.flatten, (image, 1)),
    "the last two exchanged": (torch.adjoint, (x,)),
    "parts of each": (torch.chunk, (x, 2, -1)),
    "one part of each": (torch.unbind, (x, 1)),
    "products of each": (torch.matmul, (x, x.mT)),
    "padded": (functional.pad, (image, (0, 1, 1, 0))),
    "shifted": (torch.roll, (image, (1, 1), (2, 3))),
    "a part from the end": (torch.Tensor.__getitem__, (image, (..., slice(0, 3)))),
    "attention": (functional.scaled_dot_product_attention, (image, image, image)),
}
NOT_KEPT = {
    "matmul": (torch.matmul, (torch.eye(4), x[:, 0])),
    "a vector": (torch.matmul, (x[:, 0, 0], torch.eye(4))),
    "letters": (torch.einsum, ("ij,jk->ik", torch.eye(4), x[:, 0])),
    "padded batch": (functional.pad, (x[:, 0], (0, 0, 1, -1))),
    "channels without a batch": (functional.avg_pool2d, (x, 1)),
    "the batch turned": (torch.roll, (x, 1, 0)),
    "parts of the batch": (torch.chunk, (x, 2)),
    "each sample": (torch.unbind, (x,)),
    "attention among samples": (functional.scaled_dot_product_attention, (x[:, 0], x[:, 0], x[:, 0])),
    "channels mixed without a batch": (functional.conv2d, (x, torch.randn(4, 4, 1, 1))),
    "rows of a table": (functional.embedding_bag, (torch.arange(4)[:, None].flip(0), x[:, 0])),
    "a turn": (torch.rot90, (image, 2, (0, 2))),
    "two axes turned": (torch.Tensor.flip, (image, 1, 0)),
}


def after(what):
    function, args = what
    given = args[0] if isinstance(args[0], list) else args
    held = [t for t in given if torch.is_tensor(t) and t.dim() and t.shape[0] == 4 and not t.equal(torch.eye(4))]
    places = {id(t): Place() for t in held}
    found = Call(function.__name__.strip("_"), function, args, {}, places, batch=4).places_in(function(*args))
    return found[0] if isinstance(found, tuple) else found


@pytest.mark.parametrize("what", KEPT)
def test_what_is_known_to_leave_rows_in_their_places(what):
    assert after(KEPT[what]) == Place()


def test_other_axes_become_the_samples():
    assert after((torch.movedim, (image, (2, 1), (3, 0)))) == Place(1)
    assert after((torch.transpose, (image, 0, 2))) == Place(2)
    assert after((torch.flatten, (image, 0, 1))) == Place(0, inner=6)
    assert after((torch.cat, ([x, x],))) == Place(0, outer=2)


@pytest.mark.parametrize("what", NOT_KEPT)
def test_what_is_not(what):
    assert after(NOT_KEPT[what]) in (LOST, None)
