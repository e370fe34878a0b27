"""Files of the family at sizes for tests, of random weights: whole models, a control LoRA, SigLIP and its adapter;
and pictures."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from golden_files import read
from PIL import Image
from random_model import random_weights, small_variant, write_model
from safetensors.torch import save_file
from transformers import SiglipVisionConfig, SiglipVisionModel

from flux_core.model import Flux, FluxParams
from flux_core.variants import Variant

SIGLIP_TOKENS, SIGLIP_WIDTH = 9, 24
"""of a picture, and of a token"""


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    """Rectangles of noise: a picture with edges."""
    small = np.random.default_rng(seed).integers(0, 256, (height // 8 + 1, width // 8 + 1, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.NEAREST)


def small_model(folder: Path, name: str, dtype=torch.float32, **changes) -> tuple[Variant, dict[str, Path]]:
    """A model's row made small, and its parts in files, by the flags that name them."""
    row = replace(small_variant(name), **changes)
    write_model(folder, row, dtype)
    parts = {"model": row.flow_file, "ae": row.ae_file, "t5xxl": "t5", "clip_l": "clip"}
    return row, {flag: folder / part for flag, part in parts.items()}


def control_lora(path: Path, params: FluxParams, rank: int = 3, seed: int = 5, channels: int = 128) -> Path:
    """In the official layout: every Linear with a bias, norms, and `img_in` of so many channels."""
    draw, found = torch.Generator().manual_seed(seed), {}
    with torch.device("meta"):
        wide = Flux(replace(params, in_channels=channels))
    for name, x in wide.state_dict().items():
        if name.endswith("norm.scale"):
            found[name] = 1 + 0.3 * torch.randn(x.shape, generator=draw)
        elif x.ndim == 2:
            stem, r = name.removesuffix(".weight"), min(rank, *x.shape)
            found[f"{stem}.lora_A.weight"] = torch.randn(r, x.shape[1], generator=draw) / x.shape[1] ** 0.5
            found[f"{stem}.lora_B.weight"] = 0.5 * torch.randn(x.shape[0], r, generator=draw)
            found[f"{stem}.lora_B.bias"] = 0.1 * torch.randn(x.shape[0], generator=draw)
    save_file(found, path)
    return path


def siglip(folder: Path) -> Path:
    """A SigLIP that sees pictures at 42x42, as transformers keeps one."""
    config = SiglipVisionConfig(**json.loads(read("family/redux").metadata["siglip"]))
    random_weights(SiglipVisionModel(config), seed=4).save_pretrained(folder)
    entries = {"image_processor_type": "SiglipImageProcessor", "size": {"height": 42, "width": 42}, "resample": 3}
    entries |= {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    (folder / "preprocessor_config.json").write_text(json.dumps(entries))
    return folder


def redux_adapter(path: Path, width: int) -> Path:
    """From that SigLIP to words of a width, in the official layout."""
    draw = torch.Generator().manual_seed(6)
    sizes = {"redux_up.weight": (30, SIGLIP_WIDTH), "redux_up.bias": (30,), "redux_down.weight": (width, 30),
             "redux_down.bias": (width,)}  # fmt: skip
    save_file({name: 0.5 * torch.randn(size, generator=draw) for name, size in sizes.items()}, path)
    return path
