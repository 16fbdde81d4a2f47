"""Promise: whatever a model does with its axes, norms are exact, or refused: programs of layers, drawn at random.

A program uses a few layers, some of them several times, on [B, T, 4] laid out in many ways: time first, flat, in views,
in windows, one step at a time. B and T are others in each pass; sometimes they are equal, or T is 1.
"""

import random
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional

from hf_clars.grad_norms import PerSampleGradNorms
from hf_clars.grad_norms.errors import BatchAxisError, SumCheckError
from tests.oracle import layer_norms, one_by_one
from tests.three_passes import on_one_thread

one_thread = pytest.fixture(autouse=True)(on_one_thread)
WIDTH, PASSES = 4, 5
LAYERS = {
    "linear": lambda: nn.Linear(WIDTH, WIDTH),
    "norm": lambda: nn.LayerNorm(WIDTH),
    "scale": lambda: nn.Parameter(1 + 0.3 * torch.randn(WIDTH)),
    "matrix": lambda: nn.Parameter(0.5 * torch.randn(WIDTH, WIDTH)),
    "recurrent": lambda: nn.GRU(WIDTH, WIDTH),
    "attention": lambda: nn.MultiheadAttention(WIDTH, 2),
    "convolution": lambda: nn.Conv1d(WIDTH, WIDTH, 3, padding=1),
    "groups": lambda: nn.GroupNorm(2, WIDTH),
}


def flip_axes(h):
    return h.transpose(0, 1)


def halves(f, h):
    a, b = f(torch.cat([h, 2 * h])).chunk(2)
    return a + b.sin()


def heads(f, h):
    b, t, _ = h.shape
    each = h.view(b, t, 2, 2).transpose(1, 2).reshape(2 * b, t, 2)
    return f(each.repeat(1, 1, 2)).view(b, 2, t, WIDTH).mean(1)


LAID_OUT = {
    "as it is": lambda f, h: f(h),
    "time first": lambda f, h: flip_axes(f(flip_axes(h))),
    "flat": lambda f, h: f(h.flatten(0, 1)).view_as(h),
    "flat, time first": lambda f, h: flip_axes(f(flip_axes(h).reshape(-1, WIDTH)).view(h.shape[1], len(h), WIDTH)),
    "the last step": lambda f, h: torch.cat([h[:, :-1], f(h[:, -1])[:, None]], 1),
    "step by step": lambda f, h: torch.stack([f(h[:, t]) for t in range(h.shape[1])], 1),
    "two halves": halves,
    "heads": heads,
    "each twice": lambda f, h: f(h.repeat_interleave(2, 0)).unflatten(0, (-1, 2)).mean(1),
    "three of each": lambda f, h: f(h.unsqueeze(1).expand(-1, 3, -1, -1)).mean(1),
    "three of all": lambda f, h: f(h.expand(3, -1, -1, -1)).sum(0),
    "pairs of steps": lambda f, h: (f(h)[:, :, None] * h[:, None]).mean(2),
}
BETWEEN = [
    lambda h: h.flip(1),
    lambda h: h.roll(1, 1),
    lambda h: h.cumsum(1) / 3,
    lambda h: h.sort(1)[0],
    lambda h: h + h.mean(1, keepdim=True),
    lambda h: functional.pad(h, (0, 0, 1, 0))[:, :-1],
    lambda h: h * (h[:, :1] > 0),
    lambda h: (h @ h.mT).softmax(-1) @ h,
    lambda h: torch.einsum("btd,bsd->bts", h, h).softmax(-1) @ h,
    lambda h: h.gather(1, h.argsort(1)),
    lambda h: functional.normalize(h, dim=-1),
    lambda h: torch.stack(h.unbind(1), 1),
]
RETURNED = {
    "all": lambda h: h,
    "the mean": lambda h: h.mean(1),
    "the first step": lambda h: h[:, 0],
    "flat": lambda h: h.reshape(-1, WIDTH),
}


class Program(nn.Module):
    """Drawn with a seed."""

    def __init__(self, seed):
        super().__init__()
        draw = random.Random(seed)
        names = draw.sample(list(LAYERS), draw.randint(1, 3))
        self.lines = []
        for _ in range(draw.randint(2, 4)):
            self.lines.append((draw.choice(names), draw.choice(list(LAID_OUT))))
            if draw.random() < 0.5:
                self.lines.append((None, draw.randrange(len(BETWEEN))))
        self.skips, self.returned = draw.random() < 0.5, draw.choice(list(RETURNED))
        self.sizes = [(draw.choice([2, 3, 4, 4, 5]), draw.choice([1, 2, 3, 4, 4, 5, 8])) for _ in range(PASSES)]
        self.first, self.last = nn.Linear(3, WIDTH), nn.Linear(WIDTH, WIDTH)
        for name in names:
            setattr(self, name, LAYERS[name]())

    def call(self, name, h):
        layer = getattr(self, name)
        if name == "recurrent":
            return flip_axes(layer(flip_axes(h))[0])
        if name == "attention":
            return flip_axes(layer(*[flip_axes(h)] * 3)[0])
        if name in ("convolution", "groups"):
            return layer(h.mT).mT
        return h * layer if name == "scale" else h @ layer if name == "matrix" else layer(h)

    def forward(self, x):
        h = self.first(x)
        for name, how in self.lines:
            if name is None:
                new = BETWEEN[how](h)
            elif name in ("linear", "norm", "scale", "matrix"):
                new = LAID_OUT[how](lambda t, name=name: self.call(name, t), h)
            else:
                new = self.call(name, h)
            h = (h + new).tanh() if self.skips else new.tanh()
        return RETURNED[self.returned](self.last(h))


def losses(model, x):
    out = model(x).reshape(len(x), -1)
    return (out * torch.linspace(-1, 2, out.shape[1], dtype=out.dtype)).sin().sum(1)


def outcome(seed):
    """In words; a norm that is not the one of that sample's own backward pass is an assertion error."""
    torch.manual_seed(seed)
    model = Program(seed).double()
    with warnings.catch_warnings(), PerSampleGradNorms(model, layers="tensor") as norms:
        warnings.simplefilter("ignore")
        for batch, steps in model.sizes:
            x = torch.randn(batch, steps, 3, dtype=torch.float64)
            model.zero_grad()
            try:
                losses(model, x).mean().backward()
                found = norms.per_sample
            except (BatchAxisError, SumCheckError):
                return "refused"
            norms.paused = True
            right = layer_norms(one_by_one(model, lambda m, i, x=x: losses(m, x[i : i + 1])[0], batch), norms.layers)
            norms.paused = False
            where = f"seed {seed}, {batch} samples of {steps} steps: {model.lines}"
            for name, expected in right.items():
                message = f"{name}, {where}".__add__
                torch.testing.assert_close(found[name], expected, rtol=1e-6, atol=1e-9, msg=message)
    return "exact"


def check(seeds):
    found = [outcome(seed) for seed in seeds]
    assert found.count("exact") >= 0.9 * len(seeds), found


def test_programs_of_layers():
    check(range(40))


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_many_programs_of_layers():
    check(range(40, 400))
