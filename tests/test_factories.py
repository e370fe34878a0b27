"""Tensors that flux_core makes name their dtype and device: no default of torch's decides about a picture."""

import ast
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "docs"))

from house import ROOT, modules

BOTH = {"dtype", "device"}
FACTORIES = {
    **dict.fromkeys(["arange", "as_tensor", "empty", "empty_strided", "eye", "full", "linspace", "logspace"], BOTH),
    **dict.fromkeys(["ones", "rand", "randint", "randn", "randperm", "scalar_tensor", "tensor", "zeros"], BOTH),
    "Generator": {"device"},
}
"""torch's functions that follow the defaults, and what has to be said to each"""
MODULES = {"Conv2d", "Embedding", "GroupNorm", "LayerNorm", "Linear", "RMSNorm"}
ALLOWED = {
    (path, "ones"): "a module's own parameter, made as torch's modules make theirs"
    for path in ("model/layers.py", "model/t5.py")
}


def calls(path):
    """(name, what it names, line) of every call of `torch.…` and `nn.…` in a file."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        match node:
            case ast.Call(func=ast.Attribute(value=ast.Name(id="torch" | "nn"), attr=name)):
                positional = {"device"} if name == "Generator" and node.args else set()
                yield name, positional | {keyword.arg for keyword in node.keywords}, node.lineno


def inside(path):
    return path.relative_to(ROOT).as_posix()


def test_every_factory_call_names_dtype_and_device():
    found = [
        f"{inside(path)}:{line}: torch.{name} lacks {', '.join(sorted(FACTORIES[name] - said))}"
        for path in modules()
        for name, said, line in calls(path)
        if name in FACTORIES and not said >= FACTORIES[name] and (inside(path), name) not in ALLOWED
    ]
    assert not found, "\n".join(found)


def test_only_networks_have_layers_that_follow_the_defaults():
    """The loader makes them on `meta` and puts tensors of its own dtype and device into them."""
    found = {
        inside(path) for path in modules() for name, said, _ in calls(path) if name in MODULES and not said >= BOTH
    }
    assert {path.split("/")[0] for path in found} == {"model"}


@pytest.mark.parametrize(("path", "name"), ALLOWED)
def test_what_is_allowed_is_still_there(path, name):
    assert name in [found for found, *_ in calls(ROOT / path)]
