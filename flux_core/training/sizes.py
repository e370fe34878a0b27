"""The size that a picture is trained at, and how it is cut to that size.

A resolution is one size for all (`512x768`), or the edge of a square (`512`, or several) whose area the sizes of all
shapes have at most: the buckets, of which a picture gets one by a rule.
"""

import math
from collections.abc import Callable, Mapping
from functools import cache
from hashlib import sha256
from types import MappingProxyType
from typing import NamedTuple

from PIL import Image

from ..errors import FileError, UsageError, nearest
from ..request.generation import PATCH

STEP = 64
"""of the sides of buckets"""
SMALL = 256
"""an edge below which sides are multiples of `PATCH`, since those of `STEP` would be few"""
LARGEST = 8192
"""pixels of a side"""
KOHYA = 256, 2048
"""the shortest and longest side of kohya's buckets, whatever the resolution"""
DIFFUSERS = (1, 1), (4, 5), (5, 4), (2, 3), (3, 2), (3, 4), (4, 3), (9, 16), (16, 9), (1, 2), (2, 1)
"""the shapes of diffusers' buckets, as width to height"""


class Size(NamedTuple):
    """Pixels."""

    width: int
    height: int

    def __str__(self) -> str:
        return f"{self.width}x{self.height}"


# Rules ---------------------------------------------------------------------------------------------------


