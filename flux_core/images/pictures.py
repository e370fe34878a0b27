"""Pictures in and out of tensors and files: what an init image may be, crops, grids.

Only PNG, JPEG and WebP are opened: the formats that people have, without the decoders that keep being
exploited. A picture is first measured by its header, so that a bomb costs nothing.
"""

import hashlib
import io
import math
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from ..errors import FileError
from ..request.generation import InitImage

FORMATS = ("PNG", "JPEG", "WEBP")
MAX_PIXELS = 64_000_000
MAX_BYTES = 256 * 2**20


def open_picture(path: str | Path, formats: tuple[str, ...] = FORMATS) -> tuple[Image.Image, str]:
    """A picture file, opened but not yet decoded, and its SHA-256. FileError for whatever is not one."""
    path = Path(path)
    data = _read(path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own, lower limit follows
        try:
            image = Image.open(io.BytesIO(data), formats=formats)
        except Image.DecompressionBombError as error:
            raise FileError(f"{path} is too large to open: {error}") from None
        except UnidentifiedImageError:
            raise FileError(f"{path} is no picture: give a {' or '.join(formats)} file") from None
        except (OSError, ValueError, SyntaxError) as error:
            raise FileError(f"{path} is a damaged picture: {error}") from None
    if image.width * image.height > MAX_PIXELS:
        size = f"{image.width}x{image.height}"
        raise FileError(f"{path} has {size} pixels, at most {MAX_PIXELS:,} are read: scale it down")
    return image, hashlib.sha256(data).hexdigest()


def _read(path: Path) -> bytes:
    try:
        if not path.is_file():
            finding = "is no ordinary file" if path.exists() else "does not exist"
            raise FileError(f"{path} {finding}: give a picture file")
        if path.stat().st_size > MAX_BYTES:
            raise FileError(f"{path} has more than {MAX_BYTES >> 20} MiB: give a smaller picture")
        return path.read_bytes()
    except (OSError, ValueError) as error:
        raise FileError(f"{path} cannot be read: {error}") from None


def as_rgb(image: Image.Image, name: str = "the picture") -> Image.Image:
    """Any picture as upright 8-bit RGB: EXIF rotation applied, the first frame of several, alpha over white.

    FileError when the pixels turn out to be damaged.
    """
    try:
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I"):  # 16-bit grey: Pillow's own conversion would clip it to white
            high_byte = (np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8)
            return Image.fromarray(high_byte).convert("RGB")
        if image.has_transparency_data:
            image = image.convert("RGBA")
            return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
        return image.convert("RGB")
    except (OSError, ValueError, SyntaxError) as error:
        raise FileError(f"{name} is damaged: {error}") from None


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
