"""Tables of a tool's keys, and what becomes of every key: settings, nothing that has to be done, or left out.

A tool's module has rows of `Key`; `settle` goes through a file's keys with them, and then through the defaults of the
tool that the file leaves to it.
"""

import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ...errors import UsageError, nearest
from ...variants import VARIANTS
from ..data import ENDINGS
from ..folders import MOST
from ..settings import BY_NAME

OFF: tuple[Any, ...] = (None, False, 0, "", "none", "None", "no", [], {})
"""values by which a key asks for nothing"""
SECRET = re.compile(r"(_token|api_key|secret|password)$")
"""keys whose values are not shown"""
MOST_RANK = BY_NAME["rank"].maximum or 0
"""for a LoKr whose second factor is whole: that of all Linears with at most twice as many rows and columns, once cut"""
RATE_SCHEDULES = {"constant": "constant", "constant_with_warmup": "constant", "cosine": "cosine"}
"""by diffusers' names"""
HUBER = ("huber", "smooth_l1")
"""losses that `huber_c` is of"""
MOST_NODES, SHOWN = 100_000, 100
"""of a file; characters of a value that are shown"""
Values = Mapping[str, Any]
"""a file's keys, and the tool's defaults for others"""


class LeftOut(Exception):
    """Raised for a value without a counterpart here; says why."""


class Needless(Exception):
    """Raised for a value by which nothing has to be set; says why."""


class Key(NamedTuple):
    """A row of a tool's table: a key, and what it is here."""

    name: str
    setting: str = ""
    """our name; empty: `turn` names several, or there is none"""
    turn: Callable[[Any, Values], Any] | Mapping[str, Any] | None = None
    """our value, or several settings as a dict, of the tool's value and of its other keys; a Mapping: by the value's
    text in small letters, None where it is off; None: the value as it is. LeftOut, Needless"""
    default: Any = None
    """the tool's"""
    why: str = ""
    """said beside what it sets; without a setting: why nothing has to be set"""
    lacks: str = ""
    """why it has no counterpart, unless its value asks for nothing"""


class Fate(NamedTuple):
    """What became of a key."""

    key: str
    value: Any
    settings: Values = {}  # noqa: RUF012 - a Mapping
    why: str = ""
    lacks: bool = False
    """whether it has no counterpart, for the reason in `why`"""
    is_default: bool = False
    """whether the value is the tool's default"""

    def __str__(self) -> str:
        """A line for people: `network_dim = 16: rank = 16`, `…: left out: …`"""
        set_to = ", ".join(f"{name} = {shown(name, value)}" for name, value in self.settings.items())
        told = f"left out: {self.why}" if self.lacks else "; ".join(filter(None, (set_to, self.why)))
        return f"{self.key} = {shown(self.key, self.value)}{' (default)' if self.is_default else ''}: {told}"


def shown(name: str, value: Any) -> str:
    """A value as JSON, cut where it is long; a secret's is not shown."""
    text = '"…"' if SECRET.search(name) and value else json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= SHOWN else text[:SHOWN] + "…"


def needless(of: Mapping[str, str]) -> tuple[Key, ...]:
    """Rows of keys by which nothing has to be set. of: keys with spaces between them, by the reason."""
    return tuple(Key(name, why=why) for why, names in of.items() for name in names.split())


def left_out(of: Mapping[str, str]) -> tuple[Key, ...]:
    """Rows of keys without a counterpart. of: keys with spaces between them, by the reason."""
    return tuple(Key(name, lacks=why) for why, names in of.items() for name in names.split())


def settle(
    table: Iterable[Key], given: Values, tool: str, places: Mapping[str, str] | None = None, known: Values | None = None
) -> Iterator[Fate]:
    """What becomes of a file's keys, in its order, and of the tool's defaults that differ from ours. UsageError.

    given: values by the table's names. places: where these are in the file, else they are named as in the table. known:
    more for the rows' functions, which is no key.
    """
    rows, places = {row.name: row for row in table}, places or {}
    written = {name: value for name, value in given.items() if value is not None}
    values = {name: row.default for name, row in rows.items()} | written | dict(known or {})
    for name, value in given.items():
        key = places.get(name, name)
        if name not in rows:
            why = f"{tool} has no such key that is known here.{nearest(name, rows)}"
            yield Fate(key, value, why=why, lacks=True)
        else:
            yield Fate(key, value, why="not set") if value is None else _fate(rows[name], key, value, values)
    for name in rows:
        if name not in written and rows[name].default is not None:
            fate = _fate(rows[name], name, rows[name].default, values)
            if fate.lacks or any(BY_NAME[one].default != value for one, value in fate.settings.items()):
                yield fate._replace(is_default=True)


