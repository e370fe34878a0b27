"""Load a ControlNet (`model/controlnet.py`) from a safetensors file or a folder, by diffusers' names or XLabs' own.

Its sizes are those of its tensors. How heads and the axes of positions share its features is in no tensor: that is as
in the transformer it steers, which has the same image tokens. Only `load_controlnet` imports torch.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import FileError
from ..jsonfile import quoted, read_json
from ..params import ControlNetParams, FluxParams
from ..variants import VARIANTS
from .contents import Contents, check_fit, find_contents
from .files import advice_on
from .names import CONTROLNET, network_shapes

if TYPE_CHECKING:
    import torch

    from ..model import ControlNet


def load_controlnet(
    path: str | Path,
    device: "torch.device | str" = "cpu",
    dtype: "torch.dtype | None" = None,
    of: FluxParams | None = None,
) -> "ControlNet":
    """The ControlNet in a file or folder, weights loaded and frozen, by default in bf16. Errors as in
    `read_controlnet`.

    of: sizes of the transformer that it is to steer; None: FLUX.1's.
    """
    import torch

    from ..model import ControlNet
    from .read import filled, note_precision

    contents, params = read_controlnet(path, of)
    dtype = dtype or torch.bfloat16
    note_precision(contents, dtype)
    return filled(ControlNet, contents, params, device, dtype)


def read_controlnet(path: str | Path, of: FluxParams | None = None) -> tuple[Contents, ControlNetParams]:
    """The tensors and the sizes of the ControlNet in a file or folder, by its header. FileError says what does not
    fit.
    """
    contents = find_contents(Path(path), "controlnet")
    if (found := contents.found).part != "controlnet":
        raise FileError(f"{path} is {found.text}, and no ControlNet. {advice_on(found, 'give one for FLUX.1')}")
    params = controlnet_params(contents, of or VARIANTS["flux-dev"].params)
    check_fit(contents, network_shapes(params, found.layout), "fetch it again, or give another")
    return contents, params


def controlnet_params(contents: Contents, of: FluxParams) -> ControlNetParams:
    """The sizes of a ControlNet for that transformer. FileError where it is for another."""
    size, path, axes = _Sizes(contents), contents.source.path, list(of.axes_dim)
    shared = (
        ("hidden size", size("img_in", 0), of.hidden_size),
        ("width of T5's tokens", size("txt_in", 1), of.context_in_dim),
        ("width of CLIP's vector", size("vector_in.in_layer", 1), of.vec_in_dim),
        ("features of an image token", size("img_in", 1), of.out_channels),
        ("features for the axes of positions", _config(path).get("axes_dims_rope", axes), axes),
    )
    if wrong := [f"{noun} {quoted(theirs)} instead of {ours}" for noun, theirs, ours in shared if theirs != ours]:
        raise FileError(
            f"{path} is {contents.found.text} for another transformer: {', '.join(wrong)}. Next: give one that was "
            "trained for this model."
        )
    # diffusers has MLPs of no other width, and pads narrower ones
    ratio = 4.0 if contents.found.layout == "diffusers" else size("double_blocks.0.img_mlp.0", 0) / of.hidden_size
    own = {
        "in_channels": of.out_channels,
        "mlp_ratio": ratio,
        "depth": size.count("controlnet_blocks"),
        "depth_single_blocks": size.count("controlnet_single_blocks"),
        "guidance_embed": size.has("guidance_in.in_layer"),
        "cond_channels": size("pos_embed_input", 1),
        "takes_pixels": size.has("input_hint_block.0"),
        "modes": size("controlnet_mode_embedder", 0) if size.has("controlnet_mode_embedder") else 0,
        "blocks": (of.depth, of.depth_single_blocks),
    }
    return ControlNetParams(**{**vars(of), **own})


class _Sizes:
    """The sizes of the weights in a file, by the modules' names."""

    def __init__(self, contents: Contents) -> None:
        self.contents = contents
        rows = CONTROLNET if contents.found.layout == "diffusers" else ()
        self.theirs = {row.official: row.diffusers.split()[0] for row in rows}

    def __call__(self, module: str, axis: int) -> int:
        """The size of its weight along an axis. FileError where there is none."""
        shape = self.contents.shapes.get(name := self._weight(module), ())
        if len(shape) <= axis or not shape[axis]:
            found = f"{self.contents.source.path} is {self.contents.found.text}"
            raise FileError(f"{found}, and has no {name}. Next: give one for FLUX.1, whole.")
        return shape[axis]

    def has(self, module: str) -> bool:
        return self._weight(module) in self.contents.shapes

    def count(self, stack: str) -> int:
        """How many modules a list has."""
        return len({name.split(".")[1] for name in self.contents.shapes if name.startswith(f"{stack}.")})

    def _weight(self, module: str) -> str:
        return f"{self.theirs.get(module, module)}.weight"


def _config(path: Path) -> Mapping[str, Any]:
    """What diffusers' config.json says, in the folder or beside the file; empty where there is none of a ControlNet."""
    file = (path if path.is_dir() else path.parent) / "config.json"
    found = read_json(file, "the configuration") if file.is_file() else {}
    return found if isinstance(found, dict) and found.get("_class_name") == "FluxControlNetModel" else {}
