"""Which file holds a model's weights, and a short name for what is in it."""

import hashlib
import os
from pathlib import Path

from ..errors import FileError
from ..places import embedded_folder, hub_file
from ..variants import AE_VARIABLES, VARIANTS, Variant
from .identify import Identity, Part, identify
from .source import find_source

LARGE = 2**28
"""bytes above which a file is known by its header and size instead of by every byte"""


def resolve(variant: Variant) -> tuple[Path, Path]:
    """The files of transformer and autoencoder. FileError, AccessError or DiskError where there is none."""
    return flow_path(variant), ae_path(variant)


def flow_path(variant: Variant) -> Path:
    """The transformer's file or folder of shards: what ships, else what `FLUX_MODEL` names, else the hub's file."""
    return _find(variant, variant.flow_file, "transformer", variant.variables)


def ae_path(variant: Variant) -> Path:
    """The autoencoder's file or folder: what ships, else what `FLUX_AE` names, else the hub's file."""
    return _find(variant, variant.ae_file, "vae", AE_VARIABLES)


def _find(variant: Variant, file: str, folder: str, variables: tuple[str, ...]) -> Path:
    if variant.repo is None:
        path = embedded_folder(variant) / file
        return _existing(path, str(path), "clone the repository again, whole, or install it again")
    variable, named = next(((name, value) for name in variables if (value := os.environ.get(name))), ("", ""))
    if named:
        path = Path(named).expanduser()
        inside = (path / name for name in (file, folder) if path.is_dir())  # official files, or a diffusers pipeline
        path = next((one for one in inside if one.exists()), path)
        return _existing(
            path, f"{variable}={named}", f"point {variable} to a safetensors file or a folder, or unset it"
        )
    return hub_file(variant.repo, file)


def check_files(variant: Variant) -> None:
    """Hold the headers of its files against the model: FileError, in a tenth of a second and without torch."""
    params = variant.params
    wanted: dict[Part, tuple[int, ...]] = {
        "transformer": (params.hidden_size, params.in_channels, params.guidance_embed),
        "autoencoder": (),
    }
    for path, (part, features) in zip(resolve(variant), wanted.items(), strict=True):
        found = identify(find_source(path).shapes, part)
        if found.part != part:
            raise FileError(f"{path} is {found.text}, and no {part}. Next: {_place_of(found)}.")
        if found.features and found.features != features:
            raise FileError(f"{path} is {found.text}, and not {variant.name}. Next: {_name_of(found)}.")


def _place_of(found: Identity) -> str:
    places = {"transformer": "point FLUX_MODEL to it", "autoencoder": "point FLUX_AE to it"}
    return places.get(found.part, "point FLUX_MODEL to a transformer and FLUX_AE to its autoencoder")


def _name_of(found: Identity) -> str:
    """The --name that such a file is for."""
    for row in VARIANTS.values():
        if found.features == (row.params.hidden_size, row.params.in_channels, row.params.guidance_embed):
            return f"--name {row.name}"
    return f"give a file of one of {', '.join(VARIANTS)}"


def _existing(path: Path, origin: str, advice: str) -> Path:
    if path.is_file() or path.is_dir():
        return path
    found = "is no regular file" if path.exists() else "does not exist"
    raise FileError(f"{origin} {found}. Next: {advice}.")


def weights_hashes(variant: Variant) -> dict[str, str]:
    """File name -> what its weights are known by, for the record that goes into a picture.

    A file of up to 256 MB: the first 16 hex digits of its SHA-256. A larger one would take seconds to
    minutes, so it is known by `header:` and the same digits over its safetensors header and its size:
    names, shapes and offsets, not values. An embedded model's text encoders are named too; those from the
    hub are not.
    """
    flow, ae = resolve(variant)
    files = {flow.name: flow, ae.name: ae}
    if variant.embedded:
        for folder in (variant.t5, variant.clip):
            files[f"{folder}/model.safetensors"] = embedded_folder(variant) / folder / "model.safetensors"
    return {name: _hash(path) for name, path in files.items()}


def _hash(path: Path) -> str:
    """See `weights_hashes`. A folder of shards is known by the hashes of all of them."""
    if not path.is_dir():
        return file_hash(path)
    parts = "".join(file_hash(header.path) for header in find_source(path).headers)
    return hashlib.sha256(parts.encode()).hexdigest()[:16]


def file_hash(path: Path) -> str:
    """See `weights_hashes`."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            if size <= LARGE:
                return hashlib.file_digest(file, "sha256").hexdigest()[:16]
            length = file.read(8)
            header = file.read(min(int.from_bytes(length, "little"), LARGE))
    except OSError as error:
        raise FileError(f"{path} could not be read: {error.strerror}") from error
    return "header:" + hashlib.sha256(length + header + str(size).encode()).hexdigest()[:16]
