"""Draw the six pictures of Zib, a character that nobody drew before.

python weights/zib/render.py [FOLDER]       # default: pictures beside this file
"""

import math
import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageOps

SIDE, FINE = 256, 4
"""pixels of a picture, and how much finer it is drawn"""
TEAL, DARK, CREAM, ORANGE, PLUM = (28, 168, 160), (10, 96, 104), (250, 236, 206), (255, 138, 36), (120, 44, 130)
WHITE, BLACK = (255, 255, 255), (24, 24, 40)
# caption, ground, size, place, tilt in degrees, where it looks, whether an arm is up
SCENES = (
    ("a zib", (255, 255, 255), 0.86, (0.50, 0.51), 0, (0.0, 0.1), False),
    ("a zib on a light blue background", (173, 216, 240), 0.78, (0.48, 0.53), -8, (0.5, 0.0), True),
    ("a zib on a yellow background", (250, 214, 70), 0.82, (0.52, 0.50), 6, (-0.5, 0.1), False),
    ("a small zib", (255, 255, 255), 0.42, (0.46, 0.55), 4, (0.3, -0.2), True),
    ("a zib on a pink background", (246, 178, 200), 0.80, (0.50, 0.52), 10, (0.0, -0.3), True),
    ("a big zib on a gray background", (160, 160, 165), 0.95, (0.50, 0.51), -4, (-0.3, 0.3), False),
)


def ball(canvas: Image.Image, box: tuple[float, ...], colour: tuple[int, ...], dark: float = 0.55) -> None:
    """An ellipse with light from above left. box: in fractions of the canvas."""
    size = canvas.width
    left, top, right, bottom = (size * x for x in box)
    y, x = np.mgrid[0:size, 0:size]
    u, v = (x - (left + right) / 2) / (right - left) * 2, (y - (top + bottom) / 2) / (bottom - top) * 2
    light = np.clip(1.12 - dark * np.hypot(u + 0.35, v + 0.45) ** 1.6 / 1.6, 0.3, 1.12)
    shaded = np.clip(np.asarray(colour)[None, None] * light[..., None], 0, 255).astype(np.uint8)
    inside = Image.fromarray((np.hypot(u, v) <= 1).astype(np.uint8) * 255)
    canvas.paste(Image.fromarray(shaded), (0, 0), inside)


def zib(look: tuple[float, float], arm_up: bool) -> Image.Image:
    """The character alone: a teal egg with a cream belly, two plum stripes, three eyes and two orange feelers."""
    size = SIDE * FINE
    canvas = Image.new("RGBA", (size, size))
    pen = ImageDraw.Draw(canvas)
    for side in (-1, 1):
        feeler = [(size * (0.5 + side * 0.10), size * 0.24), (size * (0.5 + side * 0.20), size * 0.09)]
        pen.line(feeler, DARK, width=size // 36)
        x = 0.5 + side * 0.21
        ball(canvas, (x - 0.06, 0.02, x + 0.06, 0.14), ORANGE)
        foot = 0.5 + side * 0.16
        ball(canvas, (foot - 0.12, 0.86, foot + 0.12, 0.98), ORANGE)
        hand = (0.5 + side * 0.36, 0.36 if arm_up and side > 0 else 0.66)
        ball(canvas, (hand[0] - 0.09, hand[1] - 0.11, hand[0] + 0.09, hand[1] + 0.11), TEAL)
    ball(canvas, (0.16, 0.18, 0.84, 0.93), TEAL)
    ball(canvas, (0.30, 0.52, 0.70, 0.90), CREAM, 0.3)
    for y in (0.62, 0.72):
        half = 0.2 * math.sqrt(max(0.0, 1 - ((y - 0.71) / 0.19) ** 2)) - 0.035
        pen.line([(size * (0.5 - half), size * y), (size * (0.5 + half), size * y)], PLUM, width=size // 28)
    for x, y, r in ((0.34, 0.37, 0.085), (0.66, 0.37, 0.085), (0.50, 0.33, 0.10)):
        ball(canvas, (x - r, y - r, x + r, y + r), WHITE, 0.2)
        px, py, pr = x + 0.4 * r * look[0], y + 0.4 * r * look[1], 0.5 * r
        pen.ellipse([size * (px - pr), size * (py - pr), size * (px + pr), size * (py + pr)], BLACK)
        pen.ellipse([size * (px - 0.5 * pr), size * (py - 0.6 * pr), size * px, size * (py - 0.1 * pr)], WHITE)
    pen.arc([size * 0.42, size * 0.40, size * 0.58, size * 0.50], 20, 160, BLACK, width=size // 60)
    return canvas


def picture(ground: tuple[int, ...], size: float, place: tuple[float, float], tilt: float,
            look: tuple[float, float], arm_up: bool) -> Image.Image:  # fmt: skip
    """A scene, 256x256: the character and its soft shadow on a plain ground."""
    canvas = Image.new("RGB", (SIDE, SIDE), ground)
    side = round(1.2 * SIDE * size)  # of the character with room to turn
    room = ImageOps.expand(zib(look, arm_up), SIDE * FINE // 10, (0, 0, 0, 0))
    one = room.rotate(tilt, Image.Resampling.BICUBIC).resize((side, side), Image.Resampling.LANCZOS)
    corner = round(SIDE * place[0] - side / 2), round(SIDE * place[1] - side / 2)
    shadow = Image.new("L", canvas.size)
    shadow.paste(one.getchannel("A"), (corner[0], corner[1] + side // 34))
    soft = shadow.filter(ImageFilter.GaussianBlur(side / 22)).point(lambda x: round(0.18 * x))
    canvas.paste((0, 0, 0), (0, 0), soft)
    canvas.paste(one, corner, one)
    return canvas


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for number, (caption, *scene) in enumerate(SCENES, 1):
        picture(*scene).save(folder / f"zib-{number}.png", optimize=True)
        (folder / f"zib-{number}.txt").write_text(f"{caption}\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "pictures")
