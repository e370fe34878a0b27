"""Networks of transformers that look at pictures, and what prepares pictures for them, from a folder or the hub.

Only safetensors are opened, and code that a repository may hold is never run: each kind names its class.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..device.defaults import plain_defaults
from ..errors import FileError, FluxError, is_out_of_memory
from ..hub.places import network_folder


@dataclass(frozen=True)
class Network:
    """A kind of network."""

    what: str
    """it is for: a noun"""
    kind: str
    """its class in transformers"""
    types: tuple[str, ...]
    """the `model_type` in its config.json, the usual one first"""
    example: str
    """a hub id"""


@plain_defaults()
def load_network(
    network: Network, name: str, device: torch.device | str, dtype: torch.dtype, folder: Path | None = None
) -> tuple[Any, Any]:
    """The network, frozen, and its image processor, which works with Pillow whatever else is installed.

    name: a folder or a hub id. folder: where it is, if that is known. FileError where there is none, it holds another
    network, or lacks a file; AccessError and DiskError as of the hub.
    """
    folder = folder or network_folder(name, network.what, f"a folder, or a hub id as {network.example}")
    _check(network, name, folder)
    with quiet():
        import transformers

        with reading(f"{name}: its image processor"):
            processor = transformers.AutoImageProcessor.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False, backend="pil"
            )
        with reading(f"{name}: the {network.what}"):
            model = load_model(getattr(transformers, network.kind), folder, device, dtype, network.what)
    return model, processor


def load_model(kind: Any, folder: Path, device: torch.device | str, dtype: torch.dtype, what: str) -> Any:
    """A model of transformers, frozen, from a folder of safetensors. FileError if it can't be read or lacks any."""
    try:
        model, info = kind.from_pretrained(
            folder,
            dtype=dtype,
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise FileError(f"{folder}: the {what} could not be read: {error}") from error
    _check_complete(info, folder, what)
    return model.to(device).eval().requires_grad_(False)


def _check_complete(info: dict[str, Any], path: Path, what: str) -> None:
    """FileError if transformers found no weights for some parameters."""
    if missing := sorted(info["missing_keys"]):  # transformers would leave them at random
        raise FileError(f"{path}: the {what} lacks {len(missing)} tensors ({', '.join(missing[:5])}).")


@contextmanager
def quiet() -> Iterator[None]:
    """A context without transformers' notices and progress bars; the relevant ones are checked here."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


@contextmanager
def reading(what: str) -> Iterator[None]:
    """A context that turns whatever transformers says of a folder into a FileError."""
    try:
        yield
    except Exception as error:  # of any class: a config.json may name and hold anything
        if isinstance(error, FluxError) or is_out_of_memory(error):
            raise
        raise FileError(f"{what} could not be read: {' '.join(str(error).split())[:300]}") from error


def _check(network: Network, name: str, folder: Path) -> None:
    """FileError if a folder holds another network, or none."""
    what, usual = network.what, network.types[0]
    kind = read_config(name, folder, what)
    if kind not in network.types:
        raise FileError(f"{name} holds a {str(kind)[:40]!a} model; a {what} is a {usual}, as {network.example}")


def read_config(name: str, folder: Path, what: str) -> str:
    """The `model_type` in a folder's config.json. FileError says that `name` holds no model; what: a noun for it."""
    try:
        return str(json.loads((folder / "config.json").read_text(encoding="utf-8"))["model_type"])
    except (OSError, ValueError, KeyError, TypeError):
        raise FileError(f"{name} holds no model: a {what} is a folder with config.json and model.safetensors") from None
