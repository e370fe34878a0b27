"""A folder of pictures and captions, as people have them: `NAME.txt` beside each picture, or one table (`tables.py`).

What cannot be used is left out, with its reason, and nothing is guessed.
"""

from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

from ..errors import FileError, UsageError
from ..files import user_path
from ..images.pictures import as_rgb, open_picture
from .captions import PLACE, with_trigger
from .masks import ALPHA, LISTED, checked_mask
from .masks import KEY as MASK
from .report import Look, look_at
from .sizes import Size, TooSmall
from .tables import CAPTIONS, TABLES, rows_of, table_in

ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".avif")
"""of files that are taken for pictures"""


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
    mask: tuple[Path, str] | None = None
    """file of its mask, and its SHA-256; the picture's own file: its alpha channel"""
    look: Look = Look(0, (), 1.0)
    """for the report"""
    bare: bool = False
    """whether its caption was without the trigger word"""
    trigger: str | None = None
    """its folder's own word; None: the run's"""
    weight: Fraction = Fraction(1)
    """how often it comes, beside others"""
    prior: bool = False
    """whether it is of a regularization set"""

    def word(self, trigger: str) -> str:
        """Its trigger word, in a run with this one."""
        return trigger if self.trigger is None else self.trigger


class Found(NamedTuple):
    """What is in a folder, or in several."""

    pictures: list[Picture]
    skipped: dict[Path, str]
    """why a picture is left out"""
    small: list[Size]
    """shapes of those that are left out as too small"""


class Row(NamedTuple):
    """What is known of a picture before it is opened."""

    text: str
    beside: Sequence[Path] = ()
    mask: Path | None = None


def read_folder(
    folder: Path,
    size_of: Callable[[Size], Size],
    trigger: str = "",
    on_picture: Callable[[], object] | None = None,
    key: str = "",
    masks: str = "",
    beside: Sequence[Path] = (),
    known: dict[str, Path] | None = None,
) -> Found:
    """The pictures of a folder and of those in it, by their names. All are decoded once, so a damaged one is found.

    size_of: the training size for a shape, as `Resolution.size_of`; its FileError leaves the picture out. on_picture:
    called after each. trigger: a word for what is learned, put where a caption says `[trigger]`, else in front, if it
    is not there; the whole caption where there is none. With a table only the pictures that it lists are used.
    key: of its rows, that names the files that a model sees with a picture: each picture needs some. beside: folders
    of such files, by the pictures' names, instead. masks: `alpha`, `metadata` (the key `mask`), or a folder, likewise.
    known: pictures of other folders by their SHA-256, which are left out here; those of this one are added.
    UsageError where none is left, FileError for a table that cannot be read.
    """
    reader = _Reader(folder, size_of, trigger, key, masks, beside)
    known = {} if known is None else known
    found = Found([], {}, [])
    for path in reader.paths:
        try:
            picture = reader.picture(path)
            if (twin := known.setdefault(picture.sha256, path)) is not path:
                where = twin.name if folder in twin.parents else twin
                raise FileError("its folder is named twice" if twin == path else f"it is the same file as {where}")
            found.pictures.append(picture)
        except FileError as error:
            found.skipped[path] = str(error)
            if isinstance(error, TooSmall):
                found.small.append(error.picture)
        finally:
            if on_picture is not None:
                on_picture()
    found.skipped.update(dict.fromkeys(reader.gone, f"{reader.table} names it, and it is not there"))
    if not found.pictures:
        reasons = "; ".join(f"{path.name}: {reason}" for path, reason in sorted(found.skipped.items())[:3])
        raise UsageError(
            f"{folder} has no picture to train on{reasons and f' ({reasons})'}. Next: pictures of at least the "
            "training size, each with a caption in a .txt of its name, or a trigger word"
        )
    return found


