"""From a safetensors file to a model: built on `meta`, filled tensor by tensor, each at once on its device
and in its dtype. So there is never a second copy of the model in memory; on the CPU, tensors that keep
their dtype stay mapped from the file until they are used.

Names and shapes are compared with the header before a byte of weights is read.
"""

import io
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from tqdm import tqdm

from ..errors import FileError
from ..model import AutoEncoder, Flux
from ..terminal import note
from ..variants import Variant
from .files import ae_path, flow_path
from .header import Entry, Header, open_file, read_header

DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}
"""what weights may be written in, by the file's word for it"""
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
    header = read_header(path)
    _check(path, header.shapes, expected)
    _check_dtypes(path, {name: entry.dtype for name, entry in header.tensors.items()})
    quiet = header.size < 10**9 or not sys.stderr.isatty()
    with (
        _opened(header, device) as get_tensor,
        tqdm(total=header.size, unit="B", unit_scale=True, desc=f"reading {path.name}", disable=quiet) as bar,
    ):
        for name in expected:
            tensor = get_tensor(name)
            bar.update(tensor.nbytes)
            yield name, tensor.to(dtype)


@contextmanager
def _opened(header: Header, device: torch.device | str) -> Iterator[Callable[[str], Tensor]]:
    """A function from names to tensors on `device`: mapped by safetensors, or read where a file can't be mapped.

    Some network and merged file systems know no mmap (os error 19), Windows runs out of page file (1455), containers
    out of address space (12). The header is known to be sound, so whatever stands in the way of safetensors is that.
    """
    try:
        mapped = safe_open(header.path, framework="pt", device=str(device))
    except (SafetensorError, OSError, RuntimeError) as error:
        note(f"{header.path.name} cannot be mapped into memory here ({error}); it is read instead")
        with open_file(header.path) as file:
            yield lambda name: _read_tensor(file, header.path, header.tensors[name]).to(device)
        return
    with mapped as opened:
        yield opened.get_tensor


def _read_tensor(file: io.BufferedReader, path: Path, entry: Entry) -> Tensor:
    """One tensor's bytes, straight into memory of its own."""
    tensor = torch.empty(entry.shape, dtype=DTYPES[entry.dtype])
    if tensor.numel():
        file.seek(entry.start)
        if file.readinto(tensor.reshape(-1).view(torch.uint8).numpy().data) != entry.end - entry.start:
            raise FileError(
                f"{path} became shorter while it was read. Next: wait until it is all there, and try again."
            )
    return tensor


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
    foreign = [f"{name} is {dtype}" for name, dtype in dtypes.items() if dtype not in DTYPES]
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
