"""One YAML file plus command-line overrides, with a wrong key named beside the nearest right one."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import json
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml
from transformers import HfArgumentParser

from hf_clars.errors import ConfigError


class _Parser(HfArgumentParser):
    """An argument parser that raises where argparse would end the process."""

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
            inherited = {name for base in kind.__mro__[1:] for name in getattr(base, "__annotations__", {})}
            own = set(kind.__annotations__)
            for field in dataclasses.fields(kind):
                if field.init and (field.name in own or (field.name in inherited and field.name in COMMON)):
                    print(_help_line(field))
        print("\n--help_all shows the rest of transformers' TrainingArguments.")
        parser.exit()


def _help_line(field: dataclasses.Field[Any]) -> str:
    default = field.default if field.default is not dataclasses.MISSING else None
    shown = "" if default is None or default == "" else f" [{getattr(default, 'value', default)}]"
    text = str(field.metadata.get("help", "")).split("\n")[0]
    if field.name in COMMON:
        text = text.split(". ")[0]  # transformers explains at length
    line = f"  --{field.name:<28} {text.rstrip('.')}"
    room = 118 - len(shown)
    return (line if len(line) <= room else f"{line[: room - 4]} ...") + shown


def parse_config(
    argument_types: Sequence[Any], argv: Sequence[str] | None = None, *, description: str = ""
) -> tuple[Any, ...]:
    """Parse `--config file.yaml --key value ...` into dataclasses; the command line wins over the file.

    Args:
        argument_types: Dataclasses, as `HfArgumentParser` takes them.
        argv: Arguments; None: those of the process.
        description: Shown by `--help`.

    Returns:
        One instance of each class.

    Raises:
        ConfigError: For a missing or unreadable file, an unknown key or flag, or a value of a wrong type.
    """
    parser = _Parser(list(argument_types), description=description, allow_abbrev=False, add_help=False)
    parser.add_argument(
        "--config",
        help="YAML file with any of these settings, or a recipe's name (quickstart); flags on the command line win.",
    )
    parser.add_argument("-h", "--help", action=_ShortHelp, help="Show the settings that matter most.")
    parser.add_argument("--help_all", action="help", help="Show every setting, those of transformers included.")
    known = [f.name for cls in argument_types for f in dataclasses.fields(cls) if f.init]
    arguments = list(sys.argv[1:] if argv is None else argv)
    path = _config_path(arguments)
    from_file = [] if path is None else _as_flags(_read_yaml(path, known))
    try:
        *parsed, _, rest = parser.parse_args_into_dataclasses(
            args=[*from_file, *arguments], return_remaining_strings=True, look_for_args_file=False
        )
    except ConfigError:
        raise
    except (ValueError, TypeError, ImportError) as error:  # transformers' own checks of TrainingArguments
        raise ConfigError(f"The settings do not fit: {error}") from error
    if rest:
        name = next((a for a in rest if a.startswith("-")), rest[0])
        raise ConfigError(_unknown(name.lstrip("-").split("=")[0], known, "The command line has"))
    return tuple(parsed)


def _config_path(arguments: Sequence[str]) -> Path | None:
    for i, argument in enumerate(arguments):
        if argument.startswith("--config="):
            return _recipe_or_file(argument.removeprefix("--config="))
        if argument == "--config" and i + 1 < len(arguments):
            return _recipe_or_file(arguments[i + 1])
    return None


def _recipe_or_file(given: str) -> Path:
    """A file, or the recipe of that name that is installed with the package."""
    shipped = RECIPES / f"{given}.yaml"
    return shipped if given in recipe_names() and not Path(given).exists() else Path(given)


def recipe_names() -> list[str]:
    """Names of the recipes that are installed with the package, for `--config NAME`."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def _read_yaml(path: Path, known: Sequence[str]) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(
            f"The config file {path} cannot be read: {error.strerror}. Check the path, or name a recipe that is "
            f"installed: {', '.join(recipe_names())}."
        ) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must hold `key: value` lines, but holds {type(values).__name__}.")
    for key in values:
        if key not in known:
            raise ConfigError(_unknown(str(key), known, f"{path} has"))
    return values


def _unknown(key: str, known: Sequence[str], where: str) -> str:
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    hint = f"Did you mean {near[0]!r}?" if near else "--help lists every setting."
    return f"{where} an unknown setting, {key!r}. {hint}"


def _as_flags(values: dict[str, Any]) -> list[str]:
    """The file's settings as flags, so that both sources are converted and checked by one parser."""
    flags: list[str] = []
    for key, value in values.items():
        if value is None or value == []:
            continue
        if isinstance(value, list):
            flags += [f"--{key}", *map(str, value)]
        elif isinstance(value, dict):
            flags.append(f"--{key}={json.dumps(value)}")
        else:
            flags.append(f"--{key}={value}")
    return flags
