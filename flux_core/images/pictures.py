"""Pictures in and out of tensors and files: what an init image may be, its colours, shapes, crops, grids.

Only the formats that people have are opened, without the decoders that keep being exploited. A picture is first
measured by its header, so that a bomb costs nothing.
"""

import hashlib
import io
import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError, features

from ..errors import FileError
from ..request.fields import FITS, PICTURES
from ..request.generation import InitImage
from ..terminal import note
from . import jpeg, png

FORMATS = tuple(kind for kind in PICTURES if kind not in ("WebP", "AVIF") or features.check(kind.lower()))
"""those of the table that this Pillow reads"""
MAX_PIXELS = 64_000_000
MAX_BYTES = 256 * 2**20
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""what makes a picture upright, by EXIF's orientation"""
SPACES = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK", "Lab": "LAB"}
"""the mode of the pixels that a colour profile is for, by what it says of itself"""


def open_picture(path: str | Path, formats: tuple[str, ...] = FORMATS) -> tuple[Image.Image, str]:
    """A picture file, opened but not yet decoded, and its SHA-256. FileError for whatever is not one."""
    data = read_bytes(path)
    return parse_picture(data, str(path), formats), hashlib.sha256(data).hexdigest()


def parse_picture(data: bytes, name: str, formats: tuple[str, ...] = FORMATS) -> Image.Image:
    """The picture in a file's bytes, opened but not yet decoded. FileError calls it `name`."""
    reader = next((module for module in (png, jpeg) if data.startswith(module.SIGNATURE)), None)
    file = io.BytesIO(reader.pixels_alone(data) if reader else data)
    with _damage(name):
        try:
            image = Image.open(file, formats=[kind.upper() for kind in formats])
        except Image.DecompressionBombError as error:
            raise FileError(f"{name} is too large to open: {error}") from None
        except UnidentifiedImageError:
            *others, last = formats
            finding = "picture that can be read" if others else f"{last} file"
            kinds = f"{', '.join(others)} or {last}" if others else last
            raise FileError(f"{name} is no {finding}: give a {kinds} file") from None
        image.info.update(reader.info(data) if reader else {})
    if image.width * image.height > MAX_PIXELS:
        size = f"{image.width}x{image.height}"
        raise FileError(f"{name} has {size} pixels, at most {MAX_PIXELS:,} are read: scale it down")
    return image


def read_bytes(path: str | Path) -> bytes:
    """A picture file's bytes. FileError where there is none, or one that is too large."""
    path = Path(path)
    try:
        if not path.is_file():
            finding = "is no ordinary file" if path.exists() else "does not exist"
            raise FileError(f"{path} {finding}: give a picture file")
        if path.stat().st_size > MAX_BYTES:
            raise FileError(f"{path} has more than {MAX_BYTES >> 20} MiB: give a smaller picture")
        return path.read_bytes()
    except (OSError, ValueError) as error:
        raise FileError(f"{path} cannot be read: {error}") from None


@contextmanager
def _damage(name: str) -> Iterator[None]:
    """FileError for whatever a decoder raises over a strange file; what it warns of is not shown."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of bombs, too: MAX_PIXELS is lower
        try:
            yield
        except (FileError, MemoryError):
            raise
        except Exception as error:
            raise FileError(f"{name} is a damaged picture: {error or type(error).__name__}") from None


def as_rgb(image: Image.Image, name: str = "the picture") -> Image.Image:
    """Any picture as upright 8-bit sRGB: its colour profile applied, the first frame of several, alpha over white.

    FileError when the pixels turn out to be damaged, or there are none.
    """
    if 0 in image.size:
        raise FileError(f"{name} has no pixels: give another")
    with _damage(name):
        opacity = png.colour_key(image)
        image.load()
        if opacity is None and image.has_transparency_data:
            opacity = image.convert("LA" if image.mode == "La" else "RGBA").getchannel("A")
        rgb = _in_srgb(_plain(image, name), image.info.get("icc_profile"), name)
        if opacity is not None:
            rgb.putalpha(opacity)
            rgb = Image.alpha_composite(Image.new("RGBA", rgb.size, "white"), rgb).convert("RGB")
        turn = TURNS.get(_orientation(image))
        rgb = rgb if turn is None else rgb.transpose(turn)
    rgb.info = {"xmp": image.info["xmp"]} if "xmp" in image.info else {}
    return rgb


def _plain(image: Image.Image, name: str) -> Image.Image:
    """The colours in eight bits and without alpha: as L, RGB, CMYK or LAB. FileError where they have no such range."""
    if image.mode[0] in "IF":
        return _upper_bits(image, name)
    if image.mode in ("L", "RGB", "CMYK", "LAB"):
        return image
    if image.mode in ("1", "LA", "La"):
        return image.convert("LA").convert("L")
    return image.convert("RGBA" if image.has_transparency_data else "RGB").convert("RGB")


def _upper_bits(image: Image.Image, name: str) -> Image.Image:
    """16-bit grey as L, which Pillow's own conversion would clip to white. FileError where there are more bits."""
    levels = np.asarray(image)
    if image.mode == "F" or levels.min() < 0 or levels.max() > 0xFFFF:
        raise FileError(f"{name} has levels of 32 bits, or below zero: save it with 8 or 16 bits")
    if getattr(image, "tag_v2", {}).get(ExifTags.Base.PhotometricInterpretation) == 0:  # white is 0
        levels = 0xFFFF - levels
    return Image.fromarray((levels >> 8).astype(np.uint8))


