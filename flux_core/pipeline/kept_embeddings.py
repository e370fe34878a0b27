"""Encoded prompts on the disk: T5's tokens and CLIP's vector, a safetensors file for each prompt.

A file is named by a hash of all that its bits depend on: the prompt, every byte of the encoders and tokenizers, their
precision, the text's length, LoRAs on the encoders, torch, tokenizers, device and threads. So it is never wrong, and
names say nothing. What somebody does to an encoder in Python is not seen. Nothing is ever deleted here: 4 MB for a
prompt of FLUX.1-dev in bf16.

A file appears whole or not at all, so processes may share a folder. One that is damaged is written again.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import tokenizers
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from ..checkpoint.files import TextFiles, encoder_config, text_files
from ..checkpoint.source import find_source, is_weights
from ..device.choice import dtype_name
from ..errors import DiskError, FileError
from ..files import prepare_folder, user_path, write_whole
from ..hub.client import cache_folder
from ..kernels import can_fuse
from ..terminal import note
from ..text import T5Choice
from ..variants import Variant
from ..version import __version__
from .environment import device_name

FLAG = "--keep-embeddings"
FORMAT = 1
LARGE = 10**9
"""bytes of a file whose hashing takes seconds, so that a line says so"""
Facts = Mapping[str, Any]
"""what embeddings depend on, as JSON has it"""


class KeptEmbeddings:
    """A folder of encoded prompts."""

    def __init__(self, folder: Path, facts: Callable[[], Facts]) -> None:
        """facts: all that an embedding depends on beside the prompt and LoRAs."""
        self.folder, self.facts = folder, facts

    def path(self, prompt: str, loras: Any) -> Path:
        """The file of a prompt. loras: those on the encoders, as JSON has them."""
        told = {"format": FORMAT, "prompt": prompt, "loras": loras, **self.facts()}
        return self.folder / f"{hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()}.safetensors"

    def find(self, path: Path) -> tuple[Tensor, Tensor] | None:
        """Text tokens and vector, on the CPU; None where there is no such file, or a damaged one."""
        try:
            state = load(path.read_bytes())
            txt, vec = state["txt"], state["vec"]
            if state["sha256"].tolist() == _digest(txt, vec):
                return txt, vec
        except FileNotFoundError:
            return None
        except (OSError, SafetensorError, KeyError, ValueError):
            pass
        note(f"{path} is damaged, or could not be read: the prompt is encoded again")
        return None

    def keep(self, path: Path, txt: Tensor, vec: Tensor) -> None:
        """Write a prompt's file. Where that fails a line says so, and nothing is lost but time."""
        txt, vec = (x.detach().cpu().contiguous() for x in (txt, vec))
        digest = torch.tensor(_digest(txt, vec), dtype=torch.uint8, device="cpu")
        try:
            write_whole(path, save({"txt": txt, "vec": vec, "sha256": digest}))
        except DiskError as error:
            note(f"an embedding is not kept: {error}")


def _digest(*tensors: Tensor) -> list[int]:
    whole = hashlib.sha256()
    for x in tensors:
        whole.update(x.reshape(-1).view(torch.uint8).numpy().data)
    return list(whole.digest())


def embeddings_folder(given: str | Path | bool | None) -> Path | None:
    """The folder that the user names, for "auto" or True the one beside the hub's cache; made where it is missing.

    None for None or False: nothing is kept. DiskError, UsageError.
    """
    if given in (None, False):
        return None
    beside = given in (True, "auto")
    return prepare_folder(cache_folder().parent / "flux_core" / "embeddings" if beside else user_path(str(given)), FLAG)


def find_kept(folder: Path, variant: Variant, t5: T5Choice, device: torch.device, dtype: torch.dtype) -> KeptEmbeddings:
    """The embeddings in a folder, for that model loaded so. FileError for an encoder's file that cannot be read."""
    of_files = _facts_of_files(folder, variant, text_files(variant))

    def facts() -> Facts:
        return {
            **of_files,
            "precision": [t5.precision, dtype_name(t5.dtype), dtype_name(dtype), torch.get_float32_matmul_precision()],
            "length": variant.max_text,
            "devices": [device_name(device), device_name(t5.home or device), torch.backends.cpu.get_cpu_capability()],
            "kernels": can_fuse(device),
            "versions": [__version__, torch.__version__, tokenizers.__version__],
        }

    return KeptEmbeddings(folder, facts)


def _facts_of_files(folder: Path, variant: Variant, files: TextFiles) -> Facts:
    """The SHA-256 of all bytes of encoders and tokenizers, and the encoders' configurations. FileError.

    Hashes are remembered in `hashes.json` in the folder, by path, size and date.
    """
    encoders = {"t5": files.t5, "clip": files.clip}
    words = {"t5": files.t5_tokenizer, "clip": files.clip_tokenizer}
    weights = {part: [header.path for header in find_source(path).headers] for part, path in encoders.items()}
    told = {part: sorted(x for x in path.iterdir() if _is_told(x)) for part, path in words.items()}
    known = _Hashes(folder / "hashes.json")
    facts = {
        "weights": {part: known.of(paths) for part, paths in weights.items()},
        "tokenizers": {part: [x.name for x in paths] + known.of(paths) for part, paths in told.items()},
        "configurations": {part: encoder_config(variant, part, path) for part, path in encoders.items()},  # type: ignore[arg-type]
    }
    known.write()
    return facts


def _is_told(path: Path) -> bool:
    """Whether a file in a tokenizer's folder may say how it cuts."""
    weights = is_weights(path) or path.name.endswith(".bin") or ".index." in path.name
    return path.is_file() and not weights and not path.name.startswith(".")


class _Hashes:
    """The SHA-256 of files, remembered while they have the same size and date."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self.known: dict[str, Any] = {}
        with suppress(OSError, ValueError, RecursionError):
            found = json.loads(place.read_bytes())
            self.known = found if isinstance(found, dict) else {}
        self.before = dict(self.known)

    def of(self, paths: Iterable[Path]) -> list[str]:
        return [self._of(path) for path in paths]

    def _of(self, path: Path) -> str:
        try:
            path = path.resolve()
            found = path.stat()
            state = [found.st_size, found.st_mtime_ns]
            match self.known.get(str(path)):
                case [size, changed, str(sha256)] if [size, changed] == state:
                    return sha256
            if found.st_size > LARGE:
                note(f"{path.name} is read once for its hash, by which embeddings are kept")
            with path.open("rb") as file:
                sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise FileError(f"{path} could not be read: {error.strerror or error}.") from None
        self.known[str(path)] = [*state, sha256]
        return sha256

    def write(self) -> None:
        """Remember them; where that fails they are hashed again next time."""
        if self.known != self.before:
            with suppress(DiskError):
                write_whole(self.place, json.dumps({k: x for k, x in self.known.items() if os.path.exists(k)}) + "\n")
