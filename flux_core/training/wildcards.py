"""Wildcards in captions: `a {red|blue} car` stands for two captions.

`{a|b}` is one of its parts, `{2$$a|b|c}` two different ones with a comma between (as Dynamic Prompts has it). Parts may
hold choices of their own. Outside of a choice `{{` and `}}` are braces, as kohya's trainer has it; what is never closed
is plain text.
"""

import re
from collections.abc import Iterator
from functools import lru_cache
from hashlib import sha256
from math import comb, prod
from typing import NamedTuple

TRIES = 50
"""drawn for each variant that is wanted, before it is believed that there are no more"""
DEEPEST = 20
"""choice in a choice; what is deeper is plain text"""
SEVERAL = re.compile(r"(\d{1,3})\$\$")


class Choice(NamedTuple):
    """So many of these, in a drawn order."""

    number: int
    options: list["Part"]


Part = list[str | Choice]
"""what is written one behind the other"""


@lru_cache(maxsize=4096)
def expansions(caption: str, count: int, seed: int = 0) -> tuple[str, ...]:
    """So many captions that a caption with wildcards stands for, no two equal; fewer where there are no more.

    They are drawn from seed and caption alone, on no library's version. Spaces are single, as in what is read.
    """
    part, found = parse(caption), dict[str, None]()
    wanted = min(count, _most(part))
    for number in range(TRIES * count):
        if len(found) == wanted:
            break
        found[" ".join(_written(part, f"{seed} {number} {caption}").split())] = None
    return tuple(found)


def parse(caption: str) -> Part:
    """A caption's texts and choices."""
    part: Part = []
    text, at = "", 0
    while at < len(caption):
        if caption[at : at + 2] in ("{{", "}}"):
            text, at = text + caption[at], at + 2
        elif caption[at] == "{" and (found := _choice(caption, at)) is not None:
            part += [text, found[0]]
            text, at = "", found[1]
        else:
            text, at = text + caption[at], at + 1
    return [*part, text]


def _choice(caption: str, start: int) -> tuple[Choice, int] | None:
    """The choice whose brace is there, and where it ends; None where it is empty, or never closed."""
    stack: list[Choice] = []
    for at in range(start, len(caption)):
        letter = caption[at]
        if letter == "{":
            stack.append(Choice(1, [[""]]))
            if len(stack) > DEEPEST:
                return None
        elif letter == "|":
            stack[-1].options.append([""])
        elif letter != "}":
            last = stack[-1].options[-1]
            last[-1] = f"{last[-1]}{letter}"
        else:
            done = _counted(stack.pop())
            if not stack:
                return None if done.options == [[""]] else (done, at + 1)
            stack[-1].options[-1] += [done, ""]
    return None


def _counted(choice: Choice) -> Choice:
    """A choice with the number that is written in front of its first option."""
    first = choice.options[0][0]
    if not (found := SEVERAL.match(str(first))):
        return choice
    choice.options[0][0] = str(first)[found.end() :]
    return Choice(min(int(found[1]), len(choice.options)), choice.options)


def _most(part: Part) -> int:
    """How many captions there are at most, orders left out: equal options are counted as often as they are there."""
    return prod(_of_choice(x) for x in part if isinstance(x, Choice))


def _of_choice(choice: Choice) -> int:
    if choice.number == 1:
        return sum(map(_most, choice.options))
    return comb(len(choice.options), choice.number) * prod(map(_most, choice.options))


def _written(part: Part, told: str) -> str:
    """A part as a draw has it."""
    return "".join(_texts(part, told))


def _texts(part: Part, told: str) -> Iterator[str]:
    for place, one in enumerate(part):
        if isinstance(one, str):
            yield one
            continue
        left = list(one.options)
        chosen = [left.pop(_number(f"{place} {i} {told}") % len(left)) for i in range(one.number)]
        yield ", ".join(_written(option, f"{place} {i} {told}") for i, option in enumerate(chosen))


def _number(text: str) -> int:
    return int.from_bytes(sha256(text.encode(errors="surrogatepass")).digest()[:8], "little")