def _in_srgb(image: Image.Image, profile: bytes | None, name: str) -> Image.Image:
    """The picture as RGB, by its ICC profile where it has one; one that cannot be used is ignored, and told."""
    if profile is not None:
        from PIL import ImageCms

        try:
            given = ImageCms.ImageCmsProfile(io.BytesIO(profile[: png.MAX_PROFILE]))
            mode = SPACES[given.profile.xcolor_space.strip()]
            if mode != image.mode and not (mode == "RGB" and image.mode == "L"):
                raise ValueError(f"it is for {mode}, the picture is {image.mode}")
            image = image.convert(mode)
            changed = ImageCms.profileToProfile(image, given, ImageCms.createProfile("sRGB"), outputMode="RGB")
            return changed or image
        except Exception as error:  # Pillow without littlecms, or whatever that says of a damaged profile
            note(f"{name}: its colour profile is ignored: {error}")
    return image.convert("RGB")


def _orientation(image: Image.Image) -> Any:
    """EXIF's or XMP's number for the rotation of a loaded picture; 1 where what holds it is damaged."""
    with suppress(Exception):
        if found := image.getexif().get(ExifTags.Base.Orientation):
            return found
    with suppress(Exception):  # Pillow reads no further than the first damaged tag
        return jpeg.orientation(image.info.get("exif", b""))
    return 1


def open_source(
    picture: str | Path | Image.Image | None,
) -> tuple[Image.Image | None, InitImage | None]:
    """An init image in RGB, and as a request names it: file name and SHA-256 (no file: of the pixels)."""
    if picture is None:
        return None, None
    if isinstance(picture, Image.Image):
        image = as_rgb(picture)
        return image, InitImage(file="", sha256=hashlib.sha256(image.tobytes()).hexdigest())
    opened, sha256 = open_picture(picture)
    name = Path(picture).name.encode(errors="replace").decode()  # a name may hold bytes that are no text
    return as_rgb(opened, str(picture)), InitImage(file=name, sha256=sha256)


# Shapes --------------------------------------------------------------------------------------------


def fitted(image: Image.Image, width: int, height: int, how: str = "crop") -> Image.Image:
    """An RGB picture at width x height pixels, by one of `request.fields.FITS`; one of that shape is only resized."""
    if how == "stretch":
        return image.resize((width, height), Image.Resampling.LANCZOS)
    if how == "pad":
        return _padded(image, width, height)
    scale = min(image.width / width, image.height / height)
    across, down = min(width * scale, image.width), min(height * scale, image.height)
    left, top = (image.width - across) / 2, (image.height - down) / 2
    box = (left, top, min(left + across, image.width), min(top + down, image.height))
    return image.resize((width, height), Image.Resampling.LANCZOS, box)


def _padded(image: Image.Image, width: int, height: int) -> Image.Image:
    """The whole picture in the middle, black around it."""
    scale = min(width / image.width, height / image.height)
    inner = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    sheet = Image.new("RGB", (width, height))
    sheet.paste(image.resize(inner, Image.Resampling.LANCZOS), ((width - inner[0]) // 2, (height - inner[1]) // 2))
    return sheet


def fit_note(image: Image.Image, width: int, height: int, how: str) -> str | None:
    """A line for people where a picture has another shape than the one to be drawn, and what is done about it."""
    scale = max(width / image.width, height / image.height)
    if (round(image.width * scale), round(image.height * scale)) == (width, height):
        return None
    shapes = f"the given picture is {image.width}x{image.height}, not the shape of {width}x{height}"
    others = " or ".join(f"--fit {other}" for other in FITS if other != how)
    return f"{shapes}: {FITS[how]} ({others} does otherwise)"


def crop_centre(image: Image.Image, width: int, height: int) -> Image.Image:
    """The middle width x height pixels."""
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def grid(images: Sequence[Image.Image], columns: int | None = None) -> Image.Image:
    """All images on one sheet, in rows, by itself as square as it gets; empty places stay black."""
    columns = columns or math.ceil(math.sqrt(len(images)))
    rows = math.ceil(len(images) / columns)
    width, height = (max(sides) for sides in zip(*(image.size for image in images), strict=True))
    sheet = Image.new("RGB", (columns * width, rows * height))
    for i, image in enumerate(images):
        sheet.paste(image, (i % columns * width, i // columns * height))
    sheet.info["xmp"] = images[0].info["xmp"]  # the mark of its pictures
    return sheet
