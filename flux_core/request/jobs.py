"""Job files: commands with their flags as JSON.

    {"command": "generate", "prompt": "a castle", "seed": 7, "skip": ["layer.6"]}

Keys are the flags' names, with `_` or `-`, or their other spellings, as in "steps". A file holds such an object, or a
list of them, which run in order.
"""

from pathlib import Path
from typing import Any

from ..errors import UsageError, nearest
from ..jsonfile import read_json
from .fields import Field, key_of


def read_jobs(path: str | Path) -> list[dict[str, Any]]:
    """The jobs of a file, unchecked. FileError when it can't be read, UsageError when it holds no job."""
    value = read_json(path, "the job")
    jobs = value if isinstance(value, list) else [value]
    if not jobs or not all(isinstance(job, dict) for job in jobs):
        raise UsageError(f'{path} holds no job: say {{"command": "generate", "prompt": "a red apple"}}')
    return jobs


def flags_of(job: dict[str, Any], fields: tuple[Field, ...], where: str) -> dict[str, Any]:
    """A job's flags as the command line gives them. UsageError names a wrong key and the nearest known key."""
    known = {key_of(flag): field for field in fields for flag in (field.flag, *field.flags)}
    flags: dict[str, Any] = {}
    for key, value in job.items():
        flag = key_of(key)
        if flag == "command":
            continue
        if flag not in known:
            raise UsageError(f"{where}: there is no {key[:60]!r} here.{nearest(flag, list(known))}")
        field = known[flag]
        if value is None or (value is False and field.kind is bool):
            continue
        if field.name in flags:
            raise UsageError(f"{where}: {key} says {field.name} a second time")
        flags[field.name] = _as_typed(value, field, f"{where}: {key}")
    return flags


def _as_typed(value: Any, field: Field, where: str) -> Any:
    """A JSON value as the command line gives it: text, a list of texts, or True for a switch. UsageError."""
    if field.kind is bool:
        if value is not True:
            raise UsageError(f"{where} must be true or false")
        return True
    if value is True and field.const:
        return field.const
    if field.repeated:
        return groups_of(value, where)
    values = value if isinstance(value, list) else [value]
    if any(isinstance(item, bool | list | dict) for item in values) or (len(values) != 1 and not field.multiple):
        raise UsageError(f"{where} must be {field.expected}" + (", or a list of such" if field.multiple else ""))
    texts = [str(item) for item in values]
    return texts if field.multiple else texts[0]


def groups_of(value: Any, where: str) -> list[list[str]]:
    """The words of each occurrence of a flag that may be repeated, of --lora. UsageError."""
    groups = value if isinstance(value, list) and any(isinstance(x, list) for x in value) else [value]
    return [_group(x, where) for x in groups]


def _group(value: Any, where: str) -> list[str]:
    """The words of one occurrence: a text, or a list of a text and other texts and numbers. UsageError."""
    words = value if isinstance(value, list) else [value]
    if not words or not isinstance(words[0], str) or not all(type(word) in (str, int, float) for word in words):
        raise UsageError(f'{where} must be a text, a list as in ["style.safetensors", 0.8], or a list of such lists')
    return [str(item) for item in words]
