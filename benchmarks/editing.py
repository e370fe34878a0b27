"""Does Stable Flow edit flux-mini's pictures, and what does it keep? By the blocks that share keys and values.

    python benchmarks/editing.py ROOT [--layers vital.json] [--each 15] [--photos 12] [--sheet FOLDER]

ROOT holds the recipe's raw data (`weights/README.md` says how to get it). Edits of four kinds, `--each` of every kind:
*recolour* (a thing gets a colour), *replace* (the right one of two things becomes another), *add* (a thing gets a
neighbour), *background* (the ground gets a colour). Source and edits start from one noise; an edit is drawn with keys
and values shared in all blocks, in the vital ones (`--layers`), in all others, in none. Printed as a table and one line
of JSON, means with 95 % confidence intervals (Wilson's for shares, normal for the others):

- *happened*: the edit is there: as `benchmarks/quality.py` judges colours, names and pairs; for the background, the
  ground is nearest to the asked colour of the palette's.
- *likeness*: similarity of edit and source by the scorer.
- *untouched*: mean difference to the source, in levels of 255, where the edit says nothing: the left half (replace) or
  the thing itself (background).
- *shape*: of what recolouring should leave: intersection over union of the thing's outlines.

Then photographs (rendered scenes with their captions): the PSNR to the photograph of the autoencoder's own round trip,
of inversion followed by sampling, and of the row that editing holds on the path, with and without the nudge.
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
    """What is asked, and the things it is judged by: sprites' places in the list of base pictures, a colour."""

    kind: str
    source: str
    edit: str
    things: tuple[int, ...]
    colour: int = -1


@dataclass
class Found:
    """The measurements of one choice of blocks."""

    happened: dict[str, list[bool]] = field(default_factory=lambda: {kind: [] for kind in KINDS})
    likeness: list[float] = field(default_factory=list)
    untouched: list[float] = field(default_factory=list)
    shape: list[float] = field(default_factory=list)


def make_edits(study: q.Study, each: int, rng: random.Random) -> list[Edit]:
    """`each` of every kind, of things with a plain name that has not come yet."""
    plain = set(plain_names(study.sprites))
    places = [i for i, sprite in enumerate(study.base) if sprite in plain]
    rng.shuffle(places)

    def name(i: int) -> str:
        return study.name(study.base[i])

    def coloured(i: int, colour: int) -> str:
        word, thing = COLOURS[colour].names[0], study.sprites.names[study.base[i]]
        return f"{q.with_article(word, word).split()[0]} {word} {thing}"

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
    """The source, and the edit with each choice of blocks, as rows of one batch."""
    request = GenerationRequest(prompt=edit.source, seed=seed)
    branches = ("source", *layers)
    plan = [
        ShareKV(blocks=tuple(blocks), targets=(name,), follow=i > 0)  # they write the same value, each its own row
        for i, (name, blocks) in enumerate(layers.items())
        if blocks
    ]
    noise = pack(get_noise(1, request.height, request.width, pipeline.device, pipeline.dtype, seed))
    sigmas = get_schedule(request.num_steps, noise.shape[1])
    run = HookRun(plan, pipeline.variant.params, sigmas, branches)
    prompts = [edit.source] + [edit.edit] * len(layers)
    velocity = pipeline.velocity(prompts, [request.guidance] * len(prompts), request.padded_size, run)
    rows = euler(velocity, noise.expand(len(prompts), -1, -1), sigmas)
    return [pipeline.picture(row[None], request) for row in rows]


