"""Write a whole model to a folder: in the official files, or as diffusers' FluxPipeline reads it.

Files that already have the requested names, layout and dtype are copied, byte for byte; others are loaded and written.

diffusers itself is not needed to write its layout: seven small JSON files, the weights under its names
(`keymaps.py`), and the text encoders, which are in transformers' format in both.
"""

import json
import math
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import FileError
from ..linears.frozen import Frozen
from ..linears.gguf import quantize
from ..linears.gguf_types import PLAIN, is_whole
from ..params import AutoEncoderParams, FluxParams
from ..variants import Variant
from .check import check_network
from .contents import Contents, find_contents, find_storage
from .files import TextFiles, ae_path, encoder_config, flow_path
from .gguf import write_gguf
from .identify import Layout, Part
from .keymaps import to_diffusers
from .names import Params, network_shapes, renamed
from .read import check_finite, dense, load_autoencoder, load_flux, note_precision, opened_official
from .scales import METADATA
from .shapes import Shape
from .source import Source, find_source, is_weights
from .tensors import DTYPES, opened
from .write import write_safetensors

SINCE = "0.30.0"
"""the diffusers version that first had FluxPipeline"""

NOT_OURS = ("decoder.", "lm_head.", "vision_model.", "visual_projection.", "text_projection.", "logit_scale")
"""prefixes of the other tensors in full T5 and CLIP files"""


@dataclass(frozen=True)
class Changes:
    """What becomes of tensors before they are rounded and written."""

    of: Mapping[Part, Mapping[str, Callable[[Tensor], Tensor]]] = field(default_factory=dict)
    """by part and name (official, or the text encoder's own): of the tensor in fp32 to its successor in fp32"""
    note: str = ""
    """what the changed files' metadata say under "merged\""""

    def of_part(self, part: Part) -> Mapping[str, Callable[[Tensor], Tensor]]:
        return self.of.get(part, {})

    @property
    def metadata(self) -> dict[str, str]:
        return {"merged": self.note} if self.note else {}


NONE = Changes()


def write_official(
    folder: Path,
    variant: Variant,
    text: TextFiles,
    dtype: torch.dtype,
    format: str | None = None,
    codes: Mapping[str, Tensor] | None = None,
    rounding: str = "",
    changes: Changes = NONE,
) -> None:
    """Write two safetensors files with official names, and folders `t5` and `clip`: like `weights/flux-mini`.

    format: of `linears.formats`, that of the transformer's Linears. codes: replace those of fp8 for the same scales, by
    weight name; the metadata's `rounding` says how they were found. changes: made on the way, not with a format.
    """
    if format:
        state = file_state(load_flux(variant, "cpu", dtype, format)) | dict(codes or {})
        says = METADATA[format] | ({"rounding": rounding} if codes else {})
        write_safetensors(folder / variant.flow_file, state, says)
    else:
        _network(folder / variant.flow_file, variant, "transformer", "official", dtype, changes)
    _official_rest(folder, variant, text, dtype, changes)


def _official_rest(
    folder: Path, variant: Variant, text: TextFiles, dtype: torch.dtype, changes: Changes = NONE
) -> None:
    """Write all but the transformer."""
    _network(folder / variant.ae_file, variant, "autoencoder", "official", dtype)
    _text_encoder(text.t5, folder / "t5", variant, "t5", dtype, changes)
    _text_encoder(text.clip, folder / "clip", variant, "clip", dtype, changes)
    copy_tokenizer(text.t5_tokenizer, folder / "t5")
    copy_tokenizer(text.clip_tokenizer, folder / "clip")


FILE_TYPES = {"Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q5_0": 8, "Q5_1": 9, "Q4_K": 14, "Q5_K": 16, "Q6_K": 18, "BF16": 32}
"""types that most of a GGUF file's blocks have -> llama.cpp's number for such a file"""
SMALL = 1024
"""numbers of a tensor up to which ComfyUI-GGUF's converter keeps fp32"""


