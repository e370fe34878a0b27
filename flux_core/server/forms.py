"""What clients send, as requests. A client may say what to draw, and nothing that names a file or a function here."""

import re
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any

from ..errors import UsageError, nearest
from ..images.given import NOTHING, Given, natural_size
from ..request.fields import FIELDS, PICTURE_FILES, REQUEST
from ..request.generation import DRAWN_BY, GenerationRequest
from ..variants import get_variant
from .shelf import Shelf

NO_RECORDS = MappingProxyType[str, Any]({})
"""of pictures, where none came with a request"""
MOST = 10
"""pictures of one request, as OpenAI has it"""
OWN = "flux_core"
"""the key under which a whole request may come: `extra_body` of OpenAI's client"""
NAMES = {"n": "num_images", "num_inference_steps": "num_steps", "guidance_scale": "guidance", "model": "name"}
"""other servers' names of fields"""
LORAS = "loras"
"""names of LoRAs with their scales (`shelf.py`)"""
IDLE = {"user", "response_format", "output_format", "size", "stream", "partial_images", OWN}
"""keys that are read here, or mean nothing to a picture"""
LOADED = {"dtype", "t5_dtype", "batch"}
"""how whoever runs the server loaded the model and draws; a record has how another did"""
MINE = {"force", "allow_empty_prompt", *LOADED}
"""and his permissions"""
LONGEST = 20_000
"""characters of a prompt"""
REACHING = {"file", "fn", "to", "path", *PICTURE_FILES}
"""keys of a request that name something on this machine"""
FORMATS = ("png", "jpeg", "webp")
MOST_PREVIEWS = 3
"""of one picture, as OpenAI has it"""
_SIZE = re.compile(r"([1-9]\d{0,4})x([1-9]\d{0,4})", re.ASCII)


def request_of(
    body: Mapping[str, Any], model: str, shelf: Shelf, given: Given = NOTHING, records: Mapping[str, Any] = NO_RECORDS
) -> GenerationRequest:
    """The request of a client's fields, for the model that is loaded. given, records: of the pictures that came with
    them. UsageError; FileError for a LoRA."""
    own = body.get(OWN, {})
    if not isinstance(own, dict):
        raise UsageError(f"{OWN} must be an object with a request's fields")
    if own.get("functions"):
        raise UsageError("that picture was drawn with functions, which cannot be sent")
    fields = {key: value for key, value in own.items() if key not in DRAWN_BY | LOADED}
    for name, value in _renamed(body):
        if name in fields:
            raise UsageError(f"{name} is said twice")
        fields[name] = value
    if any(map(_is_record, entries := _entries(fields.get("plan")))):
        fields["plan"] = [shelf.recorded(entry) if _is_record(entry) else entry for entry in entries]
    if found := sorted(MINE & fields.keys()):
        raise UsageError(f"{found[0]} cannot be set from outside")
    if found := sorted(set(_keys(fields)) & REACHING):
        raise UsageError(f"{found[0]} names something on this machine, which a client cannot")
    if any(isinstance(entry, dict) and entry.get("kind") == "lora" for entry in _entries(fields.get("plan"))):
        raise UsageError(f"a plan cannot name a LoRA here. Next: name it in {LORAS}")
    if any(len(str(fields.get(name) or "")) > LONGEST for name in ("prompt", "negative_prompt")):
        raise UsageError(f"a prompt has at most {LONGEST:,} characters here")
    if given.image is None and (idle := [name for name in ("strength", "fit") if fields.get(name) is not None]):
        raise UsageError(
            f"{idle[0]} does nothing without a picture. Next: leave it out, or send one to /v1/images/edits"
        )
    wanted = str(fields.setdefault("name", model))[:80]
    if get_variant(wanted).name != model:
        raise UsageError(f"{model} is loaded here, not {wanted}. Next: ask /v1/models")
    if (scales := fields.pop(LORAS, None)) is not None:
        fields["plan"] = [*_entries(fields.get("plan") or []), *shelf.entries(scales)]
    try:
        sizes = natural_size(fields, given, get_variant(model))
        request = GenerationRequest(**fields, **records, **{x: n for x, n in sizes.items() if x not in fields})
    except RecursionError:
        raise UsageError("the plan is nested too deep") from None
    if unsafe := [entry.kind for entry in request.plan if not entry.portable]:
        raise UsageError(f"a client cannot make us read or write files ({', '.join(unsafe)})")
    if request.num_images > MOST:
        raise UsageError(f"n must be 1 to {MOST}, not {request.num_images}")
    return request


