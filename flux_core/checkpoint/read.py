"""From a safetensors file to a model: built on `meta`, filled tensor by tensor, each at once on its device
and in its dtype. So there is never a second copy of the model in memory; on the CPU, tensors that keep
their dtype stay mapped from the file until they are used.

Names and shapes are compared with the header before a byte of weights is read.
"""

import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from tqdm import tqdm

from ..errors import FileError
from ..model import AutoEncoder, Flux
from ..variants import Variant
from .files import ae_path, flow_path

FLOATS = ("BF16", "F16", "F32", "F64")
Shapes = Mapping[str, tuple[int, ...]]
M = TypeVar("M", bound=nn.Module)


def load_flux(variant: Variant, device: torch.device | str = "cpu", dtype: torch.dtype = torch.bfloat16) -> Flux:
    """The transformer of that name, weights loaded and frozen. FileError says what does not fit."""
    with torch.device("meta"):
        model = Flux(variant.params)
    return _fill(model, flow_path(variant), device, dtype)


def load_autoencoder(
    variant: Variant, device: torch.device | str = "cpu", dtype: torch.dtype = torch.bfloat16
) -> AutoEncoder:
    """The autoencoder of that name, likewise."""
    with torch.device("meta"):
        model = AutoEncoder(variant.ae_params)
    return _fill(model, ae_path(variant), device, dtype)


def _fill(model: M, path: Path, device: torch.device | str, dtype: torch.dtype) -> M:
    expected = {name: tuple(x.shape) for name, x in model.state_dict().items()}
    state = dict(stream(path, expected, device, dtype))
    model.load_state_dict(state, assign=True)
    return model.eval().requires_grad_(False)


def stream(
    path: Path, expected: Shapes, device: torch.device | str, dtype: torch.dtype
) -> Iterator[tuple[str, Tensor]]:
    """Each tensor of the file, on `device` and in `dtype`, once names and shapes have been found to fit."""
    size = path.stat().st_size
    quiet = size < 10**9 or not sys.stderr.isatty()
    try:
        with (
            safe_open(path, framework="pt", device=str(device)) as file,
            tqdm(total=size, unit="B", unit_scale=True, desc=f"reading {path.name}", disable=quiet) as bar,
        ):
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            _check(path, {name: tuple(x.get_shape()) for name, x in slices.items()}, expected)
            _check_dtypes(path, {name: x.get_dtype() for name, x in slices.items()})
            for name in expected:
                tensor = file.get_tensor(name)
                bar.update(tensor.nbytes)
                yield name, tensor.to(dtype)
    except (SafetensorError, OSError) as error:
        raise FileError(
            f"{path} ({size:,} bytes) could not be read as safetensors: {error}. "
            "Next: fetch the file again, it is damaged or of another kind."
        ) from error


def _check(path: Path, found: Shapes, expected: Shapes) -> None:
    """FileError if the file does not hold just the tensors expected."""
    shapes = [
        f"{name} {list(found[name])} instead of {list(shape)}"
        for name, shape in expected.items()
        if name in found and found[name] != shape
    ]
    findings = [
        _listing("missing", [name for name in expected if name not in found]),
        _listing("unexpected", [name for name in found if name not in expected]),
        _listing("of another shape", shapes),
    ]
    if any(findings):
        raise FileError(
            f"{path} does not hold the tensors of this model: {'; '.join(filter(None, findings))}. "
            f"{_looks_like(found, expected)}Next: check --name, FLUX_MODEL and FLUX_AE."
        )


def _listing(what: str, names: list[str]) -> str:
    return f"{len(names)} {what} ({', '.join(names[:5])}{', …' if len(names) > 5 else ''})" if names else ""


def _check_dtypes(path: Path, dtypes: Mapping[str, str]) -> None:
    foreign = [f"{name} is {dtype}" for name, dtype in dtypes.items() if dtype not in FLOATS]
    if foreign:
        raise FileError(f"{path}: {_listing('tensors that are no bf16, fp16 or fp32', foreign)}.")


def _looks_like(found: Shapes, expected: Shapes) -> str:
    """A guess at what the file is, as a sentence, or nothing."""
    kind = _kind(found, expected)
    return f"This looks like {kind}. " if kind else ""


def _kind(found: Shapes, expected: Shapes) -> str | None:
    if any("lora" in name for name in found):
        return "a LoRA, which goes on top of a model"
    if any(name.startswith("model.diffusion_model.") for name in found):
        return "a file with ComfyUI's prefix model.diffusion_model"
    if any(name.startswith(("transformer_blocks.", "encoder.down_blocks.")) for name in found):
        return "a file in the diffusers layout"
    if "encoder.conv_in.weight" in found:
        return "an autoencoder (FLUX_AE)"
    if len(found.get("img_in.weight", ())) == 2:
        return _kind_of_flux(found, expected)
    return None


def _kind_of_flux(found: Shapes, expected: Shapes) -> str | None:
    if "img_in.weight" not in expected:
        return "a transformer (FLUX_MODEL)"
    (width, features), (wanted, _) = found["img_in.weight"], expected["img_in.weight"]
    if width != wanted:
        return f"a FLUX transformer of hidden size {width}, where this model has {wanted}"
    if features in (128, 384):
        return f"FLUX.1-{'Fill' if features == 384 else 'Canny or Depth'} (img_in takes {features} features)"
    guided = "guidance_in.in_layer.weight"
    if (guided in found) != (guided in expected):
        return "FLUX.1-dev (it has guidance_in)" if guided in found else "FLUX.1-schnell (no guidance_in)"
    return None
