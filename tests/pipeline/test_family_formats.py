"""The family in few bits: a model whose input is wide, and one that a control LoRA makes wide.

Files of the official layout and of diffusers' draw the picture of the model that is quantized when it is loaded, to the
bit, and `info` says what they are.
"""

from dataclasses import replace
from itertools import product

import pytest
import torch
from family_files import control_lora, noise, small_model
from random_model import small_variant
from tiny import Words

from flux_core.checkpoint import load_autoencoder, load_flux, to_diffusers, write_safetensors
from flux_core.checkpoint.files import text_files
from flux_core.checkpoint.keymaps import pairs_of
from flux_core.checkpoint.layouts import write_gguf_model, write_official
from flux_core.commands.info import info
from flux_core.linears.formats import format_of, quantize
from flux_core.linears.frozen import Frozen
from flux_core.linears.nf4 import Nf4Linear
from flux_core.linears.nf4 import quantize as to_nf4
from flux_core.pipeline import Components, Pipeline
from flux_core.variants import VARIANTS

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:.*it is stretched"),
]
CODES = {"fp8": "F8_E4M3", "int8": "I8", "nf4": "U8", "gguf": "Q8_0"}
"""what a file has most of; no GGUF file has diffusers' names"""
ROOM, PHOTO = noise(48, 32), noise(90, 70, 2)
PICTURES = {
    "flux-dev-fill": {"init_image": ROOM, "mask": ROOM.convert("L")},
    "flux-dev-canny-lora": {"control": PHOTO},
}


@pytest.fixture(scope="module", params=PICTURES)
def model(request, tmp_path_factory):
    """A row with files in bf16, and a folder for others. Rows of its weights are whole blocks of every format."""
    folder, name = tmp_path_factory.mktemp("formats"), request.param
    params = replace(small_variant(name).params, hidden_size=64, axes_dim=(8, 12, 12), mlp_ratio=4.0)
    row, files = small_model(folder / "bf16", name, torch.bfloat16, params=params)
    control_lora(folder / "lora.safetensors", params)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(VARIANTS, name, row)
        if row.adapter:
            patch.setitem(VARIANTS, "flux-dev", replace(VARIANTS["flux-dev"], params=params))
        yield replace(row, files={flag: str(path) for flag, path in files.items()}), folder


def drawn(row, folder, format, flux=None):
    """The tokens after the last step, and the picture's pixels. flux: the transformer, by default that of its file."""
    flux = flux or load_flux(row, "cpu", torch.float32, format)
    assert format_of(flux) == format
    text = Words(row.params.context_in_dim, False, torch.float32), Words(row.params.vec_in_dim, True, torch.float32)
    parts = Components(*text, flux, load_autoencoder(row, "cpu", torch.float32))
    pipeline, last = Pipeline(row, parts, torch.device("cpu"), torch.float32), {}
    if row.adapter:
        pipeline.loras.become(folder / "lora.safetensors", row.adapter.scale)
    fields = {"width": 48, "height": 32, "num_steps": 2, "force": True, **PICTURES[row.name]}
    (image,) = pipeline.generate("a red apple", 3, on_step=lambda step: last.update(x=step.x), **fields)
    return last["x"].tolist(), image.tobytes()


def quantized(row, format):
    """The transformer that is quantized when it is loaded; for GGUF, which only files have, afterwards."""
    if format != "gguf":
        return load_flux(row, "cpu", torch.float32, format)
    flux = load_flux(row, "cpu", torch.float32)
    quantize(flux, format)
    return flux


def official(folder, row, format):
    """A file of the official layout."""
    folder.mkdir()
    if format == "gguf":
        write_gguf_model(folder, row, text_files(row), torch.bfloat16, "Q8_0")
        return (folder / row.flow_file).with_suffix(".gguf")
    write_official(folder, row, text_files(row), torch.bfloat16, format)
    return folder / row.flow_file


def diffusers(folder, row, format):
    """A file by diffusers' names, q, k and v apart."""
    model, dense = (load_flux(row, "cpu", torch.bfloat16, kind) for kind in (format, None))
    state = to_diffusers(dense.state_dict(), row.params)
    for pair in pairs_of(row.params):
        layer = model.get_submodule(pair.official.rpartition(".")[0])
        if isinstance(layer, Frozen) and pair.official.endswith(".weight"):
            for name, tensors in zip(pair.diffusers, parts(layer, len(pair.diffusers)), strict=True):
                del state[name]
                stem = name.removesuffix("weight")
                state |= {stem + end: x.clone() for end, x in tensors.items() if end != "bias"}
    folder.mkdir()
    write_safetensors(folder / "diffusion_pytorch_model.safetensors", state)
    return folder / "diffusion_pytorch_model.safetensors"


def parts(layer, count):
    """What a file has for a layer's rows, in parts of which all but the last are square."""

    def cut(x):
        return x.tensor_split([layer.in_features * i for i in range(1, count)])

    if isinstance(layer, Nf4Linear):
        return [nf4(x) for x in cut(layer.widen(torch.float32))]
    tensors = layer.tensors()
    rows = {end: cut(x) for end, x in tensors.items() if end.startswith("weight")}
    return [tensors | {end: found[i] for end, found in rows.items()} for i in range(count)]


def nf4(x):
    """What a file has for a weight in bitsandbytes' blocks, each with its scale as it is."""
    tensors, details = to_nf4(x, double=False)
    return Nf4Linear(tensors, tuple(x.shape), details, None).tensors()


@pytest.mark.parametrize(("format", "written"), [*product(CODES, (official, diffusers))][:-1])
def test_a_file_draws_the_picture_of_the_model_quantized_as_it_is_loaded(model, format, written):
    row, folder = model
    file = written(folder / f"{written.__name__}-{format}", row, format)
    own = replace(row, files=row.files | {"model": str(file)})
    assert drawn(own, folder, format) == drawn(row, folder, format, quantized(row, format))
    layout = " in diffusers' layout" if written is diffusers else ""
    said = info(str(file))
    assert said.startswith(f"{file}: a FLUX.1 transformer{layout} of hidden size 64\n")
    assert f" {CODES[format]}" in said and f"\nfits: {row.name.removesuffix('-canny-lora')}" in said