def write_gguf_model(
    folder: Path,
    variant: Variant,
    text: TextFiles,
    dtype: torch.dtype,
    kind: str,
    kinds: Mapping[str, str] | None = None,
) -> None:
    """Write `write_official`'s folder with the transformer in a GGUF file, its blocks' matrices of type `kind`.

    kinds: types of blocks by their names, of which `kind` is what most have.

    As ComfyUI-GGUF's converter: official names, small tensors in fp32, embeddings and the last layer in bf16. Numbers
    are quantized as the source's file has them, without another rounding before.
    """
    contents, params = find_contents(flow_path(variant), "transformer"), variant.params
    check_network(contents, params)
    note_precision(contents, dtype, kind)
    with opened_official(contents, params) as get:

        def data(name: str, found: str) -> Tensor:
            x = get(name, torch.float32)
            if found in PLAIN:
                return x
            check_finite(x, name, contents.source.path)  # a search for scales would make infinity a number
            return quantize(x, found)

        tensors: dict[str, Any] = {}
        for name, shape in network_shapes(params).items():
            found = gguf_type(name, shape, (kinds or {}).get(".".join(name.split(".")[:2]), kind))
            tensors[name] = found, shape, partial(data, name, found)
        says: dict[str, Any] = {
            "general.architecture": "flux",
            "general.quantization_version": 2,
            "general.file_type": FILE_TYPES[kind],
        }
        write_gguf((folder / variant.flow_file).with_suffix(".gguf"), tensors, says)
    _official_rest(folder, variant, text, dtype)


def gguf_type(name: str, shape: Shape, kind: str) -> str:
    """The type that a tensor of the transformer has in a file of that type."""
    if len(shape) < 2 or math.prod(shape) <= SMALL:
        return "F32"
    return kind if "_blocks." in name and is_whole(kind, shape) else "BF16"


def file_state(model: nn.Module) -> dict[str, Tensor]:
    """The state dict as files have it: of a layer in few bits what its format keeps (`tensors`)."""
    state = model.state_dict()
    for name, layer in model.named_modules():
        if isinstance(layer, Frozen):
            state = {key: x for key, x in state.items() if key not in {f"{name}.{code}" for code in layer.CODES}}
            state |= {f"{name}.{ending}": x for ending, x in layer.tensors().items()}
    return state


def write_diffusers(
    folder: Path, variant: Variant, text: TextFiles, dtype: torch.dtype, changes: Changes = NONE
) -> None:
    """Write a folder for `FluxPipeline.from_pretrained(folder)`, with those changes."""
    configs = {"transformer": transformer_config(variant.params), "vae": vae_config(variant.ae_params)}
    parts: dict[str, Part] = {"transformer": "transformer", "vae": "autoencoder"}
    for name, config in configs.items():
        _json(folder / name / "config.json", config)
        _network(
            folder / name / "diffusion_pytorch_model.safetensors", variant, parts[name], "diffusers", dtype, changes
        )
    _json(folder / "scheduler" / "scheduler_config.json", scheduler_config(variant.shift))
    _text_encoder(text.clip, folder / "text_encoder", variant, "clip", dtype, changes)
    _text_encoder(text.t5, folder / "text_encoder_2", variant, "t5", dtype, changes)
    copy_tokenizer(text.clip_tokenizer, folder / "tokenizer")
    copy_tokenizer(text.t5_tokenizer, folder / "tokenizer_2")
    _json(folder / "model_index.json", _index(text))


def _network(
    target: Path, variant: Variant, part: Part, layout: Layout, dtype: torch.dtype, changes: Changes = NONE
) -> None:
    """Write transformer or autoencoder in that layout. Files that have it already are copied, byte for byte."""
    flow = part == "transformer"
    path = flow_path(variant) if flow else ae_path(variant)
    params: Params = variant.params if flow else variant.ae_params
    contents = find_contents(path, part)
    check_network(contents, params)
    source, same = contents.source, contents.found.layout == layout and contents.is_exact
    if of_part := changes.of_part(part):
        _write_changed(target, contents, params, layout, dtype, of_part, changes.metadata)
        return
    if same and _has_dtype(source, dtype) and _shards_fit(source, target, layout):
        _copy(source, target)
        return
    state = (load_flux if flow else load_autoencoder)(variant, "cpu", dtype).state_dict()
    write_safetensors(target, state if layout == "official" else to_diffusers(state, params))


