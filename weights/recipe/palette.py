"""The colours of prompts: a table from names to RGB, for objects and for backgrounds.

An object colour is a target for `render.recolour`: `rgb` is the tone of the sprite's mean brightness, `tint`
says how far its highlights go towards white (a black cat with white highlights would be grey), `keep` how
much of the sprite's own chroma survives (a grey one must keep little, or it is not grey).
"""

from typing import NamedTuple


class Colour(NamedTuple):
    names: tuple[str, ...]  # the first is the colour's name, the others mean the same
    rgb: tuple[float, float, float]
    tint: float = 0.6
    keep: float = 0.15


# fmt: off
COLOURS: tuple[Colour, ...] = (
    Colour(("red",), (0.88, 0.13, 0.13)),
    Colour(("orange",), (0.98, 0.50, 0.05)),
    Colour(("yellow",), (0.98, 0.82, 0.10)),
    Colour(("green",), (0.18, 0.66, 0.22)),
    Colour(("teal", "cyan", "turquoise"), (0.06, 0.70, 0.72)),
    Colour(("blue",), (0.12, 0.36, 0.92)),
    Colour(("purple", "violet"), (0.55, 0.20, 0.80)),
    Colour(("pink",), (1.00, 0.50, 0.74)),
    Colour(("brown",), (0.50, 0.29, 0.14), 0.35, 0.10),
    Colour(("black",), (0.11, 0.11, 0.12), 0.40, 0.04),
    Colour(("white",), (0.93, 0.93, 0.94), 0.90, 0.05),
    Colour(("gray", "grey"), (0.54, 0.55, 0.56), 0.50, 0.04),
)
# fmt: on


_LIGHT_DARK = ("red", "orange", "yellow", "green", "teal", "blue", "purple", "pink", "brown", "gray")


def _mix(rgb: tuple[float, ...], other: float, amount: float) -> tuple[float, ...]:
    return tuple(c * (1 - amount) + other * amount for c in rgb)


def _backgrounds() -> dict[str, tuple[float, ...]]:
    plain = {name: c.rgb for c in COLOURS for name in c.names}
    plain |= {"white": (1.0, 1.0, 1.0), "black": (0.03, 0.03, 0.04)}
    light = {f"light {n}": _mix(plain[n], 1.0, 0.62) for n in _LIGHT_DARK}
    dark = {f"dark {n}": _mix(plain[n], 0.0, 0.52) for n in _LIGHT_DARK}
    extra = {
        "light grey": light["light gray"],
        "dark grey": dark["dark gray"],
        "sky blue": light["light blue"],
        "navy blue": (0.05, 0.10, 0.36),
        "beige": (0.95, 0.90, 0.79),
        "cream": (0.99, 0.96, 0.87),
    }
    return plain | light | dark | extra


BACKGROUNDS: dict[str, tuple[float, ...]] = _backgrounds()
COLOUR_ID: dict[str, int] = {name: i for i, c in enumerate(COLOURS) for name in c.names}
