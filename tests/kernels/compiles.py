"""Every kernel through Triton's compiler to a device's code: `python -m tests.kernels.compiles 80:fp16 90:bf16`.

The launches are those of the functions that others call, caught where they would start. One line a kernel, architecture
and precision.
"""

import re
import sys

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.tools.tensor_descriptor import TensorDescriptor

from hf_clars.grad_norms.kernels import convolution, linear, normalization

KINDS = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}
#: Bytes of shared memory that a block may have.
MOST_SHARED = {75: 64 << 10, 80: 163 << 10, 86: 99 << 10, 90: 227 << 10, 100: 227 << 10}
FILES = (linear, convolution, normalization)


class Caught:
    """Stands for a kernel, and keeps what it was launched with."""

    def __init__(self, kernel, launches):
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid):
        return lambda *args, **kwargs: self.launches.append((self.kernel, args, kwargs))


def kind(value):
    if isinstance(value, torch.Tensor):
        return f"*{KINDS[value.dtype]}"
    if isinstance(value, TensorDescriptor):
        return f"tensordesc<{KINDS[value.base.dtype]}{value.block_shape}>"
    return "i32" if abs(value) < 2**31 else "i64"


def launches(dtype, tensor_copies):
    """What every function launches for shapes like those of ResNet-50 and ViT-B."""
    found = []
    linear.has_tensor_copies = lambda device: tensor_copies
    for file in FILES:
        for name, value in list(vars(file).items()):
            if isinstance(value, triton.JITFunction):
                setattr(file, name, Caught(value, found))
    x, g = torch.empty(2, 128, 512, dtype=dtype), torch.empty(2, 128, 256, dtype=dtype)
    linear.linear_product(x, g, True, 2)
    linear.linear_product(x[..., :129], g[..., :65], True, 1)
    for positions in (128, 64):
        linear.linear_gram(x[:, :positions], g[:, :positions])
    every = torch.empty(2, 128, 16, 16, dtype=dtype).to(memory_format=torch.channels_last)
    images = every[:, :64].contiguous(memory_format=torch.channels_last)
    settings = [3, 3], [2, 1], [1, 1], [1, 2]
    for channels, groups in ((3, 1), (128, 1), (64, 1), (64, 2), (64, 64)):
        of = every[:, :channels].contiguous(memory_format=torch.channels_last)
        weight = torch.empty(max(64, channels), channels // groups, 3, 3, dtype=torch.float32)
        y = torch.nn.functional.conv2d(of.float(), weight, None, *settings[1:], groups).to(dtype)
        convolution.convolution_product(of, y, *settings, groups, True, 1)
        convolution.convolution_gram(of, y, *settings, groups)
    stats, weight = torch.empty(64), torch.empty(64)
    for of in (images, images.contiguous()):
        normalization.channel_norm_backward(of, of, weight, stats, stats)
        normalization.channel_norm_backward(of, of, weight, torch.empty(2, 8), torch.empty(2, 8))
    rows = torch.empty(2, 128)
    for mean in (None, rows):
        normalization.row_sums(x, x, mean, rows)
    normalization.root_mean_square_dx(x, x, torch.empty(512), rows)
    for file in FILES:
        for name, value in list(vars(file).items()):
            if isinstance(value, Caught):
                setattr(file, name, value.kernel)
    return found


def compile_launch(kernel, args, kwargs, capability):
    options = {k: v for k, v in kwargs.items() if k in ("num_warps", "num_stages")}
    constants = {k: v for k, v in kwargs.items() if k not in options}
    given = dict(zip(kernel.arg_names, args, strict=False)) | constants
    constants |= {n: v for n, v in given.items() if type(v) is int and v == 1}  # as Triton does
    signature = {n: "constexpr" if n in constants else kind(given[n]) for n in kernel.arg_names}
    even = {n for n, v in given.items() if isinstance(v, torch.Tensor) or (type(v) is int and v % 16 == 0)}
    attrs = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(kernel.arg_names) if n in even - constants.keys()}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attrs)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def crowded(code):
    """Buffers that are too few for products that run on while the next tiles are copied; TTGIR of Hopper.

    Of three stages two are being copied: a product that is not waited for needs a third buffer for what it reads.
    Triton does not give it to a tile that has another use in the loop as well (triton #6691).
    """
    if "isAsync = true" not in code:
        return []
    return re.findall(r"ttg\.local_alloc\S* : \(\) -> !ttg\.memdesc<(2x\d+x\d+x\w+)", code)


def main(pairs):
    for capability, name in pairs:
        dtype = next(dtype for dtype, of in KINDS.items() if of == name)
        for kernel, args, kwargs in launches(dtype, capability >= 90):
            done = compile_launch(kernel, args, kwargs, capability)
            assert not crowded(done.asm["ttgir"]), (kernel.fn.__name__, crowded(done.asm["ttgir"]))
            assert done.metadata.shared <= MOST_SHARED[capability], (kernel.fn.__name__, done.metadata.shared)
            label = f"sm_{capability} {name} {kernel.fn.__module__.split('.')[-1]}.{kernel.fn.__name__}"
            print(f"ok {label}: {done.metadata.shared} bytes of shared memory", flush=True)


if __name__ == "__main__":
    main([(int(capability), name) for capability, name in (pair.split(":") for pair in sys.argv[1:])])
