"""Promise: dependencies point one way. No files import each other in a circle, imports for types alone included."""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def modules_of(folder):
    """{module's name: its file}, of a package in the repository."""
    files = (ROOT / folder).rglob("*.py")
    return {".".join(f.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): f for f in files}


def imported_by(file):
    """What each import of a file may mean, wherever it stands: at its top, within functions, for types alone."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name,) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from ((f"{node.module}.{alias.name}", node.module) for alias in node.names)


def arrows(modules):
    """{module: the modules that it imports}."""
    asked = {
        name: [[n for n in may_mean if n in modules][:1] for may_mean in imported_by(f)] for name, f in modules.items()
    }
    return {name: {n for found in each for n in found} for name, each in asked.items()}


@pytest.mark.parametrize("folder", ["hf_clars", "research", "benchmarks"])
def test_no_circle(folder):
    modules = modules_of(folder)
    assert len(modules) > 3
    try:
        TopologicalSorter(arrows(modules)).prepare()
    except CycleError as circle:
        pytest.fail(" imports ".join(reversed(circle.args[1])))


def test_a_circle_would_be_found():
    there = {"a": {"b"}, "b": {"c"}, "c": {"a"}}
    with pytest.raises(CycleError):
        TopologicalSorter(there).prepare()
