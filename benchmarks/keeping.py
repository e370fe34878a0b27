"""What ways of training keep and what they cost: one character, learned from six pictures, by each of them.

    python benchmarks/keeping.py [--only plain,class,…] [--steps 600] [--device cuda] [--sheet FOLDER]
    python benchmarks/keeping.py --adapter weights/zib            # one that is there
    python benchmarks/keeping.py --formats [--steps 600] [--device cuda]

Zib (`weights/zib`) is trained into flux-mini by every way of `WAYS`, the same steps, pictures and seed. Then 24
pictures are drawn of what Zib was never seen in ("a zib to the left of a car", "three zibs"), and 12 without it. What
is in them is told by the captioner of sprites (`captioning/sprites.py`), which knows Zib from two of its pictures.
Prints a line of JSON for each way:

learned   pictures with Zib in which everything that was asked for is found, in place and number
kept      pictures without it in which the same is found as in the base's at that seed
near      the same of those whose words are near to Zib's: aliens, robots, owls
levels    mean difference of these to the base's, of 255
contrast  how far pictures at guidance 6 are from those at 1, over the base's: 1 where guidance does what it did
cost      time of a step over plain training's, in this process
numbers   that learn, in thousands

`--formats`: trained on bf16, fp8, int8 and NF4 by LoRA+, each drawn on all four by flux-mini-fast in 4 steps, alone and
with the Noto style beside it: learned, kept, and the levels between its pictures and those of the bf16 adapter on bf16.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from flux_core import GenerationRequest, load_pipeline
from flux_core.captioning.sprites import Nearest, Sprite, crop, ground_of, load_sprites, tight
from flux_core.methods.charts import contact_sheet
from flux_core.pipeline import Pipeline
from flux_core.training.run import Run
from flux_core.training.settings import Settings

ROOT = Path(__file__).resolve().parent.parent
ZIB, NOTO = ROOT / "weights" / "zib" / "pictures", ROOT / "weights" / "noto"
LEARNED = (
    "a zib on a green background", "a zib on a purple background", "a zib to the left of a red apple",
    "a zib to the right of a car", "a zib above a guitar", "a dog above a zib", "two zibs", "three zibs",
    "a cat to the left of a zib", "a zib to the left of a house", "a zib on a red background", "a zib above a pizza",
)  # fmt: skip
NEAR = ("an alien", "an alien monster", "a robot", "an owl", "a penguin", "a frog on a yellow background")
FAR = (
    "a red apple", "a guitar", "a house on a light blue background", "two dogs", "a cat to the left of a car",
    "three strawberries",
)  # fmt: skip
PLAIN: Mapping[str, Any] = {
    "data": str(ZIB), "trigger": "zib", "name": "flux-mini", "resolution": "256x256", "rank": 2, "targets": "blocks",
    "lr": 2e-3, "batch": 4, "warmup": 20, "schedule": "cosine", "timesteps": "flux_shift", "guidance": 1.0, "seed": 1,
    "held_out": 0, "flip": True,
}  # fmt: skip
WAYS: Mapping[str, Mapping[str, Any]] = {
    "plain": {},
    "class": {"preserve": "differential", "class_word": "alien"},
    "blank": {"preserve": "blank"},
    "regularization": {"regularization": "pictures of the base"},
    "masks": {"masks": "masks"},
    "masks and the rest": {"masks": "masks", "mask_prior": 0.5},
    "guidance 3.5": {"guidance": 3.5},
    "contrast": {"guidance": 3.5, "contrast": 3.5},
    "huber": {"loss": "huber"},
    "T-LoRA": {"rank_min": 1},
    "LoKr": {"lokr": 16},
    "LoRA+": {"lora_plus": 8.0},
    "DoRA": {"dora": True},
    "attention alone": {"targets": "attention", "rank": 4},
    "prodigy": {"optimizer": "prodigy", "lr": 1.0},
    "schedule-free": {"optimizer": "adamw_schedulefree", "schedule": "constant"},
}
FORMATS = ("bfloat16", "fp8", "int8", "nf4")
SEEDS = 2
"""of each prompt with Zib"""


def drawn(
    pipeline: Pipeline, prompts: tuple[str, ...], steps: int, guidance: float | None = None, seeds: int = 1
) -> list[Image.Image]:
    """A picture of each prompt at each of its seeds."""
    found = []
    for seed in range(seeds):
        for i, prompt in enumerate(prompts):
            request = GenerationRequest(
                name=pipeline.variant.name, prompt=prompt, seed=100 * seed + i, num_steps=steps, guidance=guidance
            )
            found.append(pipeline.draw(pipeline.complete(request)).convert("RGB"))
    return found


def captioner(device: torch.device) -> Nearest:
    """That of sprites, which knows Zib, too."""
    found = load_sprites(device)
    features = []
    for path in sorted(ZIB.glob("*.png"))[:2]:
        pixels = np.asarray(Image.open(path).convert("RGB"))
        ground = ground_of(pixels)
        mask = (np.abs(pixels.astype(np.int16) - ground) > 41).any(-1)
        box = tight(mask, (0, 0, mask.shape[1], mask.shape[0]))
        assert box is not None
        features.append(found.scorer.features([crop(pixels, ground, box)])[0])
    zib = F.normalize(torch.stack(features), dim=-1).to(found.features)
    return Nearest(
        found.scorer, torch.cat((found.features, zib)), [*found.sprites, *[Sprite("zib", "a zib", "zibs")] * 2]
    )


def is_right(said: str, prompt: str) -> bool:
    """Whether a caption has Zib as often and where it was asked for. Other things may have any name: Zib is judged."""
    wanted = prompt.partition(" on a ")[0]
    if " to the right of " in wanted:
        wanted = " to the left of ".join(reversed(wanted.split(" to the right of ")))
    for relation in (" to the left of ", " above "):
        if relation in wanted:
            found, asked = ([part == "a zib" for part in text.split(relation)] for text in (said, wanted))
            return found == asked
    return said == wanted


def levels(some: list[Image.Image], others: list[Image.Image]) -> float:
    """The mean difference, of 255."""
    pairs = zip(some, others, strict=True)
    return float(np.mean([np.abs(np.asarray(a, np.float32) - np.asarray(b, np.float32)).mean() for a, b in pairs]))


class Base:
    """What the base draws."""

    def __init__(self, pipeline: Pipeline, tell: Nearest, steps: int) -> None:
        self.tell, self.steps = tell, steps
        self.kept = drawn(pipeline, (*NEAR, *FAR), steps)
        self.said = tell(self.kept)
        few = FAR[:4]
        self.spread = levels(drawn(pipeline, few, steps, 6.0), drawn(pipeline, few, steps, 1.0))

    def figures(self, pipeline: Pipeline) -> tuple[dict[str, float], list[Image.Image]]:
        """How a pipeline with an adapter draws, and its pictures."""
        new, old = drawn(pipeline, LEARNED, self.steps, seeds=SEEDS), drawn(pipeline, (*NEAR, *FAR), self.steps)
        right = [is_right(said, prompt) for said, prompt in zip(self.tell(new), LEARNED * SEEDS, strict=True)]
        same = np.array([a == b for a, b in zip(self.tell(old), self.said, strict=True)])
        few = FAR[:4]
        spread = levels(drawn(pipeline, few, self.steps, 6.0), drawn(pipeline, few, self.steps, 1.0))
        found = {
            "learned": np.mean(right), "kept": same.mean(), "near": same[: len(NEAR)].mean(),
            "levels": levels(old, self.kept), "contrast": spread / self.spread,
        }  # fmt: skip
        return {name: round(float(x), 3) for name, x in found.items()}, [*new[:8], *old[:6]]


def masks_of(folder: Path) -> Path:
    """White where a picture is not its ground."""
    folder.mkdir(exist_ok=True)
    for path in ZIB.glob("*.png"):
        pixels = np.asarray(Image.open(path).convert("RGB")).astype(np.int16)
        inside = (np.abs(pixels - ground_of(pixels)) > 8).any(-1)
        Image.fromarray(inside.astype(np.uint8) * 255).save(folder / path.name)
    return folder


def regularization_of(pipeline: Pipeline, folder: Path, steps: int) -> Path:
    """What the base draws for words near to Zib's, with those words."""
    folder.mkdir(exist_ok=True)
    for i, prompt in enumerate(NEAR * 2):
        request = GenerationRequest(name=pipeline.variant.name, prompt=prompt, seed=1000 + i, num_steps=steps)
        pipeline.draw(pipeline.complete(request)).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(prompt, encoding="utf-8")
    return folder


