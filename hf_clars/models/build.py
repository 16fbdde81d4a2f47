"""One way to every network: the project's own, libraries' architectures from scratch, and the Hub's."""

from __future__ import annotations

import copy
import difflib
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForImageClassification,
    MobileNetV2Config,
    PreTrainedConfig,
    PreTrainedModel,
    ResNetConfig,
    TimmWrapperConfig,
)

from hf_clars.errors import ConfigError, name_list
from hf_clars.models.cifar_resnet import CifarResNetConfig
from hf_clars.models.densenet import DenseNetBCConfig
from hf_clars.models.fully_connected import FullyConnectedConfig
from hf_clars.models.he_init import draw_convolutions
from hf_clars.models.mobilenet_v2 import MobileNetV2SmallConfig
from hf_clars.models.sigmoid_cnn import SigmoidCnnConfig
from hf_clars.models.small_cnn import SmallCnnConfig
from hf_clars.models.vgg import Vgg11Config


@dataclass(frozen=True)
class _Recipe:
    """What a short name stands for.

    Attributes:
        config: Class of the configuration.
        fixed: Settings that the name decides.
        redraw: Whether the library's first weights are replaced, see `draw_convolutions`.
    """

    config: type[PreTrainedConfig]
    fixed: dict[str, Any] = field(default_factory=dict)
    redraw: bool = False


_RECIPES: dict[str, _Recipe] = {
    "clars-cnn": _Recipe(SmallCnnConfig),
    "fcn5": _Recipe(FullyConnectedConfig),
    "cnn5": _Recipe(SigmoidCnnConfig),
    "resnet8": _Recipe(CifarResNetConfig, {"depth": 8}),
    "resnet20": _Recipe(CifarResNetConfig, {"depth": 20}),
    "resnet56": _Recipe(CifarResNetConfig, {"depth": 56}),
    "vgg11-bn": _Recipe(Vgg11Config, {"norm": "batch"}),
    "densenet-bc": _Recipe(DenseNetBCConfig),
    "mobilenet_v2-small": _Recipe(MobileNetV2SmallConfig),
    # Stride in the 3x3 convolution: "v1.5", which is what large-batch results are reported for.
    "resnet-50": _Recipe(
        ResNetConfig,
        {
            "layer_type": "bottleneck",
            "depths": [3, 4, 6, 3],
            "hidden_sizes": [256, 512, 1024, 2048],
            "embedding_size": 64,
            "downsample_in_bottleneck": False,
        },
    ),
    "mobilenet_v2": _Recipe(MobileNetV2Config, redraw=True),
    "densenet121": _Recipe(TimmWrapperConfig, {"architecture": "densenet121"}, redraw=True),
}

_ARGUMENTS = ("num_labels", "id2label", "label2id", "image_size", "num_channels")
"""Settings that `build_model` takes itself; a second value in `model_kwargs` would win or lose silently."""


def model_names() -> list[str]:
    """The short names that `build_model` knows; each means the architecture with new weights."""
    return list(_RECIPES)