def _renamed(body: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """A body's fields by our names. UsageError for a key that would be ignored."""
    if body.get("response_format") not in (None, "b64_json"):
        raise UsageError("response_format must be b64_json: pictures are in the answer")
    format_of(body)
    size = body.get("size")
    if size not in (None, "auto"):
        found = _SIZE.fullmatch(str(size))
        if found is None:
            raise UsageError(f"size must be WIDTHxHEIGHT, as in 1024x1024, not {str(size)[:40]!a}")
        yield "width", int(found[1])
        yield "height", int(found[2])
    for key, value in body.items():
        name = NAMES.get(key, key)
        if key in IDLE or value is None:
            continue
        if name not in FIELDS and name not in ("plan", LORAS):
            raise UsageError(f"there is no field {key[:60]!r} here.{nearest(key, [*FIELDS, *NAMES, *IDLE, LORAS])}")
        yield name, value


def format_of(body: Mapping[str, Any]) -> str:
    """The format in which pictures go back. UsageError."""
    found = body.get("output_format") or "png"
    if found not in FORMATS:
        raise UsageError(f"output_format must be {', '.join(FORMATS)}, not {str(found)[:40]!a}")
    return str(found)


def previews_of(body: Mapping[str, Any]) -> int | None:
    """How many previews a client wants to see in a stream; None: no stream, but one answer at the end. UsageError.

    A form says true and 2 in words.
    """
    streams, number = body.get("stream"), body.get("partial_images")
    if str(streams).lower() not in ("none", "false", "true"):
        raise UsageError(f"stream must be true or false, not {str(streams)[:40]!a}")
    if number is not None and (isinstance(number, bool) or str(number) not in map(str, range(MOST_PREVIEWS + 1))):
        raise UsageError(f"partial_images must be 0 to {MOST_PREVIEWS}, not {str(number)[:40]!a}")
    if str(streams).lower() == "true":
        return int(number or 0)
    if int(number or 0):
        raise UsageError("partial_images does nothing without stream. Next: add stream, or leave it out")
    return None


def _entries(plan: object) -> list[object]:
    return plan if isinstance(plan, list) else [plan]


def _is_record(entry: object) -> bool:
    """Whether an entry of a plan is a LoRA as pictures record it: found by its hash, it names nothing here."""
    return isinstance(entry, dict) and entry.get("kind") == "lora" and entry.get("sha256") is not None


def _keys(value: object) -> Iterator[str]:
    """All keys in a value, however deep."""
    waiting = [value]
    while waiting:
        one = waiting.pop()
        if isinstance(one, dict):
            yield from map(str, one)
            waiting += one.values()
        elif isinstance(one, list):
            waiting += one


def capabilities(model: str) -> dict[str, Any]:
    """The fields of a request with their bounds, from the table that the command line's help is from."""
    variant = get_variant(model)

    def told(field: Any) -> dict[str, Any]:
        default = getattr(variant, field.name) if field.from_variant else field.default
        bounds = {"minimum": field.minimum, "maximum": field.maximum, "choices": list(field.choices) or None}
        found = {"type": field.kind.__name__, "help": field.help, "default": default, **bounds}
        return {key: value for key, value in found.items() if value is not None}

    shown = [field for field in REQUEST if field.name not in REACHING | MINE | {"name"}]
    if not variant.params.guidance_embed:
        shown = [field for field in shown if field.name != "guidance"]
    fields = {field.name: told(field) for field in shown}
    for name in ("width", "height"):
        fields[name] |= {"minimum": variant.min_side, "maximum": variant.max_side}
    fields["num_images"] |= {"maximum": MOST}
    return {"model": model, "formats": list(FORMATS), "fields": fields}
