"""The suite needs no network, nothing may wait for the Hub, and the user's own records are left alone."""

import os
import random
import tempfile

import numpy as np
import pytest
import torch
from torch.overrides import _get_current_function_mode_stack, _pop_mode

from tests.lean import compile_without_extras, keep_imports, look_up_once, without_stacks, without_traces
from tests.undrawn import draw_nothing

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
CHECKOUT = pytest.StashKey[set[str]]()
os.environ["TRACKIO_DIR"] = tempfile.mkdtemp(prefix="trackio-")  # read when trackio is imported


# Groups that take tens of seconds, the longest first: what is begun last must be short, or a worker waits for another.
# What is not named here comes after them, file by file.
LONG = (
    "launchers",
    "tests/test_norms_compiled_whole.py",
    "processes",
    "tests/test_kernels_exact.py",
    "tests/test_errors_in_a_rule.py",
    "tests/test_gpu_kit.py",
    "tests/test_norms_compiled_shapes.py",
)


def pytest_configure(config):
    config.option.loadscopereorder = False  # xdist would begin with the groups of most tests, which are quick ones
    without_stacks()
    look_up_once()
    without_traces()


@pytest.hookimpl(wrapper=True, tryfirst=True)  # around xdist's own, which reads the groups
def pytest_collection_modifyitems(config, items):
    """A file's tests stay on one worker, and files that share what they set up on the same one; long ones are first."""
    for item in items:
        if item.get_closest_marker("xdist_group") is None:
            item.add_marker(pytest.mark.xdist_group(item.nodeid.split("::")[0]))
    items.sort(key=lambda item: LONG.index(group_of(item)) if group_of(item) in LONG else len(LONG))
    yield
    if config.getoption("loadgroup", False):
        for item in items:
            name_group(item, group_of(item))


def group_of(item):
    return item.get_closest_marker("xdist_group").args[0]


def name_group(item, group):
    """See to it that the group is in the name, where xdist looks for it.

    pytest 9.2 keeps names in another attribute than the one that xdist 3.8 writes to: each test would be a group of its
    own, and what a file or several files set up once would be set up on every worker.
    """
    if not item.nodeid.endswith(f"@{group}"):
        item._id = type(item._id).parse(f"{item.nodeid}@{group}")
    assert item.nodeid.endswith(f"@{group}")


@pytest.hookimpl(tryfirst=True)  # before the fixtures, which draw numbers too
def pytest_runtest_setup():
    """What a test draws does not depend on the tests before it, so that a failure can be repeated alone."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


def pytest_sessionstart(session):
    session.stash[CHECKOUT] = set(os.listdir(session.config.rootpath))


def pytest_sessionfinish(session):
    """What tests write goes to folders of their own: nothing new lies in the checkout, to be committed by mistake."""
    here = set(os.listdir(session.config.rootpath)) - session.stash[CHECKOUT]
    if left := sorted(name for name in here if not name.startswith((".", "__"))):
        print(f"\nTests left this in the checkout: {', '.join(left)}")
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.fixture(scope="module", autouse=True)
def _lean_runs(request):
    """Runs draw nothing at their end, except in files that are marked `draws`; earlier files' imports are kept."""
    undo = draw_nothing() if request.node.get_closest_marker("draws") is None else None
    keep_imports()
    compile_without_extras()
    yield
    if undo is not None:
        undo()


@pytest.fixture(autouse=True)
def _no_mode_is_left():
    """A mode that outlives its forward pass would follow everything that comes after, also other people's code."""
    yield
    left = list(_get_current_function_mode_stack())
    for _ in left:
        _pop_mode()
    assert left == []


@pytest.fixture
def fresh_forms(monkeypatch, tmp_path):
    """A process that seems to have an H100, has chosen no form of norms yet, and knows no file of the user's."""
    from hf_clars.grad_norms.choice import FormChoices, forms, tables
    from hf_clars.grad_norms.rules import convolution, kernel_forms, linear
    from hf_clars.grad_norms.rules.costs import SHIPPED
    from hf_clars.trainer import callbacks, resuming, trainer

    monkeypatch.setenv(tables.PLACE, str(tmp_path / "forms.json"))
    monkeypatch.delenv(tables.SECONDS, raising=False)
    here = {**tables.machine(), **SHIPPED["machine"]}
    monkeypatch.setattr(tables, "machine", lambda: here)
    fresh = FormChoices()
    for module in (forms, kernel_forms, convolution, linear, callbacks, resuming, trainer):
        monkeypatch.setattr(module, "form_choices", fresh)
    return fresh
