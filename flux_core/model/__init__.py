"""The FLUX.1 transformer and autoencoder in pure PyTorch, with the names of the official checkpoints."""

from ..params import AutoEncoderParams, ControlNetParams, FluxParams
from .autoencoder import AutoEncoder
from .controlnet import ControlNet
from .table import MODULATION, Adapt, ModulationTable
from .transformer import Flux, Modulations, Run

__all__ = [
    "MODULATION",
    "Adapt",
    "AutoEncoder",
    "AutoEncoderParams",
    "ControlNet",
    "ControlNetParams",
    "Flux",
    "FluxParams",
    "ModulationTable",
    "Modulations",
    "Run",
]
