"""Captions: many ways to say the facts of a scene, each drawn afresh.

The user's words are unknown, so the model must see every plain way to ask: bare names and full sentences,
"left of" and "on the right ... on the left", capitals and full stops. A caption is built from the inside out:

    noun        "green pig face", "pig face in green"            colour and name
    phrase      "a green pig face", "the green pig face"         article
    core        "a cat to the left of a dog", "three apples"     relation, number
    style       "a picture of ...", "..., 3d icon"
    background  "... on a light blue background"
    surface     "A cat." "CAT"
"""

import random
from dataclasses import dataclass, field

from palette import COLOURS
from words import article, is_plural, plural, with_article


@dataclass(slots=True)
class Thing:
    sprite: int
    colour: int  # -1: as it is
    name: str
    aliases: list[str]
    keywords: list[str] = field(default_factory=list)


@dataclass(slots=True)
class Scene:
    kind: str
    things: list[Thing]
    places: list[tuple[float, float, float]]  # x, y, size
    layout: str  # alone, across, down, several
    background: tuple[float, ...] = (1.0, 1.0, 1.0)
    background_name: str = ""  # "": captions do not mention it
    size_word: str = ""


# fmt: off
NUMBERS = {2: "two", 3: "three", 4: "four"}
KINDS_OF_PICTURE = (
    "picture", "picture", "photo", "image", "drawing", "illustration", "icon", "emoji", "3d render",
    "3d icon", "3d emoji", "rendering", "sticker", "3d illustration", "cartoon", "clipart",
)
ENDINGS = (", 3d icon", ", 3d emoji style", ", 3d render", ", icon", ", emoji", ", emoji style", ", 3d",
           ", cartoon", ", simple", ", digital art", ", high quality")
LEADS = ("there is {}", "this is {}", "here is {}", "show me {}", "draw {}", "we see {}", "just {}",
         "please draw {}", "i want {}", "generate {}")
PLURAL_LEADS = (
    "there are {}", "these are {}", "here are {}", "show me {}", "draw {}", "we see {}", "generate {}",
)
IN_PLACE = ("{} in the centre", "{} in the center", "{} in the middle", "{}, centered", "in the middle {}")

ACROSS = ("{a} to the left of {b}", "{a} to the left of {b}", "{a} left of {b}", "{a} left of {b}",
          "{a} on the left of {b}", "{a} on the left side of {b}", "{b} to the right of {a}",
          "{b} to the right of {a}", "{b} right of {a}", "{b} right of {a}", "{b} on the right of {a}",
          "{a} on the left and {b} on the right", "{a} on the left and {b} on the right",
          "{a} on the left, {b} on the right", "{a} on the left side and {b} on the right side",
          "{b} on the right and {a} on the left", "{b} on the right, {a} on the left",
          "on the left {a}, on the right {b}", "on the left {a} and on the right {b}",
          "on the left is {a}, on the right is {b}", "on the right {b}, on the left {a}",
          "left: {a}, right: {b}", "to the left of {b} is {a}", "to the right of {a} is {b}",
          "{a} at the left, {b} at the right", "{a} with {b} to its right", "{b} with {a} to its left",
          "{a} stands left of {b}", "{b} is to the right of {a}", "{a} is to the left of {b}",
          "{a} left, {b} right", "{a} next to {b}", "{a} next to {b}", "{a} beside {b}", "{a} beside {b}",
          "{a} and {b}", "{a} and {b}", "{a} and {b}", "{a} and {b} side by side", "{a}, {b}",
          "{a} and {b} next to each other", "{a} and then {b}", "{a} together with {b}",
          "{a} followed by {b}")
DOWN = ("{a} above {b}", "{a} above {b}", "{a} above {b}", "{a} over {b}", "{a} over {b}",
        "{a} on top of {b}", "{a} on top of {b}", "{b} below {a}", "{b} below {a}", "{b} below {a}",
        "{b} under {a}", "{b} under {a}", "{b} beneath {a}", "{b} underneath {a}",
        "{a} at the top and {b} at the bottom", "{a} at the top, {b} at the bottom",
        "{a} on top, {b} at the bottom", "{a} on top and {b} below", "{a} with {b} below it",
        "{b} with {a} above it", "{b} with {a} on top", "top: {a}, bottom: {b}", "above {b} is {a}",
        "below {a} is {b}", "{a} is above {b}", "{b} is below {a}", "under {a} there is {b}",
        "{b} at the bottom and {a} at the top", "{b} at the bottom, {a} at the top",
        "{a} directly above {b}", "{a} placed above {b}", "{a} in the upper half, {b} in the lower half")
SEVERAL = ("{n} {x}", "{n} {x}", "{n} {x}", "{n} {x}", "{d} {x}", "{d} {x}", "a group of {n} {x}",
           "exactly {n} {x}", "the {n} {x}", "a set of {n} {x}", "{n} identical {x}", "{x}, {n} of them",
           "{n} of the same: {x}")
TWO = ("a pair of {x}", "a pair of {x}", "a couple of {x}", "two {x} side by side", "both {x}", "{n} {x}",
       "{n} {x}", "{n} {x}", "{d} {x}")
BACKGROUND = ("{} on {a} {c} background", "{} on {a} {c} background", "{} on {a} {c} background",
              "{} against {a} {c} background", "{} against {a} {c} backdrop", "{} with {a} {c} background",
              "{} with {a} {c} background", "{}, {c} background", "{}, {c} background", "{} on {c}",
              "{} on {c} background", "{} in front of {a} {c} background", "{} on {a} {c} backdrop",
              "{}, {c} backdrop", "{}, on {c}", "on {a} {c} background, {}", "on {a} {c} background {}",
              "{c} background, {}", "{}. {c} background", "{}. the background is {c}",
              "{}, the background is {c}")
