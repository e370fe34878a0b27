"""How well `caption --model sprites` names what is in scenes of flux-mini's world that nothing was trained on.

    python benchmarks/captions.py ROOT [--scenes 500] [--seed 2311] [--sheet FILE]

ROOT is the folder of the recipe's raw data (see `weights/README.md`). Scenes are drawn as for training, from a seed
that no stage of the recipe has, 256x256. Prints a line of JSON:

- *names*: of all things in all scenes, how many are named: by the sprite's own name, a near-twin's (quality.py: a
  distance below TWIN), or for a skin tone by that of the thing without one. By kinds of scenes, too; *exact*: by the
  very name. A thing that is there twice has to be found twice.
- *scenes*: every thing is named, and there are no others.
- *unseen*: of things that dinov2-mini was never shown (train_scorer.py), how many are named.
"""

import argparse
import json
from collections import defaultdict
from pathlib import Path

import numpy as np
import quality as q  # puts the repository and the recipe on the path
import torch
from render import all_rgba, make_atlas, render, sheet, to_images
from scenes import KINDS, sample_scenes
from shapes import SHAPES
from sprites import load_sprites
from tqdm import tqdm
from train_scorer import unseen

from flux_core.captioning.sprites import load_sprites as load_captioner

GREY = torch.tensor([0.5, 0.6, 0.55])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path, help="folder with fluent/package and emoji/package")
    parser.add_argument("--scenes", type=int, default=500)
    parser.add_argument("--seed", type=int, default=2311)
    parser.add_argument("--sheet", type=Path, help="a file for the first scenes and those that are wrong")
    args = parser.parse_args()

    sprites, captioner = load_sprites(args.root), load_captioner(torch.device("cpu"))
    scenes, _ = sample_scenes(args.scenes, args.seed, sprites, k=1)
    used, where = np.unique(scenes.sprite, return_inverse=True)
    names = [*sprites.names, *(shape[0] for shape in SHAPES)]
    wanted = [[int(i) for i in row if i >= 0] for row in scenes.sprite]
    scenes.sprite = np.where(scenes.sprite < 0, -1, where.reshape(scenes.sprite.shape)).astype(np.int16)
    pictures = to_images(render(scenes, make_atlas(all_rgba(sprites)[torch.from_numpy(used.astype(np.int64))]), 256))

    base = [i for i, tone in enumerate(sprites.tone) if not tone]
    atlas = make_atlas(sprites.rgba[base])
    tiles, at = q.sprite_tiles(atlas, list(range(len(base))), GREY), {sprites.names[i]: k for k, i in enumerate(base)}

    def alike(found: str, name: str) -> bool:
        """Whether a name is the other's, but for a skin tone, or a near-twin's."""
        plain = name.split(", ")[0] if "skin tone" in name else name
        if found in (name, plain) or found not in at or plain not in at:
            return found in (name, plain)
        return bool(q.distances(tiles[at[plain]], tiles)[at[found]] < q.TWIN)

    never, right, exact, whole, shown, wrong = set(unseen(sprites)), defaultdict(list), [], [], [], []
    for picture, indices, kind in tqdm(list(zip(pictures, wanted, scenes.kind, strict=True))):
        found = [captioner.sprites[thing.sprite].name for thing in captioner.things(picture)]
        left = list(found)
        for index in indices:
            match = next(
                (x for x in left if x == names[index]), next((x for x in left if alike(x, names[index])), None)
            )
            if match is not None:
                left.remove(match)
            right[KINDS[kind]].append(match is not None)
            exact.append(match == names[index])
            if index in never:
                right["unseen"].append(match is not None)
        whole.append(len(found) == len(indices) and all(right[KINDS[kind]][-len(indices) :]))
        shown.append((picture, ("" if whole[-1] else "wrong: ") + captioner.caption(picture)))
    if args.sheet:
        wrong = [one for one, ok in zip(shown, whole, strict=True) if not ok]
        sheet(*map(list, zip(*(shown[:40] + wrong[:80]), strict=True)), 10).save(args.sheet)
    each = {kind: q.rate(right[kind]) for kind in (*KINDS, "unseen") if right[kind]}
    every = [one for kind in KINDS for one in right[kind]]
    figures = {"names": q.rate(every), "exact": q.rate(exact), "scenes_right": q.rate(whole), **each}
    print(json.dumps({"benchmark": "captions", "scenes": args.scenes, "seed": args.seed, **figures}))


if __name__ == "__main__":
    main()
