"""The project as a thing to read: who may import whom, how long lines and files are."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HIDDEN = {".git", "out", ".venv", "__pycache__", ".pytest_cache", ".ruff_cache"}
FILES = sorted(p for ending in ("py", "md") for p in ROOT.rglob(f"*.{ending}")
               if not HIDDEN & {*p.relative_to(ROOT).parts})
SOURCES = [p for p in FILES if p.suffix == ".py" and p.relative_to(ROOT).parts[0] != "tests"]


def length(path):
    return len(path.read_text().splitlines())


def named(path):
    """toy/world.py -> "toy.world", toy/__init__.py -> "toy"."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {named(path): path for path in SOURCES}


def imports(path):
    """All that a file imports, on top or in functions: modules of the project by their names, others by the
    first part of theirs."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            found |= {name if name in MODULES else node.module for name in names}
    return {name if name in MODULES else name.split(".")[0] for name in found}


IMPORTS = {name: imports(path) for name, path in MODULES.items()}
OURS = {name: found & MODULES.keys() for name, found in IMPORTS.items()}


def test_imports_go_round_in_no_circle():
    assert {"anyflow", "model", "sample", "train", "full.plan", "toy.world"} <= MODULES.keys()
    order = [*TopologicalSorter(OURS).static_order()]  # raises CycleError, which names the circle
    assert order.index("anyflow") < order.index("model") < order.index("sample")


def test_files_import_only_what_lies_below_them():
    """anyflow is for any network, the model for any use; of full scale only the plan runs what it plans."""
    assert IMPORTS["anyflow"] == {"torch"}
    assert not {"sample", "train"} & OURS["model"] and "train" not in OURS["sample"]
    for name in MODULES:
        if name.startswith("full.") and name != "full.plan":
            assert not {"sample", "train"} & OURS[name], name
    assert not OURS["toy.world"] and OURS["toy.plots"] <= {"full.files", "toy.world"}


def test_lines_are_short():
    long = [f"{path.relative_to(ROOT)}:{number}" for path in FILES
            for number, line in enumerate(path.read_text().splitlines(), 1) if len(line) > 110]
    assert not long


MOST = {"README.md": 120, "anyflow.py": 480, "model.py": 620, "sample.py": 350, "train.py": 500}


@pytest.mark.parametrize("name", MOST)
def test_file_is_short(name):
    assert length(ROOT / name) <= MOST[name]


def test_all_is_read_in_an_evening():
    assert sum(length(ROOT / name) for name in MOST if name.endswith(".py")) <= 1900
    assert sum(map(length, SOURCES)) <= 5969
