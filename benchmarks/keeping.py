"""What ways of training keep and what they cost: one character, learned from six pictures, by each of them.

    python benchmarks/keeping.py [--only plain,class,…] [--steps 600] [--device cuda] [--folder FOLDER] [--sheet FOLDER]
    python benchmarks/keeping.py --adapter weights/zib            # one that is there
    python benchmarks/keeping.py --formats [--steps 600] [--device cuda] [--folder FOLDER]

Zib (`weights/zib`) is trained into flux-mini by every way of `WAYS`, the same steps, pictures and seed. Then 24
pictures are drawn of what Zib was never seen in ("a zib to the left of a car", "three zibs"), and 12 without it. What
is in them is told by the captioner of sprites (`captioning/sprites.py`), which knows Zib from two of its pictures.
Prints a table in Markdown, with a row for each way:

learned   pictures with Zib in which everything that was asked for is found, in place and number
kept      pictures without it in which the same is found as in the base's at that seed
near      the same of those whose words are near to Zib's: aliens, robots, owls
levels    mean difference of these to the base's, of 255
contrast  how far pictures at guidance 6 are from those at 1, over the base's: 1 where guidance does what it did
time      of a step over plain training's
numbers   that learn, in thousands

`--formats`: trained on bf16, fp8, int8 and NF4 by LoRA+, each drawn on all four by flux-mini-fast in 4 steps, alone and
with the Noto style beside it: learned, kept, and the levels between its pictures and those of the bf16 adapter on bf16.

Progress goes to stderr, and each result into FOLDER/journal.jsonl: the same command goes on behind what is there, and
tries again what failed. `--tiny` does all with one step and a picture or two, to see that it runs.
"""

import argparse
import json
import shutil
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache, partial
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
    "kept regularization": {"regularization": "pictures of the base", "preserve": "regularization"},
    "masks": {"masks": "masks"},
    "masks and the rest": {"masks": "masks", "mask_prior": 0.5},
    "guidance 3.5": {"guidance": 3.5},
    "contrast": {"guidance": 3.5, "contrast": 3.5},
    "huber": {"loss": "huber"},
    "T-LoRA": {"rank_min": 1},
    "LoKr": {"lokr": 16},
    "LoRA+": {"lora_plus": 8.0},
    "attention alone": {"targets": "attention", "rank": 4},
    "DoRA on attention": {"targets": "attention", "rank": 4, "dora": True},
    "ranks by layer": {"ranks": "single_transformer_blocks.*=1,transformer_blocks.*=3"},
    "rates by layer": {"rates": "proj_mlp=5e-4,norm.linear=2e-4"},
    "prodigy": {"optimizer": "prodigy", "lr": 1.0},
    "schedule-free": {"optimizer": "adamw_schedulefree", "schedule": "constant"},
    "CLIP": {"train_text": "clip", "text_lr": 5e-4},
    "CLIP and T5": {"train_text": "clip,t5", "text_lr": 5e-4},
    "a word": {"token": "zib", "token_init": "alien", "token_lr": 5e-3},
    "a word alone": {"token": "zib", "token_init": "alien", "token_lr": 5e-3, "targets": "none"},
}
MEASURES = ("learned", "kept", "near", "levels", "contrast")
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


def levels(some: list[Any], others: list[Any]) -> float:
    """The mean difference, of 255."""
    pairs = zip(some, others, strict=True)
    return float(np.mean([np.abs(np.asarray(a, np.float32) - np.asarray(b, np.float32)).mean() for a, b in pairs]))


