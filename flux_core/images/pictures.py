"""Opening picture files as upright sRGB images, and resizing, cropping and arranging images.

Only common formats are opened, because rare decoders have security holes. The size is read from the header before any
pixel is decoded, so that a decompression bomb costs nothing.
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
from ..request.fields import FIT, FITS, PICTURES
from ..request.pictures import InitImage
from ..terminal import note
from . import jpeg, png

FORMATS = tuple(kind for kind in PICTURES if kind not in ("WebP", "AVIF") or features.check(kind.lower()))
"""the formats of `PICTURES` that this Pillow reads"""
MAX_PIXELS = 64_000_000
MAX_BYTES = 256 * 2**20
TRANSPOSES = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF orientation -> what makes the picture upright"""
MODES = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK", "Lab": "LAB"}
"""a colour profile's colour space -> the mode of its pixels"""


def open_picture(path: str | Path, formats: tuple[str, ...] = FORMATS) -> tuple[Image.Image, str]:
    """A picture file, opened but not yet decoded, and its SHA-256. FileError when it is no readable picture."""
    data = read_bytes(path)
    return parse_picture(data, str(path), formats), hashlib.sha256(data).hexdigest()


def parse_picture(data: bytes, name: str, formats: tuple[str, ...] = FORMATS) -> Image.Image:
    """The picture in a file's bytes, opened but not yet decoded. name: for the FileError."""
    reader = next((module for module in (png, jpeg) if data.startswith(module.SIGNATURE)), None)
    file = io.BytesIO(reader.without_metadata(data) if reader else data)
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
    """A picture file's bytes. FileError when there is no such file, or it is too large."""
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
    """A context that turns every error of a decoder into a FileError, and hides its warnings."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # also of decompression bombs: MAX_PIXELS is lower
        try:
            yield
        except (FileError, MemoryError):
            raise
        except Exception as error:
            raise FileError(f"{name} is a damaged picture: {error or type(error).__name__}") from None


def as_rgb(image: Image.Image, name: str = "the picture") -> Image.Image:
    """A picture as upright 8-bit sRGB: the first frame, its colour profile applied, transparency over white.

    FileError when the pixels turn out to be damaged, or there are none.
    """
    rgb, opacity = layers(image, name)
    if opacity is not None:
        rgb.putalpha(opacity)
        rgb = Image.alpha_composite(Image.new("RGBA", rgb.size, "white"), rgb).convert("RGB")
    rgb.info = {"xmp": image.info["xmp"]} if "xmp" in image.info else {}
    return rgb


def layers(image: Image.Image, name: str = "the picture") -> tuple[Image.Image, Image.Image | None]:
    """A picture's colours as upright 8-bit sRGB, and its opacity in mode L; None where it has no transparency.

    FileError as in `as_rgb`.
    """
    if 0 in image.size:
        raise FileError(f"{name} has no pixels: give another")
    with _damage(name):
        opacity = png.colour_key(image)
        image.load()
        if opacity is None and image.has_transparency_data:
            opacity = image.convert("LA" if image.mode == "La" else "RGBA").getchannel("A")
        rgb = _to_srgb(_to_8_bits(image, name), image.info.get("icc_profile"), name)
        if (transpose := TRANSPOSES.get(_orientation(image))) is not None:
            rgb, opacity = rgb.transpose(transpose), opacity and opacity.transpose(transpose)
    return rgb, opacity


def _to_8_bits(image: Image.Image, name: str) -> Image.Image:
    """The picture in mode L, RGB, CMYK or LAB, without alpha. FileError for levels of 32 bits."""
    if image.mode[0] in "IF":
        return _upper_bits(image, name)
    if image.mode in ("L", "RGB", "CMYK", "LAB"):
        return image
    if image.mode in ("1", "LA", "La"):
        return image.convert("LA").convert("L")
    return image.convert("RGBA" if image.has_transparency_data else "RGB").convert("RGB")


def _upper_bits(image: Image.Image, name: str) -> Image.Image:
    """16-bit grey as L, which Pillow's own conversion would clip to white. FileError for more bits."""
    levels = np.asarray(image)
    if image.mode == "F" or levels.min() < 0 or levels.max() > 0xFFFF:
        raise FileError(f"{name} has levels of 32 bits, or below zero: save it with 8 or 16 bits")
    if getattr(image, "tag_v2", {}).get(ExifTags.Base.PhotometricInterpretation) == 0:  # white is 0
        levels = 0xFFFF - levels
    return Image.fromarray((levels >> 8).astype(np.uint8))