class _Reader:
    """What reads the pictures of a folder, with `read_folder`'s arguments and errors."""

    paths: list[Path]
    gone: set[Path]
    """what is listed, and not there"""

    def __init__(
        self, folder: Path, size_of: Callable[[Size], Size], trigger: str, key: str, masks: str, beside: Sequence[Path]
    ) -> None:
        if not folder.is_dir():
            raise UsageError(f"{folder} is no folder. Next: name a folder of pictures with captions")
        self.folder, self.size_of, self.trigger, self.masks, self.beside = folder, size_of, trigger, masks, beside
        self.key, mask_key = "" if beside else key, MASK if masks == LISTED else ""
        file = table_in(folder)
        self.table = file.name if file else TABLES["jsonl"]
        self.rows = None if file is None else dict(_rows(file, self.key, mask_key))
        if self.rows is None and (missing := self.key or mask_key):
            instead = f", or name a folder: {folder},{missing}=FOLDER" if self.key else ""
            raise UsageError(
                f"{folder} has no {self.table}, whose lines name a {missing} for each picture. Next: write one{instead}"
            )
        self.mask_folder = None if masks in ("", ALPHA, LISTED) else user_path(masks)
        others = [*beside, *([self.mask_folder] if self.mask_folder else [])]
        for other in others:
            if not other.is_dir() or other.resolve() == folder.resolve():
                what = "the pictures' own folder" if other.is_dir() else "no folder"
                raise UsageError(f"{other} is {what}. Next: name a folder of files with the names of {folder}'s")
        paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in ENDINGS and path.is_file())
        inside = [other.resolve() for other in others if other.resolve().is_relative_to(folder.resolve())]
        paths = [path for path in paths if not any(path.resolve().is_relative_to(other) for other in inside)]
        self.gone = (self.rows or {}).keys() - set(paths)
        self.paths = paths if self.rows is None else [path for path in paths if path in self.rows]

    def picture(self, path: Path) -> Picture:
        """A picture, decoded and looked at. FileError with the reason where it cannot be used."""
        row = self.row(path)
        text = _one_line(row.text)
        caption = with_trigger(text, self.trigger)
        beside = tuple((other, _hash_of(other)) for other in row.beside)
        image, sha256 = open_picture(path)
        rgb = as_rgb(image, path.name)
        shape = Size(*rgb.size)
        self.size_of(shape)
        if not caption:
            raise FileError("it has no caption")
        mask = None if row.mask is None else checked_mask(row.mask, shape, alpha=self.masks == ALPHA)
        bare = bool(self.trigger and text) and self.trigger not in text and PLACE not in text
        return Picture(path, caption, sha256, shape, beside, mask, look_at(rgb), bare)

    def row(self, path: Path) -> Row:
        """What is known of a picture: from the table, or from files of its name. FileError."""
        row = Row(caption_beside(path)) if self.rows is None else self.rows[path]
        if self.key and not row.beside:
            raise FileError(f"{self.table} names no {self.key} for it")
        name = path.relative_to(self.folder)
        if self.beside:
            row = row._replace(beside=[named_alike(name, other) for other in self.beside])
        if self.masks == ALPHA:
            row = row._replace(mask=path)
        elif self.mask_folder:
            row = row._replace(mask=named_alike(name, self.mask_folder))
        elif self.masks and row.mask is None:
            raise FileError(f"{self.table} names no {MASK} for it")
        return row


def named_alike(name: Path, folder: Path) -> Path:
    """The picture in a folder of the same name, or else of that name with another ending. FileError."""
    if (folder / name).is_file():
        return folder / name
    found = [path for end in ENDINGS if (path := folder / name.with_suffix(end)).is_file()]
    if len(found) != 1:
        raise FileError(f"{folder} has {'several files' if found else 'no file'} of its name")
    return found[0]


def _hash_of(path: Path) -> str:
    """The SHA-256 of a picture's file, which is decoded once. FileError."""
    image, sha256 = open_picture(path)
    as_rgb(image, path.name)
    return sha256


def caption_beside(path: Path) -> str:
    """The caption in the .txt of a picture's name; empty without one. FileError where it is no text in UTF-8."""
    file = path.with_suffix(".txt")
    try:
        return file.read_text(encoding="utf-8-sig") if file.is_file() else ""
    except UnicodeDecodeError:
        raise FileError(f"its caption {file.name} is no text in UTF-8") from None
    except OSError as error:
        raise FileError(f"its caption {file.name} cannot be read: {error}") from None


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _rows(file: Path, key: str, mask: str) -> Iterator[tuple[Path, Row]]:
    """What a table says of pictures, with the files of two keys. FileError."""
    for where, row in rows_of(file, ("file_name", *CAPTIONS, key, mask)):
        try:
            name, text = row["file_name"], next(row[key] for key in CAPTIONS if key in row)
            others = row.get(key, []) if key else []
            masks = [row[mask]] if mask and mask in row else []
            names = [name, *masks, *([others] if isinstance(others, str) else others)]
            assert all(isinstance(x, str) for x in (*names, text))
            text.encode()  # half a surrogate pair is no text
        except (ValueError, KeyError, TypeError, AssertionError, StopIteration):
            raise FileError(
                f'{where}: not as in {{"file_name": "a.png", "text": "a caption"}}. Next: mend it there'
            ) from None
        paths = [file.parent / x for x in names]
        for one, other in zip(paths, names, strict=True):
            if not one.resolve().is_relative_to(file.parent.resolve()):
                raise FileError(f"{where}: {other} is outside of the folder")
        beside = paths[1 + len(masks) :]
        yield paths[0], Row(text, beside, paths[1] if masks else None)
