"""The layer rules that come with the package, a file a family; importing this registers them."""

from hf_clars.grad_norms.rules import (  # noqa: F401
    bilinear,
    convolution,
    embedding,
    linear,
    normalization,
    recurrent,
    scales,
    timm_layers,
    transformers_embeddings,
    transformers_layers,
)
