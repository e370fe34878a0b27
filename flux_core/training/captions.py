"""The texts that may stand for a caption while a LoRA is trained, and which of them a step draws.

Tags, divided by commas, may come in other orders, so that none depends on its place; the empty caption teaches what
guidance starts from, the trigger word alone what is common to all pictures. All texts of a run are known before it
starts, so that each is encoded once, and dropout and shuffling work from what is kept.
"""

import math
import re
from collections import Counter
from collections.abc import Iterable
from hashlib import sha256

import torch

from ..errors import UsageError
from .wildcards import expansions

CAPTION, EMPTY, TRIGGER, SHUFFLE, WILDCARD = "caption", "empty", "trigger", "shuffle-", "wildcard-"
"""kinds of texts; of the last two, with a number behind them, there may be several"""
CLASS = "class"
"""the caption with the word for a class in place of the trigger word: what is not drawn, but kept as it was"""
COMMON = (EMPTY, TRIGGER)
"""kinds whose texts are the same for all pictures, but for those of folders with triggers of their own"""
PLACE = "[trigger]"
"""in a caption: where the trigger word goes"""
BETWEEN = re.compile(rf"(?<!\S)(?:{re.escape(PLACE)})+ ")
"""such a place that is a word of its own, with the space behind it"""


def in_place(text: str, trigger: str) -> str:
    """A text with the trigger word where it says so; without a word, of two spaces around the place one is left."""
    return (text if trigger else BETWEEN.sub("", text)).replace(PLACE, trigger)


def with_trigger(caption: str, trigger: str) -> str:
    """A caption with its trigger word, once."""
    if PLACE in caption:
        return in_place(caption, trigger).strip()
    return caption if not trigger or trigger in caption else f"{trigger} {caption}".strip()


def variants(
    caption: str,
    trigger: str = "",
    shuffles: int = 0,
    keep: int = 0,
    seed: int = 0,
    wildcards: int = 0,
    separator: str = "",
) -> dict[str, str]:
    """The texts that may stand for a caption, by kind: `caption`, `shuffle-1` and on, `empty` and `trigger`.

    caption: with its trigger word. shuffles: other orders of its tags, drawn from seed and caption alone, no two equal;
    fewer where there are no more. keep: tags in front that stay; the first always stays if the trigger word is in it.
    wildcards: how many captions are made of one with `{a|b}` (`wildcards.py`), the first of them `caption`, the others
    `wildcard-1` and on; 0: braces are plain text. separator: a text that divides tags that stay in front from others,
    and from those that stay behind; where it is, `keep` is not asked, and it is never part of a text.
    """
    texts = [with_trigger(text, trigger) for text in expansions(caption, wildcards, seed)] if wildcards else [caption]
    found: dict[str, str] = {}
    for number, text in enumerate(texts):
        kind, front = (f"{WILDCARD}{number}", f"{WILDCARD}{number}-") if number else (CAPTION, "")
        others = _shuffled(text, trigger, shuffles, keep, seed, separator)
        found[kind] = ", ".join(_tags(text.replace(separator, ","))) if separator and separator in text else text
        found |= {f"{front}{SHUFFLE}{i}": other for i, other in enumerate(others, 1)}
    return {**found, EMPTY: "", **({TRIGGER: trigger} if trigger else {})}


def _tags(text: str) -> list[str]:
    return [tag.strip() for tag in text.split(",") if tag.strip()]


def _shuffled(caption: str, trigger: str, shuffles: int, keep: int, seed: int, separator: str) -> list[str]:
    if separator and separator in caption:
        front, middle, *behind = caption.split(separator, 2)
        fixed, movable = _tags(front), _tags(middle)
        last = _tags(behind[0].replace(separator, ",")) if behind else []
    else:
        tags, last = _tags(caption), []
        if trigger and tags and trigger in tags[0]:
            keep = max(keep, 1)
        fixed, movable = tags[:keep], tags[keep:]
    orders = math.factorial(len(movable)) // math.prod(math.factorial(n) for n in Counter(movable).values())
    found, number = [movable], 0
    while len(found) < min(shuffles + 1, orders):
        order = [movable[i] for i in _order(len(movable), f"{seed} {number} {caption}")]
        found += [] if order in found else [order]
        number += 1
    return [", ".join(fixed + order + last) for order in found[1:]]


def _order(count: int, text: str) -> list[int]:
    """An order of so many things that hangs on a text alone: on no library's version."""
    return sorted(range(count), key=lambda i: sha256(f"{i} {text}".encode(errors="surrogatepass")).digest())


def check_chances(caption_dropout: float, trigger_only: float, has_trigger: bool) -> None:
    """UsageError for chances that are none, or for one of the trigger alone where there is no trigger word."""
    for name, chance in (("caption_dropout", caption_dropout), ("trigger_only", trigger_only)):
        if not 0 <= chance <= 1:
            raise UsageError(f"{name} is {chance}. Next: give a chance from 0 to 1")
    if caption_dropout + trigger_only > 1:
        raise UsageError(
            f"caption_dropout {caption_dropout} and trigger_only {trigger_only} are more than 1 together. "
            "Next: lower one of them"
        )
    if trigger_only and not has_trigger:
        raise UsageError(f"trigger_only is {trigger_only}, and there is no trigger word. Next: give one with trigger")


def draw(
    kinds: Iterable[str], generator: torch.Generator, caption_dropout: float = 0.0, trigger_only: float = 0.0
) -> str:
    """One of a caption's kinds: `empty` and `trigger` with their chances, else any order of the tags with equal chance.

    kinds: as `variants` has them. generator: on the CPU; two numbers are drawn, whatever comes of them. UsageError.
    """
    known = list(kinds)
    check_chances(caption_dropout, trigger_only, TRIGGER in known)
    chance, place = torch.rand(2, dtype=torch.float64, device="cpu", generator=generator).tolist()
    if chance < caption_dropout:
        return EMPTY
    if chance < caption_dropout + trigger_only:
        return TRIGGER
    orders = [kind for kind in known if kind not in COMMON]
    return orders[int(place * len(orders))]
