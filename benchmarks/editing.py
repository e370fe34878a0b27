"""How well Stable Flow edits flux-mini's pictures and preserves the rest, by the blocks that share keys and values.

    python benchmarks/editing.py ROOT [--layers vital.json] [--each 15] [--photos 12] [--sheet FOLDER]

ROOT is the folder of the recipe's raw data (see `weights/README.md`). There are four kinds of edits, `--each` of every
kind: *recolour* (an object gets a colour), *replace* (the right of two objects becomes another), *add* (an object gets
a neighbour), *background* (the background gets a colour). Source and edits start from the same noise; an edit is drawn
with keys and values shared in all blocks, in the vital blocks (`--layers`), in all others, in none. Prints a table and
a line of JSON, means with 95 % confidence intervals (Wilson's for shares, normal for the others):

- *happened*: the edit is visible, by the criteria of `benchmarks/quality.py` for colours, names and pairs; for the
  background: of the palette's colours, the wanted colour is the nearest to it.
- *likeness*: similarity of edit and source by the scorer.
- *untouched*: mean difference to the source, in levels of 255, where nothing should change: the left half (replace) or
  the object itself (background).
- *shape*: intersection over union of the object's mask before and after recolouring.

Then for photographs (rendered scenes with their captions): the PSNR to the photograph of the autoencoder's round trip,
of inversion followed by sampling, and of the row that editing sets to the path, with and without the nudge.
"""

import argparse
import json
import math
import random
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent))

import quality as q
from palette import COLOURS
from render import all_rgba, make_atlas, render, sheet, to_images
from scenes import sample_scenes
from sprites import load_sprites, plain_names

from flux_core import GenerationRequest, load_pipeline
from flux_core.hooks import HookRun, ShareKV
from flux_core.hooks.layers import layers_of
from flux_core.hooks.sites import block_names
from flux_core.hub.places import SCORER
from flux_core.methods.scoring import load_scorer
from flux_core.methods.stable_flow import NUDGE, Editing
from flux_core.sampling import euler, get_noise, get_schedule, pack

CHOICES = ("all", "vital", "non-vital", "none")
KINDS = ("recolour", "replace", "add", "background")
KEPT = ("likeness", "untouched", "shape")


@dataclass
class Edit:
    """Prompts of an edit, and its criteria: indices of sprites in the list of base pictures, a colour."""

    kind: str
    source: str
    edit: str
    objects: tuple[int, ...]
    colour: int = -1


@dataclass
class Found:
    """Measurements of a choice of blocks."""

    happened: dict[str, list[bool]] = field(default_factory=lambda: {kind: [] for kind in KINDS})
    likeness: list[float] = field(default_factory=list)
    untouched: list[float] = field(default_factory=list)
    shape: list[float] = field(default_factory=list)


def make_edits(study: q.Study, each: int, rng: random.Random) -> list[Edit]:
    """`each` edits of every kind, of objects with a plain name, each used once."""
    plain = set(plain_names(study.sprites))
    places = [i for i, sprite in enumerate(study.base) if sprite in plain]
    rng.shuffle(places)

    def name(i: int) -> str:
        return study.name(study.base[i])

    def coloured(i: int, colour: int) -> str:
        word, noun = COLOURS[colour].names[0], study.sprites.names[study.base[i]]
        return f"{q.with_article(word, word).split()[0]} {word} {noun}"

    edits = []
    for _ in range(each):
        a, b, c, d, e, f, g = (places.pop() for _ in range(7))
        paint, ground = rng.randrange(len(COLOURS)), rng.randrange(len(COLOURS))
        word = COLOURS[ground].names[0]
        article = q.with_article(word, word).split()[0]
        edits += [
            Edit("recolour", name(a), coloured(a, paint), (a,), paint),
            Edit("replace", f"{name(b)} to the left of {name(c)}", f"{name(b)} to the left of {name(d)}", (b, d)),
            Edit("add", name(e), f"{name(e)} to the left of {name(f)}", (e, f)),
            Edit("background", name(g), f"{name(g)} on {article} {word} background", (g,), ground),
        ]
    return edits


