"""ControlNets for FLUX.1 (after arXiv 2302.05543): a few blocks that see a condition, and steer the transformer's.

A ControlNet embeds the noisy image tokens and those of the condition, adds them, and runs its few blocks. Behind each,
a Linear gives a residual, which is added to the image tokens behind some of the transformer's blocks. There are two
kinds:

- InstantX's and Shakker's take the tokens of the condition's latent. Neighbouring blocks of the transformer share a
  residual. A union of theirs knows several kinds of conditions: the embedding of one, its mode, comes before the text.
- XLabs' take pixels, and have double blocks alone, whose residuals take turns.

Sources: diffusers' `FluxControlNetModel`; XLabs-AI/x-flux `src/flux/controlnet.py`, whose names the parameters have.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn

from ..params import ControlNetParams
from .rope import embed_nd
from .transformer import Backbone

HINT_STRIDES = (1, 1, 2, 1, 2, 1, 2, 1)
"""of the convolutions over pixels: 8 in all"""


class Residuals(NamedTuple):
    """What is added to the image tokens behind blocks, [B, L, D] each."""

    double: list[Tensor]
    single: list[Tensor]

    def map(self, fn: Callable[[Tensor], Tensor]) -> "Residuals":
        """A copy with `fn` applied to every tensor."""
        return Residuals([fn(x) for x in self.double], [fn(x) for x in self.single])


class ControlNet(Backbone):
    """The ControlNet of these sizes."""

    params: ControlNetParams

    def __init__(self, params: ControlNetParams) -> None:
        super().__init__(params)
        dim = params.hidden_size
        self.pos_embed_input = nn.Linear(params.cond_channels, dim)
        self.input_hint_block = hint_block(params.hint_channels) if params.takes_pixels else None
        self.controlnet_mode_embedder = nn.Embedding(params.modes, dim) if params.modes else None
        self.controlnet_blocks = nn.ModuleList(nn.Linear(dim, dim) for _ in range(params.depth))
        self.controlnet_single_blocks = nn.ModuleList(nn.Linear(dim, dim) for _ in range(params.depth_single_blocks))

    def forward(
        self,
        img: Tensor,
        img_ids: Tensor,
        cond: Tensor,
        txt: Tensor,
        txt_ids: Tensor,
        timesteps: Tensor,
        y: Tensor,
        guidance: Tensor | None = None,
        mode: int | None = None,
    ) -> Residuals:
        """A residual of each of its blocks, for the image tokens.

        img: [B, L, in_channels], noisy; cond: [B, L, cond_channels], or pixels [B, 3, H, W] from -1 to 1 with a token
        for each 16 x 16 of them, and B may be 1; mode: of a union. The others are `Flux.forward`'s. Guidance acts only
        where the ControlNet has an embedding for it.
        """
        img, txt = self.img_in(img) + self.embed_cond(cond), self.txt_in(txt)
        if self.controlnet_mode_embedder is not None:
            if mode is None:
                raise ValueError("this ControlNet is a union and needs the mode of the condition")
            kind = self.controlnet_mode_embedder.weight[mode].expand(txt.shape[0], 1, -1)
            txt, txt_ids = torch.cat((kind, txt), dim=1), torch.cat((txt_ids[:, :1], txt_ids), dim=1)
        pe = embed_nd(torch.cat((txt_ids, img_ids), dim=1), self.params.axes_dim, self.params.theta)
        vec = self.embed_vec(timesteps, y, guidance)

        residuals = Residuals([], [])
        for block, out in zip(self.double_blocks, self.controlnet_blocks, strict=True):
            img, txt = block(img, txt, *block.modulation(vec), pe)
            residuals.double.append(out(img))
        x = torch.cat((txt, img), dim=1)
        for block, out in zip(self.single_blocks, self.controlnet_single_blocks, strict=True):
            x = block(x, *block.modulation(vec), pe)
            residuals.single.append(out(x[:, txt.shape[1] :]))
        return residuals

    def embed_cond(self, cond: Tensor) -> Tensor:
        """The condition as `forward` takes it -> [B, L, D]."""
        if self.input_hint_block is not None:
            cond = rearrange(self.input_hint_block(cond), "b c (h ph) (w pw) -> b (h w) (c ph pw)", ph=2, pw=2)
        return self.pos_embed_input(cond)

    def placed(self, residuals: Residuals) -> dict[str, Tensor]:
        """The residual behind each of the transformer's blocks, by the block's name."""
        double, single = self.params.blocks
        return {
            **_placed("double_blocks", double, residuals.double, in_turn=self.params.takes_pixels),
            **_placed("single_blocks", single, residuals.single),
        }


def hint_block(channels: Sequence[int]) -> nn.Sequential:
    """Convolutions with SiLU between them: pixels [B, 3, H, W] -> features [B, C, H/8, W/8]."""
    layers: list[nn.Module] = []
    for (before, after), stride in zip(pairwise(channels), HINT_STRIDES, strict=True):
        layers += [nn.Conv2d(before, after, 3, stride, padding=1), nn.SiLU()]
    return nn.Sequential(*layers[:-1])


def _placed(stack: str, count: int, residuals: Sequence[Tensor], in_turn: bool = False) -> dict[str, Tensor]:
    """The residuals behind `count` blocks: in turn, or each behind as many neighbours, so the last may be unused."""
    if not residuals:
        return {}
    each = -(-count // len(residuals))
    return {f"{stack}.{i}": residuals[i % len(residuals) if in_turn else i // each] for i in range(count)}
