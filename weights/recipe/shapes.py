"""Simple shapes as sprites: white, softly shaded, so that the renderer colours them like anything else.

Every outline is a polygon. Its signed distance gives the antialiased mask and, read as the height of a
rounded edge, the normal for a light from the upper left.
"""

import numpy as np
import torch
from torch import Tensor

# fmt: off
SHAPES: tuple[tuple[str, ...], ...] = (
    ("circle", "disc"), ("square",), ("triangle",), ("star", "five-pointed star"), ("heart", "heart shape"),
    ("diamond", "rhombus"), ("ring", "hollow circle"), ("hexagon",), ("cross", "plus"), ("pentagon",),
    ("oval", "ellipse"), ("rectangle",))
# fmt: on


def _regular(n: int, radius: float = 0.9, turn: float = 0.0) -> np.ndarray:
    angle = 2 * np.pi * np.arange(n) / n + turn - np.pi / 2
    return radius * np.stack([np.cos(angle), np.sin(angle)], 1)


def _lower(poly: np.ndarray, by: float) -> np.ndarray:
    return poly + np.array([0, by])


def _heart() -> np.ndarray:
    t = np.linspace(0, 2 * np.pi, 120, endpoint=False)
    x = 16 * np.sin(t) ** 3
    y = -(13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t))
    return np.stack([x, y - 2.5], 1) / 17.8


def _star() -> np.ndarray:
    radius = np.where(np.arange(10) % 2 == 0, 0.95, 0.43)[:, None]
    return _lower(_regular(10, 1.0) * radius, 0.06)


def _box(w: float, h: float) -> np.ndarray:
    return np.array([[-w, -h], [w, -h], [w, h], [-w, h]])


def _cross(a: float = 0.88, b: float = 0.3) -> np.ndarray:
    return np.array(
        [
            [-b, -a],
            [b, -a],
            [b, -b],
            [a, -b],
            [a, b],
            [b, b],
            [b, a],
            [-b, a],
            [-b, b],
            [-a, b],
            [-a, -b],
            [-b, -b],
        ]
    )


def _outline(name: str) -> np.ndarray:
    return {
        "circle": _regular(120),
        "ring": _regular(120),
        "square": _box(0.8, 0.8),
        "triangle": _lower(_regular(3, 1.02), 0.22),
        "star": _star(),
        "heart": _heart(),
        "diamond": _regular(4) * [0.78, 1.02],
        "hexagon": _regular(6, turn=np.pi / 6),
        "cross": _cross(),
        "pentagon": _lower(_regular(5), 0.06),
        "oval": _regular(120) * [1.03, 0.68],
        "rectangle": _box(0.92, 0.58),
    }[name]


def _signed_distance(points: np.ndarray, poly: np.ndarray) -> np.ndarray:
    """Positive inside. Distance to the nearest edge, even-odd rule. points [M, 2], poly [V, 2]."""
    best, inside = np.full(len(points), np.inf), np.zeros(len(points), bool)
    for a, b in zip(poly, np.roll(poly, -1, 0), strict=True):
        edge, rel = b - a, points - a
        t = np.clip(rel @ edge / (edge @ edge), 0, 1)
        best = np.minimum(best, ((rel - t[:, None] * edge) ** 2).sum(1))
        crosses = (a[1] > points[:, 1]) != (b[1] > points[:, 1])
        inside ^= crosses & (rel[:, 0] < edge[0] * rel[:, 1] / (edge[1] or 1))
    return np.where(inside, 1, -1) * np.sqrt(best)


def _sprite(name: str, size: int = 256, bevel: float = 0.22) -> np.ndarray:
    axis = (np.arange(size) + 0.5) / size * 2 - 1
    points = np.stack(np.meshgrid(axis, axis), -1).reshape(-1, 2)
    d = _signed_distance(points, _outline(name))
    if name == "ring":
        d = np.minimum(d, -_signed_distance(points, _outline(name) * 0.56))
    d = d.reshape(size, size) - 0.03
    height = bevel * np.sqrt(1 - (1 - np.clip((d + 0.03) / bevel, 0, 1)) ** 2)
    gy, gx = np.gradient(height, 2 / size)
    light = (0.35 * gx + 0.55 * gy + 1.0) / np.sqrt(gx**2 + gy**2 + 1) / 1.19
    grey = np.clip(0.72 + 0.28 * light - 0.04 * axis[:, None], 0, 1) * 0.86
    alpha = np.clip(d * size / 2 + 0.5, 0, 1)
    return np.round(np.stack([grey, grey, grey, alpha], -1) * 255).astype(np.uint8)


def shape_sprites() -> Tensor:
    """uint8 [S, 256, 256, 4], in the order of SHAPES."""
    return torch.from_numpy(np.stack([_sprite(names[0]) for names in SHAPES]))