@torch.no_grad()
def draw(pipeline, edit: Edit, seed: int, layers: dict[str, list[str]]) -> list[Image.Image]:
    """Pictures of the source and of the edit with each choice of blocks, drawn in one batch."""
    request = GenerationRequest(prompt=edit.source, seed=seed)
    branches = ("source", *layers)
    plan = [
        ShareKV(blocks=tuple(blocks), targets=(name,), follow=i > 0)  # they write the same value, each another row
        for i, (name, blocks) in enumerate(layers.items())
        if blocks
    ]
    noise = pack(get_noise(1, request.height, request.width, pipeline.device, pipeline.dtype, seed))
    sigmas = get_schedule(request.num_steps, noise.shape[1])
    run = HookRun(plan, pipeline.variant.params, sigmas, branches)
    prompts = [edit.source] + [edit.edit] * len(layers)
    velocity = pipeline.denoiser.velocity(prompts, [request.guidance] * len(prompts), request.padded_size, run)
    rows = euler(velocity, noise.expand(len(prompts), -1, -1), sigmas)
    return [pipeline.picture(row[None], request) for row in rows]


def as_tensor(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255


def happened(study: q.Study, edit: Edit, rgb: Tensor) -> bool:
    ground = q.ground_of(rgb)
    if edit.kind == "background":
        palette = torch.tensor([colour.rgb for colour in COLOURS])
        return int((palette - ground).norm(dim=1).argmin()) == edit.colour
    if edit.kind == "recolour":
        mask, sprite = q.object_mask(rgb, ground), study.base[edit.objects[0]]
        references = torch.stack([q.mean_colour(study.atlas, sprite, c) for c in range(len(COLOURS))])
        mean = rgb[:, mask].mean(1) if mask.any() else torch.zeros(3)
        return int((references - mean).norm(dim=1).argmin()) == edit.colour
    tiles = q.sprite_tiles(study.atlas, study.base, ground)
    halves = q.halves_of(rgb, ground, across=True)
    return all(q.shows(half, ground, sprite, tiles) for half, sprite in zip(halves, edit.objects, strict=True))


def judge(study: q.Study, edit: Edit, pictures: Sequence[Image.Image], found: dict[str, Found], scorer) -> list[bool]:
    """Measure an edit with every choice of blocks. Returns for each choice whether the edit is visible."""
    source, *edits = (as_tensor(picture) for picture in pictures)
    features = scorer.features(pictures)
    mask = q.object_mask(source, q.ground_of(source))
    for i, (result, rgb) in enumerate(zip(found.values(), edits, strict=True), 1):
        result.happened[edit.kind].append(happened(study, edit, rgb))
        result.likeness.append(float(features[0] @ features[i]))
        difference = 255 * (rgb - source).abs().mean(0)
        if edit.kind == "replace":
            result.untouched.append(difference[:, : difference.shape[1] // 2].mean().item())
        if edit.kind == "background" and mask.any():
            result.untouched.append(difference[mask].mean().item())
        if edit.kind == "recolour":
            now = q.object_mask(rgb, q.ground_of(rgb))
            result.shape.append(((now & mask).sum() / (now | mask).sum().clamp(min=1)).item())
    return [result.happened[edit.kind][-1] for result in found.values()]


def mean_of(values: Sequence[float]) -> tuple[float, float]:
    """The mean, and half the width of its 95 % confidence interval."""
    return statistics.mean(values), 1.96 * statistics.stdev(values) / math.sqrt(len(values))


def share_of(values: Sequence[bool]) -> tuple[float, float, float]:
    """The share of true values, and the bounds of Wilson's 95 % interval."""
    n, p, z = len(values), sum(values) / len(values), 1.96
    middle, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return p, (middle - half) / (1 + z * z / n), (middle + half) / (1 + z * z / n)


def table(found: dict[str, Found], layers: dict[str, list[str]]) -> str:
    lines = ["| shared in | happened | likeness | untouched | shape |", "| --- | --- | --- | --- | --- |"]
    for name, result in found.items():
        p, low, high = share_of([x for values in result.happened.values() for x in values])
        cells = [f"{m:.3g} ± {h:.2g}" for m, h in map(mean_of, (result.likeness, result.untouched, result.shape))]
        each = ", ".join(f"{kind} {sum(values)}/{len(values)}" for kind, values in result.happened.items())
        label = f"{name} ({len(layers[name])} blocks)"
        lines.append(f"| {label} | {p:.0%} ({low:.0%} to {high:.0%}): {each} | {' | '.join(cells)} |")
    return "\n".join(lines)


def differences(found: dict[str, Found]) -> dict[str, list[float]]:
    """Paired differences with half widths, for the paper's claims: vital keeps more than none, edits more than all."""
    vital, none, every = (found[name] for name in ("vital", "none", "all"))

    def difference(first: Sequence[float], second: Sequence[float]) -> list[float]:
        return [round(x, 4) for x in mean_of([float(a) - float(b) for a, b in zip(first, second, strict=True)])]

    kept = {f"{what}_vital_minus_none": difference(getattr(vital, what), getattr(none, what)) for what in KEPT}
    by_vital, by_all = ([x for kind in KINDS for x in result.happened[kind]] for result in (vital, every))
    return {**kept, "happened_vital_minus_all": difference(by_vital, by_all)}


def psnr(a: Tensor, b: Tensor) -> float:
    return -10 * math.log10(((a - b) ** 2).mean().item())


@torch.no_grad()
def photographs(study: q.Study, n: int) -> dict[str, float]:
    """Mean PSNR to `n` photographs, in dB."""
    batch, captions = sample_scenes(n, 98, study.sprites, k=1)
    pipeline, figures = study.pipeline, {}
    for i in tqdm(range(n), "photographs"):
        photo = to_images(render(batch[i : i + 1], study.atlas, 256))[0]
        wanted, request = as_tensor(photo), GenerationRequest(prompt=captions[i][0], seed=0)
        job = Editing(pipeline, request, ["-"], [])
        velocity = pipeline.denoiser.velocity([request.prompt], [1.0], job.size)

        def keep(name: str, tokens: Tensor, wanted=wanted, request=request) -> None:
            figures.setdefault(name, []).append(psnr(as_tensor(pipeline.picture(tokens, request)), wanted))

        keep("round_trip", pipeline.codec.encode(photo, *job.size))
        for name, nudge in (("plain", 1.0), ("nudged", NUDGE)):
            path = job.inverted(photo, nudge)
            keep(f"held_{name}", path[0])
            keep(f"replayed_{name}", euler(velocity, path[-1], job.sigmas))
            keep(f"replayed_{name}_undone", euler(velocity, path[-1], job.sigmas) / nudge)
    return {name: round(statistics.mean(values), 2) for name, values in figures.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path, help="folder with fluent/package and emoji/package")
    parser.add_argument("--layers", default="vital", help="the vital blocks, as in the editor's --layers")
    parser.add_argument("--each", type=int, default=15, help="edits of each kind")
    parser.add_argument("--photos", type=int, default=12)
    parser.add_argument("--scorer", default=SCORER)
    parser.add_argument("--sheet", type=Path, help="folder for a sheet of the edits")
    args = parser.parse_args()

    sprites = load_sprites(args.root)
    base = [i for i, tone in enumerate(sprites.tone) if not tone]
    pipeline = load_pipeline("flux-mini")
    study = q.Study(sprites, make_atlas(all_rgba(sprites)), None, pipeline, base, {})
    params = pipeline.variant.params
    names, vital = block_names(params), layers_of(args.layers, "flux-mini", params)
    layers = dict(zip(CHOICES, (names, vital, [name for name in names if name not in vital], []), strict=True))
    scorer = load_scorer(args.scorer, pipeline.device)

    found = {name: Found() for name in CHOICES}
    shown: list[tuple[Image.Image, str]] = []
    for seed, edit in enumerate(tqdm(make_edits(study, args.each, random.Random(0)), "edits")):
        pictures = draw(pipeline, edit, seed, layers)
        right = judge(study, edit, pictures, found, scorer)
        heads = [
            edit.source,
            *(f"{'' if ok else 'not: '}{name}: {edit.edit}" for name, ok in zip(CHOICES, right, strict=True)),
        ]
        shown += zip(pictures, heads, strict=True)
    if args.sheet:
        args.sheet.mkdir(parents=True, exist_ok=True)
        sheet([image for image, _ in shown], [head for _, head in shown], 10).save(args.sheet / "edits.png")
    print(table(found, layers))
    figures = {"vital": vital, "edits": 4 * args.each, **differences(found)}
    photos = photographs(study, args.photos) if args.photos else {}
    print(json.dumps({"benchmark": "editing", **figures, "scorer": scorer.name, "photographs": photos}))


if __name__ == "__main__":
    main()