def trained(way: Mapping[str, Any], folder: Path, args: argparse.Namespace) -> tuple[Run, float]:
    """A run behind its last step, its adapter still beside the model, and seconds of a step."""
    settings = Settings({**PLAIN, "steps": args.steps, "save_every": args.steps, "device": args.device,
                         "output_dir": str(folder), **way})  # fmt: skip
    run = Run(settings)
    run.find()
    run.load()
    run.encode_captions()
    run.encode_pictures()
    began = time.perf_counter()
    run.learn()
    return run, (time.perf_counter() - began) / args.steps


def compare(args: argparse.Namespace) -> None:
    """A line for each way."""
    device = torch.device(args.device)
    pipeline = load_pipeline("flux-mini", device)
    base = Base(pipeline, captioner(device), args.draw_steps)
    wanted = [name for name in WAYS if not args.only or name in args.only.split(",")]
    plain = 0.0
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        places = {"masks": masks_of(work / "masks"), "regularization": work / "base"}
        if "regularization" in wanted:
            regularization_of(pipeline, places["regularization"], args.draw_steps)
        for name in wanted:
            way = {key: str(places.get(key, value)) if key in places else value for key, value in WAYS[name].items()}
            run, seconds = trained(way, work / name, args)
            plain = plain or seconds
            with run.adapter.averaged(), run.samples.drawing():
                found, pictures = base.figures(run.pipeline)
            numbers = round(sum(x.numel() for x in run.adapter.parameters()) / 1000)
            cost = {"cost": round(seconds / plain, 2), "seconds": round(seconds, 4), "numbers": numbers}
            print(json.dumps({"way": name, **found, **cost}), flush=True)
            if args.sheet:
                args.sheet.mkdir(parents=True, exist_ok=True)
                sheet = contact_sheet([(name, pictures)], [*LEARNED[:8], *NEAR])
                sheet.save(args.sheet / f"{name}.png")
                run.adapter.save(args.sheet / name)


