"""One YAML file plus command-line overrides, with a wrong key named beside the nearest right one."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import sys
import textwrap
import typing
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from transformers import HfArgumentParser, TrainingArguments

from hf_clars.errors import ConfigError, HfClarsError
from hf_clars.trainer.yaml_settings import read_settings

_NOT_GIVEN = object()

OTHER_WORDS = {
    "accumulation_steps": ("gradient_accumulation_steps",),
    "amp": ("bf16",),
    "base_lr": ("gamma_base",),
    "batch": ("per_device_train_batch_size", "global_batch_size"),
    "batch_size": ("per_device_train_batch_size", "global_batch_size"),
    "beta": ("momentum",),
    "beta1": ("momentum",),
    "betas": ("momentum",),
    "bs": ("per_device_train_batch_size", "global_batch_size"),
    "checkpoint": ("resume_from_checkpoint",),
    "data": ("dataset",),
    "data_dir": ("dataset",),
    "data_path": ("dataset",),
    "dataset_name": ("dataset",),
    "device": ("use_cpu",),
    "epoch": ("num_train_epochs",),
    "epochs": ("num_train_epochs",),
    "eval_batch_size": ("per_device_eval_batch_size",),
    "gamma": ("learning_rate",),
    "gamma_scale": ("learning_rate",),
    "grad_accum": ("gradient_accumulation_steps",),
    "img_size": ("image_size",),
    "label_smoothing": ("label_smoothing_factor",),
    "lr": ("learning_rate",),
    "lr_schedule": ("lr_scheduler_type",),
    "max_epochs": ("num_train_epochs",),
    "mean": ("image_mean",),
    "mixed_precision": ("bf16",),
    "model_name_or_path": ("model",),
    "network": ("model",),
    "num_epochs": ("num_train_epochs",),
    "num_workers": ("dataloader_num_workers",),
    "optimizer": ("method",),
    "out_dir": ("output_dir",),
    "output": ("output_dir",),
    "precision": ("bf16",),
    "resume": ("resume_from_checkpoint",),
    "samples": ("norm_samples",),
    "save_dir": ("output_dir",),
    "scheduler": ("lr_scheduler_type",),
    "std": ("image_std",),
    "steps": ("max_steps",),
    "total_batch_size": ("global_batch_size",),
    "train_batch_size": ("per_device_train_batch_size", "global_batch_size"),
    "val_split": ("eval_split",),
    "warmup": ("warmup_epochs",),
    "warmup_ratio": ("warmup_epochs",),
    "wd": ("weight_decay",),
    "workers": ("dataloader_num_workers",),
}
"""What other projects call a setting, where the nearest spelling here would be another thing."""


class _Parser(HfArgumentParser):
    """An argument parser that raises where argparse would end the process, and leaves required settings to the file."""

    def add_argument(self, *names: Any, **settings: Any) -> argparse.Action:
        """As argparse's, but nothing is required of the command line: the file may have it."""
        return super().add_argument(*names, **{**settings, "required": False} if "required" in settings else settings)

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"The settings do not fit: {message}. --help lists every setting.")


def _recipes() -> Path:
    """The folder of recipes: in the wheel a part of the package, in a checkout beside it (see setup.py)."""
    package = Path(__file__).parents[1]
    installed = package / "configs"
    return installed if installed.is_dir() else package.parent / "configs"


RECIPES = _recipes()

COMMON = [
    "output_dir",
    "num_train_epochs",
    "max_steps",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "weight_decay",
    "lr_scheduler_kwargs",
    "bf16",
    "dataloader_num_workers",
    "eval_strategy",
    "save_strategy",
    "save_total_limit",
    "resume_from_checkpoint",
    "report_to",
    "seed",
    "use_cpu",
]
"""Settings of transformers' TrainingArguments that the short help shows beside this project's own."""


class _ShortHelp(argparse.Action):
    """Print this project's settings and the commonest of transformers', one line each, and end."""

    def __init__(self, option_strings: Sequence[str], dest: str, help: str | None = None) -> None:
        super().__init__(option_strings, dest=argparse.SUPPRESS, default=argparse.SUPPRESS, nargs=0, help=help)

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        assert isinstance(parser, _Parser)
        print(f"{parser.prog} --config FILE.yaml|RECIPE [--SETTING VALUE ...]\n")
        print(textwrap.fill(parser.description or "", 110))
        print(textwrap.fill(f"Recipes: {', '.join(recipe_names())}.", 110))
        for kind in parser.dataclass_types:
            print(f"\n{(kind.__doc__ or kind.__name__).splitlines()[0]}")
            bases = [base for base in kind.__mro__ if base not in (TrainingArguments, object)]
            own = {name for base in bases for name in vars(base).get("__annotations__", {})}
            for field in dataclasses.fields(kind):
                if field.init and (field.name in own or field.name in COMMON):
                    print(_help_line(field))
        print("\n--help_all shows the rest of transformers' TrainingArguments.")
        parser.exit()


def _help_line(field: dataclasses.Field[Any]) -> str:
    """A setting, its whole help and its default; long texts go on below themselves."""
    default = field.default if field.default is not dataclasses.MISSING else None
    shown = "" if default is None or default == "" else f" [{getattr(default, 'value', default)}]"
    text = str(field.metadata.get("help", "")).split("\n")[0]
    if field.name in COMMON:
        text = text.split(". ")[0]  # transformers explains at length
    name = f"  --{field.name:<28} "
    return textwrap.fill(
        f"{name}{text.rstrip('.')}{shown}", 118, subsequent_indent=" " * len(name), break_on_hyphens=False
    )


