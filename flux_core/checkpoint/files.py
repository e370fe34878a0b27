"""Find the files of a model's parts, and hash them for a picture's metadata. No torch.

A part is searched in this order: the file that its flag names (`Variant.files`); its environment variable; the
model's folder or all-in-one file, if the part is in it; then the weights that ship, or the hub.
"""

import hashlib
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import FileError, UsageError, nearest
from ..files import user_path
from ..hub.places import (
    TEXT_FILES,
    TEXT_OF_FLUX,
    TOKENIZER_FILES,
    embedded_folder,
    hub_file,
    hub_folder,
    shipped_folder,
)
from ..jsonfile import read_json
from ..variants import AE_VARIABLES, DEFAULT, VARIANTS, Variant, get_variant
from .header import read_header
from .identify import WHOLE, Identity, Part
from .source import WEIGHTS, find_source

AGAIN = "clone the repository again, whole, or install it again"
"""where a file that ships is missing"""
LARGE = 2**28
"""bytes above which a file's hash is of its header and size instead of every byte"""


@dataclass(frozen=True)
class PartSpec:
    """The names of a part: its flag, and its folders inside a model's folder."""

    flag: str
    """the key of `Variant.files`"""
    folders: tuple[str, ...]
    """in diffusers' layout, then in that of `save --format official`"""
    tokenizer: str = ""
    """the folder of a text encoder's tokenizer, in diffusers' layout"""

    @property
    def spelled(self) -> str:
        return "--" + self.flag.replace("_", "-")


PARTS: dict[Part, PartSpec] = {
    "transformer": PartSpec("model", ("transformer",)),
    "autoencoder": PartSpec("ae", ("vae",)),
    "t5": PartSpec("t5xxl", ("text_encoder_2", "t5"), "tokenizer_2"),
    "clip": PartSpec("clip_l", ("text_encoder", "clip"), "tokenizer"),
}

ADDED = ("controlnet", "lora")
"""what goes on top of a model, by a flag of the same name"""
OWN_MODEL = "give a transformer with --model (or FLUX_MODEL) and its autoencoder with --ae (or FLUX_AE)"


# The entries of a config.json besides the sizes in `Variant.t5_config` and `clip_config`.
T5_KIND = {"architectures": ["T5EncoderModel"], "model_type": "t5"}
CLIP_KIND = {"architectures": ["CLIPTextModel"], "model_type": "clip_text_model"}


class TextFiles(NamedTuple):
    """The text encoders, each a file or a folder as transformers keeps it, and their tokenizers' folders."""

    t5: Path
    t5_tokenizer: Path
    clip: Path
    clip_tokenizer: Path


def with_files(name: str | None = None, **files: str | Path | None) -> Variant:
    """The variant of that name, with the user's own files instead of its own.

    files: `model` (a safetensors file, or a folder, which may hold the other parts, too), `ae`, `clip_l`, `t5xxl`.
    Without a name it is read from the model's header. `model` may also be a name. UsageError, FileError.
    """
    flags = [part.flag for part in PARTS.values()]
    for flag in files.keys() - set(flags):
        raise UsageError(f"a model has no part {flag!r}: there are {', '.join(flags)}.{nearest(flag, flags)}")
    given = {flag: str(path) for flag, path in files.items() if path is not None}
    if (model := given.get("model")) in VARIANTS:
        if name not in (None, model):
            raise UsageError(f"--name {name} and --model {model} are two models: give one of them")
        name = given.pop("model")
    elif name is None and model is not None:
        name = _name_in(user_path(model))
    variant = get_variant(name or DEFAULT)
    return replace(variant, files=given) if given else variant


def _name_in(path: Path) -> str:
    """The name of the variant whose transformer that is. Where headers are the same, the file's own name decides."""
    _existing(path, f"--model {path}", f"give a safetensors file, a folder, or a name: {', '.join(VARIANTS)}")
    variants = sorted(VARIANTS.values(), key=lambda variant: not _is_named(path, variant.flow_file))
    inside = _inside(path, variants[0], "transformer")
    found = find_source(inside).identity()
    for variant in variants:
        if found.features == features_of(variant):
            return variant.name
    raise FileError(f"{inside} is {found.text}, and no transformer of {', '.join(VARIANTS)}. {advice_on(found)}")


def _spellings(file: str) -> list[str]:
    """A file's name with each suffix that files of weights have."""
    return [Path(file).stem + suffix for suffix in WEIGHTS]


def _is_named(path: Path, file: str) -> bool:
    """Whether a path is a file of that name, or a folder with one, under either suffix."""
    return any(path.name == name or (path / name).exists() for name in _spellings(file))