def build_model(
    name_or_path: str,
    *,
    num_labels: int,
    image_size: int = 224,
    num_channels: int = 3,
    label_names: list[str] | None = None,
    from_scratch: bool = False,
    replace_head: bool = False,
    keep_numbers: bool = False,
    model_kwargs: dict[str, Any] | None = None,
) -> PreTrainedModel:
    """Build or load an image classifier.

    Args:
        name_or_path: A short name of `model_names()` (always new weights; write `./resnet20` for a folder of that
            name), a local folder, or a name on the Hub. Code from the Hub is never executed.
        num_labels: Classes of the data.
        image_size: Side of the images; only for new weights of architectures that depend on it.
        num_channels: Channels of the images.
        label_names: Names of the classes; None: their numbers.
        from_scratch: Take only the configuration of a folder or Hub name. Default False: its weights too.
        replace_head: Give pretrained weights a new classifier when the classes differ in number or name, or when they
            come without one. Default False. A classifier for the same classes is kept either way.
        keep_numbers: Keep a classifier whose class names differ from the data's, because the numbers mean the same.
            Default False.
        model_kwargs: Settings of the model's configuration; for pretrained weights also options of `from_pretrained`
            such as `revision`. timm's arguments for `densenet121` go under `model_args`.

    Returns:
        The model, in train mode.

    Raises:
        ConfigError: If the model is not found, its classes or channels do not fit, a setting is unknown or given twice,
            or a package is missing.
    """
    labels = _labels(num_labels, label_names)
    more = _checked_kwargs(model_kwargs)
    if name_or_path in _RECIPES:
        return _from_recipe(name_or_path, {"image_size": image_size, "num_channels": num_channels}, labels, more)
    if from_scratch:
        config, unknown = _fetch_config(name_or_path, more)
        if unknown:
            raise _unknown_settings(name_or_path, list(unknown))
        shape = {"image_size": image_size, "num_channels": num_channels}
        config.update({**labels, **{key: value for key, value in shape.items() if hasattr(config, key)}})
        return _new(name_or_path, config)
    config, _ = _fetch_config(name_or_path, more)
    _check_fit(name_or_path, config, num_labels, num_channels, replace_head=replace_head)
    theirs = _class_names(config)
    other = label_names is not None and theirs is not None and theirs != label_names and not keep_numbers
    if other and not replace_head:
        assert theirs is not None
        raise _other_names(name_or_path, theirs, label_names or [])
    model = _pretrained(name_or_path, {"num_labels": num_labels, **labels, **more}, replace_head=replace_head)
    if other and config.num_labels == num_labels:
        _renew_classifier(model)
    return model


def pretrained_classes(
    name_or_path: str, *, from_scratch: bool = False, model_kwargs: dict[str, Any] | None = None
) -> list[str] | None:
    """The classes that pretrained weights tell apart, in the order of their outputs.

    Args:
        name_or_path: As in `build_model`.
        from_scratch: Likewise.
        model_kwargs: Likewise.

    Returns:
        Their names; None for new weights, and where the checkpoint only numbers its classes.

    Raises:
        ConfigError: There is no such model.
    """
    if name_or_path in _RECIPES or from_scratch:
        return None
    return _class_names(_fetch_config(name_or_path, _checked_kwargs(model_kwargs))[0])


def _labels(num_labels: int, names: list[str] | None) -> dict[str, Any]:
    names = names or [str(i) for i in range(num_labels)]
    if len(names) != num_labels:
        raise ConfigError(f"num_labels={num_labels}, but {len(names)} label_names were given: make the two agree.")
    return {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}


def _checked_kwargs(model_kwargs: dict[str, Any] | None) -> dict[str, Any]:
    more = dict(model_kwargs or {})
    if "trust_remote_code" in more:
        raise ConfigError(
            "model_kwargs has trust_remote_code, but this package never runs code from the Hub: remove it, and build "
            "such a model in a script of your own."
        )
    if twice := [key for key in _ARGUMENTS if key in more]:
        raise ConfigError(
            f"model_kwargs has {', '.join(twice)}, which the data decides: set it there; build_model takes it directly."
        )
    return more


def _from_recipe(name: str, shape: dict[str, Any], labels: dict[str, Any], more: dict[str, Any]) -> PreTrainedModel:
    recipe = _RECIPES[name]
    if decided := [key for key in recipe.fixed if key in more]:
        raise ConfigError(
            f"model_kwargs has {', '.join(decided)}, which the name {name!r} already decides: leave it out, or take "
            f"the class {recipe.config.__name__}."
        )
    known = recipe.config()
    if unknown := [key for key in more if not hasattr(known, key)]:
        raise _unknown_settings(name, unknown)
    settings = {key: value for key, value in shape.items() if hasattr(known, key)}
    if recipe.config is TimmWrapperConfig:
        arguments = more.pop("model_args", None) or {}
        settings["model_args"] = {**arguments, "in_chans": shape["num_channels"]}  # timm's word for num_channels
    model = _new(name, recipe.config(**settings, **recipe.fixed, **more, **labels))
    if recipe.redraw:
        draw_convolutions(model)
    return model


def _unknown_settings(name: str, unknown: list[str]) -> ConfigError:
    return ConfigError(
        f"model_kwargs has {', '.join(unknown)}, which {name} does not know: correct the spelling or remove it."
    )


