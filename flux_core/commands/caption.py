"""`caption`: a caption for each picture of a folder, by a vision-language model or by the sprites that ship."""

import statistics
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from ..errors import FileError, FluxError, UsageError
from ..files import prepare_folder
from ..hub.client import cached
from ..hub.places import TOKENIZER_FILES, embedded_folder, hub_folder
from ..terminal import no_bars, note, tell
from ..variants import Variant, get_variant
from .table import CAPTION

if TYPE_CHECKING:
    from ..captioning.run import Captioner, Report

_FIELDS = {field.name: field for field in CAPTION}
SPRITES, FLUX_MINI, FLUX = "sprites", "flux-mini", "flux-dev"
ASKED = ("style", "prompt", "max_new_tokens", "temperature", "dtype")
"""flags that say nothing to the sprites"""
OF_PLACE = ("batch", "device", "name")
"""flags that no caption depends on"""


def caption(folder: str, **flags: Any) -> None:
    """Caption the pictures of a folder, print the captions and how long they are, and say what has none.

    UsageError for wrong flags, FileError at the end where a picture is left without a caption; AccessError, DiskError,
    MemoryShortage. Whatever was captioned by then is written.
    """
    given = {key: _FIELDS[key].parse(text) for key, text in flags.items()}
    values = {key: field.default for key, field in _FIELDS.items()} | given
    place, is_sprites = Path(folder), values["model"] == SPRITES
    if is_sprites and (useless := [_FIELDS[key].flag for key in ASKED if key in given]):
        raise UsageError(f"--model {SPRITES} is asked nothing: leave out {', '.join(useless)}")
    if values["prompt"] and "style" in given:
        raise UsageError("--style and --prompt are two ways to ask. Next: give one of them")
    variant = get_variant(values["name"] or (FLUX_MINI if is_sprites else FLUX))

    from ..captioning.folder import TABLES, Captions, only_captioner, pictures_in  # and with it torch
    from ..captioning.run import Wording, caption_folder

    pictures = pictures_in(place)
    prepare_folder(place, "DIR")
    for kind, name in TABLES.items():
        if values["to"] != kind and (place / name).is_file():
            how = "takes one table alone" if values["to"] in TABLES else "reads captions from there"
            note(f"{place} has a {name}, and train {how}. Next: --to {kind}, or remove it")

    wording = Wording(
        **{key: values[key] for key in ("prefix", "suffix", "trigger", "existing")},
        between=", " if values["style"] == "tags" and not values["prompt"] else " ",
    )
    settings = {key: x for key, x in values.items() if key not in OF_PLACE}
    with (
        only_captioner(place),
        tqdm(total=len(pictures), desc="captions", unit="picture", disable=no_bars()) as bar,
    ):
        captions = Captions(place, values["to"], settings)

        def show(path: Path, text: str) -> None:
            with bar.external_write_mode(sys.stdout):
                tell(f"{captions.name_of(path)}: {text}") if text else None
            bar.update()

        report = caption_folder(captions, lambda: _load(values), wording, values["batch"], values["max_side"], show)
    _tell_report(place, report, variant)


def _load(values: dict[str, Any]) -> "Captioner":
    """The captioner. Errors as in `load_vision_language`."""
    from ..device.choice import format_named, pick_device, pick_dtype

    device = pick_device(values["device"])
    if values["model"] == SPRITES:
        from ..captioning.sprites import load_sprites

        return load_sprites(device)
    from ..captioning.vision_language import Ask, load_vision_language
    from ..captioning.words import STYLES

    answer = {key: values[key] for key in ("prompt", "max_new_tokens", "temperature", "seed")}
    ask = Ask(style=STYLES[values["style"]], **answer)
    dtype = pick_dtype(values["dtype"], device)
    return load_vision_language(values["model"], ask, device, dtype, format_named(values["dtype"]))


def _tell_report(folder: Path, report: "Report", variant: Variant) -> None:
    """Print what was done. FileError where pictures are left without a caption."""
    if report.written:
        _tell_lengths(folder, report.written, variant)
    left = len(report.failed) + len(report.doubles)
    tell(f"{folder}: {len(report.written)} captioned, {report.kept} kept, {left} left out")
    for path, first in report.doubles.items():
        note(
            f"{path.relative_to(folder)} is left out: {path.stem}.txt is of {first.name}, and there is one for both. "
            "Next: rename one of them, or --to jsonl"
        )
    if report.failed:
        listed = "; ".join(f"{path.name}: {reason}" for path, reason in list(report.failed.items())[:5])
        more = "; …" if len(report.failed) > 5 else ""
        raise FileError(
            f"{len(report.failed)} of the pictures in {folder} got no caption ({listed}{more}). "
            "Next: mend or remove them, or caption them by hand or by another --model"
        )


def _tell_lengths(folder: Path, written: dict[Path, str], variant: Variant) -> None:
    """Print how many tokens of T5 the captions have, and which are longer than that model reads."""
    try:
        counts = dict(zip(written, _token_counts(written.values(), variant), strict=True))
    except FluxError as error:
        return note(f"how many tokens of T5 they have is not known: {error}")
    low, middle, high = min(counts.values()), round(statistics.median(counts.values())), max(counts.values())
    tell(f"tokens of T5: {low} to {high}, the median {middle}; {variant.name} reads {variant.max_text}")
    for path in (path for path, count in counts.items() if count > variant.max_text):
        note(f"{path.relative_to(folder)}: {counts[path]} tokens, and {variant.name} reads {variant.max_text} of them")


def _token_counts(texts: Iterable[str], variant: Variant) -> list[int]:
    """How many tokens of T5 each text has, the last one included. Errors as in `hub_folder`."""
    from ..text.tokenizer import load_tokenizer

    if variant.repo is None:
        folder = embedded_folder(variant) / variant.t5
    else:
        there = cached(variant.repo, "tokenizer_2/spiece.model")
        folder = there[0].parent if there else hub_folder(variant.t5, TOKENIZER_FILES, "T5's tokenizer")
    tokenizer = load_tokenizer(folder, "t5", sys.maxsize)
    return [len(tokenizer.pieces(text)) for text in texts]
