"""Imports go down only, as docs/design.md draws them, and what is heavy or optional is imported where it is used."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
sys.path.insert(0, str(REPOSITORY / "docs"))

from house import GROUND, ROOT, arrows, drawing, floors, imports, modules  # noqa: E402

STRANGERS = [{"hooks", "linears"}, {"hooks", "kernels"}]
"""neighbours that do not know each other"""
MODULES = modules()


def inside(name):
    parts = name.split(".")
    return parts[1] if parts[0] == "flux_core" and len(parts) > 1 else None


def test_imports_go_down_only():
    graph = arrows()
    floors(graph)  # raises where packages import each other in a circle
    assert not any(other in graph[name] or name in graph[other] for name, other in map(sorted, STRANGERS))


def test_the_ground_imports_nothing_from_above():
    for path in (ROOT / f"{name}.py" for name in GROUND):
        assert {inside(name) for name in imports(path)} <= {None, "__version__", *GROUND}, path


def test_the_design_shows_the_drawing_of_the_code():
    text = (REPOSITORY / "docs" / "design.md").read_text(encoding="utf-8")
    assert f"```\n{drawing()}\n```" in text, "put what `python docs/house.py` prints into docs/design.md"


def test_the_recipe_has_no_circle_either():
    folder = REPOSITORY / "weights" / "recipe"
    names = {path.stem for path in folder.glob("*.py")}
    trees = {name: ast.walk(ast.parse((folder / f"{name}.py").read_text(encoding="utf-8"))) for name in names}
    graph = {name: {x.module for x in nodes if isinstance(x, ast.ImportFrom)} & names for name, nodes in trees.items()}
    order = floors(graph)
    assert order["palette"] < order["sprites"] < order["heldout"] < order["scenes"] < order["train_transformer"]


def test_at_most_twelve_modules_lie_in_the_package_itself():
    assert len([path for path in MODULES if path.parent == ROOT]) <= 12


def test_the_model_knows_nothing_of_files():
    allowed = {"torch", "einops", "flux_core", *sys.stdlib_module_names} - {"os", "pathlib", "io", "json"}
    for path in (ROOT / "model").glob("*.py"):
        assert {inside(name) for name in imports(path)} <= {None, "model", "params"}
        assert {name.split(".")[0] for name in imports(path)} <= allowed


def test_commands_do_not_import_each_other():
    for path in (ROOT / "commands").glob("*.py"):
        shared = tuple(f"flux_core.commands.{name}." for name in ("table", "stepwise", "loras"))
        others = [
            name for name in imports(path) if name.startswith("flux_core.commands.") and not name.startswith(shared)
        ]
        assert not others, f"{path} imports {others}"


def test_diffusers_is_never_needed():
    for path in MODULES:
        assert not any(name.split(".")[0] == "diffusers" for name in imports(path)), path


@pytest.mark.parametrize("heavy", ["transformers", "huggingface_hub"])
def test_heavy_packages_wait_until_they_are_used(heavy):
    for path in MODULES:
        assert not any(name.split(".")[0] == heavy for name in imports(path, lazily=False)), path


@pytest.mark.parametrize(
    "module",
    [
        "flux_core",
        "flux_core.checkpoint",
        "flux_core.variants",
        "flux_core.hub.places",
        "flux_core.hooks",
        "flux_core.main",
    ],
)
def test_importing_costs_no_torch(module):
    code = f"import sys, {module}; assert not {{'torch', 'transformers'}} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT.parent)
