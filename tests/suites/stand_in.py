"""Puts our classes in the place of torch's and transformers', in a process that runs somebody else's tests.

As a pytest plugin (`-p tests.suites.stand_in`) or around a script (`python -m tests.suites.stand_in MODULE`).
HF_CLARS_STAND_IN names who stands in: `lars`, `nag`, `trainer`. Without it nothing is replaced: the baseline.
"""

from __future__ import annotations

import inspect
import os
import runpy
import sys

import torch

REPLACED = ("SGD", "Adam", "AdamW")


def optimizer_like(original: type, ours: type) -> type:
    """A class of ours that takes the original's arguments.

    Args:
        original: An optimizer of torch.
        ours: `LARS` or `NAG`. Arguments that it does not have are left out.
    """
    known = set(inspect.signature(ours.__init__).parameters) - {"self", "model", "params"}
    order = [n for n in inspect.signature(original.__init__).parameters if n not in ("self", "params")]

    class StandIn(ours):
        def __init__(self, params, *args, **kwargs):
            given = dict(zip(order, args, strict=False)) | kwargs
            kept = {k: v for k, v in given.items() if k in known}
            if original is torch_original["SGD"]:
                kept.setdefault("momentum", 0.0)
            super().__init__(params, **({"lr": 1e-3} | kept))

    StandIn.__name__ = StandIn.__qualname__ = original.__name__
    StandIn.__init__.__signature__ = inspect.signature(original.__init__)  # some read which arguments there are
    globals()[original.__name__] = StandIn  # so that it is found when it is unpickled
    return StandIn


torch_original = {name: getattr(torch.optim, name) for name in REPLACED}


def install(who: str | None) -> None:
    """Replace, before the tests' modules are imported."""
    if not who:
        return
    if who in ("lars", "nag"):
        from hf_clars.optim import LARS, NAG

        for name, original in torch_original.items():
            setattr(torch.optim, name, optimizer_like(original, {"lars": LARS, "nag": NAG}[who]))
    elif who == "trainer":
        import transformers

        from hf_clars import ClarsTrainer, ClarsTrainingArguments

        transformers.Trainer, transformers.TrainingArguments = ClarsTrainer, ClarsTrainingArguments
    else:
        raise ValueError(f"HF_CLARS_STAND_IN={who!r}: use lars, nag or trainer.")


install(os.environ.get("HF_CLARS_STAND_IN"))

if __name__ == "__main__":
    module = sys.argv[1]
    sys.argv = [module, *sys.argv[2:]]
    runpy.run_module(module, run_name="__main__", alter_sys=True)
