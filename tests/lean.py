"""What libraries do at every call or run, that no test looks at, and that takes longer than most of what tests do."""

import functools
import gc
import importlib.metadata
import logging
import sys
import traceback
from types import SimpleNamespace

import torch


def keep_imports():
    """What is imported stays: Trainer collects garbage after each run, and need not look through all modules for it."""
    gc.collect()
    gc.freeze()


def without_stacks():
    """Let `torch.manual_seed` note no stack of calls for each kind of device that is not there: 2 ms a call."""
    for device in (torch.cuda, torch.xpu, torch.mtia):
        device.traceback = SimpleNamespace(format_stack=list)


def look_up_once():
    """Let a package's description be read once, and not in each Trainer for each package that it could use."""
    importlib.metadata.metadata = functools.cache(importlib.metadata.metadata)


def without_traces():
    """pytest listens to every logger: torch.compile would describe each of its steps to the one that is for that."""
    logging.getLogger("torch.__trace").addHandler = lambda handler: None


def compile_without_extras():
    """Let torch.compile not time its guards, for which it empties the processor's cache, nor note pytest's stack."""
    if (guards := sys.modules.get("torch._dynamo.guards")) is not None:
        guards.profile_guard_manager = lambda *args: 0.0
    if (errors := sys.modules.get("torch._dynamo.exc")) is not None:
        errors.get_stack_above_dynamo = traceback.StackSummary
