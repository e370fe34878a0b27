"""Masks of what is painted anew in a scene: around one of its things, a box, a side, or a blob."""

import numpy as np
import torch
import torch.nn.functional as F
from scenes import SceneBatch
from torch import Tensor

MARGIN = 0.12
"""of a canvas, at most, around a thing"""


def sample_masks(scenes: SceneBatch, size: int, rng: np.random.Generator) -> Tensor:
    """A mask for each scene, [B, 1, size, size]: 1 where it is painted, else 0."""
    n = len(scenes)
    kind, inside = rng.integers(4, size=(n, 1)), (np.arange(size) + 0.5) / size
    x0, y0, x1, y1 = np.select([kind == 0, kind == 1], [_around(scenes, rng), _boxes(n, rng)], _sides(n, rng)).T
    across, down = ((a[:, None] <= inside) & (inside < b[:, None]) for a, b in ((x0, x1), (y0, y1)))
    boxes = torch.from_numpy(down[:, None, :, None] & across[:, None, None, :])
    noise = torch.from_numpy(rng.standard_normal((n, 1, 5, 5), dtype=np.float32))
    blobs = F.interpolate(noise, (size, size), mode="bicubic") > 0.2
    return torch.where(torch.from_numpy(kind == 3)[:, :, None, None], blobs, boxes).float()


def _around(scenes: SceneBatch, rng: np.random.Generator) -> np.ndarray:
    """Boxes (x0, y0, x1, y1), [B, 4], around one of the things of each scene."""
    n = len(scenes)
    rows, chosen = np.arange(n), (rng.random(n) * (scenes.sprite >= 0).sum(1)).astype(int)
    middle, half = scenes.xy[rows, chosen], scenes.size[rows, chosen, None] / 2
    margin = rng.uniform(0, MARGIN, (n, 4))
    return np.concatenate([middle - half - margin[:, :2], middle + half + margin[:, 2:]], 1)


def _boxes(n: int, rng: np.random.Generator) -> np.ndarray:
    corner = rng.uniform(0, 0.7, (n, 2))
    return np.concatenate([corner, corner + rng.uniform(0.2, 0.9, (n, 2))], 1)


def _sides(n: int, rng: np.random.Generator) -> np.ndarray:
    """All beyond a line."""
    found = np.tile([0.0, 0.0, 1.0, 1.0], (n, 1))
    found[np.arange(n), rng.integers(4, size=n)] = rng.uniform(0.25, 0.75, n)
    return found
