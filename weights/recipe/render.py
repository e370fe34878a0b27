"""Scenes to pictures, on the device, in plain tensor operations.

A layer is an affine view of a sprite: output pixel u in [-1, 1] looks at (u - centre) / size in the sprite.
Shrinking by sampling alone would alias, so sprites are kept in a pyramid (256, 192, 128, ... pixels,
premultiplied alpha) and each layer samples the smallest level that is not smaller than its own size: at most
1.5 source pixels to one. Premultiplied, because only then are averages of pixels right at soft edges, and
`over` is one line: a + b (1 - alpha).

A colour is changed by brightness: the sprite's mean becomes the colour, what is darker goes to black with it,
what is brighter goes towards white, and a little of the old chroma stays so that stripes and eyes remain
(`palette.py`).

    python weights/recipe/render.py ROOT sheet.png [kind]
"""

import math
import sys
import textwrap
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from palette import COLOURS
from PIL import Image, ImageDraw, ImageFont
from scenes import KINDS, SceneBatch, sample_scenes
from shapes import shape_sprites
from sprites import Sprites, load_sprites
from torch import Tensor

LEVELS = (256, 192, 128, 96, 64, 48, 32)
SHADOW, SHADOW_DROP, SHADOW_LEVEL = 0.18, 0.035, 16
LUMA = (0.299, 0.587, 0.114)


@dataclass(frozen=True)
class Atlas:
    """Every sprite at every level: uint8 [N, 4, s, s], premultiplied; its mean brightness, [N]."""

    levels: dict[int, Tensor]
    mean_luma: Tensor


def all_rgba(sprites: Sprites) -> Tensor:
    """The emoji, then the shapes: uint8 [N + S, 256, 256, 4], as the numbers in a SceneBatch mean them."""
    return torch.cat([sprites.rgba, shape_sprites()])


def make_atlas(rgba: Tensor, device: str | torch.device = "cpu", chunk: int = 256) -> Atlas:
    sizes = (*LEVELS, SHADOW_LEVEL)
    levels = {s: torch.empty(len(rgba), 4, s, s, dtype=torch.uint8, device=device) for s in sizes}
    luma = torch.empty(len(rgba), device=device)
    weights = torch.tensor(LUMA, device=device).view(3, 1, 1)
    for i in range(0, len(rgba), chunk):
        x = rgba[i : i + chunk].to(device).permute(0, 3, 1, 2).float() / 255
        x = torch.cat([x[:, :3] * x[:, 3:], x[:, 3:]], 1)
        luma[i : i + chunk] = (x[:, :3] * weights).sum((1, 2, 3)) / x[:, 3].sum((1, 2)).clamp(min=1e-3)
        for s in sizes:
            y = x if s == 256 else F.interpolate(x, (s, s), mode="bilinear", antialias=True)
            levels[s][i : i + chunk] = (y * 255).round().to(torch.uint8)
    return Atlas(levels, luma)


@torch.no_grad()
def render(
    batch: SceneBatch,
    atlas: Atlas,
    size: int,
    chunk: int = 256,
    shadow: bool = True,
    ground: Tensor | None = None,
) -> Tensor:
    """Pictures [B, 3, size, size] in [-1, 1], on the atlas's device.

    ground: [B, 3, size, size] in [0, 1], behind the things; by default the scenes' own colours.
    """
    if ground is None:
        ground = torch.from_numpy(batch.background).to(atlas.mean_luma.device)[:, :, None, None]
        ground = ground.expand(-1, -1, size, size)
    rows = [slice(i, i + chunk) for i in range(0, len(batch), chunk)]
    parts = [_render(batch[some], ground[some].clone(), atlas, size, shadow) for some in rows]
    return torch.cat(parts) if parts else torch.empty(0, 3, size, size, device=atlas.mean_luma.device)


def _render(batch: SceneBatch, canvas: Tensor, atlas: Atlas, size: int, shadow: bool) -> Tensor:
    device = canvas.device
    for layer in range(batch.sprite.shape[1]):
        level = np.select([batch.size[:, layer] * size <= s for s in LEVELS[::-1]], LEVELS[::-1], LEVELS[0])
        for s in LEVELS:
            rows = np.flatnonzero((batch.sprite[:, layer] >= 0) & (level == s))
            if len(rows):
                _draw(canvas, torch.from_numpy(rows).to(device), batch[rows], layer, atlas, s, shadow)
    return canvas * 2 - 1