def features_of(variant: Variant) -> tuple[int, ...]:
    """`Identity.features` of that variant's transformer."""
    params = variant.params
    return params.hidden_size, params.in_channels, params.guidance_embed


def resolve(variant: Variant) -> tuple[Path, Path]:
    """The files of transformer and autoencoder. FileError, AccessError or DiskError where there is none."""
    return flow_path(variant), ae_path(variant)


def flow_path(variant: Variant) -> Path:
    """The transformer's file or folder of shards."""
    if (own := own_path(variant, "transformer")) is not None:
        return own
    if not variant.base or variant.adapter:
        return _shipped(variant, variant.flow_file)
    from .adapted import ADAPTER, adapted_file  # torch

    base, adapter = _shipped(variant, get_variant(variant.base).flow_file), shipped_folder(variant.name) / ADAPTER
    return adapted_file(variant.name, base, _existing(adapter, str(adapter), AGAIN), variant.params)


def adapter_path(variant: Variant) -> Path | None:
    """The file that a variant adds to another one's transformer, or None. Errors as in `resolve`."""
    adapter = variant.adapter
    if adapter is None:
        return None
    if variable := next((name for name in adapter.variables if os.environ.get(name)), None):
        named, advice = os.environ[variable], f"point {variable} to a safetensors file, or unset it"
        return _existing(user_path(named), f"{variable}={named}", advice)
    if adapter.repo:
        return hub_file(adapter.repo, adapter.file)
    check_ships(variant)
    path = shipped_folder(variant.name) / adapter.file
    return _existing(path, str(path), AGAIN)


def check_ships(variant: Variant) -> None:
    """FileError for a variant whose adapter neither ships nor is on the hub."""
    if (adapter := variant.adapter) is not None and adapter.made_by:
        raise FileError(
            f"{variant.name} needs {adapter.file}, which does not ship. Next: make it by `{adapter.made_by}` "
            f"(weights/README.md), and point {adapter.variables[-1]} to it."
        )


def ae_path(variant: Variant) -> Path:
    """The autoencoder's file or folder."""
    return own_path(variant, "autoencoder") or _shipped(variant, variant.ae_file)


def _shipped(variant: Variant, file: str) -> Path:
    if variant.repo is not None:
        return hub_file(variant.repo, file)
    path = embedded_folder(variant) / file
    return _existing(path, str(path), AGAIN)


def text_files(variant: Variant) -> TextFiles:
    """Text encoders and tokenizers. FileError, AccessError or DiskError where there are none."""
    t5, clip = own_path(variant, "t5"), own_path(variant, "clip")
    t5_words, clip_words = _tokenizer(variant, "t5", t5), _tokenizer(variant, "clip", clip)
    if variant.repo is None:
        folder = embedded_folder(variant)
        shipped = [
            _existing(folder / name, str(folder / name), "clone the repository again, whole")
            for name in (variant.t5, variant.clip)
        ]
        return TextFiles(t5 or shipped[0], t5_words or shipped[0], clip or shipped[1], clip_words or shipped[1])
    if clip is None:
        clip = hub_folder(variant.clip, TEXT_FILES)
        clip_words = clip_words or clip
    if t5 is None:
        t5, hub_words = _t5_of_hub(variant)
        t5_words = t5_words or hub_words
    return TextFiles(
        t5,
        t5_words or hub_folder(variant.t5, TOKENIZER_FILES, "T5's tokenizer"),
        clip,
        clip_words or hub_folder(variant.clip, TOKENIZER_FILES, "CLIP's tokenizer"),
    )


def _t5_of_hub(variant: Variant) -> tuple[Path, Path]:
    """T5 and its tokenizer from the hub, safetensors only.

    Google's own repository holds pickles, which are never opened here; then the encoder comes from the FLUX.1
    repository, which has the same weights as safetensors, a quarter of the size (bf16, no decoder).
    """
    assert variant.repo is not None
    t5 = hub_folder(variant.t5, TEXT_FILES)
    if any(t5.glob("*.safetensors")):
        return t5, t5
    flux = hub_folder(variant.repo, TEXT_OF_FLUX)
    return flux / "text_encoder_2", flux / "tokenizer_2"


def _tokenizer(variant: Variant, part: Part, encoder: Path | None) -> Path | None:
    """The folder of a text encoder's tokenizer among the user's own: with it, beside it, or in the model's folder."""
    name, model = PARTS[part].tokenizer, _named(variant, "transformer")
    folders = [encoder, encoder.parent / name] if encoder else []
    folders += [model[0] / name] if model else []
    whole = ("tokenizer.json", "spiece.model", "vocab.json")
    return next((folder for folder in folders if any((folder / file).is_file() for file in whole)), None)


