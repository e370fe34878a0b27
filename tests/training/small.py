"""A small transformer and a few examples to learn from, the same in every process."""

import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

from flux_core.model import Flux, FluxParams
from flux_core.training import Example, Recipe, adapt, train

PARAMS = FluxParams(
    in_channels=64, out_channels=64, vec_in_dim=8, context_in_dim=16, hidden_size=32, mlp_ratio=2.0, num_heads=2,
    depth=1, depth_single_blocks=2, axes_dim=(4, 6, 6), theta=10_000, qkv_bias=True, guidance_embed=True,
)  # fmt: skip
RECIPE = Recipe(steps=12, lr=1e-2, batch=2, accumulation=2, warmup=3, schedule="cosine", seed=5)


def small_adapter(patterns=("to_q", "proj_out", "norm_out.linear"), rank=2):
    draw = torch.Generator().manual_seed(0)
    model = Flux(PARAMS)
    with torch.no_grad():
        for x in model.parameters():
            x.copy_(0.2 * torch.randn(x.shape, generator=draw))
    return adapt(model, patterns, rank, 4, draw)


def examples(count=5):
    draw = torch.Generator().manual_seed(1)
    shapes = (16, 4, 6), (3, 16), (8,)
    return [Example(f"{i}.png", *(torch.randn(shape, generator=draw) for shape in shapes)) for i in range(count)]


LONG = replace(RECIPE, steps=150)


def say(done):
    """With time to be killed."""
    print(done.step, flush=True)
    time.sleep(0.01)


if __name__ == "__main__":
    train(small_adapter(), examples(), LONG, Path(sys.argv[1]), every=1, on_step=say)
