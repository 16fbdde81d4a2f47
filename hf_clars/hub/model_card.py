"""The model card of a run: metadata that the Hub understands, and a body that people do."""

import math
import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.utils import HFValidationError, validate_repo_id

from hf_clars.hub.card_text import card_body
from hf_clars.hub.errors import HubError
from hf_clars.hub.licences import licence_identifier
from hf_clars.hub.markdown import one_line
from hf_clars.hub.summary import RunSummary

METRICS = {  # name in Trainer's results: (the Hub's metric, its name for people)
    "eval_accuracy": ("accuracy", "Top-1 accuracy"),
    "eval_top5_accuracy": ("accuracy", "Top-5 accuracy"),
    "eval_loss": ("loss", "Evaluation loss"),
}
"""The results that go to the card's model-index; the table in the body has all."""


def build_model_card(
    summary: RunSummary, *, pictures: Sequence[str | Path] = (), pages: Sequence[str | Path] = ()
) -> ModelCard:
    """Return the model card of a run; `card.save(folder / "README.md")` writes it.

    The metadata is `huggingface_hub.ModelCardData`: library, pipeline and tags, the licence and base model if given,
    the data set only by its Hub id, and the results as model-index. Names may hold any characters: they are put on one
    line and shown as they are. An absolute path in a value is cut to its last part.

    Args:
        summary: The facts of the run.
        pictures: Image files, relative to the card's folder ("layer_rates.png"), in the order to be shown.
        pages: Interactive pages (html) to link to, likewise.

    Raises:
        HubError: There is no name, a Hub id is no such id, the Hub knows no such licence, a file's path leaves the
            card's folder, or a result is no number.
    """
    for role, hub_id in (
        ("dataset_id", summary.dataset_id),
        ("base_model", summary.base_model),
        ("repo_id", summary.repo_id),
    ):
        check_hub_id(role, hub_id)
    if not one_line(summary.model_name):
        raise HubError("A model card needs a model_name with at least one visible character.")
    links = [_relative_link(picture) for picture in pictures]
    page_links = [_relative_link(page) for page in pages]
    data = ModelCardData(
        model_name=one_line(summary.model_name),
        library_name=summary.library,
        pipeline_tag=summary.task,
        license=None if summary.license is None else licence_identifier(summary.license),
        base_model=summary.base_model,
        datasets=None if summary.dataset_id is None else [summary.dataset_id],
        metrics=["accuracy"] if any("accuracy" in key for key in summary.results) else None,
        tags=[
            *([summary.task] if summary.task else []),
            "hf_clars",
            one_line(summary.method).lower(),
            "large-batch-training",
        ],
        eval_results=_eval_results(summary) or None,
    )
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{card_body(summary, links, page_links)}")


def _eval_results(summary: RunSummary) -> list[EvalResult]:
    """Return the results that the Hub has words for; NaN and infinities are no results."""
    if summary.task is None:  # a result there is one of a task
        return []
    name = one_line(summary.dataset)
    # The Hub wants some identifier even of data that it does not have.
    identifier = summary.dataset_id or re.sub(r"[^\w.-]+", "-", name.lower()).strip("-") or "unknown"
    found = []
    for key, (metric, title) in METRICS.items():
        if key not in summary.results:
            continue
        value = _number(key, summary.results[key])
        if math.isfinite(value):
            found.append(
                EvalResult(
                    task_type=summary.task,
                    task_name=summary.task.replace("-", " ").capitalize(),
                    dataset_type=identifier,
                    dataset_name=name,
                    dataset_config=_optional_line(summary.dataset_config),
                    dataset_split=_optional_line(summary.eval_split),
                    metric_type=metric,
                    metric_name=title,
                    metric_value=value,
                )
            )
    return found


def _optional_line(text: str | None) -> str | None:
    return None if text is None else one_line(text)


def _number(key: str, value: object) -> float:
    try:
        return float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError) as error:
        raise HubError(f"The result {key!r} of the run must be a number, not {value!r}.") from error


def check_hub_id(role: str, hub_id: str | None) -> None:
    """Raise unless `hub_id` can be an id on the Hub, or is None.

    Args:
        role: What the id is for, in the words of the message ("repo_id").
        hub_id: "owner/name", or a name.

    Raises:
        HubError: With what an id looks like.
    """
    try:
        if hub_id is not None:
            validate_repo_id(hub_id)
    except HFValidationError as error:
        raise HubError(
            f"{role}={hub_id!r} is no id on the Hub ({error}). Give 'owner/name', or None if it is not on the Hub."
        ) from error


def _relative_link(file: str | Path) -> str:
    text = str(file)
    path = PurePosixPath(text.replace("\\", "/"))
    if path.is_absolute() or PureWindowsPath(text).drive or ".." in path.parts or not path.name:
        raise HubError(
            f"The file {text!r} must lie in the card's folder or below: give its path relative to that folder."
        )
    return path.as_posix()
