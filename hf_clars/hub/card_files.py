"""A run's card on disk, and the facts it was made of, so that it can be made again."""

from __future__ import annotations

import json
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from hf_clars.errors import HfClarsError
from hf_clars.hub.errors import HubError
from hf_clars.hub.eval_results import write_eval_results
from hf_clars.hub.model_card import build_model_card
from hf_clars.hub.run_files import CARD, find_pages, find_pictures
from hf_clars.hub.summary import RunSummary
from hf_clars.theory import BatchAdvice, advise

FACTS = "run_summary.json"


def write_card(folder: str | Path, summary: RunSummary, *, batch_advice: bool = False) -> Path:
    """Write the card with the folder's pictures, `.eval_results`, and the facts themselves (`run_summary.json`).

    Args:
        folder: The run's folder.
        summary: The facts.
        batch_advice: Whether the card says what batch size the log speaks for. Default False.

    Returns:
        Path of the card, `README.md`.

    Raises:
        HubError: See `build_model_card`.
    """
    root = Path(folder)
    advice = summary.batch_advice or (_batch_advice(root, summary) if batch_advice else None)
    shown = replace(summary, batch_advice=advice)
    card = build_model_card(shown, pictures=find_pictures(root), pages=find_pages(root))
    card.save(root / CARD)
    write_eval_results(root, summary)
    facts = asdict(replace(summary, batch_advice=None))  # follows from the log
    (root / FACTS).write_text(json.dumps(facts, indent=1, default=float) + "\n", encoding="utf-8")
    return root / CARD


def read_facts(folder: str | Path, **changes: Any) -> RunSummary:
    """Read the facts that `write_card` left.

    Args:
        folder: The run's folder.
        changes: Facts to replace; None keeps what the run said.

    Returns:
        The facts.

    Raises:
        HubError: There are none, or the file is damaged.
    """
    path = Path(folder).expanduser() / FACTS
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        known = {field.name for field in fields(RunSummary)}
        if not isinstance(found, dict) or set(found) - known:
            raise ValueError("it does not hold the facts of a run")
        return RunSummary(**found | {name: value for name, value in changes.items() if value is not None})
    except FileNotFoundError as error:
        raise HubError(
            f"There is no {path}, from which the card could be made: training writes it at its end. Give the folder "
            "of a finished run."
        ) from error
    except (OSError, ValueError, TypeError) as error:
        raise HubError(f"The facts of the run in {path} cannot be read: {error}. Was the file edited?") from error


def _batch_advice(folder: Path, summary: RunSummary) -> BatchAdvice | None:
    """What the log says of the batch size; a run without samples' norms, or with too few of them, has no advice."""
    try:
        return advise(folder, data_size=next(iter(summary.splits.values()), None))  # the training split comes first
    except HfClarsError:
        return None
