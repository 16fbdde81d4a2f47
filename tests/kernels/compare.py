"""Every kernel against its reference: `python -m tests.kernels.compare DEVICE [SEED] [EVERY]` prints one line a case.

On the CPU it needs TRITON_INTERPRET=1, which must be set before Triton is imported: hence a process of its own. With
EVERY only each EVERY-th case of each kernel is run, beginning with the second: the first shapes are the plainest.
"""

import itertools
import random
import sys
from collections import Counter

import torch

from hf_clars.grad_norms.kernels import operations, reference


def linear_cases(device, dtype, rng):
    shapes = [(1, 1, 5, 3), (2, 49, 16, 24), (3, 50, 33, 17), (2, 197, 40, 8)]
    shapes += [(rng.randint(1, 5), rng.randint(1, 70), rng.randint(1, 50), rng.randint(1, 50)) for _ in range(6)]
    for b, t, d, p in shapes:
        x, g = torch.randn(b, t, d, device=device).to(dtype), torch.randn(b, t, p, device=device).to(dtype)
        for bias in (True, False):
            kind = "product with bias" if bias else "product"
            yield kind, (b, t, d, p), "linear_product", (x, g, bias, rng.randint(1, b))
        yield "gram", (b, t, d, p), "linear_gram", (x, g)


def convolution_cases(device, dtype, rng):
    fixed = [((1, 1), (1, 1), (0, 0), (1, 1)), ((3, 3), (1, 1), (1, 1), (1, 1)), ((7, 7), (2, 2), (3, 3), (1, 1))]
    other = [((3, 2), (2, 1), (1, 0), (2, 3)), ((1, 1), (2, 2), (0, 0), (1, 1)), ((3, 3), (2, 2), (1, 1), (1, 1))]
    for settings, (channels, groups) in itertools.product(fixed + other, ((3, 1), (18, 1), (6, 6), (12, 3), (36, 2))):
        b, p, h, w = rng.randint(1, 3), groups * rng.randint(1, 24 // groups), rng.randint(9, 12), rng.randint(9, 12)
        x = torch.randn(b, channels, h, w, device=device).to(dtype)
        kernel, *where = settings
        weight = torch.zeros(p, channels // groups, *kernel, device=device)
        g = torch.randn_like(torch.nn.functional.conv2d(x.float(), weight, None, *where, groups)).to(dtype)
        if rng.random() < 0.7:
            x, g = (t.contiguous(memory_format=torch.channels_last) for t in (x, g))
        label = tuple(x.shape), p, groups, settings
        grouped = "" if groups == 1 else " depthwise" if groups == channels else " grouped"
        with_bias, measured = rng.random() < 0.5, rng.randint(1, b)
        arguments = (x, g, *map(list, settings), groups)
        yield f"convolution_product{grouped}", label, "convolution_product", (*arguments, with_bias, measured)
        if groups < channels:  # never taken for depthwise convolutions
            yield f"convolution_gram{grouped}", label, "convolution_gram", arguments


def normalization_cases(device, dtype, rng):
    for b, c, h in [(1, 3, 1), (4, 20, 5), (2, 18, 30), (rng.randint(1, 4), rng.randint(1, 40), rng.randint(1, 9))]:
        x, g = (torch.randn(b, c, h, h + 1, device=device).to(dtype) for _ in range(2))
        if rng.random() < 0.6:
            x, g = (t.contiguous(memory_format=torch.channels_last) for t in (x, g))
        groups = 2 if c % 2 == 0 else 1
        for kind, shape in (("batch_norm", (c,)), ("group_norm", (b, groups))):
            stats = torch.randn(shape, device=device), torch.rand(shape, device=device) + 0.5
            weight = torch.randn(c, device=device)
            yield kind, (b, c, h), "channel_norm_backward", (x, g, weight, *stats)
            yield f"{kind} sums", (b, c, h), "channel_sums", (x, g, *stats)
    for b, t, c in [(1, 1, 3), (2, 50, 24), (3, rng.randint(1, 40), rng.randint(1, 60))]:
        x, g = (torch.randn(b, t, c, device=device).to(dtype) for _ in range(2))
        mean, rstd = torch.randn(b, t, device=device), torch.rand(b, t, device=device) + 0.5
        for m in (mean, None):
            yield "rows" if m is None else "rows with mean", (b, t, c), "row_sums", (x, g, m, rstd)
        yield "rms_norm", (b, t, c), "root_mean_square_dx", (x, g, torch.randn(c, device=device), rstd)


def check(label, found, expected):
    """One line for each tensor that a kernel gives."""
    found, expected = ([t] if isinstance(t, torch.Tensor) else t for t in (found, expected))
    for f, e in zip(found, expected, strict=True):
        assert f.shape == e.shape, (label, f.shape, e.shape)
        error = float((f.float() - e.float()).norm() / e.float().norm().clamp(min=1e-6))
        limit = {torch.float16: 2e-3, torch.bfloat16: 1e-2}.get(e.dtype, 2e-5)
        print(f"{'ok' if error <= limit else 'WRONG'} {label} {error:.1e}")


def main(device, seed=0, every=1):
    torch.manual_seed(seed)
    rng = random.Random(seed)
    # Triton's interpreter multiplies bit patterns of bfloat16: there only on a device.
    dtypes = [torch.float32, torch.float16] + ([torch.bfloat16] if device == "cuda" else [])
    for dtype, cases in itertools.product(dtypes, (linear_cases, convolution_cases, normalization_cases)):
        seen = Counter()
        for kind, shape, name, arguments in cases(device, dtype, rng):
            seen[kind] += 1
            if seen[kind] % every == 2 % every:
                found = getattr(operations, name)(*arguments)
                check(f"{dtype} {kind} {shape}", found, getattr(reference, name)(*arguments))
    assert not operations.failed(), operations.failed()


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
