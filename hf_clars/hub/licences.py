"""The words that the Hub knows for licences."""

from __future__ import annotations

import difflib

from hf_clars.hub.errors import HubError

# fmt: off
IDENTIFIERS = frozenset((
    "afl-3.0", "agpl-3.0", "apache-2.0", "apple-amlr", "apple-ascl", "artistic-2.0", "bigcode-openrail-m",
    "bigscience-bloom-rail-1.0", "bigscience-openrail-m", "bsd", "bsd-2-clause", "bsd-3-clause",
    "bsd-3-clause-clear", "bsl-1.0", "c-uda", "cc", "cc-by-2.0", "cc-by-2.5", "cc-by-3.0", "cc-by-4.0",
    "cc-by-nc-2.0", "cc-by-nc-3.0", "cc-by-nc-4.0", "cc-by-nc-nd-3.0", "cc-by-nc-nd-4.0", "cc-by-nc-sa-2.0",
    "cc-by-nc-sa-3.0", "cc-by-nc-sa-4.0", "cc-by-nd-4.0", "cc-by-sa-3.0", "cc-by-sa-4.0", "cc0-1.0",
    "cdla-permissive-1.0", "cdla-permissive-2.0", "cdla-sharing-1.0", "creativeml-openrail-m",
    "deepfloyd-if-license", "ecl-2.0", "epl-1.0", "epl-2.0", "etalab-2.0", "eupl-1.1", "eupl-1.2",
    "fair-noncommercial-research-license", "gemma", "gfdl", "gpl", "gpl-2.0", "gpl-3.0", "grok2-community",
    "h-research", "intel-research", "isc", "lgpl", "lgpl-2.1", "lgpl-3.0", "lgpl-lr", "llama2", "llama3", "llama3.1",
    "llama3.2", "llama3.3", "llama4", "lppl-1.3c", "mit", "mpl-2.0", "ms-pl", "ncsa", "odbl", "odc-by", "ofl-1.1",
    "openmdw-1.0", "openmdw-1.1", "openrail", "openrail++", "osl-3.0", "other", "pddl", "postgresql", "unknown",
    "unlicense", "wtfpl", "zlib",
))
# fmt: on
"""As https://huggingface.co/docs/hub/repositories-licenses lists them; huggingface_hub 2.4 has no such list. One that
the Hub adds later must be added here; until then "other" stands for it."""


def licence_identifier(word: str) -> str:
    """The Hub's identifier of a licence.

    Args:
        word: In any case: "Apache-2.0".

    Returns:
        As the Hub spells it: "apache-2.0".

    Raises:
        HubError: The Hub knows no such licence; the message has the nearest ones.
    """
    found = word.strip().lower()
    if found in IDENTIFIERS:
        return found
    near = difflib.get_close_matches(found.replace(" ", "-"), sorted(IDENTIFIERS), n=3, cutoff=0.5)
    hint = f"Did you mean {' or '.join(map(repr, near))}? " if near else ""
    raise HubError(
        f"license={word!r} is no licence that the Hub knows. {hint}Take an identifier of "
        "https://huggingface.co/docs/hub/repositories-licenses, or 'other'."
    )
