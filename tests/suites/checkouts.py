"""Which tests of which project are run, who stands in for what, and what is expected to differ."""

from __future__ import annotations

import fnmatch
import os
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Suite:
    """One project's tests.

    Attributes:
        name: The folder of its checkout.
        tests: Files, relative to it.
        stand_in: Who stands in: `lars`, `nag` or `trainer`.
        select: pytest's `-k`; empty: all.
        expected: {pattern of a test's id: why it differs and may}.
    """

    name: str
    tests: tuple[str, ...]
    stand_in: str
    select: str = ""
    expected: dict[str, str] = field(default_factory=dict)


_FIGURES = "the figures are those of the original optimizer"
SUITES = [
    Suite(
        "transformers",
        ("tests/trainer/test_trainer.py", "tests/trainer/test_trainer_seq2seq.py"),
        "trainer",
        expected={
            "*optimizer*adam*": "another optimizer is asked for, which ClarsTrainer refuses",
            "*adafactor*": "another optimizer is asked for, which ClarsTrainer refuses",
            "*lomo*": "another optimizer is asked for, which ClarsTrainer refuses",
            "*galore*": "another optimizer is asked for, which ClarsTrainer refuses",
            "*bnb*": "another optimizer is asked for, which ClarsTrainer refuses",
            "*checkpoint*optimizer.pt*": "the optimizer's state is written as safetensors: there is no optimizer.pt",
            "*log*keys*": "the log has our keys beside Trainer's",
        },
    ),
    Suite(
        "timm",
        ("tests/test_optim.py",),
        "nag",
        "sgd or lookahead",
        {
            "*convergence?sgd?": "it asks for a momentum of 1, which is refused",
            "*convergence?lookahead_adam*": _FIGURES,
            "*zero_lr*": "the paper's momentum holds the rate, so a rate of 0 leaves what the buffer has",
        },
    ),
    Suite("timm", ("tests/test_scheduler.py",), "lars"),
    Suite(
        "pytorch",
        ("test/optim/test_lrscheduler.py", "test/optim/test_swa_utils.py"),
        "nag",
        expected={"*compound_*adam*": _FIGURES},
    ),
    Suite("pytorch", ("test/distributed/checkpoint/test_state_dict.py",), "lars"),
    Suite(
        "accelerate",
        tuple(f"tests/test_{part}.py" for part in ("optimizer", "scheduler", "state_checkpointing", "accelerator")),
        "lars",
    ),
    Suite(
        "peft",
        ("tests/test_custom_models.py",),
        "nag",
        "(test_disable_adapters or test_parameters_after_loading or test_training_works) and MLP "
        "and (LoRA or IA3 or LoHa or VeRA)",
        {
            # It asks for Adam. With momentum at Adam's rate weights grow until merging and unmerging them rounds too
            # much; torch's SGD with the same momentum fails in the same tests.
            "*disable_adapters_with_merging*lora_b bias*": _FIGURES,
            "*disable_adapters_with_merging*pvera*": _FIGURES,
            "*disable_adapters_with_merging*adalora*": _FIGURES,
        },
    ),
    Suite("trl", ("tests/test_sft_trainer.py",), "trainer"),
    Suite("lightning", ("tests/tests_pytorch/trainer/optimization/test_optimizers.py",), "lars"),
]


def checkout_of(suite: Suite) -> Path | None:
    """Where a suite's checkout is, under the folder that HF_CLARS_SUITES names; None without one."""
    folder = os.environ.get("HF_CLARS_SUITES")
    found = Path(folder) / suite.name if folder else None
    return found if found is not None and found.is_dir() else None


def outcomes(suite: Suite, checkout: Path, stand_in: str, report: Path) -> dict[str, str]:
    """Run a suite's tests in a process of their own.

    Args:
        suite: The suite.
        checkout: Its checkout.
        stand_in: Who stands in; empty: nobody, the baseline.
        report: Where pytest's report goes.

    Returns:
        {test id: "passed", "failed" or "skipped"}.

    Raises:
        FileNotFoundError: If a file of the tests is not in the checkout.
        RuntimeError: If pytest did not begin.
    """
    for test in suite.tests:
        if not (checkout / test).exists():
            raise FileNotFoundError(f"{checkout / test} is not there: the checkout is of another version.")
    # The plugin by a name of its own: many projects have a package `tests`, which would hide ours.
    places = [str(Path(__file__).parent), str(ROOT), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {
        "HF_CLARS_STAND_IN": stand_in,
        "PYTHONPATH": os.pathsep.join(p for p in places if p),
        "HF_HUB_OFFLINE": "1",
    }
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "stand_in",
        "-o",
        "addopts=",  # theirs name plugins that need not be there
        f"--junitxml={report}",
        *suite.tests,
    ]
    subprocess.run(
        [*command, *(["-k", suite.select] if suite.select else [])], cwd=checkout, env=environment, check=False
    )
    if not report.exists():
        raise RuntimeError(f"pytest did not begin in {checkout}: what it says is above.")
    return read_report(report)


def read_report(report: Path) -> dict[str, str]:
    """What became of each test, from pytest's report."""
    found = {}
    for case in ElementTree.parse(report).getroot().iter("testcase"):
        tags = {child.tag for child in case}
        outcome = "failed" if tags & {"failure", "error"} else "skipped" if "skipped" in tags else "passed"
        found[f"{case.get('classname')}::{case.get('name')}"] = outcome
    return found


def new_failures(suite: Suite, baseline: dict[str, str], ours: dict[str, str]) -> list[str]:
    """What passes with the original classes, fails with ours, and is not expected to."""
    return sorted(
        test
        for test, outcome in baseline.items()
        if outcome == "passed"
        and ours.get(test, "missing") not in ("passed", "skipped")
        and not any(fnmatch.fnmatch(test.lower(), pattern.lower()) for pattern in suite.expected)
    )
