"""The order of imports, and what ``import puretrain`` must not load."""

import ast
import importlib.metadata
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = ROOT / "puretrain"
EXEMPT = {"puretrain", "puretrain.__main__"}


def documented_line():
    """The rooms from left to right, as docs/architecture.md gives them."""
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    (line,) = re.findall(r"^errors → .*$", text, flags=re.MULTILINE)
    return line.split(" → ")


def module_name(path):
    """``puretrain.optim.adam`` for ``puretrain/optim/adam.py``; a package is its ``__init__``."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room(module):
    return module.split(".")[1]


def imported_modules(source, module, *, is_package):
    """Full names of the modules of the package that a source imports, wherever it does so."""
    parent = module.split(".") if is_package else module.split(".")[:-1]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = parent[: len(parent) - node.level + 1]
                base = ".".join([*above, base] if base else above)
            # `from puretrain import tree` names a room; below that, the room is known already.
            names = [f"{base}.{a.name}" for a in node.names] if base == "puretrain" else [base]
        else:
            continue
        for name in names:
            # The version is a fact of the whole package, which any room may print or write down.
            if name.split(".")[0] == "puretrain" and name != "puretrain.__version__":
                yield name


def breaches(source, module, line, *, is_package=False):
    """Each import of a source that does not point to the left, as text."""
    place = line.index(room(module))
    found = []
    for name in imported_modules(source, module, is_package=is_package):
        if name == "puretrain":
            found.append(f"{module} imports puretrain itself; import the room")
        elif room(name) not in line:
            found.append(f"{module} imports {name}, which is no room")
        elif line.index(room(name)) > place:
            found.append(f"{module} imports {name}, which is to its right")
    return found


MODULES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_each_module_imports_only_from_its_left(path):
    module = module_name(path)
    if module in EXEMPT:
        return
    line = documented_line()
    assert room(module) in line, f"{module} has no place in the line of docs/architecture.md"
    source = path.read_text(encoding="utf-8")
    assert not breaches(source, module, line, is_package=path.name == "__init__.py")


def test_each_room_of_the_line_exists():
    rooms = {room(module_name(path)) for path in MODULES if module_name(path) not in EXEMPT}
    assert rooms == set(documented_line())


def test_the_reference_has_a_page_for_each_room():
    pages = {path.stem for path in (ROOT / "docs" / "reference").glob("*.md")} - {"index"}
    assert pages == set(documented_line())


@pytest.mark.parametrize(
    "source",
    [
        "import puretrain.step",
        "import puretrain",
        "from puretrain import step",
        "from puretrain import TrainState",
        "from puretrain.step import train_step",
        "from . import step",
        "from .step import train_step",
        "def f():\n    from puretrain.step import train_step",
        "if TYPE_CHECKING:\n    from puretrain.step import train_step",
    ],
)
def test_a_breach_is_seen(source):
    assert breaches(source, "puretrain.optim", ["tree", "optim", "step"])


@pytest.mark.parametrize(
    ("source", "module", "is_package"),
    [
        ("from puretrain.tree import Record", "puretrain.optim", False),
        ("from puretrain import tree", "puretrain.optim.adam", False),
        ("from .chain import chain", "puretrain.optim.adam", False),
        ("from .adam import adam", "puretrain.optim", True),
        ("from ..tree import Record", "puretrain.optim.adam", False),
        ("import puretrained, torch.optim", "puretrain.optim", False),
        ("from puretrain import __version__", "puretrain.optim", False),
    ],
)
def test_an_import_to_the_left_is_allowed(source, module, is_package):
    assert not breaches(source, module, ["tree", "optim", "step"], is_package=is_package)


def test_import_leaves_heavy_packages_for_first_use():
    code = "import sys, puretrain; print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    assert "puretrain" in loaded
    assert not {"tensorboard", "rich", "torch.utils.tensorboard"} & set(loaded)


@pytest.mark.parametrize("collects", [True, False])
def test_import_does_not_collect_garbage_and_leaves_the_collector_as_it_was(collects):
    code = f"""
import gc, torch
gc.{"enable" if collects else "disable"}()
begun = []
gc.callbacks.append(lambda phase, info: begun.append(info["generation"]))
import puretrain
print(gc.isenabled(), begun.count(2))
"""
    printed = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    assert printed == [str(collects), "0"]


def test_functorch_is_only_the_one_inside_torch():
    installed = {d.metadata["Name"].lower() for d in importlib.metadata.distributions()}
    assert "torch" in installed
    assert "functorch" not in installed
