"""The FLUX.1 transformer (Black Forest Labs, 2024): 19 double-stream and 38 single-stream blocks at full size.

It predicts the velocity of a rectified flow (arXiv 2209.03003): with `x = sigma * noise + (1 - sigma) * data`, the
output is `noise - data` for each packed image token. Parameters bear the names of the official safetensors file.
"""

from typing import Protocol

import torch
from torch import Tensor, nn

from ..params import FluxParams
from .blocks import DoubleStreamBlock, LastLayer, SingleStreamBlock
from .layers import MLPEmbedder, timestep_embedding
from .rope import embed_nd

TIME_DIM = 256


class Run(Protocol):
    """What may stand between the loop and the model for the length of one forward.

    `value` sees what exists once for all blocks (`img_in`, `txt_in`, `vec`, `pe`, `velocity`) and the modulation of
    every block, by name, and returns what takes its place. `double_block` and `single_block` stand around a block:
    they call it, skip it, change what goes in and comes out, or pass a `tap` that reaches inside.
    """

    def value(self, name: str, x): ...

    def double_block(self, name: str, block: DoubleStreamBlock, img, txt, mods, pe) -> tuple[Tensor, Tensor]: ...

    def single_block(self, name: str, block: SingleStreamBlock, x, txt_len: int, mods, pe) -> Tensor: ...


class Flux(nn.Module):
    """Transformer of sizes `params`; the official class of the same name takes the same arguments."""

    def __init__(self, params: FluxParams) -> None:
        super().__init__()
        if params.hidden_size % params.num_heads:
            raise ValueError(f"hidden_size {params.hidden_size} is no multiple of num_heads {params.num_heads}")
        if sum(params.axes_dim) != params.head_dim:
            raise ValueError(f"axes_dim {params.axes_dim} must add up to the head size {params.head_dim}")
        dim = params.hidden_size
        self.params = params
        self.in_channels = params.in_channels
        self.out_channels = params.out_channels
        self.hidden_size = dim
        self.num_heads = params.num_heads

        self.img_in = nn.Linear(params.in_channels, dim)
        self.time_in = MLPEmbedder(TIME_DIM, dim)
        self.vector_in = MLPEmbedder(params.vec_in_dim, dim)
        self.guidance_in = MLPEmbedder(TIME_DIM, dim) if params.guidance_embed else None
        self.txt_in = nn.Linear(params.context_in_dim, dim)
        self.double_blocks = nn.ModuleList(DoubleStreamBlock(params) for _ in range(params.depth))
        self.single_blocks = nn.ModuleList(SingleStreamBlock(params) for _ in range(params.depth_single_blocks))
        self.final_layer = LastLayer(dim, params.out_channels)

    def embed_vec(self, timesteps: Tensor, y: Tensor, guidance: Tensor | None) -> Tensor:
        """What conditions every block alike: time, guidance and the pooled prompt. [B], [B, V], [B] -> [B, D]."""
        vec = self.time_in(timestep_embedding(timesteps, TIME_DIM))
        if self.guidance_in is not None:
            if guidance is None:
                raise ValueError("this model is guidance-distilled and needs a guidance strength for each row")
            vec = vec + self.guidance_in(timestep_embedding(guidance, TIME_DIM))
        return vec + self.vector_in(y)

    def forward(
        self,
        img: Tensor,
        img_ids: Tensor,
        txt: Tensor,
        txt_ids: Tensor,
        timesteps: Tensor,
        y: Tensor,
        guidance: Tensor | None = None,
        run: Run | None = None,
    ) -> Tensor:
        """Velocity of every image token.

        img: [B, L, in_channels]; img_ids: [B, L, 3]; txt: [B, T, context]; txt_ids: [B, T, 3]; timesteps: [B] in
        [0, 1]; y: [B, vec]; guidance: [B]. Returns [B, L, out_channels].
        """
        if img.ndim != 3 or txt.ndim != 3:
            raise ValueError(f"img and txt must be [B, L, D], got {tuple(img.shape)} and {tuple(txt.shape)}")
        img, txt = self.img_in(img), self.txt_in(txt)
        vec = self.embed_vec(timesteps, y, guidance)
        pe = embed_nd(torch.cat((txt_ids, img_ids), dim=1), self.params.axes_dim, self.params.theta)
        if run is None:
            return self.final_layer(self._blocks(img, txt, vec, pe), vec)
        txt, img = run.value("txt_in", txt), run.value("img_in", img)
        vec, pe = run.value("vec", vec), run.value("pe", pe)
        return run.value("velocity", self.final_layer(self._blocks_run(img, txt, vec, pe, run), vec))

    def _blocks(self, img: Tensor, txt: Tensor, vec: Tensor, pe: Tensor) -> Tensor:
        for block in self.double_blocks:
            img, txt = block(img, txt, *block.modulation(vec), pe)
        x = torch.cat((txt, img), dim=1)
        for block in self.single_blocks:
            x = block(x, *block.modulation(vec), pe)
        return x[:, txt.shape[1] :]

    def _blocks_run(self, img: Tensor, txt: Tensor, vec: Tensor, pe: Tensor, run: Run) -> Tensor:
        """The same loop with a run between it and the blocks."""
        for i, block in enumerate(self.double_blocks):
            name = f"double_blocks.{i}"
            mods = run.value(f"{name}.mod", block.modulation(vec))
            img, txt = run.double_block(name, block, img, txt, mods, pe)
        x = torch.cat((txt, img), dim=1)
        for i, block in enumerate(self.single_blocks):
            name = f"single_blocks.{i}"
            mods = run.value(f"{name}.mod", block.modulation(vec))
            x = run.single_block(name, block, x, txt.shape[1], mods, pe)
        return x[:, txt.shape[1] :]
