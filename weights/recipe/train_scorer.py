"""The embedded scorer: a small DINOv2, taught by pictures of flux-mini's world alone. No name is ever read.

    python weights/recipe/train_scorer.py ROOT WORK [--minutes 12]

Self-supervision by telling instances apart, as in Exemplar-CNN (arXiv 1406.6909) and NPID (arXiv 1805.01978): every
sprite is an example of nothing but itself, and of each picture that the renderer made the network is to say which of
them are in it, wherever they stand, however large, painted in any colour, on any ground, in any light, half cropped
away. The answer is read off the cosines between the picture's feature and one learned vector for each sprite, so that
what is learned is the very similarity that a scorer is asked for. It begins with things in their own colours on white:
begun with all at once, nothing is learned for a long time.

The class token and the mean of the patch tokens answer alike, so that either pooling describes the picture. One in
sixteen of the things is never shown (`unseen`), for `benchmarks/scorer.py` to ask. (What `heldout.json` keeps from
flux-mini are combinations, for it to draw; a scorer draws nothing.)

Handed on is the moving average without the sprites' vectors, in transformers' format: WORK/dinov2-mini.
"""

import copy
import json
import math
import os
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from palette import COLOURS
from render import LUMA, Atlas, all_rgba, make_atlas, render
from scenes import SceneBatch, sample_scenes
from sprites import Sprites, load_sprites, plain_names
from torch import Tensor, nn
from trainer import Trainer, say, stage_arguments
from transformers import Dinov2Config, Dinov2Model

CONFIG = Dinov2Config(
    image_size=112,  # 14 x 14 patches
    patch_size=8,
    hidden_size=192,
    num_hidden_layers=6,
    num_attention_heads=3,
    use_mask_token=False,
)
PREPROCESSOR = {
    "image_processor_type": "BitImageProcessor",
    "do_convert_rgb": True,
    "do_resize": True,
    "size": {"shortest_edge": CONFIG.image_size},
    "resample": 3,
    "do_center_crop": True,
    "crop_size": {"height": CONFIG.image_size, "width": CONFIG.image_size},
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,  # to [-1, 1], as the renderer gives them
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
}
TEMPERATURE = 0.08
CANVAS = 144  # what crops are cut from


class Scorer(nn.Module):
    """The backbone that ships, and a vector for each sprite, which training needs."""

    def __init__(self, sprites: int, config: Dinov2Config = CONFIG) -> None:
        super().__init__()
        self.backbone = Dinov2Model(config)
        # Short, so that AdamW's even steps turn them fast.
        self.vectors = nn.Parameter(0.03 * torch.randn(sprites, config.hidden_size))

    def forward(self, pictures: Tensor) -> Tensor:
        """Pictures [B, 3, H, W] -> logits [2, B, N]: cosines of class token and mean patch with every sprite."""
        tokens = self.backbone(pictures).last_hidden_state
        features = torch.stack([tokens[:, 0], tokens[:, 1:].mean(1)])
        with torch.autocast(pictures.device.type, enabled=False):  # bf16 rounds a cosine by a tenth of a temperature
            return F.normalize(features.float(), dim=-1) @ F.normalize(self.vectors, dim=-1).T / TEMPERATURE


def shares(scenes: SceneBatch, sprites: int) -> Tensor:
    """The share of each object in each scene: [B, N], rows sum to 1."""
    there = torch.from_numpy(scenes.sprite).long()
    found = torch.zeros(len(there), sprites + 1).scatter_(1, there.where(there >= 0, sprites), 1)[:, :sprites]
    return found / found.sum(1, keepdim=True)