def judge(args: argparse.Namespace) -> None:
    """A line for an adapter that is there."""
    device = torch.device(args.device)
    pipeline = load_pipeline("flux-mini", device)
    base = Base(pipeline, captioner(device), args.draw_steps)
    pipeline.loras.load(args.adapter, 1.0, False, False)
    found, _ = base.figures(pipeline)
    print(json.dumps({"adapter": args.adapter, **found}))


def formats(args: argparse.Namespace) -> None:
    """A line for each pair of formats, alone and with another adapter."""
    device = torch.device(args.device)
    tell, first, prompts = captioner(device), dict[bool, list[Image.Image]](), (*NEAR, *FAR)
    with tempfile.TemporaryDirectory() as scratch:
        for learned in FORMATS:
            run, _ = trained({"dtype": learned, **WAYS["LoRA+"]}, Path(scratch) / learned, args)
            run.adapter.save(Path(scratch) / learned)
            del run
        for on in FORMATS:
            pipeline = load_pipeline("flux-mini-fast", device, on)
            base = tell(drawn(pipeline, prompts, 4))
            for learned in FORMATS:
                mine = pipeline.loras.load(Path(scratch) / learned, 1.0, False, False)
                for style in (False, True):
                    handles = [mine, *([pipeline.loras.load(NOTO, 1.0, False, False)] if style else [])]
                    new, old = drawn(pipeline, LEARNED, 4), drawn(pipeline, prompts, 4)
                    for handle in handles[1:]:
                        handle.remove()
                    right = [is_right(*pair) for pair in zip(tell(new), LEARNED, strict=True)]
                    same = [a == b for a, b in zip(tell(old), base, strict=True)]
                    far = levels([*new, *old], first.setdefault(style, [*new, *old]))
                    told = {"trained": learned, "drawn": on, "noto": style, "learned": np.mean(right).round(3)}
                    print(json.dumps({**told, "kept": np.mean(same).round(3), "from bf16": round(far, 2)}), flush=True)
                mine.remove()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="ways, with commas; plain first")
    parser.add_argument("--adapter", help="a file or folder of a LoRA")
    parser.add_argument("--formats", action="store_true")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--draw-steps", type=int, default=28)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--sheet", type=Path, help="a folder for pictures and adapters")
    args = parser.parse_args()
    (formats if args.formats else judge if args.adapter else compare)(args)


if __name__ == "__main__":
    main()
