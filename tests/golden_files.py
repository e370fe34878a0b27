"""The outputs of the official implementation in `tests/golden/`, and how far ours are from them."""

import json
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor

from flux_core.model import Flux, FluxParams

FOLDER = Path(__file__).parent / "golden"


class Golden(NamedTuple):
    tensors: dict[str, Tensor]
    metadata: dict[str, str]

    def group(self, prefix: str) -> dict[str, Tensor]:
        """The tensors under a prefix, by the rest of their names."""
        return {k.removeprefix(prefix): v for k, v in self.tensors.items() if k.startswith(prefix)}


def read(name: str) -> Golden:
    with safe_open(FOLDER / f"{name}.safetensors", framework="pt") as file:
        return Golden({name: file.get_tensor(name) for name in file.keys()}, file.metadata())  # noqa: SIM118


def flux_of(golden: Golden, dtype: torch.dtype = torch.float32) -> Flux:
    """Our transformer with the weights of the file, in `dtype`."""
    model = Flux(FluxParams(**json.loads(golden.metadata["params"])))
    model.load_state_dict(golden.group("weights."))
    return model.to(dtype).eval().requires_grad_(False)


def distance(ours: Tensor, theirs: Tensor) -> float:
    """Relative L2."""
    return float((ours.double() - theirs.double()).norm() / theirs.double().norm())
