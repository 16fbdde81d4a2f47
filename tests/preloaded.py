"""What the fork server imports, once for all processes that tests start there."""

from contextlib import suppress

import torchvision  # noqa: F401
from accelerate.commands import launch  # noqa: F401

import benchmarks.coverage.judge
import benchmarks.coverage.sweep  # noqa: F401
import hf_clars.image_classification.run
import hf_clars.plots.products  # noqa: F401
import tests.killed_runs
import tests.launchers.worker  # noqa: F401
from tests.lean import keep_imports, look_up_once, without_stacks

with suppress(ImportError):  # accelerate imports them in a training
    import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401

without_stacks()
look_up_once()
keep_imports()
