"""The four networks of a model: T5, CLIP, transformer, autoencoder."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from ..checkpoint import load_autoencoder, load_flux
from ..kernels import install, install_decode
from ..model import AutoEncoder, Flux
from ..text import T5Choice, load_text_encoders
from ..variants import Variant


@dataclass(frozen=True, eq=False)
class Components:
    """The loaded networks. `t5` and `clip` map prompts to [B, T, D] and [B, V]."""

    t5: Any
    clip: Any
    flux: Flux
    ae: AutoEncoder

    def __iter__(self) -> Iterator[Any]:
        return iter((self.t5, self.clip, self.flux, self.ae))


def load_components(
    variant: Variant,
    device: torch.device,
    dtype: torch.dtype,
    format: str | None = None,
    t5: T5Choice | None = None,
    mapped: bool = False,
) -> Components:
    """The networks of a model on that device. Errors as in `load_flux`.

    format: that of the transformer's Linears. t5: how T5 is loaded. mapped: as in `load_flux`.
    """
    encoders = load_text_encoders(variant, device, dtype, t5, mapped)
    flux = load_flux(variant, device, dtype, format, mapped)
    return Components(*encoders, flux, load_autoencoder(variant, device, dtype))


def install_kernels(components: Components, device: torch.device, attention: str = "exact") -> Components:
    """The same components, with the fastest functions that the device has. attention: as in `kernels.install`."""
    install(components.flux, device, attention)
    install_decode(components.ae, device)
    return components