def _fate(row: Key, key: str, value: Any, values: Values) -> Fate:
    """What becomes of a value."""
    try:
        return Fate(key, value, _turned(row, value, values), row.why)
    except LeftOut as error:
        return Fate(key, value, why=str(error), lacks=True)
    except Needless as error:
        return Fate(key, value, why=str(error))
    except (TypeError, ValueError, AttributeError, OverflowError, re.error):
        raise UsageError(f"{key} = {shown(key, value)} is no value of {row.name}. Next: mend that line") from None


def _turned(row: Key, value: Any, values: Values) -> Values:
    """The settings of a value. LeftOut, Needless."""
    if row.lacks:
        raise Needless("off, as here") if value in OFF else LeftOut(row.lacks)
    if isinstance(row.turn, Mapping):
        if str(value).lower() not in row.turn:
            raise LeftOut(f"there are {', '.join(row.turn)}")
        value = row.turn[str(value).lower()]
        if value is None:
            raise Needless("as without it")
    elif row.turn:
        value = row.turn(value, values)
    found = value if isinstance(value, dict) else {row.setting: value} if row.setting else {}
    if not found and not row.why:
        raise Needless("as here")
    return found


# What several tools have ---------------------------------------------------------------------------------


class Folder(NamedTuple):
    """A folder of pictures."""

    path: str
    repeats: int = 1
    """how often its pictures come, against those of others"""
    trigger: str = ""
    masks: str = ""
    """a folder, or `alpha`"""
    asked: str = ""
    """what the file says of repeats, for people: `num_repeats = 10`"""


