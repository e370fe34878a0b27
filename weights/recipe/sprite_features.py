"""What `caption --model sprites` knows: dinov2-mini's features of all sprites, and what they are called.

    python weights/recipe/sprite_features.py ROOT [FOLDER]

ROOT: see `weights/README.md`; FOLDER holds dinov2-mini, and gets sprites.safetensors. A feature is the mean over views
of a sprite, alone, as the captioner cuts it out: on white, on a light and on a dark ground, and in three colours. Skin
tones are left out: the network was taught to ignore colour. A row is int8, of a vector whose length means nothing.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from captions import Scene, Thing
from palette import BACKGROUNDS, COLOUR_ID
from render import all_rgba, make_atlas, render, to_images
from safetensors.torch import save_file
from scenes import pack
from shapes import SHAPES
from sprites import load_sprites
from words import plural, with_article

from flux_core.captioning.sprites import EDGE, FILE, SIDE, crop, ground_of, tight
from flux_core.methods.scoring import Scorer, load_scorer

VIEWS = (("white", ""), ("light blue", ""), ("dark green", ""), ("white", "red"), ("white", "green"), ("white", "blue"))
"""grounds and colours, "" for its own"""
CHUNK = 64


def main(root: Path, folder: Path) -> None:
    sprites, scorer = load_sprites(root), load_scorer(str(folder), torch.device("cpu"))
    base = [i for i, tone in enumerate(sprites.tone) if not tone]
    shapes = [len(sprites) + i for i in range(len(SHAPES))]
    names = [sprites.names[i] for i in base] + [shape[0] for shape in SHAPES]
    rgba = all_rgba(sprites)[base + shapes]
    features = torch.cat([features_of(rgba[i : i + CHUNK], scorer) for i in range(0, len(rgba), CHUNK)])
    codes = (127 * features / features.abs().amax(-1, keepdim=True)).round().to(torch.int8)
    words = [(name, with_article(name, name), plural(name)) for name in names]
    save_file({"features": codes}, folder / FILE, {"sprites": json.dumps(words, ensure_ascii=False)})
    print(f"{folder / FILE}: {len(words)} sprites, {(folder / FILE).stat().st_size:,} bytes")


def features_of(rgba: torch.Tensor, scorer: Scorer) -> torch.Tensor:
    """Unit vectors [n, D] for sprites, uint8 [n, 256, 256, 4]."""
    atlas, views = make_atlas(rgba), []
    for ground, colour in VIEWS:
        scenes = [
            Scene(
                "single",
                [Thing(i, COLOUR_ID.get(colour, -1), "", [])],
                [(0.5, 0.5, 0.86)],
                "alone",
                BACKGROUNDS[ground],
            )
            for i in range(len(rgba))
        ]
        views.append(scorer.features([alone(np.asarray(x)) for x in to_images(render(pack(scenes), atlas, SIDE))]))
    return F.normalize(torch.stack(views).mean(0), dim=-1)


def alone(pixels: np.ndarray):
    """The thing in a picture, cut out as the captioner does; the whole where it hides in its ground."""
    ground = ground_of(pixels)
    mask = (np.abs(pixels.astype(np.int16) - ground) > EDGE).any(-1)
    whole = (0, 0, *pixels.shape[1::-1])
    return crop(pixels, ground, tight(mask, whole) or whole)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path)
    parser.add_argument("folder", type=Path, nargs="?", default=Path(__file__).resolve().parents[1] / "dinov2-mini")
    main(**vars(parser.parse_args()))
