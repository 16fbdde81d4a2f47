"""Promise: where another library's private name is used, the file says which, why, and what would end it."""

import ast
from pathlib import Path

ROOT = Path(__file__).parent.parent
FILES = [p for room in ("hf_clars", "research", "scripts") for p in sorted((ROOT / room).rglob("*.py"))]
OWN = {"os._exit"}  # Python's, documented under this name
LISTED = "hf_clars/grad_norms/"  # its torch_internals.py has a docstring and a test for each


def private(name):
    return name.startswith("_") and not name.startswith("__")


def foreign_names(tree):
    """Private attributes of what is neither `self` nor of a class of this file."""
    own = {n.name for n in ast.walk(tree) if isinstance(n, (ast.FunctionDef, ast.ClassDef))}
    own |= {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Store)}
    own |= {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute) and ast.unparse(n.value) in ("self", "cls")}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and private(node.attr) and node.attr not in own:
            if ast.unparse(node) not in OWN:
                yield node.attr
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("getattr", "hasattr"):
            name = node.args[1]
            if isinstance(name, ast.Constant) and private(name.value) and name.value not in own:
                yield name.value


def unexplained(text):
    comments = " ".join(line.strip().lstrip("#").strip() for line in text.splitlines())
    _, *explained = comments.split("Private name")
    for name in sorted(set(foreign_names(ast.parse(text)))):
        family = "_foreach_*" if name.startswith("_foreach_") else name
        if not any(name in words[:300] or family in words[:300] for words in explained):
            yield name


def test_every_private_name_is_explained_where_it_is_used():
    files = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in FILES}
    missing = {name: list(unexplained(text)) for name, text in files.items() if not name.startswith(LISTED)}
    assert len(missing) > 100
    assert {name: found for name, found in missing.items() if found} == {}


def test_one_that_is_not_explained_is_noticed():
    assert list(unexplained("import torch\ntorch._foreach_mul(a, b)\n")) == ["_foreach_mul"]
    assert list(unexplained('hasattr(p, "_hidden")\n')) == ["_hidden"]
    assert list(unexplained("# Private name: p._hidden. It ends some day.\np._hidden\n")) == []
    assert list(unexplained("self._own = 1\nother._own\n")) == []
