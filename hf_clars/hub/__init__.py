"""What the Hub shows of a trained model, and how it gets there: card, results, push."""

from hf_clars.hub.card_files import read_facts, write_card
from hf_clars.hub.errors import HubError
from hf_clars.hub.model_card import build_model_card
from hf_clars.hub.push import Push, push_run
from hf_clars.hub.run_files import shared_files
from hf_clars.hub.summary import RunSummary

__all__ = [
    "HubError",
    "Push",
    "RunSummary",
    "build_model_card",
    "push_run",
    "read_facts",
    "shared_files",
    "write_card",
]
