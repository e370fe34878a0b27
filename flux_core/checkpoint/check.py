"""Check that the files of a model hold exactly its tensors, by their headers, before torch is imported. No torch."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from ..errors import FileError, UsageError
from ..variants import VARIANTS, Variant, originals, plain
from .contents import Contents, check_fit, find_contents
from .controlnet import read_controlnet
from .files import PARTS, adapter_path, advice_on, ae_path, encoder_config, features_of, flow_path, own_path
from .identify import Identity, Part
from .names import Params, network_shapes
from .redux import UP as REDUX_UP
from .redux import check_redux
from .shapes import Shapes, clip_shapes, t5_shapes
from .source import find_source

NOUNS = {"t5": "T5 text encoder", "clip": "CLIP text encoder"} | {x: x for x in ("transformer", "autoencoder")}
TABLES: dict[Part, str] = {"t5": "shared.weight", "clip": "embeddings.token_embedding.weight"}
"""a text encoder's embeddings, whose width is its output's"""
POSITIONS = "embeddings.position_embedding.weight"


def check_files(variant: Variant) -> None:
    """FileError if a part's header has not exactly the tensors of that model; in a tenth of a second, without torch.

    Text encoders are checked if they are the user's own; those of the hub are fetched only when they are loaded. An
    adapter is there, and Redux's is checked; a LoRA is by `lora.file.check_own`.
    """
    if (adapter := adapter_path(variant)) is not None and variant.takes.words:
        check_redux(adapter, variant)
    _check(flow_path(variant), "transformer", variant)
    _check(ae_path(variant), "autoencoder", variant)
    for part in ("t5", "clip"):
        if (path := own_path(variant, part)) is not None:
            _check(path, part, variant)


def check_alone(variant: Variant) -> None:
    """UsageError for a model that is another's transformer with an adapter: what is written of it would lack that."""
    if variant.adapter is None:
        return
    parts = variant.repo, variant.flow_file
    base = next(row.name for row in VARIANTS.values() if (row.repo, row.flow_file) == parts and row.adapter is None)
    raise UsageError(
        f"{variant.name} is {base} with {variant.adapter.file}, and written without it. Next: --name {base}"
    )


def _check(path: Path, part: Part, variant: Variant) -> None:
    contents = find_contents(path, part)
    found = contents.found
    if found.part != part:
        raise FileError(f"{path} is {found.text}, and no {NOUNS[part]}. {advice_on(found)}")
    if found.features and found.features != features_of(variant):
        raise FileError(f"{path} is {found.text}, and not {variant.name}. Next: {_name_of(found)}.")
    check_part(contents, variant)


def fits(path: Path) -> str:
    """A line with the names of the models that a file or folder fits, or goes with; or why not the likeliest."""
    source = find_source(path)
    part = source.identity().part
    if part == "controlnet":
        return _goes_with(plain(), lambda variant: read_controlnet(path, variant.params))
    if REDUX_UP in source.shapes:
        rows = [variant for variant in VARIANTS.values() if variant.takes.words]
        return _goes_with(rows, lambda variant: check_redux(path, variant))
    if part not in PARTS:
        return "fits: no model, as it is no part of one"
    contents, findings = find_contents(path, part), {}
    variants = [replace(variant, files={PARTS[part].flag: str(path)}) for variant in originals()]
    for of_family in (False, True):  # whose other parts are those of the plain models
        some = [variant for variant in variants if bool(variant.takes) == of_family and not variant.adapter]
        for variant in some:
            try:
                _check(path, part, variant)
            except FileError as error:
                findings[variant.name] = str(error)
        if names := [variant.name for variant in some if variant.name not in findings]:
            return f"fits: {', '.join(names)}"
    return f"fits no model: {findings[max(findings, key=lambda name: _alike(contents, VARIANTS[name]))]}"


def _goes_with(variants: Sequence[Variant], check: Callable[[Variant], object]) -> str:
    """A line with the names of those that a check passes, or why the last does not."""
    names, findings = [], []
    for variant in variants:
        try:
            check(variant)
            names.append(variant.name)
        except FileError as error:
            findings.append(str(error))
    return f"goes with: {', '.join(names)}" if names else f"goes with no model: {findings[-1]}"


def _alike(contents: Contents, variant: Variant) -> int:
    """The number of tensors with the name and shape that the variant has."""
    return len(contents.shapes.items() & expected_shapes(contents, variant).items())


def check_part(contents: Contents, variant: Variant) -> None:
    """FileError if the tensors are not exactly those of that part of the model, by names and shapes."""
    if contents.part in TABLES:
        _check_encoder(contents, variant)
    else:
        check_network(contents, variant.params if contents.part == "transformer" else variant.ae_params)


def expected_shapes(contents: Contents, variant: Variant) -> Shapes:
    """Names and shapes of that part of the model, in the file's layout. FileError for a configuration without sizes."""
    path, part, layout = contents.source.path, contents.part, contents.found.layout
    if part == "transformer":
        return network_shapes(variant.params, layout)
    if part == "autoencoder":
        return network_shapes(variant.ae_params, layout)
    try:
        config = encoder_config(variant, part, path)
        return t5_shapes(config) if part == "t5" else clip_shapes(config)
    except (ValueError, TypeError) as error:
        reason = f"{path}: the text encoder's configuration could not be read: {error}"
        raise FileError(f"{reason}. Next: {_encoder_advice(variant, part)}.") from None


def check_network(contents: Contents, params: Params) -> None:
    """FileError if the tensors are not exactly those of a transformer or autoencoder of these sizes."""
    advice = f"check --name and {PARTS[contents.part].spelled}"
    check_fit(contents, network_shapes(params, contents.found.layout), advice)


def _check_encoder(contents: Contents, variant: Variant) -> None:
    """FileError if a text encoder is not of its configuration's sizes, or not as wide as the transformer takes it."""
    path, part, found = contents.source.path, contents.part, contents.shapes
    expected, advice = expected_shapes(contents, variant), _encoder_advice(variant, part)
    width = variant.params.context_in_dim if part == "t5" else variant.params.vec_in_dim
    if (features := _size(found, TABLES[part], 1)) not in (None, width):
        finding = f"of {features} features for each token, and {variant.name} takes {width}"
        raise FileError(f"{path} is {contents.found.text} {finding}. Next: {advice}.")
    places, right = _size(found, POSITIONS, 0), _size(expected, POSITIONS, 0)
    if places and right and places > right:
        finding = f"with position embeddings for {places} places instead of {right}: a LongCLIP"
        raise FileError(f"{path} is {contents.found.text} {finding}. Next: {advice}.")
    check_fit(contents, expected, advice)


def _size(shapes: Shapes, name: str, axis: int) -> int | None:
    """A matrix's size along an axis; None where there is no such matrix."""
    shape = shapes.get(name, ())
    return shape[axis] if len(shape) == 2 else None


def _encoder_advice(variant: Variant, part: Part) -> str:
    if own_path(variant, part) is None:
        return "fetch it again"
    if variant.embedded:
        return f"leave {PARTS[part].spelled} out: {variant.name} ships with its own"
    return f"give that of {variant.t5 if part == 't5' else variant.clip} with {PARTS[part].spelled}"


def _name_of(found: Identity) -> str:
    """The --name that such a file is for."""
    for variant in VARIANTS.values():
        if found.features == features_of(variant):
            return f"--name {variant.name}"
    return f"give a file of one of {', '.join(VARIANTS)}"