class Base:
    """What the base draws."""

    def __init__(self, pipeline: Pipeline, device: torch.device, args: argparse.Namespace) -> None:
        self.pipeline, self.tell, self.steps, self.few = pipeline, captioner(device), args.draw_steps, args.few
        self.learned, self.others, self.spread_of = LEARNED[: self.few], others(self.few), FAR[:4][: self.few]
        self.kept = drawn(pipeline, self.others, self.steps)
        self.said = self.tell(self.kept)
        self.spread = self._spread()

    def _spread(self) -> float:
        return levels(*(drawn(self.pipeline, self.spread_of, self.steps, guidance) for guidance in (6.0, 1.0)))

    def adapted(self, adapter: Path, sheet: Path | None) -> dict[str, float]:
        """How it draws with an adapter. sheet: where some of the pictures go."""
        handle = self.pipeline.loras.load(adapter, 1.0, False, False)
        try:
            new = drawn(self.pipeline, self.learned, self.steps, seeds=SEEDS)
            old, spread = drawn(self.pipeline, self.others, self.steps), self._spread()
        finally:
            handle.remove()
        if sheet:
            heads = [*self.learned[:8], *self.others[: len(NEAR)]]
            pictures = [*new[: len(self.learned)][:8], *old[: len(NEAR)]]
            sheet.mkdir(parents=True, exist_ok=True)
            contact_sheet([(adapter.name, pictures)], heads).save(sheet / f"{adapter.name}.png")
        right = [is_right(*pair) for pair in zip(self.tell(new), self.learned * SEEDS, strict=True)]
        same = [a == b for a, b in zip(self.tell(old), self.said, strict=True)]
        near = same[: len(NEAR[: self.few])]
        found = np.mean(right), np.mean(same), np.mean(near), levels(old, self.kept), spread / self.spread
        return dict(zip(MEASURES, (round(float(x), 3) for x in found), strict=True))


def others(few: int) -> tuple[str, ...]:
    """Prompts without Zib, the first so many of both kinds."""
    return (*NEAR[:few], *FAR[:few])


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


class Journal:
    """What was measured, a line of JSON each, so that a failure or a kill loses nothing but its own."""

    def __init__(self, folder: Path, args: argparse.Namespace) -> None:
        self.path, self.failed = folder / "journal.jsonl", list[str]()
        self.about = {name: getattr(args, name) for name in ("steps", "draw_steps", "device", "few")}
        folder.mkdir(parents=True, exist_ok=True)
        lines = self.path.read_text(encoding="utf-8").splitlines() if self.path.is_file() else []
        rows = [json.loads(line) for line in lines if line.endswith("}")]
        self.done: dict[str, dict[str, Any]] = {row["what"]: row["found"] for row in rows if row["about"] == self.about}

    def measure(self, what: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any] | None:
        """What is there, else what `make` returns; nothing where it fails, which is told, and tried by the next run."""
        if what not in self.done:
            began = time.perf_counter()
            try:
                found = make()
            except Exception:  # whatever it is, hours of other results go on
                self.failed.append(what)
                print(f"{what}: FAILED\n{traceback.format_exc()}", file=sys.stderr, flush=True)
                return None
            with self.path.open("a", encoding="utf-8") as file:
                file.write("\n" + json.dumps({"what": what, "about": self.about, "found": found}))  # one may be cut off
            self.done[what] = found
            told = json.dumps({"what": what, **found, "took": round(time.perf_counter() - began, 1)})
            print(told, file=sys.stderr, flush=True)
        return self.done[what]

    def end(self) -> int:
        """The exit code."""
        if self.failed:
            print(f"failed: {', '.join(self.failed)}; the same command tries again", file=sys.stderr)
        return int(bool(self.failed))


