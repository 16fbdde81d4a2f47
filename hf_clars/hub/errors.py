"""The error of everything that concerns the Hub."""

from hf_clars.errors import HfClarsError


class HubError(HfClarsError):
    """A card cannot be made, or a run cannot be pushed; the message says why and what to do."""