def _write_changed(
    target: Path,
    contents: Contents,
    params: Params,
    layout: Layout,
    dtype: torch.dtype,
    changes: Mapping[str, Callable[[Tensor], Tensor]],
    metadata: Mapping[str, str],
) -> None:
    """Write a network with changes. One tensor at a time is in fp32; those without a change stay mapped."""
    names = network_shapes(params)
    if missing := [name for name in changes if name not in names]:
        raise FileError(f"{contents.source.path} has no {missing[0]} to change. Next: leave this LoRA out.")
    with opened_official(contents, params) as get:

        def made(name: str) -> Tensor:
            return changes[name](get(name, torch.float32)).to(dtype) if name in changes else get(name, dtype)

        state = {name: made(name) for name in names}
        target.parent.mkdir(exist_ok=True)
        write_safetensors(target, state if layout == "official" else to_diffusers(state, params), metadata)


def _has_dtype(source: Source, dtype: torch.dtype) -> bool:
    """Whether all tensors have that dtype."""
    return {DTYPES.get(kind) for kind in source.dtypes.values()} == {dtype}


def _shards_fit(source: Source, target: Path, layout: Layout) -> bool:
    """Whether the weights are in one safetensors file, or in shards that the layout finds: by an index of the target's
    name."""
    indexed = layout == "diffusers" and source.index is not None and source.index.name == f"{target.name}.index.json"
    return (len(source.headers) == 1 or indexed) and not any(header.is_gguf for header in source.headers)


def _copy(source: Source, target: Path) -> None:
    """Copy one file under the target's name, or shards and their index under their own names."""
    target.parent.mkdir(exist_ok=True)
    if len(source.headers) == 1:
        shutil.copyfile(source.headers[0].path, target)
        return
    assert source.index is not None
    for file in (source.index, *(header.path for header in source.headers)):
        shutil.copyfile(file, target.parent / file.name)


def transformer_config(params: FluxParams) -> dict[str, Any]:
    """The arguments of diffusers' FluxTransformer2DModel."""
    return {
        "_class_name": "FluxTransformer2DModel",
        "_diffusers_version": SINCE,
        "patch_size": 1,
        "in_channels": params.in_channels,
        "out_channels": params.out_channels,
        "num_layers": params.depth,
        "num_single_layers": params.depth_single_blocks,
        "attention_head_dim": params.head_dim,
        "num_attention_heads": params.num_heads,
        "joint_attention_dim": params.context_in_dim,
        "pooled_projection_dim": params.vec_in_dim,
        "guidance_embeds": params.guidance_embed,
        "axes_dims_rope": list(params.axes_dim),
    }


def vae_config(params: AutoEncoderParams) -> dict[str, Any]:
    """The arguments of diffusers' AutoencoderKL."""
    levels = len(params.ch_mult)
    return {
        "_class_name": "AutoencoderKL",
        "_diffusers_version": SINCE,
        "act_fn": "silu",
        "block_out_channels": [params.ch * mult for mult in params.ch_mult],
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "force_upcast": True,
        "in_channels": params.in_channels,
        "out_channels": params.out_ch,
        "latent_channels": params.z_channels,
        "layers_per_block": params.num_res_blocks,
        "mid_block_add_attention": True,
        "norm_num_groups": 32,
        "sample_size": params.resolution,
        "scaling_factor": params.scale_factor,
        "shift_factor": params.shift_factor,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
    }


def scheduler_config(shift: bool) -> dict[str, Any]:
    """The arguments of diffusers' FlowMatchEulerDiscreteScheduler. A dynamic shift ignores `shift`."""
    return {
        "_class_name": "FlowMatchEulerDiscreteScheduler",
        "_diffusers_version": SINCE,
        "num_train_timesteps": 1000,
        "shift": 3.0 if shift else 1.0,
        "use_dynamic_shifting": shift,
        "base_shift": 0.5,
        "max_shift": 1.15,
        "base_image_seq_len": 256,
        "max_image_seq_len": 4096,
    }


