"""Promise: one command with short help, and a wheel and an sdist that install and run outside the repository."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from hf_clars.cli.commands import COMMANDS, main
from hf_clars.trainer.config import recipe_names

ROOT = Path(__file__).parent.parent
SCRIPTS = {
    "train": "train_imagenet.py",
    "plot": "plot_layer_rates.py",
    "advise": "advise_batch_size.py",
    "card": "write_card.py",
    "push": "push_to_hub.py",
    "bench": "benchmark_grad_norms.py",
    "bench-input": "benchmark_input.py",
}


def test_the_help_fits_a_screen_and_names_every_command(capsys):
    for asked in ([], ["--help"], ["help"]):
        assert main(asked) == 0
        lines = capsys.readouterr().out.splitlines()
        assert len(lines) <= 24
        assert max(map(len, lines)) <= 80
        assert all(any(line.split()[:1] == [name] for line in lines) for name in COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_explains_itself(name, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["hf-clars"])
    monkeypatch.setenv("COLUMNS", "120")
    with pytest.raises(SystemExit) as end:
        main([name, "--help"])
    assert end.value.code == 0
    assert f"hf-clars {name}" in capsys.readouterr().out


def test_an_unknown_command_names_the_nearest(capsys):
    assert main(["trian"]) == 2
    assert "did you mean 'train'" in capsys.readouterr().err
    assert main(["fly"]) == 2
    assert "there are train, " in capsys.readouterr().err


def test_errors_that_users_can_mend_are_one_paragraph(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["hf-clars"])
    assert main(["train", "--config", str(tmp_path / "no.yaml")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "cannot be read" in error
    assert "quickstart" in error


@pytest.mark.parametrize(("name", "script"), SCRIPTS.items())
def test_scripts_are_the_commands(name, script):
    text = (ROOT / "scripts" / script).read_text()
    module, _ = COMMANDS[name]
    assert f"from {module} import main" in text
    assert len(text.splitlines()) < 12
    assert set(SCRIPTS) <= set(COMMANDS)


def test_the_recipes_of_the_repository_are_those_of_the_package():
    assert recipe_names() == sorted(path.stem for path in (ROOT / "configs").glob("*.yaml"))


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """(the wheel made from the sdist, the sdist)."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    for name in ("hf_clars", "configs"):
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    build("sdist", source, out)
    sdist = next(out.glob("*.tar.gz"))
    with tarfile.open(sdist) as archive:
        archive.extractall(source / "unpacked", filter="data")
    build("wheel", next((source / "unpacked").iterdir()), out)
    return next(out.glob("*.whl")), sdist


def build(kind, source, out):
    code = f"from setuptools import build_meta; build_meta.build_{kind}({str(out)!r})"
    subprocess.run([sys.executable, "-c", code], cwd=source, check=True, capture_output=True)


@pytest.fixture(scope="module")
def installed(built, tmp_path_factory):
    """A folder with the unpacked wheel, as pip lays it out."""
    folder = tmp_path_factory.mktemp("site")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(folder)]
    subprocess.run([*pip, str(built[0])], check=True, capture_output=True)
    return folder


def run(installed, cwd, *arguments):
    done = subprocess.run(
        [sys.executable, str(installed / "bin" / "hf-clars"), *arguments],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(installed)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_wheel_and_sdist_hold_all_that_the_package_needs(built):
    names = set(zipfile.ZipFile(built[0]).namelist())
    tracked = {path.relative_to(ROOT).as_posix() for path in (ROOT / "hf_clars").rglob("*.py")}
    assert tracked <= names
    data = {"hf_clars/py.typed", "hf_clars/grad_norms/README.md", "hf_clars/grad_norms/rules/h100.json"}
    assert data <= names
    assert {f"hf_clars/configs/{name}.yaml" for name in recipe_names()} <= names
    assert not any(
        name.startswith(("tests", "scripts", "configs", "research", "benchmarks", "setup")) for name in names
    )
    entry = next(name for name in names if name.endswith("entry_points.txt"))
    assert "hf-clars = hf_clars.cli.commands:main" in zipfile.ZipFile(built[0]).read(entry).decode()
    with tarfile.open(built[1]) as sdist:
        assert any(name.endswith("hf_clars/py.typed") for name in sdist.getnames())


def test_the_installed_command_runs_outside_the_repository(installed, tmp_path):
    assert "hf-clars COMMAND" in run(installed, tmp_path, "--help")


@pytest.mark.slow
def test_the_installed_command_trains_by_a_recipe_s_name(installed, tmp_path):
    run(installed, tmp_path, "train", "--config", "quickstart", "--num_train_epochs", "8", "--use_cpu", "true")
    assert (tmp_path / "runs" / "quickstart" / "model.safetensors").exists()
    listed = run(installed, tmp_path, "push", "runs/quickstart", "--repo-id", "owner/name", "--dry-run")
    assert "model.safetensors" in listed
    assert "checkpoint" not in listed