def buckets(picture: Size, resolution: Size) -> Size:
    """Our rule: of the sizes around an edge R, the one whose shape is nearest to the picture's.

    Sides are multiples of 64 (of 16 where R < 256) from R / 2 to 2 R. For each width there is the largest height whose
    area is at most R * R; their mirror images and the largest square are there, too. Shapes are compared by the
    difference of the logarithms of width / height; no picture is equally near to two.
    """
    edge = resolution.width
    step = STEP if edge >= SMALL else PATCH
    sizes = _list(edge, -(-edge // (2 * step)) * step, 2 * edge // step * step, step)
    return min(sizes, key=lambda one: _mismatch(one, picture))


def kohya(picture: Size, resolution: Size) -> Size:
    """kohya's rule: the nearest width / height by their plain difference, from sides of 256 to 2048 by 64."""
    sizes = _list(resolution.width, *KOHYA, STEP)
    return picture if picture in sizes else min(sizes, key=lambda one: abs(_aspect(one) - _aspect(picture)))


def kohya_no_upscale(picture: Size, resolution: Size) -> Size:
    """kohya's rule with `bucket_no_upscale`: the picture's own shape, in multiples of 64, at most of that area.

    FileError where nothing of the picture is left.
    """
    if math.prod(picture) > math.prod(resolution):
        aspect = _aspect(picture)
        edge = math.sqrt(math.prod(resolution) * aspect)
        width, height = _rounded(edge), _rounded(edge / aspect)
        sizes = [Size(_rounded(height * aspect), height), Size(width, _rounded(width / aspect))]
    else:
        sizes = [Size(picture.width // STEP * STEP, picture.height // STEP * STEP)]
    if any(0 in size for size in sizes):
        raise FileError(f"it has {picture} pixels: a side of its bucket would have fewer than {STEP}")
    return min(sizes, key=lambda one: abs(_aspect(one) - _aspect(picture)))


def diffusers(picture: Size, resolution: Size) -> Size:
    """diffusers' rule: of eleven shapes in multiples of 16 the least |h bw - w bh|, the last of equals."""
    return least_area(picture, _shapes(resolution.width))


def least_area(picture: Size, sizes: tuple[Size, ...]) -> Size:
    """The size of the least |h bw - w bh|, the last of equals."""
    return min(reversed(sizes), key=lambda one: abs(picture.height * one.width - picture.width * one.height))


RULES: Mapping[str, Callable[[Size, Size], Size]] = MappingProxyType(
    {
        "fixed": lambda picture, resolution: resolution,
        "buckets": buckets,
        "kohya": kohya,
        "kohya_no_upscale": kohya_no_upscale,
        "diffusers": diffusers,
    }
)
"""the training size of a picture at a resolution, by name. All but `fixed` take a square"""


@cache
def _list(edge: int, least: int, most: int, step: int) -> tuple[Size, ...]:
    """Sizes of sides from `least` to `most`, at most edge * edge pixels: by width, then by height."""
    square = edge // step * step
    found = {Size(square, square)}
    for width in range(least, most + 1, step):
        height = min(most, edge * edge // width // step * step)
        if height >= least:
            found |= {Size(width, height), Size(height, width)}
    return tuple(sorted(found))


@cache
def _shapes(edge: int) -> tuple[Size, ...]:
    """diffusers' buckets."""
    found = []
    for shape in DIFFUSERS:
        height = math.sqrt(edge * edge / _aspect(Size(*shape)))
        sides = (height * _aspect(Size(*shape)), height)
        found.append(Size(*(max(1, round(side / PATCH)) * PATCH for side in sides)))
    return tuple(dict.fromkeys(found))


def _aspect(size: Size) -> float:
    return size.width / size.height


def _mismatch(one: Size, other: Size) -> float:
    """How many times as wide, or as high, one shape is as another: at least 1, in the order of logarithms."""
    a, b = one.width * other.height, one.height * other.width
    return max(a, b) / min(a, b)


def _rounded(side: float) -> int:
    """kohya's: to a whole number, half upwards, then down to a multiple of 64."""
    return int(side + 0.5) // STEP * STEP


# A resolution --------------------------------------------------------------------------------------------


class TooSmall(FileError):
    """A picture has fewer pixels than each size that it may have."""

    def __init__(self, picture: Size, size: Size) -> None:
        super().__init__(f"it has {picture} pixels, fewer than {size}")
        self.picture = picture


class Resolution(NamedTuple):
    """What training sizes are chosen by."""

    rule: str
    """in `RULES`"""
    sizes: tuple[Size, ...]
    """one size, or squares, the largest first"""

    def size_of(self, picture: Size) -> Size:
        """A picture's training size: at the largest resolution where it need not be enlarged.

        FileError, with the reason, for a picture too small for all, or more than twice as wide or high as any bucket.
        """
        if 0 in picture:
            raise FileError("it has no pixels")
        for resolution in self.sizes:
            size = RULES[self.rule](picture, resolution)
            if picture.width < size.width or picture.height < size.height:
                continue
            if self.rule != "fixed" and _mismatch(picture, size) > 2:
                raise FileError(f"it has {picture} pixels, a shape beyond every bucket: the nearest is {size}")
            return size
        raise TooSmall(picture, size)


def parse_resolution(text: str, rule: str = "") -> Resolution:
    """The resolution that is written as `512x768`, `512` or `512,768`. UsageError.

    rule: a name in `RULES`; by default `fixed` for a width and height, else `buckets`.
    """
    parts = [part.strip() for part in text.lower().split(",")]
    rule = rule or ("fixed" if "x" in text.lower() else "buckets")
    if rule not in RULES:
        raise UsageError(
            f"no rule for sizes is named {rule!r}.{nearest(rule, RULES)} Next: give one of {', '.join(RULES)}"
        )
    try:
        sides = [[int(side) for side in part.split("x")] for part in parts]
        sizes = [Size(side[0], side[-1]) for side in sides]
        assert all(len(side) <= 2 for side in sides)
    except (ValueError, AssertionError):
        raise UsageError(
            f"resolution {text!r} is no size. Next: write 512x768, or for buckets 512 or 512,768"
        ) from None
    if rule == "fixed":
        if len(sizes) > 1 or any(side % PATCH for side in sizes[0]):
            raise UsageError(
                f"resolution {text!r} is not one size in multiples of {PATCH}. Next: write one as 512x768, or choose "
                "the rule buckets"
            )
    elif any(len(side) > 1 for side in sides):
        raise UsageError(
            f"resolution {text!r}: rule {rule} takes squares. Next: write 512 or 512,768, or choose the rule fixed"
        )
    least = STEP if rule.startswith("kohya") else PATCH
    if not all(least <= side <= LARGEST for size in sizes for side in size):
        raise UsageError(f"resolution {text!r}: sides have {least} to {LARGEST} pixels. Next: write a number of these")
    return Resolution(rule, tuple(sorted(set(sizes), reverse=True)))


# Cuts ----------------------------------------------------------------------------------------------------


class Cut(NamedTuple):
    """How a picture becomes a training picture: resized so that it covers the size, cropped, and mirrored."""

    size: Size
    resized: Size
    left: int
    top: int
    flip: bool
    """whether it is mirrored, left to right"""


def cuts(
    picture: Size, size: Size, crop: str = "centre", count: int = 1, flip: bool = False, seed: int = 0, key: str = ""
) -> list[Cut]:
    """The cuts of a picture, each once.

    crop: `centre` for one, or `random` for `count` boxes that are drawn from seed and key alone, the same in every
    process; fewer where boxes are equal, since a picture may have few. flip: adds the mirror image of each. key: the
    picture's SHA-256. UsageError.
    """
    if crop not in ("centre", "random"):
        raise UsageError(f"crop must be centre or random, not {crop!r}")
    if count < 1:
        raise UsageError(f"the number of random crops must be at least 1, not {count}")
    resized = covering(picture, size)
    spare = resized.width - size.width, resized.height - size.height
    if crop == "centre":
        corners = [(spare[0] // 2, spare[1] // 2)]
    else:
        corners = [_corner(spare, f"{seed} {key} {number}") for number in range(count)]
    return [
        Cut(size, resized, *corner, mirrored)
        for corner in dict.fromkeys(corners)
        for mirrored in ((False, True) if flip else (False,))
    ]


def _corner(spare: tuple[int, int], told: str) -> tuple[int, int]:
    """A box's left and top, drawn by a hash."""
    digest = sha256(told.encode()).digest()
    left, top = (int.from_bytes(digest[i : i + 8], "little") for i in (0, 8))
    return left % (spare[0] + 1), top % (spare[1] + 1)


def covering(picture: Size, size: Size) -> Size:
    """The smallest size of a picture's shape that covers a size. The other side is rounded, half upwards."""
    (w, h), (width, height) = picture, size
    if w * height > width * h:
        return Size((2 * w * height + h) // (2 * h), height)
    return Size(width, (2 * h * width + w) // (2 * w))


def apply(cut: Cut, image: Image.Image) -> Image.Image:
    """The training picture of an upright picture: resized by Lanczos, cropped, mirrored."""
    box = cut.left, cut.top, cut.left + cut.size.width, cut.top + cut.size.height
    found = image.resize(cut.resized, Image.Resampling.LANCZOS).crop(box)
    return found.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if cut.flip else found