def _new(name: str, config: PreTrainedConfig) -> PreTrainedModel:
    try:
        return AutoModelForImageClassification.from_config(config, trust_remote_code=False).train()
    except ImportError as error:
        raise ConfigError(
            f"{name} needs a package that is not installed ({_first_line(error)}); for the networks of timm: "
            "pip install 'hf_clars[timm]'."
        ) from error
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"{name} is no image classifier that transformers can build: {_first_line(error)}") from error


def _fetch_config(name_or_path: str, more: dict[str, Any]) -> tuple[PreTrainedConfig, dict[str, Any]]:
    try:
        return AutoConfig.from_pretrained(name_or_path, trust_remote_code=False, return_unused_kwargs=True, **more)
    except ConfigError:
        raise
    except (OSError, ValueError) as error:
        near = difflib.get_close_matches(name_or_path, model_names(), n=1, cutoff=0.5)
        hint = f"Did you mean {near[0]!r}? " if near else ""
        raise ConfigError(
            f"There is no model {name_or_path!r}: it is no short name, no local folder with a config.json, and the Hub "
            f"did not give it ({_first_line(error)}). {hint}Short names are {', '.join(model_names())}."
        ) from error


def _check_fit(name: str, config: PreTrainedConfig, num_labels: int, num_channels: int, *, replace_head: bool) -> None:
    if config.num_labels != num_labels and not replace_head:
        raise ConfigError(
            f"{name} was trained for {config.num_labels} classes, but the data has {num_labels}. Set replace_head to "
            "true to give it a new classifier, from_scratch to true to take its architecture only, or use other data."
        )
    if getattr(config, "num_channels", num_channels) != num_channels:
        raise ConfigError(
            f"{name} was trained on images of {config.num_channels} channels, but num_channels is {num_channels}. Set "
            f"num_channels to {config.num_channels}, or from_scratch to true to take its architecture only."
        )


def _class_names(config: PreTrainedConfig) -> list[str] | None:
    """One name an output; None where they are numbers only."""
    named = {int(number): str(name) for number, name in (config.id2label or {}).items()}
    names = [named.get(number, "") for number in range(config.num_labels or 0)]
    return None if all(name in (f"LABEL_{i}", str(i), "") for i, name in enumerate(names)) else names


def _other_names(name: str, theirs: list[str], data: list[str]) -> ConfigError:
    new = [repr(label) for label in data if label not in theirs]
    unknown = f" ({name_list(new, 3)} not among the former)" if new else " (another order)"
    return ConfigError(
        f"{name} tells apart {name_list(theirs)}, but the classes of the data are {name_list(data)}{unknown}. Set "
        "replace_head to true to give it a new classifier for the data's classes. Set keep_numbers to true if the "
        "numbers mean the same and only the names differ."
    )


def _renew_classifier(model: PreTrainedModel) -> None:
    """Give the classifier new weights. It is whatever has another shape in a network with one class more."""
    config = copy.deepcopy(model.config)
    fresh = AutoModelForImageClassification.from_config(config, trust_remote_code=False).state_dict()
    config.num_labels = (config.num_labels or 0) + 1
    wider = AutoModelForImageClassification.from_config(config, trust_remote_code=False).state_dict()
    with torch.no_grad():
        for key, value in model.state_dict().items():
            if value.shape != wider[key].shape:
                value.copy_(fresh[key])


def _pretrained(name: str, settings: dict[str, Any], *, replace_head: bool) -> PreTrainedModel:
    try:
        model, info = AutoModelForImageClassification.from_pretrained(
            name, **settings, ignore_mismatched_sizes=replace_head, trust_remote_code=False, output_loading_info=True
        )
    except ImportError as error:
        raise ConfigError(f"{name} needs a package that is not installed: {_first_line(error)}") from error
    except OSError as error:
        raise ConfigError(f"The weights of {name} could not be read: {_first_line(error)}") from error
    missing = sorted(set(info["missing_keys"]) & {key for key, _ in model.named_parameters()})
    if missing and not replace_head:
        raise ConfigError(
            f"{name} has no weights for {', '.join(missing[:4])}{' and more' if len(missing) > 4 else ''}: it comes "
            "without a trained classifier. Set replace_head to true to train a new one."
        )
    return model.train()


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
