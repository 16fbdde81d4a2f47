"""`RunSummary`: all that a model card says of a run, as plain values."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from hf_clars.theory import BatchAdvice


@dataclass(kw_only=True)
class RunSummary:
    """The facts of one training run.

    Attributes:
        model_name: The title of the card and the name in its model-index.
        architecture: The model class, as "ResNetForImageClassification".
        parameters: The number of trainable parameters.
        dataset: The data's name, for people.
        method: A name in `hf_clars.optim.METHODS`.
        recipe: How it was trained: any JSON-like values by name; the usual names ("global_batch", "micro_batch",
            "accumulation", "processes", "gamma_scale", "eta", "momentum", "schedule", "warmup_epochs", "epochs",
            "weight_decay", "norm_samples", "precision", "seed") come first in the table and are spelled out.
        results: Numbers by the names that Trainer gives them in `all_results.json` ("eval_accuracy", 0 to 1,
            "eval_loss", "train_loss", "train_runtime", "train_samples_per_second" ...).
        dataset_id: The data set's id on the Hub; default None: it is not on the Hub, or not known to be.
        dataset_config: The configuration of the data set that was used; default None: there is but one.
        eval_split: The split that the results are of.
        eval_task: The task's id in the `eval.yaml` of a data set that is a benchmark on the Hub; default None: the
            configuration's name, or "default".
        splits: The number of images by split.
        hardware: The machine in words.
        versions: Library versions by name.
        history: One mapping per epoch ("epoch", "eval_accuracy", "eval_loss", "train_loss" ...; any may lack).
        base_model: Hub id of the model that training started from; default None: none, or none is known.
        origin: What training started from where `base_model` does not say it: "scratch" (new weights) or "checkpoint"
            (weights that are not on the Hub). Default None: not known, and the card says nothing of it.
        license: An identifier of `hf_clars.hub.licences`; default None: the card says that none was chosen. Which
            licence weights have is for those to say who trained them (and for their data); code does not guess it.
        repo_id: Where the model will be on the Hub; default None: the card tells the reader to put the name in.
        batch_advice: What the layer-rate log says of the batch size; default None: the card does not mention it.
        task: The Hub's word for what the model does. Default "image-classification"; None: the card says only that it
            is a network.
        library: The Hub's word for the library that loads it. Default "transformers"; None: it is a bare module, whose
            class the reader must have.
        needs_import: Whether `import hf_clars` must come before loading (the project's own architectures).
    """

    model_name: str
    architecture: str
    parameters: int
    dataset: str
    method: str
    recipe: Mapping[str, Any]
    results: Mapping[str, float]
    dataset_id: str | None = None
    dataset_config: str | None = None
    eval_split: str | None = None
    eval_task: str | None = None
    splits: Mapping[str, int] = field(default_factory=dict)
    hardware: str = "not recorded"
    versions: Mapping[str, str] = field(default_factory=dict)
    history: Sequence[Mapping[str, float]] = ()
    base_model: str | None = None
    origin: str | None = None
    license: str | None = None
    repo_id: str | None = None
    batch_advice: BatchAdvice | None = None
    task: str | None = "image-classification"
    library: str | None = "transformers"
    needs_import: bool = False
