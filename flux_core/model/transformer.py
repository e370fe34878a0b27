"""The FLUX.1 transformer (Black Forest Labs, 2024): 19 double-stream and 38 single-stream blocks at full size.

It predicts the velocity of a rectified flow (arXiv 2209.03003): with `x = sigma * noise + (1 - sigma) * data`, the
output is `noise - data` for each packed image token. Parameters have the names of the official safetensors file.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from ..params import TIME_DIM, FluxParams
from .blocks import DoubleStreamBlock, LastLayer, SingleStreamBlock
from .layers import MLPEmbedder, ModulationOut, timestep_embedding
from .rope import embed_nd

Fetch = Callable[[Iterable[Any]], Iterator[Any]]
"""yields blocks in order, each with its weights on the computing device until the next is requested"""


class Run(Protocol):
    """The hooks of one forward, called by the loop over the blocks.

    `value` gets each value that exists once for all blocks (first `txt_in`, then `img_in`, `pe`, `y`, `vec`,
    `velocity`) and the modulation of every block, by name, and returns its replacement. `double_block` and
    `single_block` are called instead of a block: they call it, skip it, change its inputs and outputs, or pass a `tap`
    for the values inside.
    """

    def value(self, name: str, x): ...

    def double_block(self, name: str, block: DoubleStreamBlock, img, txt, mods, pe) -> tuple[Tensor, Tensor]: ...

    def single_block(self, name: str, block: SingleStreamBlock, x, txt_len: int, mods, pe) -> Tensor: ...


class Modulations(NamedTuple):
    """Shift, scale and gate of all blocks and the last layer: the only effect of `vec` on the model."""

    double: list[tuple[ModulationOut, ...]]
    single: list[tuple[ModulationOut, ...]]
    last: tuple[Tensor, Tensor]

    def map(self, fn: Callable[[Tensor], Tensor]) -> "Modulations":
        """A copy with `fn` applied to every tensor."""

        def of(blocks: list[tuple[ModulationOut, ...]]) -> list[tuple[ModulationOut, ...]]:
            return [tuple(ModulationOut(*map(fn, mod)) for mod in sets) for sets in blocks]

        shift, scale = self.last
        return Modulations(of(self.double), of(self.single), (fn(shift), fn(scale)))

    @classmethod
    def joined(cls, parts: "Sequence[Modulations]") -> "Modulations":
        """The parts concatenated along the first axis, that of steps."""
        if len(parts) == 1:
            return parts[0]
        rows = iter([torch.cat(tensors) for tensors in zip(*(part.tensors() for part in parts), strict=True)])
        return parts[0].map(lambda _: next(rows))

    def tensors(self) -> list[Tensor]:
        """All tensors, in the order in which `map` goes through them."""
        return [*chain.from_iterable(mod for sets in (*self.double, *self.single) for mod in sets), *self.last]


class Changes(NamedTuple):
    """Counts of changes to what a model's layers compute. What was computed from them before is stale after one."""

    layers: int = 0
    """layers exchanged: also graphs recorded before are stale"""
    scales: int = 0
    """numbers changed in place, which a recorded graph reads"""

    def next(self, scales: bool) -> "Changes":
        return self._replace(scales=self.scales + 1) if scales else self._replace(layers=self.layers + 1)


class Backbone(nn.Module):
    """The embedders and blocks that the transformer and its ControlNets have alike."""

    def __init__(self, params: FluxParams) -> None:
        super().__init__()
        if params.hidden_size % params.num_heads:
            raise ValueError(f"hidden_size {params.hidden_size} is no multiple of num_heads {params.num_heads}")
        if sum(params.axes_dim) != params.head_dim:
            raise ValueError(f"axes_dim {params.axes_dim} must add up to the head size {params.head_dim}")
        dim = params.hidden_size
        self.params = params

        self.img_in = nn.Linear(params.in_channels, dim)
        self.time_in = MLPEmbedder(TIME_DIM, dim)
        self.vector_in = MLPEmbedder(params.vec_in_dim, dim)
        self.guidance_in = MLPEmbedder(TIME_DIM, dim) if params.guidance_embed else None
        self.txt_in = nn.Linear(params.context_in_dim, dim)
        self.double_blocks = nn.ModuleList(DoubleStreamBlock(params) for _ in range(params.depth))
        self.single_blocks = nn.ModuleList(SingleStreamBlock(params) for _ in range(params.depth_single_blocks))

    def embed_vec(self, timesteps: Tensor, y: Tensor, guidance: Tensor | None) -> Tensor:
        """The conditioning vector, from time, pooled prompt and guidance: [B], [B, V], [B] -> [B, D]."""
        vec = self.time_in(timestep_embedding(timesteps, TIME_DIM))
        if self.guidance_in is not None:
            if guidance is None:
                raise ValueError("this model is guidance-distilled and needs a guidance strength for each row")
            vec = vec + self.guidance_in(timestep_embedding(guidance, TIME_DIM))
        return vec + self.vector_in(y)