# fmt: on


def write_captions(rng: random.Random, scene: Scene, k: int) -> list[str]:
    """k wordings, different where possible."""
    found: dict[str, None] = {}
    for _ in range(3 * k):
        if len(found) < k:
            found.setdefault(_caption(rng, scene))
    return (list(found) * k)[:k]


def _caption(rng: random.Random, scene: Scene) -> str:
    text = {"alone": _alone, "across": _two, "down": _two, "several": _several}[scene.layout](rng, scene)
    if scene.background_name:
        colour = scene.background_name
        text = rng.choice(BACKGROUND).format(text, a=article(colour), c=colour)
    return _surface(rng, text)


def _pick_name(rng: random.Random, thing: Thing, aliases: float, keywords: float = 0.0) -> str:
    draw = rng.random()
    if thing.keywords and draw < keywords:
        return rng.choice(thing.keywords)
    if thing.aliases and draw < keywords + aliases:
        return rng.choice(thing.aliases)
    return thing.name


def _coloured(rng: random.Random, thing: Thing, name: str) -> str:
    """Colour before the name, the ways that fit in any sentence."""
    if thing.colour < 0:
        return name
    colour = rng.choice(COLOURS[thing.colour].names) if rng.random() < 0.4 else COLOURS[thing.colour].names[0]
    if rng.random() < 0.08:
        colour += rng.choice((" coloured", " colored", "-coloured", "-colored"))
    return f"{colour} {name}"


def _phrase(rng: random.Random, text: str, name: str) -> str:
    draw = rng.random()
    if draw < 0.40:
        return text
    if draw < 0.88:
        return with_article(text, name)
    return f"the {text}" if draw < 0.95 or is_plural(name) else f"one {text}"


def _alone(rng: random.Random, scene: Scene) -> str:
    thing = scene.things[0]
    name = _pick_name(rng, thing, 0.25, 0.10)
    if thing.colour >= 0 and rng.random() < 0.30:
        colour = rng.choice(COLOURS[thing.colour].names)
        size = scene.size_word + " " if scene.size_word else ""
        verb = "are" if is_plural(name) else "is"
        text = rng.choice(
            (
                "{} in {c}",
                "{} in {c}",
                "{} that {v} {c}",
                "{} coloured {c}",
                "{} colored {c}",
                "{}, {c}",
                "{} which {v} {c}",
                "{} painted {c}",
                "{} of {c} colour",
                "{} in {c} color",
            )
        )
        return _style(rng, text.format(_phrase(rng, size + name, name), c=colour, v=verb), 0.5, is_plural(name))
    text = " ".join(filter(None, (scene.size_word, _coloured(rng, thing, name))))
    return _style(rng, _phrase(rng, text, name), 1.0, is_plural(name))


def _style(rng: random.Random, text: str, amount: float, many: bool = False) -> str:
    draw = rng.random() / amount
    if draw < 0.16:
        kind = rng.choice(KINDS_OF_PICTURE)
        return f"{rng.choice((article(kind) + ' ', article(kind) + ' ', 'the ', ''))}{kind} of {text}"
    if draw < 0.22:
        return rng.choice(PLURAL_LEADS if many else LEADS).format(text)
    if draw < 0.31:
        return text + rng.choice(ENDINGS)
    if draw < 0.34:
        return rng.choice(IN_PLACE).format(text)
    return f"{text} {rng.choice(('emoji', 'icon', '3d emoji'))}" if draw < 0.37 else text


def _two(rng: random.Random, scene: Scene) -> str:
    names = [_pick_name(rng, t, 0.20) for t in scene.things]
    nouns = [_coloured(rng, t, n) for t, n in zip(scene.things, names, strict=True)]
    draw = rng.random()
    if draw < 0.62:
        nouns = [with_article(x, n) for x, n in zip(nouns, names, strict=True)]
    elif draw < 0.70:
        nouns = [f"the {x}" for x in nouns]
    elif draw < 0.74:
        nouns = [_phrase(rng, x, n) for x, n in zip(nouns, names, strict=True)]
    text = rng.choice(ACROSS if scene.layout == "across" else DOWN).format(a=nouns[0], b=nouns[1])
    draw = rng.random()
    if draw < 0.12:
        kind = rng.choice(KINDS_OF_PICTURE)
        return f"{article(kind)} {kind} of {text}" if ":" not in text else f"{article(kind)} {kind}, {text}"
    return text + rng.choice(ENDINGS) if draw < 0.18 else text


def _several(rng: random.Random, scene: Scene) -> str:
    thing, n = scene.things[0], len(scene.things)
    many = _coloured(rng, thing, plural(_pick_name(rng, thing, 0.20)))
    text = rng.choice(TWO if n == 2 and rng.random() < 0.6 else SEVERAL).format(n=NUMBERS[n], d=n, x=many)
    return _style(rng, text, 0.5, many=not text.startswith(("a ", "the ")))


def _surface(rng: random.Random, text: str) -> str:
    draw = rng.random()
    if draw < 0.15:
        text = text[0].upper() + text[1:]
    elif draw < 0.17:
        text = text.title()
    elif draw < 0.18:
        text = text.upper()
    return text + "." if rng.random() < 0.14 else text
