"""No module of the package needs another that needs it, those under type hints and in functions counted."""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[1] / "hf_structprune"


def imports(root):
    """For each module the others of its package that it imports anywhere."""
    files = {}
    for path in root.rglob("*.py"):
        parts = path.relative_to(root.parent).with_suffix("").parts
        files[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    graph = {}
    for name, path in files.items():
        package = name if path.name == "__init__.py" else name.rpartition(".")[0]
        graph[name] = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.level:
                base = package.split(".")
                base = ".".join([*base[: len(base) - node.level + 1], *([node.module] if node.module else [])])
                found = {f"{base}.{alias.name}" for alias in node.names}
                graph[name] |= {one if one in files else base for one in found} & files.keys() - {name}
    return graph


def test_there_are_none():
    graph = imports(ROOT)
    assert len(graph) > 100 and "hf_structprune.planner" in graph["hf_structprune.pruner"]
    list(TopologicalSorter(graph).static_order())  # raises a CycleError that names them


def test_one_would_be_found(tmp_path):
    package = tmp_path / "some"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "one.py").write_text("from .two import b\n")
    (package / "two.py").write_text("def f():\n    from . import one\n")
    with pytest.raises(CycleError, match=r"some\.one"):
        list(TopologicalSorter(imports(package)).static_order())