def _to_srgb(image: Image.Image, profile: bytes | None, name: str) -> Image.Image:
    """The picture as RGB, converted by its ICC profile. A profile that cannot be used is ignored, with a note."""
    if profile is not None:
        from PIL import ImageCms

        try:
            source = ImageCms.ImageCmsProfile(io.BytesIO(profile[: png.MAX_PROFILE]))
            mode = MODES[source.profile.xcolor_space.strip()]
            if mode != image.mode and not (mode == "RGB" and image.mode == "L"):
                raise ValueError(f"it is for {mode}, the picture is {image.mode}")
            image = image.convert(mode)
            converted = ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
            return converted or image
        except Exception as error:  # Pillow without littlecms, or any error of littlecms over a damaged profile
            note(f"{name}: its colour profile is ignored: {error}")
    return image.convert("RGB")


def _orientation(image: Image.Image) -> Any:
    """The orientation of a loaded picture by EXIF or XMP, 1 to 8; 1 (upright) where these are damaged."""
    with suppress(Exception):
        if found := image.getexif().get(ExifTags.Base.Orientation):
            return found
    with suppress(Exception):  # Pillow reads no further than the first damaged tag
        return jpeg.orientation(image.info.get("exif", b""))
    return 1


def open_source(picture: str | Path | Image.Image | None) -> tuple[Image.Image | None, InitImage | None]:
    """An init image in RGB, and its record for a request: file name and SHA-256 (of the pixels if it is no file)."""
    if picture is None:
        return None, None
    if isinstance(picture, Image.Image):
        image = as_rgb(picture)
        return image, InitImage(file="", sha256=hashlib.sha256(image.tobytes()).hexdigest())
    opened, record = open_recorded(picture)
    return as_rgb(opened, str(picture)), record


def open_recorded(path: str | Path) -> tuple[Image.Image, InitImage]:
    """A picture file, opened but not yet decoded, and its record. FileError."""
    opened, sha256 = open_picture(path)
    name = Path(path).name.encode(errors="replace").decode()  # a file name may hold bytes that are not UTF-8
    return opened, InitImage(file=name, sha256=sha256)


# Shapes --------------------------------------------------------------------------------------------


def resampling(image: Image.Image) -> Image.Resampling:
    """How a picture is resized; of a mask, which is in mode L, without Lanczos' waves beside an edge."""
    return Image.Resampling.BILINEAR if image.mode == "L" else Image.Resampling.LANCZOS


def fitted(image: Image.Image, width: int, height: int, how: str = FIT) -> Image.Image:
    """A picture resized to width x height pixels; `how`, of `request.fields.FITS`, if its shape differs."""
    if how == "stretch":
        return image.resize((width, height), resampling(image))
    if how == "pad":
        return _padded(image, width, height)
    scale = min(image.width / width, image.height / height)
    inner = min(width * scale, image.width), min(height * scale, image.height)
    left, top = (image.width - inner[0]) / 2, (image.height - inner[1]) / 2
    box = (left, top, min(left + inner[0], image.width), min(top + inner[1], image.height))
    return image.resize((width, height), resampling(image), box)


def _padded(image: Image.Image, width: int, height: int) -> Image.Image:
    """The whole picture, centred on black."""
    scale = min(width / image.width, height / image.height)
    inner = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    sheet = Image.new("RGB", (width, height))
    sheet.paste(image.resize(inner, resampling(image)), ((width - inner[0]) // 2, (height - inner[1]) // 2))
    return sheet


def fit_note(image: Image.Image, width: int, height: int, how: str) -> str | None:
    """A line for the user that says how a picture of another shape is fitted; None if its shape is the same."""
    scale = max(width / image.width, height / image.height)
    if (round(image.width * scale), round(image.height * scale)) == (width, height):
        return None
    shapes = f"the input picture is {image.width}x{image.height}, not the shape of {width}x{height}"
    others = " or ".join(f"--fit {other}" for other in FITS if other != how)
    return f"{shapes}: {FITS[how]} ({others} changes that)"


def crop_centre(image: Image.Image, width: int, height: int) -> Image.Image:
    """The central width x height pixels."""
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def grid(images: Sequence[Image.Image], columns: int | None = None) -> Image.Image:
    """The images on a sheet, row by row, as square as possible by default; empty cells are black."""
    columns = columns or math.ceil(math.sqrt(len(images)))
    rows = math.ceil(len(images) / columns)
    width, height = (max(sides) for sides in zip(*(image.size for image in images), strict=True))
    sheet = Image.new("RGB", (columns * width, rows * height))
    for i, image in enumerate(images):
        sheet.paste(image, (i % columns * width, i // columns * height))
    sheet.info["xmp"] = images[0].info["xmp"]  # IPTC's mark for media made by a model
    return sheet
