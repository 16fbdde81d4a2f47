"""What an image classifier's run refuses once data and model are there, and before anything is trained."""

from __future__ import annotations

import torch
from torch import nn
from transformers.integrations import is_deepspeed_zero3_enabled

from hf_clars.errors import ConfigError
from hf_clars.image_classification.arguments import DataArguments
from hf_clars.metrics.top_k import K
from hf_clars.trainer.arguments import ClarsTrainingArguments

MEASURED_WITH_EACH = ("loss", "runtime", "samples_per_second", "steps_per_second", "model_preparation_time")
"""What Trainer measures in every evaluation."""


def check_for_images(args: ClarsTrainingArguments, classes: int) -> None:
    """Refuse a metric that no evaluation of this run has, a best model that nothing would choose, noise for words.

    Args:
        args: The run's.
        classes: How many the data has.

    Raises:
        ConfigError: Naming the metrics that there are.
    """
    names = ["loss", "accuracy", *(["top5_accuracy"] if classes >= K else [])]
    metric = args.metric_for_best_model
    if metric is not None and metric.removeprefix("eval_") not in (*names, *MEASURED_WITH_EACH):
        raise ConfigError(
            f"metric_for_best_model={metric} is measured in no evaluation of this run: choose one of "
            f"{', '.join(names)}."
        )
    if args.load_best_model_at_end and str(getattr(args.eval_strategy, "value", args.eval_strategy)) == "no":
        raise ConfigError(
            "load_best_model_at_end has no effect without evaluations and checkpoints during training: set "
            "eval_strategy and save_strategy to epoch or steps, or leave it out."
        )
    if args.neftune_noise_alpha is not None:
        raise ConfigError(
            "neftune_noise_alpha adds noise to the embeddings of words, which image classifiers do not have: leave it "
            "out."
        )


def check_takes_images(model: nn.Module, args: DataArguments, *, name: str) -> None:
    """Show the model one black image, so that a size it cannot take is said before data are read for hours.

    Its weights, running statistics and the random numbers stay as they are.

    Args:
        model: As built, on the host.
        args: Size and channels of the images.
        name: What the model is called in the message.

    Raises:
        ConfigError: With the model's own reason.
    """
    if is_deepspeed_zero3_enabled():  # the weights lie in pieces until the engine is there
        return
    parameter = next(model.parameters())
    image = torch.zeros(1, args.num_channels, args.image_size, args.image_size, dtype=parameter.dtype)
    training = model.training
    model.eval()
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            model(pixel_values=image.to(parameter.device))
    except Exception as error:  # every model has its own words for it
        raise ConfigError(
            f"{name} cannot take images of {args.image_size} x {args.image_size} pixels and {args.num_channels} "
            f"channels ({' '.join(str(error).split()).rstrip('.')}): set image_size to what the model was made for, or "
            "from_scratch to true to build it anew for this size."
        ) from error
    finally:
        model.train(training)
