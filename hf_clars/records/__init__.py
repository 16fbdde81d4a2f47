"""What a run leaves besides the model: the layer-rate log and the optimizer state, as safetensors."""

from hf_clars.records.files import RecordError
from hf_clars.records.layer_rates import LayerRateLog
from hf_clars.records.log_file import QUANTITIES, SIGNAL_QUANTITIES
from hf_clars.records.optimizer_state import load_optimizer_state, save_optimizer_state

__all__ = [
    "QUANTITIES",
    "SIGNAL_QUANTITIES",
    "LayerRateLog",
    "RecordError",
    "load_optimizer_state",
    "save_optimizer_state",
]
