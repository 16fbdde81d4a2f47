"""Promise: importing a part of the package needs only what that part is made of, and an extra that lacks is named."""

import subprocess
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, packages_distributions, requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from hf_clars import ClarsTrainer
from hf_clars.extras import EXTRA_OF
from tests.trainer_kit import Images, Plain, clars_args

pytestmark = pytest.mark.draws

ROOT = Path(__file__).parent.parent
CODE = """
import sys
from importlib.machinery import PathFinder

hidden, only = {hidden!r}, {only!r}

class Only(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        package = name.partition(".")[0]
        lacks = package in hidden or only and package not in only and not package.startswith("_sysconfigdata")
        return None if lacks else super().find_spec(name, path, target)

sys.meta_path = [Only if finder is PathFinder else finder for finder in sys.meta_path]
{code}
"""
IMAGE_PACKAGES = {"PIL", "torchvision", "simplejpeg", "matplotlib", "mlxtend"}
TRAINING = """
import torch
from torch import nn
from hf_clars.grad_norms import PerSampleGradNorms
from hf_clars.optim import CLARS, LARS, NAG, SignalLARS
import hf_clars

torch.manual_seed(0)
net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 5), nn.LayerNorm(5))
x = torch.randn(6, 3, 6, 6)
with PerSampleGradNorms(net) as norms:
    net(x).square().mean().backward()
assert {name: n.shape for name, n in norms.per_sample.items()} == dict.fromkeys("0145", torch.Size([6])), "norms"
for kind in (CLARS, LARS, NAG, SignalLARS):
    optimizer = kind(net, lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        net(x).square().mean().backward()
        optimizer.step()
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.remove_hooks()
assert hf_clars.__version__ and hf_clars.PerSampleGradNorms is PerSampleGradNorms
third = {name.partition(".")[0] for name in sys.modules} & {"transformers", "accelerate", "safetensors", "numpy"}
assert not third, third
print("trained")
"""


def run(code, hidden=(), only=None):
    """Run code in a process that cannot find some packages, or nothing but some packages."""
    program = CODE.format(hidden=set(hidden), only=only and sorted(only), code=code)
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)


def torch_alone():
    """What `pip install torch` brings, the standard library, and this package."""
    names = with_requirements("torch")
    found = {
        m for m, owners in packages_distributions().items() if names & {o.lower().replace("_", "-") for o in owners}
    }
    return found | set(sys.stdlib_module_names) | {"hf_clars"}


def with_requirements(name, seen=None):
    seen = set() if seen is None else seen
    if name not in seen:
        seen.add(name)
        try:
            needed = [Requirement(line) for line in requires(name) or []]
        except PackageNotFoundError:  # for another system than this one
            needed = []
        for requirement in needed:
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                with_requirements(requirement.name.lower().replace("_", "-"), seen)
    return seen


@pytest.fixture(scope="module")
def bare():
    """What training says where torch is alone, and then a look at what needs more."""
    return run(f"{TRAINING}\nimport hf_clars.models", only=torch_alone())


def test_optimizers_and_norms_need_torch_alone(bare):
    assert bare.stdout == "trained\n", bare.stderr


def test_torch_alone_is_not_everything(bare):
    assert bare.stderr.endswith("ModuleNotFoundError: No module named 'transformers'\n")


def test_the_trainer_needs_no_images_and_no_pictures_and_commands_name_the_extra_that_lacks():
    code = """
from hf_clars import ClarsTrainer, PerSampleGradNorms
hidden -= {"datasets", "evaluate"}
from hf_clars.cli.commands import main
for command in ("train", "plot", "bench", "bench-input"):
    print(command, main([command, "--help"]))
import hf_clars.data
"""
    done = run(code, hidden=IMAGE_PACKAGES | {"datasets", "evaluate"})
    assert done.stdout.splitlines() == ["train 2", "plot 2", "bench 2", "bench-input 2"], done.stderr
    *sentences, last = done.stderr.splitlines()
    assert all("pip install 'hf_clars[images]'" in line for line in [*sentences[:4], last]), done.stderr
    assert "Traceback" not in "".join(sentences[:4])
    assert "MissingExtraError: Reading images needs the package" in last


def test_training_without_matplotlib_ends_with_its_model_and_a_warning(tmp_path, monkeypatch, caplog):
    for name in [n for n in sys.modules if n.startswith(("matplotlib", "hf_clars.plots"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # the import system's word for: not there
    args = clars_args(tmp_path, max_steps=2, log_layer_rates=True)
    ClarsTrainer(Plain(), args, train_dataset=Images()).train()
    assert "Not drawn: Drawing a run needs the package matplotlib" in caplog.text
    assert (tmp_path / "layer_rates.safetensors").exists()
    assert not (tmp_path / "layer_rates.png").exists()


def test_the_extras_that_sentences_name_hold_the_packages():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    other_names = {"PIL": "pillow", "backpack": "backpack-for-pytorch"}
    for package, extra in EXTRA_OF.items():
        held = {Requirement(line).name.replace("-", "_") for line in extras[extra]}
        assert other_names.get(package, package).replace("-", "_") in held, (package, extra)