def instance_loss(logits: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy of logits [2, B, N] with shares [B, N]; how often the class token's best sprite is present."""
    loss = -(wanted * F.log_softmax(logits, -1)).sum(-1).mean()
    return loss, wanted.gather(1, logits[0].argmax(-1, keepdim=True)).gt(0).float().mean()


# Pictures ------------------------------------------------------------------------------------------


def another_view(scenes: SceneBatch, rng: np.random.Generator, freedom: float = 1.0) -> SceneBatch:
    """Scenes of the same objects, moved and scaled together, half of them recoloured, on another background.

    With less freedom fewer are painted, and more are on white. Objects keep their order and never leave the canvas.
    What was painted stays painted, in any colour: a shape has none of its own.
    """
    n, there = len(scenes), scenes.sprite >= 0
    painted = there & ((scenes.colour >= 0) | (rng.random(there.shape) < 0.5 * freedom))
    colour = np.where(painted, rng.integers(len(COLOURS), size=there.shape), -1)
    ground = np.where(rng.random((n, 1)) < 0.7 * freedom, rng.random((n, 3)), 1.0)
    distance = np.abs(np.array([c.rgb for c in COLOURS])[colour] - ground[:, None]).max(-1)
    hidden = (painted & (distance < 0.25)).any(1, keepdims=True)
    ground = np.where(hidden, (ground + 0.5) % 1, ground)  # half the range away in every channel

    half = scenes.size[..., None] / 2
    low = np.where(there[..., None], scenes.xy - half, np.inf).min(1)
    high = np.where(there[..., None], scenes.xy + half, -np.inf).max(1)
    zoom = rng.uniform(0.4, 0.97, n) / (high - low).max(1)
    corner = rng.random((n, 2)) * (1 - (high - low) * zoom[:, None])
    return SceneBatch(
        scenes.sprite,
        ((scenes.xy - low[:, None]) * zoom[:, None, None] + corner[:, None]).astype(np.float32),
        (scenes.size * zoom[:, None]).astype(np.float32),
        colour.astype(np.int8),
        ground.astype(np.float32),
        scenes.kind,
    )


def windows(scenes: SceneBatch, rng: np.random.Generator, low: float, high: float, part: bool = False) -> np.ndarray:
    """Windows (x, y, width, height), float32 [B, 4], inside the canvas, each with the centre of an object.

    Their area is between `low` and `high` of the canvas or, for a `part`, of that thing. A crop of bare ground could
    teach nothing but the ground.
    """
    rows, n = np.arange(len(scenes)), len(scenes)
    chosen = (rng.random(n) * (scenes.sprite >= 0).sum(1)).astype(int)
    middle = scenes.xy[rows, chosen]
    aspect = np.exp(rng.uniform(-1, 1, n) * math.log(4 / 3) / 2)
    side = np.sqrt(rng.uniform(low, high, n))[:, None] * np.stack([aspect, 1 / aspect], 1)
    side = np.minimum(side * scenes.size[rows, chosen, None] if part else side, 1)
    first, last = np.maximum(middle - side, 0), np.minimum(middle, 1 - side)
    return np.concatenate([first + rng.random((n, 2)) * (last - first), side], 1).astype(np.float32)


def crop(pictures: Tensor, window: Tensor, mirrored: Tensor, size: int) -> Tensor:
    """Windows [B, 4] of pictures [B, 3, H, W] as [B, 3, size, size], some of them `mirrored` (bool [B])."""
    x, y, width, height = window.unbind(1)
    theta = torch.zeros(len(window), 2, 3, device=window.device)
    theta[:, 0, 0] = torch.where(mirrored, -width, width)
    theta[:, 1, 1] = height
    theta[:, 0, 2], theta[:, 1, 2] = 2 * x + width - 1, 2 * y + height - 1
    grid = F.affine_grid(theta, [len(window), 3, size, size], align_corners=False)
    return F.grid_sample(pictures, grid, padding_mode="border", align_corners=False)


def retouch(pictures: Tensor, dice: torch.Generator) -> Tensor:
    """Pictures [B, 3, H, W] in [-1, 1] in another light and through another lens, each its own."""

    def draw(low: float, high: float, channels: int = 1) -> Tensor:
        shape = len(pictures), channels, 1, 1
        return torch.empty(shape, device=pictures.device).uniform_(low, high, generator=dice)

    grey = (pictures * torch.tensor(LUMA, device=pictures.device).view(3, 1, 1)).sum(1, keepdim=True)
    pictures = grey + draw(0.2, 1.3) * (pictures - grey)
    pictures = pictures * draw(0.75, 1.2) * draw(0.85, 1.15, 3) + draw(-0.2, 0.2)
    row = torch.tensor([1.0, 4, 6, 4, 1], device=pictures.device) / 16
    kernel = row.outer(row).expand(3, 1, 5, 5)
    blurred = F.conv2d(F.pad(pictures, (2, 2, 2, 2), "replicate"), kernel, groups=3)
    return pictures.lerp(blurred, draw(-1, 1).clamp(min=0)).clamp(-1, 1)  # half of them stay sharp


def views(
    scenes: SceneBatch, atlas: Atlas, rng: np.random.Generator, freedom: float = 1.0, size: int = CONFIG.image_size
) -> Tensor:
    """A crop [B, 3, size, size] of another picture of each scene."""
    seen = another_view(scenes, rng, freedom)
    pictures = render(seen, atlas, CANVAS, chunk=len(seen))
    dice = torch.Generator(pictures.device).manual_seed(int(rng.integers(2**31)))
    window = torch.from_numpy(windows(seen, rng, 0.4, 1.0)).to(pictures.device)
    mirrored = torch.rand(len(seen), generator=dice, device=pictures.device) < 0.5
    return retouch(crop(pictures, window, mirrored, size), dice)


# The stage -----------------------------------------------------------------------------------------


def unseen(meta: Sprites) -> list[int]:
    """Sprites that training never shows: one in sixteen of those with a plain name.

    No hands, whose skin tones would show them all the same.
    """
    return [i for i in sorted(plain_names(meta)) if meta.group[i] != "people-body"][::16]


def write_scorer(folder: Path, backbone: Dinov2Model) -> Dinov2Model:
    """A folder for `Dinov2Model.from_pretrained` and `AutoImageProcessor.from_pretrained`; what is in it, in bf16."""
    backbone = copy.deepcopy(backbone).to(torch.bfloat16)
    backbone.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR, indent=2) + "\n", encoding="utf-8")
    return backbone