def parse_config(
    argument_types: Sequence[Any], argv: Sequence[str] | None = None, *, description: str = ""
) -> tuple[Any, ...]:
    """Parse `--config file.yaml --key value ...` into dataclasses; the command line wins over the file.

    A dataclass that has a method `check_given(in_file, as_flags)` is told which settings were given where: it can
    refuse what would have no effect.

    Args:
        argument_types: Dataclasses, as `HfArgumentParser` takes them.
        argv: Arguments; None: those of the process.
        description: Shown by `--help`.

    Returns:
        One instance of each class.

    Raises:
        ConfigError: For a missing or unreadable file, an unknown key or flag, a value of a wrong type, or settings that
            one of the classes refuses.
    """
    parser = _Parser(list(argument_types), description=description, allow_abbrev=False, add_help=False)
    parser.add_argument(
        "--config",
        help="YAML file with any of these settings, or a recipe's name (quickstart); flags on the command line win.",
    )
    parser.add_argument("-h", "--help", action=_ShortHelp, help="Show the settings that matter most.")
    parser.add_argument("--help_all", action="help", help="Show every setting, those of transformers included.")
    fields = _fields(argument_types)
    # What is in the namespace already is no default for argparse to fill in: these stay where no flag is given.
    flags = argparse.Namespace(**dict.fromkeys((*fields, "config"), _NOT_GIVEN))
    _, rest = parser.parse_known_args(list(sys.argv[1:] if argv is None else argv), flags)
    if rest:
        raise ConfigError(_left_over(rest, list(fields)))
    as_flags = {name: value for name, value in vars(flags).items() if value is not _NOT_GIVEN}
    config = as_flags.pop("config", None)
    in_file = {} if config is None else _from_file(_recipe_or_file(config), fields)
    parsed = tuple(_built(kind, {**in_file, **as_flags}) for kind in argument_types)
    for settings in parsed:
        if hasattr(settings, "check_given"):
            settings.check_given(set(in_file), set(as_flags))
    return parsed


def _fields(argument_types: Sequence[Any]) -> dict[str, tuple[Any, dataclasses.Field[Any]]]:
    """Type and field of every setting, by name."""
    return {
        field.name: (hints[field.name], field)
        for kind in argument_types
        for hints in [typing.get_type_hints(kind)]
        for field in dataclasses.fields(kind)
        if field.init
    }


def _from_file(path: Path, fields: dict[str, tuple[Any, dataclasses.Field[Any]]]) -> dict[str, Any]:
    values = read_settings(path, fields, ", ".join(recipe_names()))
    for key in values:
        if key not in fields:
            raise ConfigError(unknown_setting(key, list(fields), f"{path} has"))
    return values


def _built(kind: Any, given: dict[str, Any]) -> Any:
    """An instance of one of the dataclasses; what its own checks raise is one paragraph."""
    fields = [field for field in dataclasses.fields(kind) if field.init]
    missing = [
        field.name
        for field in fields
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if field.name not in given
    ]
    if missing:
        raise ConfigError(
            f"The settings lack {' and '.join(missing)}: give --{missing[0]} on the command line, or `{missing[0]}:` "
            "in the file of --config. --help lists every setting."
        )
    with settings_explained():
        return kind(**{field.name: given[field.name] for field in fields if field.name in given})


@contextmanager
def settings_explained() -> Iterator[None]:
    """Within this, where nothing but settings can be at fault, what libraries raise becomes one paragraph.

    Raises:
        ConfigError: With what the library said, and its error as the cause.
    """
    try:
        yield
    except HfClarsError:
        raise
    except Exception as error:  # transformers, accelerate, torch and trackers raise whatever they like
        said = " ".join(str(error).split()) or "no reason given"
        kind = "" if isinstance(error, ValueError | TypeError) else f"{type(error).__name__}: "
        raise ConfigError(f"The settings do not fit: {kind}{said.rstrip('.')}. --help lists every setting.") from error


def _recipe_or_file(given: str) -> Path:
    """A file, or the recipe of that name that is installed with the package."""
    shipped = RECIPES / f"{given}.yaml"
    return shipped if given in recipe_names() and not Path(given).exists() else Path(given)


def recipe_names() -> list[str]:
    """Names of the recipes that are installed with the package, for `--config NAME`."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def _left_over(rest: Sequence[str], known: Sequence[str]) -> str:
    flag = next((word for word in rest if word.startswith("-")), None)
    if flag is None:
        return (
            f"The command line has {rest[0]!r}, which belongs to no setting: each setting is a flag with its value, "
            "such as --momentum 0.9. --help lists every setting."
        )
    return unknown_setting(flag.lstrip("-").split("=")[0].replace("-", "_"), known, "The command line has")


def unknown_setting(key: str, known: Sequence[str], where: str) -> str:
    """The sentence about a name that no setting has, with the one that was probably meant.

    Args:
        key: The name.
        known: The names that there are.
        where: How the sentence begins.

    Returns:
        One paragraph.
    """
    meant = [name for name in OTHER_WORDS.get(key.lower(), ()) if name in known]
    meant = meant or difflib.get_close_matches(key, known, n=1, cutoff=0.75)
    hint = f"Did you mean {' or '.join(map(repr, meant))}?" if meant else "--help lists every setting."
    return f"{where} an unknown setting, {key!r}. {hint}"
