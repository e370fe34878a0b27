"""The pictures that come with a request: opened, recorded, and what size they ask for.

A request holds their records, `Given` their pixels. Commands open both before torch is imported.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from ..errors import UsageError, nearest
from ..files import expand_home
from ..lora.known import Known
from ..request.fields import FIELDS, FIT, MAPS, MOST_WEIGHT, PICTURE_FILES
from ..request.generation import GenerationRequest
from ..request.pictures import Control, ControlNetUse, Reference, read_pad
from ..variants import DEFAULT, Variant, get_variant, nearest_size
from .controlnets import Wanted
from .masks import Canvas, mask_note, open_mask
from .pictures import MAX_PIXELS, fit_note, open_source

Picture = str | Path | Image.Image
"""a file, or a picture"""
STRETCHED = 1.1
"""ratio of sides from which a picture of another shape is worth a line"""
LARGEST = 2
"""times a model's own area: up to it a picture that is painted in keeps its size"""


class Followed(NamedTuple):
    """A ControlNet, and what is followed by it."""

    net: Known
    image: Image.Image
    """a map, or what becomes one"""


class Given(NamedTuple):
    """The pictures of a request, RGB, of any size."""

    image: Image.Image | None = None
    """to start from, or to paint in"""
    mask: Image.Image | None = None
    """of the image's size, mode L: white is painted anew"""
    control: Image.Image | None = None
    """a map, or what becomes one"""
    references: tuple[Image.Image, ...] = ()
    controlnets: tuple[Followed, ...] = ()
    """the only way by which a file of a ControlNet is opened: no record names a path"""

    @classmethod
    def of(cls, pictures: "Image.Image | Given | None") -> "Given":
        """Of an init image alone, too."""
        return pictures if isinstance(pictures, Given) else cls(pictures)

    def check(self, request: GenerationRequest) -> None:
        """UsageError where a request names other pictures than there are, or its model takes more."""
        request.check_whole()
        there = {
            "init_image": self.image is not None, "mask": self.mask is not None, "control": self.control is not None,
            "reference": len(self.references), "controlnet": len(self.controlnets),
        }  # fmt: skip
        for name, found in there.items():
            named = getattr(request, name)
            if found != (len(named) if isinstance(named, tuple) else named is not None):
                what = {"init_image": "an init image", "controlnet": "a ControlNet"}.get(name, f"a {name} picture")
                raise UsageError(f"{what} goes with a request that names one, and the other way round")
        for use, one in zip(request.controlnet or (), self.controlnets, strict=True):
            if use.net_sha256 != one.net.sha256:
                raise UsageError(f"{one.net.path} is another ControlNet than the request's, by its SHA-256")
        if request.pad and self.image is not None:
            width, height = _extended_size(self.image, request.pad)
            if width * height > MAX_PIXELS:
                size = f"with --pad the picture has {width}x{height} pixels"
                raise UsageError(f"{size}, at most {MAX_PIXELS:,} are drawn from. Next: fewer pixels")

    def on_canvas(self, request: GenerationRequest) -> "tuple[Given, Canvas | None]":
        """The pictures as they are drawn by, and the canvas where a part of one is painted: all show that part."""
        if not request.paints or self.image is None:
            return self, None
        canvas = Canvas.of(request, self.image, self.mask)
        control = None if self.control is None else canvas.part_of(self.control)
        nets = tuple(one._replace(image=canvas.part_of(one.image)) for one in self.controlnets)
        return self._replace(image=canvas.image, mask=canvas.mask, control=control, controlnets=nets), canvas

    def maps(self, request: GenerationRequest) -> Iterator[tuple[str, Image.Image]]:
        """Photographs of which maps are made, each with the map's name."""
        uses = zip(request.controlnet or (), self.controlnets, strict=True)
        pairs = [(request.control, self.control), *((use, one.image) for use, one in uses)]
        yield from ((record.map, image) for record, image in pairs if record and record.map and image)


NOTHING = Given()


