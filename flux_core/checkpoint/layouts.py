"""A whole model as a folder: in the official files, or as diffusers' FluxPipeline reads it.

diffusers itself is not needed to write its layout: seven small JSON files, the weights under its names
(`keymaps.py`), and the text encoders, which are in transformers' format in both.
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from ..params import AutoEncoderParams, FluxParams
from ..places import TextFolders
from ..text.encoders import tokenizer_class
from ..variants import Variant
from .keymaps import to_diffusers
from .write import write_safetensors

State = Mapping[str, Tensor]
SINCE = "0.30.0"
"""the diffusers version that first had FluxPipeline"""

NOT_OURS = ("decoder.", "lm_head.", "vision_model.", "visual_projection.", "text_projection.", "logit_scale")
"""prefixes of what full T5 and CLIP files hold besides the text encoders"""


def write_official(
    folder: Path, variant: Variant, flux: State, ae: State, text: TextFolders, dtype: torch.dtype
) -> None:
    """Two safetensors files with official names, and folders `t5` and `clip`: like `weights/flux-mini`."""
    write_safetensors(folder / variant.flow_file, flux)
    write_safetensors(folder / variant.ae_file, ae)
    copy_text_encoder(text.t5, folder / "t5", dtype)
    copy_text_encoder(text.clip, folder / "clip", dtype)
    copy_tokenizer(text.t5_tokenizer, folder / "t5")
    copy_tokenizer(text.clip_tokenizer, folder / "clip")


def write_diffusers(
    folder: Path, variant: Variant, flux: State, ae: State, text: TextFolders, dtype: torch.dtype
) -> None:
    """What `FluxPipeline.from_pretrained(folder)` opens."""
    _module(folder / "transformer", transformer_config(variant.params), to_diffusers(flux, variant.params))
    _module(folder / "vae", vae_config(variant.ae_params), to_diffusers(ae, variant.ae_params))
    _json(folder / "scheduler" / "scheduler_config.json", scheduler_config(variant.shift))
    copy_text_encoder(text.clip, folder / "text_encoder", dtype)
    copy_text_encoder(text.t5, folder / "text_encoder_2", dtype)
    copy_tokenizer(text.clip_tokenizer, folder / "tokenizer")
    copy_tokenizer(text.t5_tokenizer, folder / "tokenizer_2")
    _json(folder / "model_index.json", _index(text))


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


def _index(text: TextFolders) -> dict[str, Any]:
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


def _module(folder: Path, config: dict[str, Any], state: State) -> None:
    _json(folder / "config.json", config)
    write_safetensors(folder / "diffusion_pytorch_model.safetensors", state)


def copy_text_encoder(source: Path, target: Path, dtype: torch.dtype) -> None:
    """A text encoder's configuration, and its weights in `dtype`, without what its file holds besides it."""
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    for stale in ("torch_dtype", "dtype"):
        config.pop(stale, None)
    _json(target / "config.json", config | {"dtype": str(dtype).removeprefix("torch.")})
    for path in sorted(source.glob("*.safetensors.index.json")):
        shutil.copyfile(path, target / path.name)
    for path in sorted(source.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            kept = [name for name in file.keys() if not name.startswith(NOT_OURS)]  # noqa: SIM118
            state = {name: _cast(file.get_tensor(name), dtype) for name in kept}
        write_safetensors(target / path.name, state)


def _cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.to(dtype) if x.is_floating_point() else x  # position ids stay whole numbers


def copy_tokenizer(source: Path, target: Path) -> None:
    """What is beside an encoder's configuration and weights: the tokenizer's files."""
    target.mkdir(exist_ok=True)
    for path in sorted(source.iterdir()):
        weights = path.name.endswith((".safetensors", ".index.json", ".bin", ".md"))
        if path.is_file() and not weights and path.name not in ("config.json", "generation_config.json"):
            shutil.copyfile(path, target / path.name)


def _json(path: Path, value: dict[str, Any]) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