def data_of(learned: Iterable[Folder], regular: Iterable[Folder] = ()) -> dict[str, Any]:
    """The settings of folders to learn from, and of others for regularization. A path counts once.

    What is equal for all folders to learn from is `repeats`, `trigger`, `masks`; else it stands behind their paths, as
    in `PATH,weight=2,trigger=zwx,masks=FOLDER`. Pictures of regularization sets come equally often: they are half of an
    epoch. UsageError for repeats that are none, or that have no counterpart.
    """
    learned, regular = list(learned), list(regular)
    for one in (*learned, *regular):
        if not isinstance(one.repeats, int) or one.repeats < 1:
            raise UsageError(
                f"{one.asked} of {one.path} is no number of times that pictures come. Next: mend that line"
            )
    folders, others = _once(learned), [one._replace(repeats=1) for one in _once(regular)]
    every = math.gcd(*(one.repeats for one in folders))
    folders = [one._replace(repeats=one.repeats // every) for one in folders]
    for one in folders:
        if one.repeats > MOST:
            ratio = ":".join(str(each.repeats) for each in folders)
            raise UsageError(
                f"{one.asked} of {one.path} makes the folders' ratio {ratio}, and numbers in one go up to {MOST} here. "
                "Next: give repeats of a smaller ratio"
            )
    alike = {
        name: values.pop() for name in ("trigger", "masks") if len(values := {getattr(x, name) for x in folders}) == 1
    }
    found = {"data": [_text(one, alike) for one in folders], "repeats": every}
    found |= {name: value for name, value in alike.items() if value}
    return found | ({"regularization": [_text(one, {}) for one in others]} if others else {})


def here(path: str) -> str:
    """A folder's path as `--data` takes it for one: `a/b` would be a data set of the hub."""
    return path if path.startswith((".", "~")) or Path(path).is_absolute() else f"./{path}"


def _once(folders: Iterable[Folder]) -> list[Folder]:
    found: dict[str, Folder] = {}
    for one in folders:
        found.setdefault(one.path, one)
    return list(found.values())


def _text(folder: Folder, alike: Values) -> str:
    """As `--data` has it."""
    weight = folder.repeats if folder.repeats != 1 else ""
    told = {"weight": weight, "trigger": folder.trigger, "masks": folder.masks}
    return ",".join([folder.path, *(f"{key}={value}" for key, value in told.items() if value and key not in alike)])


def count(folder: str) -> int | None:
    """How many pictures lie in a folder; None where it is not there."""
    path = Path(folder).expanduser()
    if not path.is_dir():
        return None
    return sum(one.suffix.lower() in ENDINGS for one in path.rglob("*"))


def model_of(value: Any, values: Values) -> dict[str, Any]:
    """`name` by an official hub id, or `name` and `model` by a file's or folder's name. Key's `turn`."""
    repos = {row.repo: name for name, row in VARIANTS.items() if row.repo and not row.takes and not row.adapter}
    if value in repos:
        return {"name": repos[value]}
    text = value.lower()
    name = next((name for name in ("flux-schnell", "flux-dev-krea") if name.rpartition("-")[2] in text), "flux-dev")
    return {"name": name, "model": value}


def epochs(setting: str) -> Callable[[Any, Values], Any]:
    """A `turn` for a number of epochs: `epoch` in the values is how many steps one has, or None."""

    def turn(value: Any, values: Values) -> Any:
        if values["epoch"] is None:
            raise LeftOut("the pictures are not there to be counted")
        return {setting: int(value) * values["epoch"]}

    return turn


def only(value: Any, why: str) -> Callable[[Any, Values], Any]:
    """A `turn` for a key of which one value has a counterpart, by which nothing has to be set."""

    def turn(given: Any, values: Values) -> Any:
        raise (Needless if given == value else LeftOut)(why)

    return turn


def when(switch: str, setting: str, *among: Any) -> Callable[[Any, Values], Any]:
    """A `turn` for a key that counts where another is on, or has one of these values."""

    def turn(value: Any, values: Values) -> Any:
        if not (values[switch] in among if among else values[switch]):
            raise Needless(f"it counts with {switch} {' or '.join(among)}".rstrip())
        return {setting: value}

    return turn


def rate_schedule(optimizer: str) -> Callable[[Any, Values], Any]:
    """A `turn` for the rate's schedule. optimizer: the key of that."""

    def turn(value: Any, values: Values) -> Any:
        if "schedulefree" in str(values[optimizer]).lower():
            raise Needless("a schedule-free optimizer has none")
        if value not in RATE_SCHEDULES:
            raise LeftOut(f"there are {', '.join(RATE_SCHEDULES)}")
        return RATE_SCHEDULES[value]

    return turn


def huber_schedule(value: Any, values: Values) -> dict[str, Any]:
    """A `turn` for the schedule of `huber_c`."""
    if values["loss_type"] not in HUBER:
        raise Needless("the loss is not huber or smooth_l1")
    if value == "snr":
        raise LeftOut("it is not defined for a rectified flow; huber_c is one number for all noise levels")
    return {"huber_schedule": value}


def folders(value: Any, values: Values) -> dict[str, Any]:
    """A `turn` for the key that names a folder: `learned` and `regular` in the values are all of them."""
    return data_of(values["learned"], values["regular"])


def other(key: str, value: Any, first: Any, own: bool, again: bool = False) -> Fate:
    """What becomes of another folder's key. first: the first folder's value. own: whether each folder's counts; again:
    but not of this one, which is a folder that came before."""
    if value == first:
        return Fate(key, value, why="as in the first folder")
    if again:
        return Fate(key, value, why="the folder was named before, and counts once", lacks=True)
    if own:
        return Fate(key, value, why="read with the first folder")
    return Fate(key, value, why="the first folder's counts for all", lacks=True)


HELD_OUT = Key("(validation)", "held_out", lambda x, of: 0, default="none", why="it trains on every picture")
"""of tools that judge by no pictures"""


def check_size(document: Any) -> None:
    """UsageError for more values than any config has: aliases in YAML make many of a short text, or no end of them."""
    ahead, seen = [document], 0
    while ahead:
        one = ahead.pop()
        inner = list(one.values()) if isinstance(one, dict) else one if isinstance(one, list) else []
        seen += 1
        if seen + len(ahead) + len(inner) > MOST_NODES:
            raise UsageError(f"it has more than {MOST_NODES:,} values, which no config has")
        ahead += inner


def flatten(document: Any, prefix: str = "") -> dict[str, Any]:
    """Values by their places, `train.lr` or `datasets[0].path`; lists of plain values are whole."""
    if isinstance(document, dict) and (document or not prefix):
        items = [(f"{prefix}.{key}" if prefix else str(key), value) for key, value in document.items()]
    elif isinstance(document, list) and any(isinstance(one, dict | list) for one in document):
        items = [(f"{prefix}[{i}]", value) for i, value in enumerate(document)]
    else:
        return {prefix: document}
    found: dict[str, Any] = {}
    for key, value in items:
        found |= flatten(value, key)
    return found
