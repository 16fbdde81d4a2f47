"""What several processes share: sums over them, and layer norms of weights that are split over them."""

from hf_clars.distributed.collectives import sum_over_ranks, world_size
from hf_clars.distributed.shards import LocalNorms, local_norms, on_device
from hf_clars.distributed.zero import ZeroPieces, keeps_gradients_elsewhere, zero_pieces

__all__ = [
    "LocalNorms",
    "ZeroPieces",
    "keeps_gradients_elsewhere",
    "local_norms",
    "on_device",
    "sum_over_ranks",
    "world_size",
    "zero_pieces",
]
