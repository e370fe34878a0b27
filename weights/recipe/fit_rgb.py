"""The matrix of previews: RGB from the 16 channels of a latent pixel, by least squares over pictures of scenes.

    python weights/recipe/fit_rgb.py ROOT weights/flux-mini/ae.safetensors

Prints 16 rows and the constant, for `flux_core/variants.py`, and the root mean square error in levels of 255. The
encoder decides, so this is to be run again when it is trained anew, not when the decoder is.
"""

import sys

import torch
import torch.nn.functional as F
from render import all_rgba, make_atlas, render
from scenes import sample_scenes
from sprites import load_sprites

from flux_core.checkpoint import load_autoencoder, with_files

PICTURES, SEED = 1000, 7


@torch.no_grad()
def main(root: str, file: str) -> None:
    sprites = load_sprites(root)
    scenes, _ = sample_scenes(PICTURES, SEED, sprites, k=1)
    atlas, ae = make_atlas(all_rgba(sprites)), load_autoencoder(with_files("flux-mini", ae=file), dtype=torch.float32)
    latents, colours = [], []
    for i in range(0, PICTURES, 20):
        pictures = render(scenes[slice(i, i + 20)], atlas, 256)
        latents.append(ae.encode(pictures).movedim(1, -1).flatten(0, 2))
        colours.append(F.avg_pool2d(pictures, 8).movedim(1, -1).flatten(0, 2))
        print(f"\r{i + 20} of {PICTURES} pictures", end="", file=sys.stderr)
    x, y = torch.cat(latents), torch.cat(colours)
    x = F.pad(x, (0, 1), value=1.0)
    found = torch.linalg.lstsq(x, y).solution
    print("\n".join(f"({', '.join(f'{number:.4f}' for number in row)})," for row in found.tolist()))
    print(f"{((x @ found.round(decimals=4) - y).square().mean().sqrt() * 127.5).item():.1f} levels", file=sys.stderr)


if __name__ == "__main__":
    main(*sys.argv[1:])
