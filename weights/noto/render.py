"""Write the pictures of Noto in this folder, from the npm package @iconify-json/noto.

    npm pack @iconify-json/noto@1.2.9 && tar xzf iconify-json-noto-1.2.9.tgz
    pip install resvg-py
    python weights/noto/render.py package

A picture shows one thing as flux-mini draws one: 256x256, centred, about as large. Most are on white; every fourth to
train on has a background of `weights/recipe/palette.py`, which its caption names, so that backgrounds stay what they
were. The caption is in a `.txt` beside it, with the word for the style before the thing's name.

`heldout` is for the measure alone (`benchmarks/style.py`). Both lists were fixed before anything was trained, from 192
names that the base draws. For 54 of them Noto's and Fluent's pictures of a thing were each other's nearest by
dinov2-mini, so that it recognises the thing in both styles; 36 of these, drawn by lot, are held out. To train on: the
other 18, the 26 for which only one of the two is the other's nearest, and eight more, animals and vehicles.
"""

import io
import json
import sys
from pathlib import Path

from PIL import Image

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "recipe"))

from palette import BACKGROUNDS  # noqa: E402
from words import with_article  # noqa: E402

SIZE, DRAWN = 256, 200
"""of a picture, and of Noto's square in it"""
STYLE = "noto"
"""the word for the style, in front of a thing's name: as a word of its own before a comma it would be a second thing"""
# fmt: off
TRAINED = [
    "airplane", "alien", "ambulance", "artist palette", "bicycle", "broom", "butterfly", "cactus", "cat",
    "cheese wedge", "cherries", "clown face", "cookie", "crab", "crown", "door", "doughnut", "dress", "droplet",
    "drum", "eggplant", "ferris wheel", "fire engine", "flying saucer", "fox", "frog", "hammer", "hot dog",
    "light bulb", "lion", "microscope", "mobile phone", "owl", "panda", "peach", "pencil", "puzzle piece", "ring",
    "rooster", "scissors", "shark", "spider", "sunglasses", "syringe", "t-shirt", "teapot", "telephone", "telescope",
    "tennis", "toolbox", "tractor", "watermelon",
]
HELD_OUT = [
    "anchor", "axe", "basketball", "bell", "birthday cake", "bowling", "briefcase", "camera", "castle", "closed book",
    "cupcake", "floppy disk", "game die", "gem stone", "ghost", "giraffe", "glasses", "helicopter", "hourglass done",
    "house", "jeans", "lady beetle", "locomotive", "pretzel", "pushpin", "rainbow", "red heart", "rocket", "sailboat",
    "scroll", "snowflake", "star", "sunflower", "taxi", "television", "umbrella",
]
# fmt: on
LIGHT = [name for name in BACKGROUNDS if name.startswith("light ") and not name.endswith(("gray", "grey"))]


def drawn(body: str) -> Image.Image:
    """An icon's SVG as RGBA pixels."""
    try:
        from resvg_py import svg_to_bytes
    except ModuleNotFoundError:
        raise SystemExit("resvg-py, which draws SVG, is not installed. Next: pip install resvg-py") from None
    box = f'viewBox="0 0 128 128" width="{DRAWN}" height="{DRAWN}"'
    svg = f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" {box}>{body}</svg>'
    return Image.open(io.BytesIO(bytes(svg_to_bytes(svg_string=svg)))).convert("RGBA")


def picture(body: str, background: str) -> Image.Image:
    """The icon at the centre of a background."""
    icon = drawn(body)
    page = Image.new("RGB", (SIZE, SIZE), tuple(round(255 * x) for x in BACKGROUNDS[background]))
    page.paste(icon, ((SIZE - DRAWN) // 2,) * 2, icon)
    return page


def write(folder: Path, names: list[str], icons: dict[str, dict[str, str]], coloured: int) -> None:
    """A picture and a caption of each name; every so many on a colour, none for 0."""
    folder.mkdir(exist_ok=True)
    for i, name in enumerate(names):
        on_colour = bool(coloured) and i % coloured == 0
        background = LIGHT[i // coloured % len(LIGHT)] if on_colour else "white"
        caption = with_article(f"{STYLE} {name}", name) + (f" on a {background} background" if on_colour else "")
        stem = name.replace(" ", "-")
        picture(icons[stem]["body"], background).save(folder / f"{stem}.png", optimize=True)
        (folder / f"{stem}.txt").write_text(f"{caption}\n", encoding="utf-8")


def main(package: str) -> None:
    icons = json.loads((Path(package) / "icons.json").read_text(encoding="utf-8"))["icons"]
    write(HERE / "pictures", TRAINED, icons, 4)
    write(HERE / "heldout", HELD_OUT, icons, 0)


if __name__ == "__main__":
    main(*sys.argv[1:2])
