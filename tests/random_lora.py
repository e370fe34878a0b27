"""LoRA files with random factors, in official names, for a model of any size."""

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from flux_core.model import Flux, FluxParams

PREFIX = "diffusion_model."
CLIP_MODULE, T5_MODULE = "text_model.encoder.layers.0.self_attn.q_proj", "encoder.block.0.layer.0.SelfAttention.q"


def factors(
    params: FluxParams, rank: int = 4, seed: int = 0, strength: float = 1.0, alpha: float | None = None
) -> dict[str, Tensor]:
    """Factors for every Linear, whose difference is about `strength` times as large as the Linear's own weights."""
    draw = torch.Generator().manual_seed(seed)
    with torch.device("meta"):
        linears = {name: m for name, m in Flux(params).named_modules() if isinstance(m, nn.Linear)}
    found = {}
    for name, linear in linears.items():
        down = torch.randn(rank, linear.in_features, generator=draw) / linear.in_features**0.5
        up = torch.randn(linear.out_features, rank, generator=draw) / rank**0.5
        found |= {
            f"{PREFIX}{name}.lora_down.weight": down,
            f"{PREFIX}{name}.lora_up.weight": up * strength,
        }
        found |= {} if alpha is None else {f"{PREFIX}{name}.alpha": torch.tensor(alpha)}
    return found


def write(path: Path, tensors: dict[str, Tensor], **metadata: str) -> Path:
    save_file(tensors, path, metadata or None)
    return path


def text_factors(clip_dim: int = 128, t5_dim: int = 256, inner: int = 256, rank: int = 4, seed: int = 9):
    """Factors for the first query projection of each text encoder, under kohya's names."""
    draw = torch.Generator().manual_seed(seed)
    sizes = {f"lora_te1_{CLIP_MODULE}": (clip_dim, clip_dim), f"lora_te3_{T5_MODULE}": (inner, t5_dim)}
    return {
        f"{name.replace('.', '_')}.{end}.weight": torch.randn(*shape, generator=draw) * 0.3
        for name, (rows, columns) in sizes.items()
        for end, shape in (("lora_down", (rank, columns)), ("lora_up", (rows, rank)))
    }