def main() -> None:
    parser = stage_arguments(__doc__, steps=100_000, minutes=12, batch=512, lr=1e-3, data=True)
    parser.add_argument("--scenes", type=int, default=200_000)
    args = parser.parse_args()

    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")
    sprites = load_sprites(args.root)
    scenes, _ = sample_scenes(args.scenes, 20, sprites, k=1, workers=os.cpu_count() or 1, pairs=0.15)
    toned = [i for i, tone in enumerate(sprites.tone) if tone]  # repainted, they are all the same
    scenes = scenes[~np.isin(scenes.sprite, unseen(sprites) + toned).any(1)]
    say(f"sampled {len(scenes)} scenes")
    rgba = all_rgba(sprites)
    atlas = make_atlas(rgba, args.device)
    say("made the atlas")

    scorer = Scorer(len(rgba)).to(args.device)
    trainer = Trainer(scorer, args.lr, args.steps, args.minutes, decay_from=0.5)
    state = args.work / "scorer.state.safetensors"
    trainer.resume(state)
    forward = torch.compile(scorer, dynamic=False) if args.device == "cuda" else scorer

    for step in trainer.loop(args.pause):
        rng = np.random.default_rng(step)
        some = scenes[rng.integers(len(scenes), size=args.batch)]
        freedom = min(1.0, trainer.progress / 0.6)
        pictures = views(some, atlas, rng, freedom)
        with torch.autocast(args.device, torch.bfloat16, enabled=args.device == "cuda"):
            logits = forward(pictures)
        loss, named = instance_loss(logits, shares(some, len(rgba)).to(args.device))
        trainer.update(loss)
        if step % 1000 == 999:
            trainer.save(state)
        if step % 100 == 0:
            say(f"step {step} loss {loss.item():.4f} named {named.item():.3f}")
    trainer.save(state)
    if trainer.progress < 1:
        return
    trainer.load_average()
    backbone = write_scorer(args.work / "dinov2-mini", scorer.backbone)
    say(f"{sum(p.numel() for p in backbone.parameters()) / 1e6:.2f} M parameters after {trainer.step} steps")


if __name__ == "__main__":
    main()
