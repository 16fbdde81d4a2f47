"""What the fork server imports, once for all processes that tests start there."""

from contextlib import suppress

import torchvision  # noqa: F401
from accelerate.commands import launch  # noqa: F401

import benchmarks.coverage.judge
import benchmarks.coverage.sweep  # noqa: F401
import hf_clars.image_classification.run  # noqa: F401
import tests.killed_runs
import tests.launchers.worker  # noqa: F401
from tests.undrawn import keep_imports

with suppress(ImportError):  # accelerate imports it in a training
    import deepspeed  # noqa: F401

keep_imports()
