"""A folder of pictures and captions, as people have them: `NAME.txt` beside each picture, or one `metadata.jsonl`.

What cannot be used is left out, with its reason, and nothing is guessed.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from ..errors import FileError, UsageError
from ..images.pictures import as_rgb, open_picture
from .sizes import Size

ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".avif")
"""of files that are taken for pictures"""
METADATA, CAPTIONS = "metadata.jsonl", ("text", "prompt", "caption")
"""a file of lines with `file_name` and one of these, as of Hugging Face's imagefolder"""
PLACE = "[trigger]"
"""in a caption: where the trigger word goes"""


class Picture(NamedTuple):
    """A picture to train on."""

    path: Path
    caption: str
    sha256: str
    """of its file"""
    shape: Size
    """upright"""
    beside: tuple[tuple[Path, str], ...] = ()
    """files that the model sees with it, each with its SHA-256"""


class Found(NamedTuple):
    """What is in a folder."""

    pictures: list[Picture]
    skipped: dict[Path, str]
    """why a picture is left out"""


def read_folder(
    folder: Path,
    size_of: Callable[[Size], Size],
    trigger: str = "",
    on_picture: Callable[[], object] | None = None,
    key: str = "",
) -> Found:
    """The pictures of a folder and of those in it, by their names. All are decoded once, so a damaged one is found.

    size_of: the training size for a shape, as `Resolution.size_of`; its FileError leaves the picture out. on_picture:
    called after each. trigger: a word for what is learned, put where a caption says `[trigger]`, else in front, if it
    is not there; the whole caption where there is none. With a metadata.jsonl only the pictures that it lists are used.
    key: of its lines, that names the files that a model sees with a picture: each picture needs some.
    UsageError where none is left, FileError for a metadata.jsonl that cannot be read.
    """
    if not folder.is_dir():
        raise UsageError(f"{folder} is no folder. Next: name a folder of pictures with captions")
    listed = _listed(folder, key)
    if key and listed is None:
        raise UsageError(f"{folder} has no {METADATA}, whose lines name a {key} for each picture. Next: write one")
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in ENDINGS and path.is_file())
    pictures: dict[str, Picture] = {}
    skipped: dict[Path, str] = {}
    for path in paths if listed is None else [path for path in paths if path in listed]:
        try:
            text, names = (_beside(path), []) if listed is None else listed[path]
            caption = with_trigger(_one_line(text), trigger)
            if key and not names:
                raise FileError(f"{METADATA} names no {key} for it")
            beside = tuple((other, _hash_of(other)) for other in names)
            image, sha256 = open_picture(path)
            shape = Size(*as_rgb(image, path.name).size)
            size_of(shape)
        except FileError as error:
            skipped[path] = str(error)
            continue
        finally:
            if on_picture is not None:
                on_picture()
        if not caption:
            skipped[path] = "it has no caption"
        elif sha256 in pictures:
            skipped[path] = f"it is the same file as {pictures[sha256].path.name}"
        else:
            pictures[sha256] = Picture(path, caption, sha256, shape, beside)
    for path in (listed or {}).keys() - set(paths):
        skipped[path] = f"{METADATA} names it, and it is not there"
    if not pictures:
        reasons = "; ".join(f"{path.name}: {reason}" for path, reason in sorted(skipped.items())[:3])
        raise UsageError(
            f"{folder} has no picture to train on{reasons and f' ({reasons})'}. Next: pictures of at least the "
            "training size, each with a caption in a .txt of its name, or a trigger word"
        )
    return Found(list(pictures.values()), skipped)


def with_trigger(caption: str, trigger: str) -> str:
    """A caption with its trigger word, once."""
    if PLACE in caption:
        return caption.replace(PLACE, trigger).strip()
    return caption if not trigger or trigger in caption else f"{trigger} {caption}".strip()


def _hash_of(path: Path) -> str:
    """The SHA-256 of a picture's file, which is decoded once. FileError."""
    image, sha256 = open_picture(path)
    as_rgb(image, path.name)
    return sha256


def _beside(path: Path) -> str:
    """The caption in the .txt of a picture's name; empty without one."""
    file = path.with_suffix(".txt")
    try:
        return file.read_text(encoding="utf-8-sig") if file.is_file() else ""
    except UnicodeDecodeError:
        raise FileError(f"its caption {file.name} is no text in UTF-8") from None
    except OSError as error:
        raise FileError(f"its caption {file.name} cannot be read: {error}") from None


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _listed(folder: Path, key: str) -> Mapping[Path, tuple[str, list[Path]]] | None:
    """The captions of a metadata.jsonl and the files of a key, by picture; None without one. FileError."""
    file = folder / METADATA
    if not file.is_file():
        return None
    return dict(_rows(file, key))


def _rows(file: Path, key: str) -> Iterator[tuple[Path, tuple[str, list[Path]]]]:
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise FileError(f"{file} cannot be read: {error}") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            name, text = row["file_name"], next(row[key] for key in CAPTIONS if key in row)
            others = row.get(key, []) if key else []
            names = [name, *([others] if isinstance(others, str) else others)]
            assert all(isinstance(x, str) for x in (*names, text))
            text.encode()  # half a surrogate pair is no text
        except (ValueError, KeyError, TypeError, AssertionError, StopIteration, RecursionError):
            raise FileError(
                f'{file}, line {number}: not as in {{"file_name": "a.png", "text": "a caption"}}. Next: mend that line'
            ) from None
        path, *beside = (file.parent / x for x in names)
        for one, other in zip((path, *beside), names, strict=True):
            if not one.resolve().is_relative_to(file.parent.resolve()):
                raise FileError(f"{file}, line {number}: {other} is outside of the folder")
        yield path, (text, beside)
