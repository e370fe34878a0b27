"""Print the house as the code has it: the packages of flux_core from the top down, and what each imports.

    python docs/house.py

`docs/design.md` holds what this prints, and `tests/test_imports.py` compares the two: an import that is new changes the
drawing, or fails.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1] / "flux_core"
GROUND = ("errors", "files", "jsonfile", "params", "script", "strength", "terminal", "variants", "version")
"""modules in flux_core itself that everything may import; `main` is at the top"""


def modules() -> list[Path]:
    """Every module of the package."""
    return sorted(ROOT.rglob("*.py"))


def room(path: Path) -> str:
    """The package, or the module in flux_core itself, that a file belongs to."""
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imports(path: Path, lazily: bool = True) -> Iterator[str]:
    """Absolute names of all that a file imports; not `lazily`: of what it imports when it is imported itself."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    package = ("flux_core", *path.relative_to(ROOT).parent.parts)
    for node in ast.walk(tree) if lazily else _top_level(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else ()
            stem = ".".join((*base, *([node.module] if node.module else [])))
            yield from (f"{stem}.{alias.name}" for alias in node.names)


def _top_level(node: ast.AST) -> Iterator[ast.AST]:
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield child
            yield from _top_level(child)


def arrows() -> dict[str, set[str]]:
    """For every package (and `main`) those that its files import, wherever in them; the ground is left out."""
    found: dict[str, set[str]] = {}
    for path in modules():
        name = room(path)
        if name in (*GROUND, "__init__", "__main__"):
            continue
        inside = {full.split(".")[1] for full in imports(path) if full.startswith("flux_core.")}
        others = inside - {name, *GROUND, "__version__"}
        found.setdefault(name, set()).update(others)
    return found


def floors(graph: dict[str, set[str]]) -> dict[str, int]:
    """The floor of each: one above the highest that it imports. ValueError names what imports itself in a circle."""
    found: dict[str, int] = {}
    while len(found) < len(graph):
        ready = [name for name, below in graph.items() if name not in found and below <= found.keys()]
        if not ready:
            raise ValueError(f"these import each other in a circle: {', '.join(sorted(graph.keys() - found.keys()))}")
        found |= {name: 1 + max((found[below] for below in graph[name]), default=0) for name in ready}
    return found


def drawing() -> str:
    """Lines from the top floor down: a package, what it is (its docstring's first line), and what it imports."""
    graph = arrows()
    floor = floors(graph)
    width = max(map(len, graph)) + 2
    lines = []
    for name in sorted(graph, key=lambda name: (-floor[name], name)):
        below = sorted(graph[name], key=lambda other: (-floor[other], other))
        lines += [f"{floor[name]:>2}  {name:<{width}}{_summary(name)}"]
        lines += [f"{'':{width + 4}}-> {', '.join(below)}"] if below else []
    lines += [f" 0  {', '.join(GROUND)}"]
    return "\n".join(lines)


def _summary(name: str) -> str:
    path = ROOT / name / "__init__.py" if (ROOT / name).is_dir() else ROOT / f"{name}.py"
    return (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").split("\n")[0]


if __name__ == "__main__":
    print(drawing())
