"""What `--data` and `--regularization` name: folders of pictures, each with what is its own behind commas.

`pictures,weight=2,trigger=zwx,masks=folder`; for pairs `after,reference=before` (or `before+style`), by names of files.
"""

import os
import re
from collections.abc import Callable, Sequence
from fractions import Fraction
from itertools import cycle, islice
from math import lcm
from pathlib import Path
from typing import NamedTuple

from ..errors import UsageError, nearest
from ..files import user_path
from .data import Found, Picture, read_folder
from .hub_data import from_hub
from .sizes import Size

OPTION = re.compile(r",(\w+)=")
WEIGHT = re.compile(r"\d{1,3}(\.\d{1,2})?", re.ASCII)
MOST = 100
"""of weights"""


class Folder(NamedTuple):
    """A folder of pictures, and what is its own."""

    place: str
    """a folder, or the id of a hub data set"""
    weight: Fraction = Fraction(1)
    """how often its pictures come, beside those of other folders"""
    trigger: str | None = None
    """None: the run's"""
    masks: str = ""
    """as `--masks`; empty: the run's"""
    reference: str = ""
    """folders with the files that a model sees with its pictures, with + between"""
    control: str = ""
    prior: bool = False
    """whether it is a regularization set"""

    def beside(self, takes: str) -> list[Path]:
        """The folders of what a model sees beside its pictures. UsageError where it learns to see other things."""
        for key in PAIRS:
            if getattr(self, key) and key != takes:
                raise UsageError(f"{self.place}: {key}= goes with --takes {key}")
        named: str = getattr(self, takes) if takes in PAIRS else ""
        return [user_path(one) for one in ([named] if os.path.isdir(named) else named.split("+")) if one]


PAIRS = ("reference", "control")
KEYS = ("weight", "trigger", "masks", *PAIRS)
"""what may stand behind a folder's commas"""


def parse_folders(values: str | Sequence[str] | None, named: str = "--data") -> list[Folder]:
    """The folders that a flag or a setting names, one or several. named: for the UsageError."""
    return [_parsed(text, named) for text in ([values] if isinstance(values, str) else values or [])]


def _parsed(text: str, named: str) -> Folder:
    place, options = _split(text)
    if not place:
        raise UsageError(f"{named} {text!a} names no folder")
    found: dict[str, str] = {}
    for key, value in options:
        if key not in KEYS:
            raise UsageError(f"{named} {text}: a folder has no {key!a}.{nearest(key, KEYS)} Next: {', '.join(KEYS)}")
        if key in found or not (value or key == "trigger"):
            raise UsageError(f"{named} {text}: {key} {'is set twice' if key in found else 'is empty'}")
        found[key] = value
    weight = found.pop("weight", "1")
    if not WEIGHT.fullmatch(weight) or not 0 < Fraction(weight) <= MOST:
        raise UsageError(f"{named} {text}: weight must be a number from 0.01 to {MOST}, not {weight!a}")
    masks, reference, control = (found.get(key, "") for key in KEYS[2:])
    return Folder(place, Fraction(weight), found.get("trigger"), masks, reference, control)


def _split(text: str) -> tuple[str, list[tuple[str, str]]]:
    """A folder and its options. The longest beginning that is there is the folder, whatever commas it has."""
    ends = [len(text), *(found.start() for found in reversed([*re.finditer(",", text)]))]
    there = [end for end in ends if end and os.path.exists(user_path(text[:end]))]
    first = OPTION.search(text, there[0] if there else 0)
    if first is None or (there and first.start() != there[0]):
        return text, []
    words = OPTION.split(text[first.start() :])[1:]
    return text[: first.start()], list(zip(words[::2], words[1::2], strict=True))


def read_folders(
    folders: Sequence[Folder],
    size_of: Callable[[Size], Size],
    hub: Path,
    trigger: str = "",
    masks: str = "",
    takes: str = "",
    on_picture: Callable[[], object] | None = None,
) -> Found:
    """The pictures of all folders, none twice. hub: where data sets of the hub are written.

    trigger, masks: of folders that have none of their own; not of regularization sets. takes: a name in `seen.WAYS`.
    Others as in `read_folder`, and its errors.
    """
    whole, known = Found([], {}, []), dict[str, Path]()
    for number, folder in enumerate(folders):
        word = folder.trigger if folder.trigger is not None else "" if folder.prior else trigger
        found = read_folder(
            _there(folder.place, hub, number), size_of, word, on_picture, takes if takes in PAIRS else "",
            folder.masks or ("" if folder.prior else masks), folder.beside(takes), known,
        )  # fmt: skip
        own = word if folder.prior or folder.trigger is not None else None
        whole.pictures.extend(
            one._replace(trigger=own, weight=folder.weight, prior=folder.prior) for one in found.pictures
        )
        whole.skipped.update(found.skipped)
        whole.small.extend(found.small)
    return whole


def fetch(folders: Sequence[Folder], hub: Path) -> None:
    """Fetch those that are data sets of the hub, once. hub: as in `read_folders`. Errors of `from_hub`."""
    for number, one in enumerate(folders):
        _there(one.place, hub, number)


def _there(place: str, hub: Path, number: int) -> Path:
    """A folder, or that of a data set of the hub, fetched once: `user/name` where there is no folder `user`."""
    path = user_path(place)
    if path.is_dir() or place.count("/") != 1 or place.startswith((".", "/", "~")) or path.parent.is_dir():
        return path
    return from_hub(place, hub.with_name(f"{hub.name}-{number + 1}") if number else hub)


def epoch_of(pictures: Sequence[Picture], repeats: int = 1) -> list[Picture]:
    """The pictures of an epoch, each as often as it comes, which is a whole number of times.

    Weights below 1 make an epoch longer: at 0.5 a picture comes once, those at 1 twice. There are as many of
    regularization sets as others: they come again from the first one until there are, and where there are more of them,
    all others come again.
    """
    learned = _times([one for one in pictures if not one.prior]) * repeats
    priors = _times([one for one in pictures if one.prior])
    learned *= max(1, -(-len(priors) // len(learned)))
    return [*learned, *islice(cycle(priors), len(learned))]


def _times(pictures: Sequence[Picture]) -> list[Picture]:
    """Pictures, each by its weight, all of them before one comes again."""
    whole = lcm(*(one.weight.denominator for one in pictures))
    times = [int(one.weight * whole) for one in pictures]
    return [
        one for turn in range(max(times, default=0)) for one, most in zip(pictures, times, strict=True) if turn < most
    ]