def table(heads: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Print it in Markdown; what is not there is empty."""
    print(f"| {' | '.join(heads)} |\n{'| --- ' * len(heads)}|")
    for row in rows:
        print(f"| {' | '.join('' if x is None else str(x) for x in row)} |", flush=True)


def trained(way: Mapping[str, Any], folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Train by a way, into a folder. Returns seconds of a step, and thousands of numbers that learn."""
    shutil.rmtree(folder, ignore_errors=True)  # half a run would have half the time
    settings = Settings({**PLAIN, "steps": args.steps, "save_every": args.steps, "device": args.device,
                         "output_dir": str(folder), **way})  # fmt: skip
    run = Run(settings)
    for stage in (run.find, run.load, run.encode_captions, run.encode_pictures):
        stage()
    began = time.perf_counter()
    run.learn()
    seconds = (time.perf_counter() - began) / args.steps
    with run.adapter.averaged():
        run.adapter.save(folder)
    numbers = round(sum(x.numel() for x in run.adapter.parameters()) / 1000)
    return {"seconds": round(seconds, 4), "numbers": numbers}


def compare(args: argparse.Namespace) -> int:
    """A row for each way."""
    wanted = [name for name in WAYS if not args.only or name in args.only.split(",")]
    journal, device = Journal(args.folder, args), torch.device(args.device)
    pipeline = load_pipeline("flux-mini", device)
    base = Base(pipeline, device, args)
    places = {"masks": args.folder / "masks", "regularization": args.folder / "base"}
    masks_of(places["masks"])
    if any("regularization" in WAYS[name] for name in wanted):
        regularization_of(pipeline, places["regularization"], args.draw_steps)
    for name in wanted:
        way = {key: str(places.get(key, value)) if key in places else value for key, value in WAYS[name].items()}
        folder = args.folder / name
        if journal.measure(f"train {name}", partial(trained, way, folder, args)):
            journal.measure(f"draw {name}", partial(base.adapted, folder, args.sheet))
    rows, plain = [], journal.done.get("train plain", {}).get("seconds")
    for name in wanted:
        cost, found = journal.done.get(f"train {name}", {}), journal.done.get(f"draw {name}", {})
        times = round(cost["seconds"] / plain, 2) if cost and plain else None
        rows.append([name, *map(found.get, MEASURES), times, cost.get("numbers")])
    table(["", *MEASURES, "time", "numbers, k"], rows)
    return journal.end()


def judge(args: argparse.Namespace) -> int:
    """A row for an adapter that is there."""
    device = torch.device(args.device)
    found = Base(load_pipeline("flux-mini", device), device, args).adapted(Path(args.adapter), args.sheet)
    table(["", *MEASURES], [[args.adapter, *found.values()]])
    return 0


def formats(args: argparse.Namespace) -> int:
    """A table of pairs of formats, alone and with another adapter."""
    journal, device, told = Journal(args.folder, args), torch.device(args.device), captioner(torch.device(args.device))

    @lru_cache(1)
    def base(on: str) -> tuple[Pipeline, list[str]]:
        pipeline = load_pipeline("flux-mini-fast", device, on)
        return pipeline, told(drawn(pipeline, others(args.few), 4))

    def pair(learned: str, on: str, beside: str) -> dict[str, float]:
        (pipeline, said), wanted = base(on), LEARNED[: args.few]
        adapters = [args.folder / learned, *([NOTO] if beside else [])]
        handles = [pipeline.loras.load(path, 1.0, False, False) for path in adapters]
        try:
            new, old = drawn(pipeline, wanted, 4), drawn(pipeline, others(args.few), 4)
        finally:
            for handle in reversed(handles):
                handle.remove()
        first = args.folder / f"bfloat16{beside}.npy"
        if learned == on == FORMATS[0]:
            np.save(first, np.stack([np.asarray(one) for one in (*new, *old)]))
        right = [is_right(*one) for one in zip(told(new), wanted, strict=True)]
        same = [a == b for a, b in zip(told(old), said, strict=True)]
        found = {"learned": np.mean(right), "kept": np.mean(same)}
        if first.is_file():  # that pair may have failed
            found["from bf16"] = levels([*new, *old], list(np.load(first)))
        return {name: round(float(x), 2) for name, x in found.items()}

    for learned in FORMATS:
        way = {"dtype": learned, **WAYS["LoRA+"]}
        journal.measure(f"train on {learned}", partial(trained, way, args.folder / learned, args))
    cells = {(learned, on, beside): f"{learned} drawn on {on}{beside}"
             for on in FORMATS for learned in FORMATS for beside in ("", " with noto")}  # fmt: skip
    for cell, name in cells.items():
        if f"train on {cell[0]}" in journal.done:
            journal.measure(name, partial(pair, *cell))
    for beside, title in (("", "alone"), (" with noto", "with noto")):
        print(f"\nlearned, kept, levels from bf16; {title}\n")
        found = {
            cell: ", ".join(f"{x:.2f}" for x in journal.done.get(name, {}).values()) for cell, name in cells.items()
        }
        table(["trained on", *(f"drawn on {on}" for on in FORMATS)],
              [[learned, *(found[learned, on, beside] for on in FORMATS)] for learned in FORMATS])  # fmt: skip
    return journal.end()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="ways, with commas")
    parser.add_argument("--adapter", help="a file or folder of a LoRA")
    parser.add_argument("--formats", action="store_true")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--draw-steps", type=int, default=28)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--folder", type=Path, default=Path("output/keeping"), help="of adapters and of the journal")
    parser.add_argument("--sheet", type=Path, help="a folder for pictures")
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args()
    args.few = 1 if args.tiny else None
    if args.tiny:
        args.steps = args.draw_steps = 1
    return (formats if args.formats else judge if args.adapter else compare)(args)


if __name__ == "__main__":
    sys.exit(main())
