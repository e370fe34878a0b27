"""The adapter of FLUX.1 Redux: whether a file is one, and fits a model, by its header. No torch.

The official file and diffusers' folder `image_embedder` have the same names: `redux_up` and `redux_down`, two Linears.
"""

from pathlib import Path

from ..errors import FileError
from ..variants import REDUX, Variant
from .contents import Contents, check_fit, find_contents
from .shapes import redux_shapes

FOLDER = "image_embedder"
"""its place in a folder of diffusers' layout"""
UP, DOWN = "redux_up.weight", "redux_down.weight"


def check_redux(path: Path, variant: Variant) -> Contents:
    """The tensors of a Redux adapter's file or folder. FileError if it is none, or its words are not of T5's width."""
    inside, advice = path / FOLDER, f"give {REDUX.file} of {REDUX.repo}"
    contents = find_contents(inside if inside.is_dir() else path, "other")
    shapes, text, width = contents.shapes, contents.found.text, variant.params.context_in_dim
    if UP not in shapes:
        raise FileError(f"{path} is {text}, and no Redux adapter. Next: {advice}.")
    down = shapes.get(DOWN, ())
    if len(down) == 2 and down[0] != width:
        finding = f"whose words have {down[0]} features, and {variant.name} takes {width}"
        raise FileError(f"{path} is {text}, {finding}. Next: choose a model for it with --name, as flux-dev.")
    hidden, features = (*shapes[UP], 0, 0)[:2]
    check_fit(contents, redux_shapes(features, hidden, width), advice)
    return contents
