"""The FLUX.1 transformer and autoencoder in pure PyTorch, with the names of the official checkpoints."""

from ..params import AutoEncoderParams, FluxParams
from .autoencoder import AutoEncoder
from .table import MODULATION, Adapt, ModulationTable
from .transformer import Flux, Modulations, Run

__all__ = [
    "MODULATION",
    "Adapt",
    "AutoEncoder",
    "AutoEncoderParams",
    "Flux",
    "FluxParams",
    "ModulationTable",
    "Modulations",
    "Run",
]