def encoder_config(variant: Variant, part: Part, path: Path) -> dict[str, Any]:
    """A text encoder's config.json: beside its weights, with the model that ships, or the variant's. FileError.

    Without its `quantization_config`: the tensors tell that.
    """
    folders = [path if path.is_dir() else path.parent]
    if variant.embedded:
        folders.append(embedded_folder(variant) / {"t5": variant.t5, "clip": variant.clip}[part])
    for file in (folder / "config.json" for folder in folders):
        found = read_json(file, "the configuration") if file.is_file() else {}
        # beside a single file there may be the configuration of something else
        if isinstance(found, dict) and str(found.get("model_type")).startswith(part):
            config = {**CLIP_KIND, **found["text_config"]} if "text_config" in found else found  # CLIP's two halves
            return {key: value for key, value in config.items() if key != "quantization_config"}
    return {**T5_KIND, **variant.t5_config} if part == "t5" else {**CLIP_KIND, **variant.clip_config}


def own_path(variant: Variant, part: Part) -> Path | None:
    """The user's own file or folder of that part, or None. FileError where what is named does not exist."""
    if (own := _named(variant, part)) is not None:
        return _inside(own[0], variant, part)
    model = _named(variant, "transformer")
    if model is None:
        return None
    if model[0].is_dir():
        inside = _inside(model[0], variant, part)
        return inside if inside != model[0] else None
    found = find_source(model[0]).identity(part)
    return model[0] if found.part == part and found.prefix == WHOLE[part] else None


def _named(variant: Variant, part: Part) -> tuple[Path, str] | None:
    """The path that a flag or a variable gives for that part, and the flag or variable with it, for errors."""
    spec = PARTS[part]
    variables = {"transformer": variant.variables, "autoencoder": AE_VARIABLES}.get(part, ())
    if (named := variant.files.get(spec.flag)) is not None:
        origin, advice = f"{spec.spelled} {named}", "give a safetensors file or a folder"
    elif variant.repo and (variable := next((name for name in variables if os.environ.get(name)), None)):
        named = os.environ[variable]
        origin = f"{variable}={named}"
        advice = f"point {variable} to a safetensors file or a folder, or unset it"
    else:
        return None
    return _existing(user_path(named), origin, advice), origin


def _inside(path: Path, variant: Variant, part: Part) -> Path:
    """The part's own file or folder in a folder of several, or the path itself."""
    file = {"transformer": variant.flow_file, "autoencoder": variant.ae_file}.get(part)
    names = [*(_spellings(file) if file else []), *PARTS[part].folders]
    places = (path / name for name in names if path.is_dir())
    return next((place for place in places if place.exists()), path)


def advice_on(found: Identity, otherwise: str = OWN_MODEL) -> str:
    """The next step where such a file was given for a wrong part: the flag that takes it, or what to give instead."""
    if found.part in PARTS:
        return f"Next: give it with {PARTS[found.part].spelled}."
    return f"Next: give it with --{found.part}." if found.part in ADDED else f"Next: {otherwise}."


def _existing(path: Path, origin: str, advice: str) -> Path:
    if path.is_file() or path.is_dir():
        return path
    found = "is no regular file" if path.exists() else "does not exist"
    raise FileError(f"{origin} {found}. Next: {advice}.")


def weights_hashes(variant: Variant) -> dict[str, str]:
    """File name -> hash of its weights, for a picture's metadata.

    A file of up to 256 MB: the first 16 hex digits of its SHA-256. A larger one would take seconds to
    minutes, so its hash is `header:` and the same digits over its header and its size:
    names, shapes and offsets, not values. Text encoders are included where they ship or are the user's own;
    those from the hub are not.
    """
    flow, ae = resolve(variant)
    files = {flow.name: flow, ae.name: ae}
    if (adapter := adapter_path(variant)) is not None:
        # diffusers calls any network's file the same
        files[f"lora/{adapter.name}" if adapter.name in files else adapter.name] = adapter
    encoders: dict[Part, str] = {"t5": variant.t5, "clip": variant.clip}
    for part, folder in encoders.items():
        if (own := own_path(variant, part)) is not None:
            files[f"{folder}/{own.name}"] = own
        elif variant.embedded:
            files[f"{folder}/model.safetensors"] = embedded_folder(variant) / folder / "model.safetensors"
    return {name: _hash(path) for name, path in files.items()}


def _hash(path: Path) -> str:
    """See `weights_hashes`. The hash of a folder of shards is that of all their hashes."""
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
            header = file.read(min(entry.start for entry in read_header(path).tensors.values()))
    except OSError as error:
        raise FileError(f"{path} could not be read: {error.strerror}") from error
    return "header:" + hashlib.sha256(header + str(size).encode()).hexdigest()[:16]
