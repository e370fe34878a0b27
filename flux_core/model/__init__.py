"""FLUX.1's transformer, autoencoder and text encoders in pure PyTorch, with the names of the official checkpoints."""

from ..params import AutoEncoderParams, ClipParams, ControlNetParams, FluxParams, T5Params
from .autoencoder import AutoEncoder
from .clip import ClipText
from .controlnet import ControlNet
from .t5 import T5Encoder
from .table import MODULATION, Adapt, ModulationTable
from .transformer import Flux, Modulations, Run

__all__ = [
    "MODULATION",
    "Adapt",
    "AutoEncoder",
    "AutoEncoderParams",
    "ClipParams",
    "ClipText",
    "ControlNet",
    "ControlNetParams",
    "Flux",
    "FluxParams",
    "ModulationTable",
    "Modulations",
    "Run",
    "T5Encoder",
    "T5Params",
]
