"""What functions do with axes, by their names; see `place.py`."""

from functools import cache

import torch

#: Read numbers in order.
IN_ORDER = ("view", "reshape", "flatten", "unflatten", "_unsafe_view", "view_as", "reshape_as")
#: Name axes, and give a view.
NAMES_AXES = (
    *(
        "transpose",
        "permute",
        "swapaxes",
        "swapdims",
        "movedim",
        "moveaxis",
        "t",
        "T",
        "mT",
        "H",
        "mH",
        "numpy_T",
        "unsqueeze",
        "squeeze",
    ),
    *("expand", "expand_as", "select", "narrow", "getitem", "slice", "chunk", "split", "unbind", "adjoint"),
    *("getattr", "tensor_split", "diagonal", "broadcast_to"),
)
SPREADS = ("expand", "expand_as", "repeat", "broadcast_to", "tile")
#: Keep the shape, and each number's sample.
KEEP_SHAPES = (
    *("contiguous", "clone", "to", "type", "type_as", "float", "double", "half", "bfloat16", "long", "int", "bool"),
    *("detach", "fill", "zero", "tril", "triu", "zeros_like", "ones_like", "full_like", "rand_like", "randn_like"),
    *("layer_norm", "rms_norm", "group_norm", "instance_norm", "batch_norm", "local_response_norm", "normalize"),
    *("softmax", "log_softmax", "softmin", "gumbel_softmax", "cumsum", "cumprod", "logcumsumexp"),
    *("dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_alpha_dropout"),
    *("_softmax", "_log_softmax", "empty_like", "bernoulli", "requires_grad"),
)
#: Keep the first axis of their first operand, and make others of the rest.
KEEP_THE_FIRST = (
    *(f"{of}{n}d" for n in (1, 2, 3) for of in ("conv", "conv_transpose", "avg_pool", "max_pool", "lp_pool")),
    *(f"adaptive_{of}_pool{n}d" for n in (1, 2, 3) for of in ("avg", "max")),
    *("interpolate", "upsample", "pixel_shuffle", "pixel_unshuffle", "channel_shuffle", "grid_sample", "affine_grid"),
    *("embedding_bag", "cosine_similarity", "unfold", "fold", "view_as_complex", "view_as_real"),
    *("gru_cell", "rnn_tanh_cell", "rnn_relu_cell"),
)
#: Of these every axis before the last is kept.
OF_THE_LAST = ("pad", "glu", "one_hot", "bilinear")
#: What goes along one axis: where its arguments name that, and what it is if they do not.
REDUCTIONS = {
    **dict.fromkeys(("sum", "mean", "amax", "amin", "logsumexp", "prod", "nansum", "nanmean", "all", "any"), 1),
    **dict.fromkeys(("max", "min", "argmax", "argmin", "median", "mode", "var", "std", "var_mean", "std_mean"), 1),
    **dict.fromkeys(("norm", "vector_norm", "linalg_norm", "linalg_vector_norm", "kthvalue"), 2),
    **{"count_nonzero": 1, "nanmedian": 1, "aminmax": 99},
}
ALONG = {
    **dict.fromkeys(("sort", "argsort", "msort", "gather", "index_select", "scatter", "scatter_add", "flip"), 1),
    **dict.fromkeys(("index_add", "index_copy", "index_fill", "scatter_reduce"), 1),
    **dict.fromkeys(("topk", "take_along_dim", "roll", "cross", "rot90"), 2),
    **{f"fft_{kind}fft{axes}": 2 for kind in ("", "i", "r", "ir", "h", "ih") for axes in ("", "2", "n")},
}
ALONG_THE_LAST = {
    **dict.fromkeys(("sort", "argsort", "topk"), -1),
    **{name: (-2, -1) if name.endswith("2") else -1 for name in ALONG if name.startswith("fft") and name[-1] != "n"},
}
#: Bring axes that the operands share to the front on the way to their result: heads or experts, and not the samples.
TURNS_INSIDE = ("einsum",)
JOINS = ("cat", "concat", "concatenate", "hstack", "vstack", "dstack", "column_stack")


#: Python's names of functions that torch calls otherwise.
_OPERATORS = {"truediv": "div", "true_divide": "div", "floordiv": "div", "floor_divide": "div", "mod": "remainder"}
_OPERATORS |= {"and": "bitwise_and", "or": "bitwise_or", "xor": "bitwise_xor", "invert": "bitwise_not"}
_OPERATORS |= {"and_": "bitwise_and", "or_": "bitwise_or"}
_MADE_OF_SUCH = (
    *("hardswish", "softsign", "logsigmoid", "tanhshrink", "prelu", "copy", "complex", "polar", "conj", "real", "imag"),
    *("multiply", "subtract", "divide", "absolute", "negative", "greater", "less", "greater_equal", "less_equal"),
    *("not_equal", "arccos", "arcsin", "arctan", "arctan2", "fix", "isclose", "special_expit", "special_erf"),
)
#: What functions call what they take first, in its order, where it is given by name.
BY_NAME = (
    *("input", "tensors", "mat1", "mat", "batch1", "x1", "mat2", "batch2", "vec", "x2", "other", "weight"),
    *("pad", "repeats"),
)


@cache
def is_pointwise(name: str) -> bool:
    """Whether a function computes number by number, its operands broadcast: torch marks these.

    Args:
        name: Of the function, or of an operator that writes into its first operand, or takes it last.
    """
    for plain in (name, name.removeprefix("i"), name.removeprefix("r")):
        packet = getattr(torch.ops.aten, _OPERATORS.get(plain, plain), None)
        if packet is not None and any(torch.Tag.pointwise in getattr(packet, o).tags for o in packet.overloads()):
            return True
    return name in _MADE_OF_SUCH


def is_view(name: str) -> bool:
    """Whether a function's result has the numbers of its operand, and no others."""
    return name in (*IN_ORDER, *NAMES_AXES, *SPREADS)
