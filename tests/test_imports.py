"""The house: imports go down only, and what is heavy or optional is imported where it is used."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import flux_core

ROOT = Path(flux_core.__file__).parent
FLOORS = {
    "errors": 0, "params": 0, "version": 0, "terminal": 0,
    "jsonfile": 1, "model": 1, "variants": 1, "hub": 1, "request": 1, "sampling": 1,
    "hooks": 1, "linears": 2, "kernels": 2, "checkpoint": 2,
    "device": 3, "images": 3, "session": 3, "methods": 3, "pipeline": 3, "text": 3,
    "commands": 4,
    "main": 5,
}  # fmt: skip
STRANGERS = [{"hooks", "linears"}, {"hooks", "kernels"}, {"model", "text"}]
"""neighbours that do not know each other"""
MODULES = sorted(path for path in ROOT.rglob("*.py") if "weights" not in path.parts)


def home(path):
    """The first name below flux_core: the floor's room."""
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imports(path, lazily=True):
    """(absolute name, level) of all imports of a file, or only of those made when it is itself imported."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    package = ("flux_core", *path.relative_to(ROOT).parent.parts)
    for node in ast.walk(tree) if lazily else top_level(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else ()
            stem = ".".join((*base, *([node.module] if node.module else [])))
            yield from (f"{stem}.{alias.name}" for alias in node.names)


def top_level(node):
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield child
            yield from top_level(child)


def inside(name):
    parts = name.split(".")
    return parts[1] if parts[0] == "flux_core" and len(parts) > 1 else None


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_down_only(path):
    room = home(path)
    if room == "__init__":
        return
    for other in filter(FLOORS.__contains__, map(inside, imports(path))):
        assert FLOORS[other] <= FLOORS[room], f"{path} imports {other}, from above"
        assert not any({room, other} <= pair and room != other for pair in STRANGERS), f"{path} imports {other}"


def test_every_room_has_a_floor():
    rooms = {home(path) for path in MODULES} - {"__init__", "__main__"}
    assert rooms <= FLOORS.keys(), f"give these a floor here: {rooms - FLOORS.keys()}"


def test_the_model_knows_nothing_of_files():
    allowed = {"torch", "einops", "flux_core", *sys.stdlib_module_names} - {"os", "pathlib", "io", "json"}
    for path in (ROOT / "model").glob("*.py"):
        assert {inside(name) for name in imports(path)} <= {None, "model", "params"}
        assert {name.split(".")[0] for name in imports(path)} <= allowed


def test_commands_do_not_import_each_other():
    for path in (ROOT / "commands").glob("*.py"):
        others = [name for name in imports(path) if name.startswith("flux_core.commands.") and "stepwise" not in name]
        assert not others, f"{path} imports {others}"


def test_diffusers_is_never_needed():
    for path in MODULES:
        assert not any(name.split(".")[0] == "diffusers" for name in imports(path)), path


@pytest.mark.parametrize("heavy", ["transformers", "huggingface_hub"])
def test_heavy_packages_wait_until_they_are_used(heavy):
    for path in MODULES:
        assert not any(name.split(".")[0] == heavy for name in imports(path, lazily=False)), path


@pytest.mark.parametrize(
    "module", ["flux_core", "flux_core.checkpoint", "flux_core.variants", "flux_core.hub.places", "flux_core.hooks"]
)
def test_importing_costs_no_torch(module):
    code = f"import sys, {module}; assert not {{'torch', 'transformers'}} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT.parent)
