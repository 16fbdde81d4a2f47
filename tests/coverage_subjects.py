"""Subjects that the coverage sweep must live through: right, wrong, killed, endless, greedy."""

import os
import signal
import time

import torch
from torch import nn

from benchmarks.coverage.subject import Subject


class Misbehaves(nn.Module):
    """As soon as somebody has put a hook on its layer."""

    def __init__(self, what):
        super().__init__()
        self.layer, self.what = nn.Linear(4, 2), what

    def forward(self, x):
        if self.layer._forward_hooks:
            if self.what == "dies":
                os.kill(os.getpid(), signal.SIGSEGV)
            if self.what == "sleeps":
                time.sleep(600)
            while self.what == "computes without end":
                pass
            if self.what == "is greedy":
                torch.empty(200 * 2**30, dtype=torch.uint8)
            if self.what == "raises":
                raise IndexError("out of range")
        return self.layer(x)


def names():
    return ["is well", "dies", "sleeps", "computes without end", "is greedy", "raises"]


def build(name):
    torch.manual_seed(0)
    if name == "cannot be built":
        raise ValueError("no such model")
    return Subject(Misbehaves(name), {"": (torch.randn(3, 4),)})
