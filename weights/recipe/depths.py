"""Depth of scenes: silhouettes on black, the brighter the nearer.

A scene is flat, so what a thing's depth could be is a choice: the larger it is, the nearer, and its middle is nearer
than its rim, as of something round. The ground is far away, and shadows have no depth.
"""

import numpy as np
import torch
from render import SHADOW_LEVEL, Atlas, sample
from scenes import SceneBatch
from torch import Tensor

LEVEL = 128
"""of the sprites' pyramid whose outlines are drawn"""
FAR, RIM = 0.4, 0.6
"""the nearness of something tiny, and what of its nearness a thing has at its rim"""


@torch.no_grad()
def depth(scenes: SceneBatch, atlas: Atlas, size: int) -> Tensor:
    """Nearness [B, size, size] from 0 to 1, on the atlas's device."""
    device = atlas.mean_luma.device
    found = torch.zeros(len(scenes), 1, size, size, device=device)
    for layer in range(scenes.sprite.shape[1]):
        there = np.flatnonzero(scenes.sprite[:, layer] >= 0)
        if not len(there):
            continue
        rows = torch.from_numpy(there).to(device)
        sprite, xy, scale = (
            torch.from_numpy(x[:, layer]).to(device)[rows] for x in (scenes.sprite, scenes.xy, scenes.size)
        )
        outline, middle = (
            sample(atlas.levels[level][sprite.long(), 3:].float() / 255, xy, scale, size)
            for level in (LEVEL, SHADOW_LEVEL)
        )
        near = (FAR + (1 - FAR) * scale)[:, None, None, None] * (RIM + (1 - RIM) * middle)
        found[rows] = found[rows].lerp(near, outline)
    return found[:, 0]