def open_given(
    init_image: Picture | None = None,
    mask: Picture | None = None,
    control: Picture | tuple[str, Picture] | None = None,
    reference: Picture | Sequence[Any] | None = None,
    controlnet: Sequence[Sequence[Any]] | None = None,
    variant: Variant | None = None,
) -> tuple[Given, dict[str, Any]]:
    """Pictures and their records, by a request's fields. FileError, UsageError.

    control: with the name of a map before it, as in `canny:photo.png` or a pair. reference: a picture, or several,
    each of them alone or with its weight after it. controlnet: for each ControlNet (file, picture, scale, (start, end),
    mode), of which three may be left out: `controlnets.Wanted`; the picture as `control`. variant: the model that these
    are for; None: the default.
    """
    image, origin = open_source(init_image)
    drawn, masked = (None, None) if mask is None else open_mask(mask, image)
    made, file = _map_and_file(control)
    seen, source = open_source(file)
    others = [(*open_source(one), weight) for one, weight in _weighted(reference)]
    nets = [_followed(Wanted.of(one), variant or get_variant(DEFAULT)) for one in controlnet or ()]
    records = {
        "init_image": origin,
        "mask": masked,
        "control": None if source is None else Control(**dict(source), map=made),
        "reference": tuple(Reference(**dict(record or ()), weight=weight) for _, record, weight in others) or None,
        "controlnet": tuple(use for _, use in nets) or None,
    }
    references = tuple(one for one, _, _ in others if one is not None)
    pictures = Given(image, drawn, seen, references, tuple(one for one, _ in nets))
    return pictures, {key: value for key, value in records.items() if value is not None}


def with_image(fields: dict[str, Any], image: str | None, variant: Variant) -> dict[str, Any]:
    """The flags, with `--image` as the one that the model takes its picture by. The same dict. UsageError."""
    if image is None:
        return fields
    takes = variant.takes
    name = "reference" if takes.pictures else "control" if takes.control else "init_image"
    if fields.get(name) is not None:
        raise UsageError(f"--image and {FIELDS[name].flag} are the same for {variant.name}: give one of them")
    fields[name] = [[image]] if takes.pictures else f"{takes.map}:{image}" if name == "control" and takes.map else image
    return fields


def as_taken(
    variant: Variant, pictures: Sequence[Picture], mask: Picture | None = None
) -> tuple[Given, dict[str, Any]]:
    """Pictures and their records as a model takes them: to start from, to paint in, for a map, or as references.

    UsageError, FileError.
    """
    takes = variant.takes
    if mask is not None and not pictures:
        raise UsageError("a mask needs a picture to paint in")
    if mask is not None and (takes.pictures or takes.control):
        raise UsageError(f"{variant.name} does not start from its picture, and a mask does nothing. Next: leave it out")
    if len(pictures) > 1 and not takes.pictures:
        raise UsageError(f"{variant.name} takes one picture, not {len(pictures)}")
    if takes.pictures:
        return open_given(reference=pictures)
    first = next(iter(pictures), None)
    return open_given(control=first and (takes.map, first)) if takes.control else open_given(first, mask)


def check_same(request: GenerationRequest, records: Mapping[str, Any]) -> None:
    """UsageError where a request names other pictures than these: it is to be gone on with."""
    for name in PICTURE_FILES:
        before, now = (told(found) for found in (getattr(request, name), records.get(name)))
        if before != now:
            said = "it was begun with another" if now and before else "it was begun with" if before else "it had no"
            raise UsageError(f"{said} {FIELDS[name].flag}. Next: give the same pictures as before")


def told(records: Any) -> list[dict[str, Any]]:
    """What records of pictures say, but for the files' names; empty for None."""
    every = records if isinstance(records, tuple) else (records,) if records else ()
    return [one.model_dump(exclude={"file", "net"}) for one in every]


def pop_given(
    fields: dict[str, Any], variant: Variant | None = None, old: GenerationRequest | None = None
) -> tuple[Given, dict[str, Any]]:
    """Remove the flags that name pictures, and open these. As `open_given`.

    old: the request of a picture that is repeated; its ControlNets' settings hold where none are typed.
    """
    files = {name: fields.pop(name, None) for name in PICTURE_FILES}
    typed, before = files.pop("controlnet") or (), (old and old.controlnet) or ()
    nets = [Wanted.typed(words, use) for words, use in zip_longest(typed, before[: len(typed)])]
    return open_given(**files, controlnet=nets, variant=variant)


def _followed(wanted: Wanted, variant: Variant) -> tuple[Followed, ControlNetUse]:
    """A ControlNet with its picture, and the record of both."""
    made, file = _map_and_file(wanted.control)
    image, source = open_source(file)  # before a net is fetched
    if image is None or source is None:
        raise UsageError(f"the ControlNet {wanted.name} needs a picture to follow")
    net, record = wanted.found(made, variant.params)
    return Followed(net, image), ControlNetUse(**dict(source), map=made, **record)


def _map_and_file(control: Picture | tuple[str, Picture] | None) -> tuple[str, Picture | None]:
    if isinstance(control, list | tuple):
        if len(control) != 2 or not isinstance(control[0], str):
            raise UsageError("a control picture is a file or a picture, or a pair of a map's name and one of these")
        return control[0], control[1]
    if isinstance(control, str):
        name, colon, file = control.partition(":")
        if colon and name in MAPS:
            return name, expand_home(file)
        if colon and (meant := nearest(name, MAPS)) and not Path(expand_home(control)).exists():
            raise UsageError(f"there is no map {name!a}: there are {', '.join(MAPS)}.{meant}")
        return "", expand_home(control)
    return "", control


