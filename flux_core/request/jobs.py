"""Job files: a command with its flags as JSON, to keep, to share and to run again.

    {"command": "generate", "prompt": "a castle", "seed": 7, "skip": ["layer.6"]}

Keys are the flags' names, with `_` or `-`, or their other spellings, as in "steps". A list of such objects runs one
after the other.
"""

from pathlib import Path
from typing import Any

from ..errors import UsageError, nearest
from ..jsonfile import read_json
from .fields import Field


def read_jobs(path: str | Path) -> list[dict[str, Any]]:
    """The jobs of a file, unchecked. FileError when it can't be read, UsageError when it holds none."""
    found = read_json(path, "the job")
    jobs = found if isinstance(found, list) else [found]
    if not jobs or not all(isinstance(job, dict) for job in jobs):
        raise UsageError(f'{path} holds no job: say {{"command": "generate", "prompt": "a red apple"}}')
    return jobs


def flags_of(job: dict[str, Any], fields: tuple[Field, ...], where: str) -> dict[str, Any]:
    """A job's flags as the command line would give them. UsageError names the key and the nearest right one."""
    known = {_word(flag): field for field in fields for flag in (field.flag, *field.flags)}
    flags: dict[str, Any] = {}
    for key, value in job.items():
        word = _word(key)
        if word == "command":
            continue
        if word not in known:
            raise UsageError(f"{where}: there is no {key[:60]!r} here.{nearest(word, list(known))}")
        if value is None or (value is False and known[word].kind is bool):
            continue
        name = known[word].name
        if name in flags:
            raise UsageError(f"{where}: {key} says {name} a second time")
        flags[name] = _as_given(value, known[word], f"{where}: {key}")
    return flags


def _word(flag: str) -> str:
    """`--num-steps` -> `num_steps`"""
    return flag.lstrip("-").replace("-", "_")


def _as_given(value: Any, field: Field, where: str) -> Any:
    """Text, a list of texts, or True for a switch."""
    if field.kind is bool:
        if value is not True:
            raise UsageError(f"{where} must be true or false")
        return True
    if value is True and field.const:
        return field.const
    values = value if isinstance(value, list) else [value]
    if any(isinstance(one, bool | list | dict) for one in values) or (len(values) != 1 and not field.multiple):
        raise UsageError(f"{where} must be {field.expected}" + (", or a list of such" if field.multiple else ""))
    texts = [str(one) for one in values]
    return texts if field.multiple else texts[0]