def _index(text: TextFiles) -> dict[str, Any]:
    return {
        "_class_name": "FluxPipeline",
        "_diffusers_version": SINCE,
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "text_encoder_2": ["transformers", "T5EncoderModel"],
        "tokenizer": ["transformers", tokenizer_class(text.clip_tokenizer, "CLIPTokenizer")],
        "tokenizer_2": ["transformers", tokenizer_class(text.t5_tokenizer, "T5TokenizerFast")],
        "transformer": ["diffusers", "FluxTransformer2DModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }


def text_linears(text: TextFiles) -> dict[Part, dict[str, Shape]]:
    """Names and shapes of the matrices in the text encoders' files, which changes may name (without ".weight")."""
    found: dict[Part, dict[str, Shape]] = {}
    paths: dict[Part, Path] = {"clip": text.clip, "t5": text.t5}
    for part, path in paths.items():
        source = find_source(path)
        names = _encoder_names(source, part)
        shapes = {bare: source.weights[name] for name, bare in names.items() if bare.endswith(".weight")}
        found[part] = {bare.removesuffix(".weight"): shape for bare, shape in shapes.items() if len(shape) == 2}
    return found


def _encoder_names(source: Source, part: Part) -> dict[str, str]:
    """A text encoder's tensors: the file's names -> without the prefix, those of llama.cpp as transformers has them."""
    prefix = source.identity(part).prefix
    inner = find_storage(source, prefix).names
    names = [x.removeprefix(prefix) for x in source.shapes if x.startswith(prefix) and x not in inner]
    ours = {theirs: bare for bare, theirs in renamed(names, part).items()} if part == "t5" else {}
    found = {prefix + name: ours.get(name, name) for name in names}
    return {name: bare for name, bare in found.items() if not bare.startswith(NOT_OURS)}


def _text_encoder(
    path: Path, target: Path, variant: Variant, part: Part, dtype: torch.dtype, changes: Changes = NONE
) -> None:
    """Write a text encoder's configuration, and its weights in `dtype`, without other networks in its file.

    A folder that has both already is copied, byte for byte.
    """
    source, word = find_source(path), str(dtype).removeprefix("torch.")
    found, config = source.identity(part), encoder_config(variant, part, path)
    storage, mine = find_storage(source, found.prefix), _encoder_names(source, part)
    of_part = changes.of_part(part)
    stays = not of_part and path.is_dir() and len(mine) == len(source.shapes) and _has_dtype(source, dtype)
    file = target / "model.safetensors"
    if stays and config.get("dtype", config.get("torch_dtype")) == word and _shards_fit(source, file, "diffusers"):
        _copy(source, file)
        shutil.copyfile(path / "config.json", target / "config.json")
        return
    kept = {key: value for key, value in config.items() if key != "torch_dtype"}
    _json(target / "config.json", kept | {"dtype": word})
    with opened(source, "cpu", storage.among(mine)) as get:

        def cast(name: str) -> Tensor:
            if name not in storage.of and not (x := get(name)).is_floating_point():
                return x  # position ids stay whole numbers
            change = of_part.get(mine[name])
            x = dense(get, name, storage, torch.float32 if change else dtype)
            return change(x).to(dtype) if change else x

        metadata = changes.metadata if of_part else {}
        write_safetensors(file, {bare: cast(name) for name, bare in mine.items()}, metadata)


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copy the tokenizer's files: those that are beside an encoder's configuration and weights."""
    target.mkdir(exist_ok=True)
    for path in sorted(source.iterdir()):
        weights = is_weights(path) or path.name.endswith((".bin", ".md")) or ".index." in path.name
        if path.is_file() and not weights and path.name not in ("config.json", "generation_config.json"):
            shutil.copyfile(path, target / path.name)


def tokenizer_class(folder: Path, default: str) -> str:
    """The name of the transformers class that a tokenizer's own configuration asks for."""
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return config.get("tokenizer_class") or default


def _json(path: Path, value: dict[str, Any]) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8", newline="\n")