def _weighted(reference: Any) -> list[tuple[Picture, float]]:
    """Each picture with its weight. UsageError."""
    given = [] if reference is None else reference if isinstance(reference, list | tuple) else [reference]
    if isinstance(given, tuple) and len(given) == 2 and isinstance(given[1], int | float):
        given = [given]
    found = []
    for one in given:
        file, *rest = one if isinstance(one, list | tuple) else [one]
        if len(rest) > 1:
            raise UsageError(f"--reference takes a file and its weight, not {len(rest) + 1} words")
        found.append((file, _weight(rest[0], file) if rest else 1.0))
    return found


def _weight(text: object, file: Picture) -> float:
    with suppress(TypeError, ValueError):
        if abs(weight := float(text)) <= MOST_WEIGHT:  # type: ignore[arg-type]
            return weight
    name, bounds = "" if isinstance(file, Image.Image) else f" {file}", f"from -{MOST_WEIGHT} to {MOST_WEIGHT}"
    raise UsageError(f"the weight of --reference{name} must be a number {bounds}, not {str(text)[:40]!a}")


def natural_size(fields: Mapping[str, Any], given: Given, variant: Variant) -> dict[str, Any]:
    """Width and height that a request's pictures ask for, where it does not say them itself; else nothing.

    A picture that is painted in keeps its size, or its shape where it is far larger than what the model draws. A
    reference that a model changes decides the shape, too.
    """
    if fields.get("width") is not None or fields.get("height") is not None:
        return {}
    if given.image is not None and fields.get("mask_padding") is None and (given.mask or fields.get("pad")):
        return _within(*_extended_size(given.image, fields.get("pad")), variant)
    if variant.takes.control and given.control:
        return _within(*given.control.size, variant)
    if variant.takes.references and given.references:
        size = given.references[0].size
        if not variant.takes.sizes:
            return _within(*size, variant)
        return dict(zip(("width", "height"), nearest_size(size, variant.takes.sizes), strict=True))
    return {}


def _extended_size(image: Image.Image, pad: object) -> tuple[int, int]:
    """A picture's size with what it is extended by, if that can be read."""
    with suppress(ValueError):
        if pixels := read_pad(pad):
            return image.width + pixels[0] + pixels[2], image.height + pixels[1] + pixels[3]
    return image.size


def size_notes(request: GenerationRequest, given: Given) -> Iterator[str]:
    """Lines for the user on pictures that are not drawn as they are."""
    variant, size = request.variant, (request.width, request.height)
    if given.mask is not None and (line := mask_note(given.mask)):
        yield line
    if given.image is not None and request.mask_padding is None:
        if not request.paints:
            line = fit_note(given.image, *size, request.fit or FIT)
        else:
            line = _scaled_note(_extended_size(given.image, request.pad), size, given.mask is not None)
        yield from filter(None, [line])
    whole = size if request.mask_padding is None or not given.image else _extended_size(given.image, request.pad)
    if variant.takes.control and given.control and (line := _stretch_note("the control picture", given.control, whole)):
        yield line
    for _, image in given.controlnets:
        yield from filter(None, [_stretch_note("the ControlNet's picture", image, whole)])
    for one in given.references if variant.takes.references else ():
        seen = nearest_size(one.size, variant.takes.sizes) if variant.takes.sizes else size
        yield from filter(None, [_stretch_note("the reference", one, seen)])


def _scaled_note(found: tuple[int, int], drawn: tuple[int, int], masked: bool) -> str | None:
    if found == drawn:
        return None
    advice = ". --mask-padding 32 draws the masked part alone, and keeps the rest as it is" if masked else ""
    return "the picture of {}x{} pixels is drawn at {}x{}".format(*found, *drawn) + advice


def _stretch_note(what: str, image: Image.Image, size: tuple[int, int]) -> str | None:
    """Where the shape differs by more than a tenth."""
    ratio = image.width / image.height * size[1] / size[0]
    if 1 / STRETCHED < ratio < STRETCHED:
        return None
    return "{} is {}x{}, not the shape of {}x{}: it is stretched".format(what, *image.size, *size)


def _within(width: int, height: int, variant: Variant) -> dict[str, int]:
    """A size as it is, or of the model's own area."""
    area = variant.width * variant.height
    sides = width, height
    if width * height > LARGEST * area or not variant.min_side <= min(sides) <= max(sides) <= variant.max_side:
        scale = (area / (width * height)) ** 0.5
        sides = round(width * scale), round(height * scale)
    return {"width": sides[0], "height": sides[1]}
