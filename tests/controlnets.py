"""ControlNets for tests: those of the golden file, and small ones of random weights, ours and diffusers'."""

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from golden_files import Golden, flux_of, read
from random_model import random_weights
from safetensors.torch import save_file
from torch import Tensor, nn

from flux_core.checkpoint import from_diffusers, to_diffusers
from flux_core.model import ControlNet, Flux
from flux_core.params import ControlNetParams, FluxParams


@cache
def golden() -> Golden:
    return read("family/controlnet")


@cache
def golden_flux() -> Flux:
    return flux_of(golden())


def golden_params() -> FluxParams:
    return golden_flux().params


@dataclass(frozen=True)
class Case:
    """A ControlNet of the golden file, and what it was used with."""

    name: str

    @property
    def told(self) -> dict:
        return json.loads(golden().metadata["cases"])[self.name]

    @property
    def params(self) -> ControlNetParams:
        told = self.told
        own = {"depth": told["num_layers"], "depth_single_blocks": told["num_single_layers"]}
        more = {"guidance_embed": told.get("guidance", False), "modes": told.get("modes", 0), "blocks": (5, 4)}
        return ControlNetParams(**{**vars(golden_params()), **own, **more})

    @property
    def state(self) -> dict[str, Tensor]:
        """By diffusers' names."""
        return golden().group(f"{self.name}.controlnet.")

    @property
    def cond(self) -> Tensor:
        return golden().tensors[f"{self.name}.in.cond"]

    def net(self) -> ControlNet:
        net = ControlNet(self.params)
        net.load_state_dict(from_diffusers(self.state, self.params))
        return net.eval().requires_grad_(False)


PLAIN, UNION = Case("plain"), Case("union")


def xlabs_params(of: FluxParams) -> ControlNetParams:
    """Pixels in, double blocks alone, as XLabs' are."""
    own = {"depth": 2, "depth_single_blocks": 0, "mlp_ratio": 4.0}
    return ControlNetParams(**{**vars(of), **own, "takes_pixels": True, "blocks": (of.depth, of.depth_single_blocks)})


def params_for(of: FluxParams, **own) -> ControlNetParams:
    """A double and a single block, in sizes that diffusers has, too; `own` are others."""
    few = {"depth": 1, "depth_single_blocks": 1, "mlp_ratio": 4.0, "blocks": (of.depth, of.depth_single_blocks)}
    return ControlNetParams(**{**vars(of), **few, **own})


def write_net(path: Path, params: ControlNetParams, std: float = 0.2, seed: int = 5) -> Path:
    """A file of random weights by diffusers' names."""
    net = random_weights(ControlNet(params), seed=seed, std=std)
    save_file({name: x.contiguous() for name, x in to_diffusers(net.state_dict(), params).items()}, path)
    return path


def random_net(params: ControlNetParams, std: float = 0.2) -> ControlNet:
    return random_weights(ControlNet(params), seed=5, std=std)


def theirs(params: ControlNetParams) -> nn.Module:
    """diffusers' network of these sizes."""
    from diffusers import FluxControlNetModel

    pixels = {"conditioning_embedding_channels": params.cond_channels // 4, "patch_size": 2}
    return FluxControlNetModel(
        in_channels=params.in_channels,
        num_layers=params.depth,
        num_single_layers=params.depth_single_blocks,
        attention_head_dim=params.head_dim,
        num_attention_heads=params.num_heads,
        joint_attention_dim=params.context_in_dim,
        pooled_projection_dim=params.vec_in_dim,
        guidance_embeds=params.guidance_embed,
        axes_dims_rope=list(params.axes_dim),
        num_mode=params.modes or None,
        **(pixels if params.takes_pixels else {}),
    ).eval()
