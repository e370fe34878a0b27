"""A whole pipeline of a few thousand random weights: real classes throughout, only their sizes are small."""

from dataclasses import replace
from zlib import crc32

import torch

from flux_core.model import AutoEncoder, Flux
from flux_core.pipeline import Components, Pipeline
from flux_core.variants import VARIANTS, Variant

CONTEXT, VECTOR = 8, 6


def tiny_variant(name: str = "flux-mini") -> Variant:
    """The named row with networks that forward in a millisecond; latents keep 16 channels and 8x down."""
    row = VARIANTS[name]
    depths = {"depth": 1, "depth_single_blocks": 1}
    widths = {"hidden_size": 16, "mlp_ratio": 2.0, "num_heads": 2, "axes_dim": (2, 2, 4)}
    text = {"vec_in_dim": VECTOR, "context_in_dim": CONTEXT}
    ae = replace(row.ae_params, ch=32, ch_mult=(1, 1, 1, 1), num_res_blocks=1)
    return replace(row, params=replace(row.params, **depths, **widths, **text), ae_params=ae, max_text=4)


class Words:
    """A text encoder after the pipeline's contract: one random vector for each word, up to four of them."""

    def __init__(self, dim: int, pooled: bool, dtype: torch.dtype) -> None:
        self.dim, self.pooled, self.dtype, self.calls = dim, pooled, dtype, 0

    def __call__(self, prompts: list[str]) -> torch.Tensor:
        self.calls += 1
        rows = torch.stack([self._row(prompt) for prompt in prompts])
        return (rows.mean(1) if self.pooled else rows).to(self.dtype)

    def _row(self, prompt: str) -> torch.Tensor:
        return torch.stack([self._word(word) for word in (prompt.split() + [""] * 4)[:4]])

    def _word(self, word: str) -> torch.Tensor:
        return torch.randn(self.dim, generator=torch.Generator().manual_seed(crc32(word.encode())))

    def to(self, device: torch.device | str) -> "Words":
        return self

    def notes(self, prompt: str) -> list[str]:
        dropped = " ".join(prompt.split()[4:])
        return [f"the prompt is longer than 4 tokens; dropped: {dropped!r}"] if dropped else []


def tiny_pipeline(
    name: str | Variant = "flux-mini",
    device: str | None = None,
    dtype: str | torch.dtype | None = None,
    offload: bool = False,
    vae_tiling: bool = False,
    compile: bool = False,
    t5_dtype: str | torch.dtype | None = None,
    **text: str | None,
) -> Pipeline:
    """Stands in for `load_pipeline`, arguments included; weights are the same every time."""
    variant = tiny_variant(name if isinstance(name, str) else name.name)
    kind = getattr(torch, str(dtype or "float32").removeprefix("torch."))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, ae = Flux(variant.params).to(kind), AutoEncoder(variant.ae_params).to(kind)
    t5, clip = Words(CONTEXT, False, kind), Words(VECTOR, True, kind)
    weights = {"flux-mini.safetensors": "abc"}
    components = Components(t5, clip, model, ae)
    return Pipeline(variant, components, torch.device("cpu"), kind, weights, offload, vae_tiling, compile)


def short_of_memory(pipeline, error):
    """A device on which two rows do not fit."""
    whole = pipeline.model.forward

    def forward(img, *args, **kwargs):
        if len(img) > 1:
            raise error
        return whole(img, *args, **kwargs)

    pipeline.model.forward = forward