def as_tensor(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255


def happened(study: q.Study, edit: Edit, rgb: Tensor) -> bool:
    ground = q.ground_of(rgb)
    if edit.kind == "background":
        palette = torch.tensor([one.rgb for one in COLOURS])
        return int((palette - ground).norm(dim=1).argmin()) == edit.colour
    if edit.kind == "recolour":
        mask, sprite = q.object_mask(rgb, ground), study.base[edit.things[0]]
        references = torch.stack([q.mean_colour(study.atlas, sprite, c) for c in range(len(COLOURS))])
        mean = rgb[:, mask].mean(1) if mask.any() else torch.zeros(3)
        return int((references - mean).norm(dim=1).argmin()) == edit.colour
    tiles = q.sprite_tiles(study.atlas, study.base, ground)
    halves = q.halves_of(rgb, ground, across=True)
    return all(q.shows(half, ground, thing, tiles) for half, thing in zip(halves, edit.things, strict=True))


def judge(study: q.Study, edit: Edit, pictures: Sequence[Image.Image], found: dict[str, Found], scorer) -> list[bool]:
    """Measure one edit, by every choice of blocks. Returns whether it happened."""
    source, *edits = (as_tensor(picture) for picture in pictures)
    features = scorer.features(pictures)
    mask = q.object_mask(source, q.ground_of(source))
    for i, (one, rgb) in enumerate(zip(found.values(), edits, strict=True), 1):
        one.happened[edit.kind].append(happened(study, edit, rgb))
        one.likeness.append(float(features[0] @ features[i]))
        difference = 255 * (rgb - source).abs().mean(0)
        if edit.kind == "replace":
            one.untouched.append(difference[:, : difference.shape[1] // 2].mean().item())
        if edit.kind == "background" and mask.any():
            one.untouched.append(difference[mask].mean().item())
        if edit.kind == "recolour":
            now = q.object_mask(rgb, q.ground_of(rgb))
            one.shape.append(((now & mask).sum() / (now | mask).sum().clamp(min=1)).item())
    return [one.happened[edit.kind][-1] for one in found.values()]


def mean_of(values: Sequence[float]) -> tuple[float, float]:
    """Mean and half the width of its 95 % confidence interval."""
    return statistics.mean(values), 1.96 * statistics.stdev(values) / math.sqrt(len(values))


def share_of(values: Sequence[bool]) -> tuple[float, float, float]:
    """A share, and Wilson's 95 % interval of it."""
    n, p, z = len(values), sum(values) / len(values), 1.96
    middle, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return p, (middle - half) / (1 + z * z / n), (middle + half) / (1 + z * z / n)


def table(found: dict[str, Found], layers: dict[str, list[str]]) -> str:
    lines = ["| shared in | happened | likeness | untouched | shape |", "| --- | --- | --- | --- | --- |"]
    for name, one in found.items():
        p, low, high = share_of([x for values in one.happened.values() for x in values])
        cells = [f"{m:.3g} ± {h:.2g}" for m, h in map(mean_of, (one.likeness, one.untouched, one.shape))]
        each = ", ".join(f"{kind} {sum(values)}/{len(values)}" for kind, values in one.happened.items())
        label = f"{name} ({len(layers[name])} blocks)"
        lines.append(f"| {label} | {p:.0%} ({low:.0%} to {high:.0%}): {each} | {' | '.join(cells)} |")
    return "\n".join(lines)


def differences(found: dict[str, Found]) -> dict[str, list[float]]:
    """What the paper's table says: vital keeps more than none, and edits more than all. Paired, with half widths."""
    vital, none, every = (found[name] for name in ("vital", "none", "all"))

    def difference(ones: Sequence[float], others: Sequence[float]) -> list[float]:
        return [round(x, 4) for x in mean_of([float(a) - float(b) for a, b in zip(ones, others, strict=True)])]

    kept = {f"{what}_vital_minus_none": difference(getattr(vital, what), getattr(none, what)) for what in KEPT}
    edited, asked = ([x for kind in KINDS for x in one.happened[kind]] for one in (vital, every))
    return {**kept, "happened_vital_minus_all": difference(edited, asked)}


def psnr(one: Tensor, other: Tensor) -> float:
    return -10 * math.log10(((one - other) ** 2).mean().item())


@torch.no_grad()
def photographs(study: q.Study, n: int) -> dict[str, float]:
    """Mean PSNR to photographs, in dB."""
    batch, captions = sample_scenes(n, 98, study.sprites, k=1)
    pipeline, figures = study.pipeline, {}
    for i in tqdm(range(n), "photographs"):
        photo = to_images(render(batch[i : i + 1], study.atlas, 256))[0]
        wanted, request = as_tensor(photo), GenerationRequest(prompt=captions[i][0], seed=0)
        job = Editing(pipeline, request, ["-"], [])
        velocity = pipeline.velocity([request.prompt], [1.0], job.size)

        def keep(name: str, tokens: Tensor, wanted=wanted, request=request) -> None:
            figures.setdefault(name, []).append(psnr(as_tensor(pipeline.picture(tokens, request)), wanted))

        keep("round_trip", pipeline.tokens_of(photo, *job.size))
        for name, nudge in (("plain", 1.0), ("nudged", NUDGE)):
            path = job.inverted(photo, nudge)
            keep(f"held_{name}", path[0])
            keep(f"replayed_{name}", euler(velocity, path[-1], job.sigmas))
            keep(f"replayed_{name}_undone", euler(velocity, path[-1], job.sigmas) / nudge)
    return {name: round(statistics.mean(values), 2) for name, values in figures.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path, help="folder with fluent/package and emoji/package")
    parser.add_argument("--layers", default="vital", help="the vital blocks, as --layers of the editor takes them")
    parser.add_argument("--each", type=int, default=15, help="edits of each kind")
    parser.add_argument("--photos", type=int, default=12)
    parser.add_argument("--scorer", default=SCORER)
    parser.add_argument("--sheet", type=Path, help="folder for a sheet of the edits, to look at")
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