def _draw(canvas: Tensor, rows: Tensor, batch: SceneBatch, layer: int, atlas: Atlas, level: int, shadow: bool) -> None:
    device, size = canvas.device, canvas.shape[-1]
    sprite = torch.from_numpy(batch.sprite[:, layer].astype(np.int64)).to(device)
    xy = torch.from_numpy(batch.xy[:, layer]).to(device)
    scale = torch.from_numpy(batch.size[:, layer]).to(device)
    under = canvas[rows]
    if shadow:
        drop = torch.stack([torch.zeros_like(scale), SHADOW_DROP * scale], 1)
        alpha = sample(atlas.levels[SHADOW_LEVEL][sprite, 3:].float() / 255, xy + drop, scale, size)
        under = under * (1 - SHADOW * alpha)
    over = sample(atlas.levels[level][sprite].float() / 255, xy, scale, size)
    painted = np.flatnonzero(batch.colour[:, layer] >= 0)
    if len(painted):
        some = torch.from_numpy(painted).to(device)
        colour = torch.from_numpy(batch.colour[painted, layer].astype(np.int64)).to(device)
        over[some] = recolour(over[some], colour, atlas.mean_luma[sprite[some]])
    canvas[rows] = over[:, :3] + under * (1 - over[:, 3:])


def sample(sprites: Tensor, xy: Tensor, scale: Tensor, size: int) -> Tensor:
    """Sprites [B, C, s, s] placed on canvases [B, C, size, size]; nothing outside them."""
    theta = torch.zeros(len(xy), 2, 3, device=xy.device)
    theta[:, 0, 0] = theta[:, 1, 1] = 1 / scale
    theta[:, :, 2] = -(xy * 2 - 1) / scale[:, None]
    grid = F.affine_grid(theta, [len(xy), 1, size, size], align_corners=False)
    return F.grid_sample(sprites, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


def recolour(rgba: Tensor, colour: Tensor, mean_luma: Tensor) -> Tensor:
    """Premultiplied [B, 4, H, W] in palette colours [B]; `mean_luma` [B] is what becomes the colour."""
    table = torch.tensor([(*c.rgb, c.tint, c.keep) for c in COLOURS], device=rgba.device)[colour][:, :, None, None]
    target, tint, keep = table[:, :3], table[:, 3:4], table[:, 4:]
    alpha = rgba[:, 3:]
    rgb = rgba[:, :3] / alpha.clamp(min=1 / 255)
    luma = (rgb * torch.tensor(LUMA, device=rgba.device).view(3, 1, 1)).sum(1, keepdim=True)
    middle = mean_luma.clamp(0.2, 0.85)[:, None, None, None]
    dark = (luma / middle).clamp(max=1)
    bright = ((luma - middle) / (1 - middle)).clamp(0, 1)
    new = target * dark + (1 - target) * tint * bright + keep * (rgb - luma)
    return torch.cat([new.clamp(0, 1) * alpha, alpha], 1)


# A sheet of samples --------------------------------------------------------------------------------


def to_images(pictures: Tensor) -> list[Image.Image]:
    array = ((pictures.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(a) for a in array]


def sheet(images: list[Image.Image], captions: list[str], columns: int = 8) -> Image.Image:
    """Pictures in rows with their captions underneath."""
    w, h = images[0].size
    page = Image.new("RGB", (columns * (w + 8), math.ceil(len(images) / columns) * (h + 44)), "white")
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(11)
    for i, (image, caption) in enumerate(zip(images, captions, strict=True)):
        x, y = i % columns * (w + 8) + 4, i // columns * (h + 44) + 4
        page.paste(image, (x, y))
        draw.text((x, y + h + 1), "\n".join(textwrap.wrap(caption, w // 6)[:3]), "black", font)
    return page


def main(root: str, path: str, kind: str = "", rows: int = 6, columns: int = 8, size: int = 192) -> None:
    sprites = load_sprites(root)
    batch, captions = sample_scenes(3000, 0, sprites, k=1)
    chosen = np.flatnonzero(batch.kind == KINDS.index(kind)) if kind else np.arange(len(batch))
    batch, captions = batch[chosen[: rows * columns]], [captions[i][0] for i in chosen[: rows * columns]]
    used, where = np.unique(batch.sprite, return_inverse=True)  # an atlas of these alone: quick on a CPU
    batch.sprite = np.where(batch.sprite < 0, -1, where.reshape(batch.sprite.shape))
    pictures = render(batch, make_atlas(all_rgba(sprites)[torch.from_numpy(used.astype(np.int64))]), size)
    sheet(to_images(pictures), captions, columns).save(path)


if __name__ == "__main__":
    main(*sys.argv[1:4])
