"""Promise: importing a part of the package needs only what that part is made of."""

import subprocess
import sys

CODE = """
import sys
from importlib.machinery import PathFinder

class Without(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in {missing!r} else super().find_spec(name, path, target)

sys.meta_path = [Without if finder is PathFinder else finder for finder in sys.meta_path]
{code}
"""
IMAGES = {"PIL", "torchvision", "simplejpeg", "matplotlib", "mlxtend"}


def run_without(missing, code):
    program = CODE.format(missing=sorted(missing), code=code)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=200)
    return done.stderr if done.returncode else ""


def test_the_trainer_needs_no_images_and_no_pictures():
    assert not run_without(IMAGES | {"datasets", "evaluate"}, "from hf_clars import ClarsTrainer, PerSampleGradNorms")


def test_the_check_notices_a_missing_package():
    assert "No module named" in run_without(IMAGES, "import hf_clars.data")
