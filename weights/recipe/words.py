"""English for objects: articles, plurals and colours around a name of several words.

The head of a name is the last word before the first preposition ("slice of pizza", "cat with wry smile"): it
decides whether the name is a plural already and takes the ending. Rules, then short lists of what the rules
get wrong.
"""

import re
from functools import cache

_HEAD_END = re.compile(r" (?=(?:with|of|in|on|at|behind|without|for|from|over|under)\b)|(?=, )")
# fmt: off
_PLURAL_HEADS = {
    "people", "men", "women", "scissors", "dice", "children",
}
_NOT_PLURAL = {"rhinoceros", "claus", "christmas", "lens", "gas", "canvas", "pancreas", "dynamics",
               "physics"}
_MASS = {"bread", "bacon", "butter", "salt", "ice", "popcorn", "spaghetti", "rice", "fire", "coral", "sushi",
         "garlic", "wood", "soap", "yarn", "thread", "tennis", "bowling", "hockey", "lacrosse", "badminton",
         "dna", "oden", "boxing", "ping pong", "broccoli", "sake", "mate"}
_IRREGULAR = {"mouse": "mice", "person": "people", "man": "men", "woman": "women", "child": "children",
              "tooth": "teeth", "foot": "feet", "goose": "geese", "ox": "oxen", "sheep": "sheep",
              "deer": "deer", "fish": "fish", "moose": "moose", "bison": "bison", "blowfish": "blowfish",
              "jellyfish": "jellyfish", "shrimp": "shrimp", "squid": "squid", "leaf": "leaves",
              "knife": "knives", "wolf": "wolves", "scarf": "scarves", "loaf": "loaves",
              "potato": "potatoes", "tomato": "tomatoes", "mango": "mangoes", "volcano": "volcanoes",
              "mosquito": "mosquitoes", "die": "dice", "policeman": "policemen", "snowman": "snowmen",
              "aircraft": "aircraft", "yes": "yes", "buffalo": "buffaloes"}
# fmt: on


_AN = re.compile(r"(?:hour|honest|x-ray|8|[aeio]|u(?!ni|ku|s[aeiu]|ti|fo|t[ei]))")
_A_DESPITE_VOWEL = re.compile(r"(?:one\b|once|ewe|eu)")


def _split(name: str) -> tuple[str, str, str]:
    """ "slice of pizza" -> ("", "slice", " of pizza")"""
    cut = _HEAD_END.search(name)
    front, rest = (name[: cut.start()], name[cut.start() :]) if cut and cut.start() else (name, "")
    before, space, head = front.rpartition(" ")
    return before + space, head, rest


@cache
def is_plural(name: str) -> bool:
    head = _split(name)[1]
    if head in _PLURAL_HEADS:
        return True
    return len(head) > 3 and head.endswith("s") and not head.endswith(("ss", "us", "is")) and head not in _NOT_PLURAL


@cache
def is_mass(name: str) -> bool:
    return _split(name)[1] in _MASS or name in _MASS


@cache
def plural(name: str) -> str:
    before, head, rest = _split(name)
    return name if is_plural(name) else before + _plural_word(head) + rest


def _plural_word(word: str) -> str:
    front, hyphen, last = word.rpartition("-")
    if last in _IRREGULAR:
        return front + hyphen + _IRREGULAR[last]
    if last.endswith(("s", "x", "z", "ch", "sh")):
        return word + "es"
    if last.endswith("y") and last[-2:-1] not in "aeiou":
        return word[:-1] + "ies"
    return word + "s"


@cache
def article(phrase: str) -> str:
    return "an" if _AN.match(phrase) and not _A_DESPITE_VOWEL.match(phrase) else "a"


def with_article(phrase: str, noun: str) -> str:
    """ "a red apple"; what is plural or has no number stays bare. `noun` is the name within the phrase."""
    return phrase if is_plural(noun) or is_mass(noun) else f"{article(phrase)} {phrase}"
