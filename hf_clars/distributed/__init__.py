"""What several processes share: sums over them, and layer norms of weights that are split over them."""

from hf_clars.distributed.collectives import sum_over_ranks, world_size
from hf_clars.distributed.engine import Groups, GroupTensors, TensorHolder
from hf_clars.distributed.shards import LocalNorms, is_split, local_norms, local_part, on_device, whole_norms
from hf_clars.distributed.zero import ZeroPieces, zero_pieces
from hf_clars.distributed.zero_marks import (
    is_zeros,
    keeps_gradients_elsewhere,
    whole_gradient,
    whole_shape,
    zero_optimizer,
)

__all__ = [
    "GroupTensors",
    "Groups",
    "LocalNorms",
    "TensorHolder",
    "ZeroPieces",
    "is_split",
    "is_zeros",
    "keeps_gradients_elsewhere",
    "local_norms",
    "local_part",
    "on_device",
    "sum_over_ranks",
    "whole_gradient",
    "whole_norms",
    "whole_shape",
    "world_size",
    "zero_optimizer",
    "zero_pieces",
]