class Flux(Backbone):
    """The transformer of these sizes; the official class of the same name takes the same arguments."""

    def __init__(self, params: FluxParams) -> None:
        super().__init__(params)
        self.changes = Changes()
        self.in_channels = params.in_channels
        self.out_channels = params.out_channels
        self.hidden_size = params.hidden_size
        self.num_heads = params.num_heads
        self.final_layer = LastLayer(params.hidden_size, params.out_channels)

    def modulations(self, vec: Tensor) -> Modulations:
        """The modulation of every block and the last layer, from vec [B, D]."""
        return Modulations(
            [block.modulation(vec) for block in self.double_blocks],
            [block.modulation(vec) for block in self.single_blocks],
            self.final_layer.modulation(vec),
        )

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
        mods: Modulations | None = None,
        fetch: Fetch = iter,
    ) -> Tensor:
        """Velocity of every image token.

        img: [B, L, in_channels]; img_ids: [B, L, 3]; txt: [B, T, context]; txt_ids: [B, T, 3]; timesteps: [B] in
        [0, 1]; y: [B, vec]; guidance: [B]. Returns [B, L, out_channels]. mods: the modulations of this time, prompt and
        guidance, if computed already; then no `vec` is computed, and a run gets none. fetch: iterates over blocks, and
        may load their weights.
        """
        if img.ndim != 3 or txt.ndim != 3:
            raise ValueError(f"img and txt must be [B, L, D], got {tuple(img.shape)} and {tuple(txt.shape)}")
        img, txt = self.img_in(img), self.txt_in(txt)
        pe = embed_nd(torch.cat((txt_ids, img_ids), dim=1), self.params.axes_dim, self.params.theta)
        if run is not None:
            txt, img, pe = run.value("txt_in", txt), run.value("img_in", img), run.value("pe", pe)
        if mods is None:
            vec = self.embed_vec(timesteps, y if run is None else run.value("y", y), guidance)
            mods = self.modulations(vec if run is None else run.value("vec", vec))
        x = self._blocks(img, txt, mods, pe, fetch) if run is None else self._blocks_run(img, txt, mods, pe, fetch, run)
        velocity = self.final_layer(x, *mods.last)
        return velocity if run is None else run.value("velocity", velocity)

    def _blocks(self, img: Tensor, txt: Tensor, mods: Modulations, pe: Tensor, fetch: Fetch) -> Tensor:
        for block, sets in zip(fetch(self.double_blocks), mods.double, strict=True):
            img, txt = block(img, txt, *sets, pe)
        x = torch.cat((txt, img), dim=1)
        for block, sets in zip(fetch(self.single_blocks), mods.single, strict=True):
            x = block(x, *sets, pe)
        return x[:, txt.shape[1] :]

    def _blocks_run(self, img: Tensor, txt: Tensor, mods: Modulations, pe: Tensor, fetch: Fetch, run: Run) -> Tensor:
        """`_blocks`, with the hooks of a run."""
        for i, (block, sets) in enumerate(zip(fetch(self.double_blocks), mods.double, strict=True)):
            name = f"double_blocks.{i}"
            img, txt = run.double_block(name, block, img, txt, run.value(f"{name}.mod", sets), pe)
        x = torch.cat((txt, img), dim=1)
        for i, (block, sets) in enumerate(zip(fetch(self.single_blocks), mods.single, strict=True)):
            name = f"single_blocks.{i}"
            x = run.single_block(name, block, x, txt.shape[1], run.value(f"{name}.mod", sets), pe)
        return x[:, txt.shape[1] :]
