"""Effect of true CFG, CFG-Zero* and dynamic thresholding on flux-mini, and time of true CFG at full size.

    python benchmarks/steering.py [--each 24] [--guidance 3.5] [--sheet steering.png]
    python benchmarks/steering.py --gpu-timing [--compile] [--size 512 1024] [--tiny]

Twelve objects are drawn without a negative prompt, "a fish", and then with every setting from the same seed and the
colour of that picture in the negative prompt, "a blue fish", at 128x128:

gone      share of pictures that show an object, but not in that colour, with Wilson's 95 % interval. An object's
          pixels differ from the ground; its colour is, of the eight chromatic colours of the recipe's palette, the
          colour with the nearest hue to the mean of its pixels weighted by their chroma
turned    mean angle between its hue and that colour's, less that of the plain picture, in degrees
likeness  mean cosine of dinov2-mini's features, which ignore colour, to those of the plain picture
clipped   percentage of the objects' values at 0 or 255

With --gpu-timing: milliseconds of a true-CFG velocity of FLUX.1-dev with random weights in bf16, by two rows of one
batch and by two passes, which take turns (`timing.py`); `ratio` is to two passes, peaks in GiB. Prints lines of JSON.
"""

import argparse
import gc
import json
import statistics
import sys
import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import quality as q  # puts the repository and the recipe on the path
import torch
import torch.nn.functional as F
from editing import as_tensor, share_of
from palette import COLOURS
from parity_diffusers import in_dtype_of, random_flux, random_inputs
from PIL import Image
from random_parts import tiny_variant
from timing import ratio, turns
from torch import Tensor
from tqdm import tqdm

from flux_core import load_pipeline
from flux_core.hub.places import SCORER
from flux_core.images.pictures import grid
from flux_core.kernels import install
from flux_core.methods.scoring import load_scorer
from flux_core.sampling import flow_velocity, get_schedule
from flux_core.sampling.guidance import cfg_velocity, one_batch, two_passes
from flux_core.variants import VARIANTS

OBJECTS = (
    "fish", "heart", "star", "car", "balloon", "bird", "key", "guitar", "cactus", "rocket", "mushroom", "butterfly",
)  # fmt: skip
PAINTS = COLOURS[:8]
"""the chromatic colours"""
SETTINGS: dict[str, dict[str, Any]] = {
    "2": {"true_cfg_scale": 2.0},
    "4": {"true_cfg_scale": 4.0},
    "4, CFG-Zero*": {"true_cfg_scale": 4.0, "cfg_zero": 1},
    "4, CFG-Zero* without zero-init": {"true_cfg_scale": 4.0, "cfg_zero": 0},
    "8": {"true_cfg_scale": 8.0},
    "8, thresholded as at 2": {"true_cfg_scale": 8.0, "mimic_scale": 2.0},
    "8, the same at 95 %": {"true_cfg_scale": 8.0, "mimic_scale": 2.0, "threshold_percentile": 95.0},
    "8, falling (cosine)": {"true_cfg_scale": 8.0, "cfg_schedule": "cosine"},
}


def object_of(image: Image.Image) -> Tensor:
    """The pixels [3, n] that differ from the ground."""
    rgb = as_tensor(image)
    return rgb[:, q.object_mask(rgb, q.ground_of(rgb))]


def angles(image: Image.Image) -> Tensor | None:
    """Angles [8] in degrees between the hue of a picture's object and those of PAINTS; None without an object."""
    pixels = object_of(image)
    if not pixels.numel():
        return None
    chroma = pixels.amax(0) - pixels.amin(0)
    mean = (pixels * chroma).sum(1) / chroma.sum().clamp_min(1e-6)
    hue, paints = (x - x.mean(-1, keepdim=True) for x in (mean, torch.tensor([one.rgb for one in PAINTS])))
    return torch.rad2deg(F.cosine_similarity(paints, hue[None]).clamp(-1, 1).acos())


def draw(pipeline: Any, each: int, **shared: Any) -> tuple[dict[str, list[Image.Image]], list[int]]:
    """The pictures of every setting, in the same order, and the colours in their negative prompts."""
    pictures: dict[str, list[Image.Image]] = {name: [] for name in ("plain", *SETTINGS)}
    colours = []
    for seed in tqdm(range(each)):
        noun = OBJECTS[seed % len(OBJECTS)]
        pictures["plain"] += pipeline.generate(f"a {noun}", seed, **shared)
        found = angles(pictures["plain"][-1])
        colours.append(0 if found is None else int(found.argmin()))
        negative = f"a {PAINTS[colours[-1]].names[0]} {noun}".replace("a o", "an o")
        for name, setting in SETTINGS.items():
            pictures[name] += pipeline.generate(f"a {noun}", seed, negative_prompt=negative, **shared, **setting)
    return pictures, colours


def figures(pictures: Sequence[Image.Image], plain: Sequence[Image.Image], colours: Sequence[int], scorer: Any) -> dict:
    gone, turned = [], []
    for before, after, colour in zip(map(angles, plain), map(angles, pictures), colours, strict=True):
        gone.append(after is not None and int(after.argmin()) != colour)
        turned += [] if after is None or before is None else [(after - before)[colour].item()]
    share, low, high = share_of(gone)
    likeness = (scorer.features(pictures) * scorer.features(plain)).sum(1)
    return {
        "gone": round(share, 3),
        "interval": [round(low, 3), round(high, 3)],
        "turned": round(statistics.mean(turned)),
        "likeness": round(likeness.mean().item(), 3),
        "clipped": round(100 * statistics.mean(map(clipped, pictures)), 1),
    }


def clipped(image: Image.Image) -> float:
    x = object_of(image)
    return ((x == 0) | (x == 1)).float().mean().item() if x.numel() else 0.0


def draw_and_measure(each: int, steps: int, guidance: float, sheet: Path | None) -> None:
    pipeline = load_pipeline("flux-mini")
    scorer = load_scorer(SCORER, pipeline.device)
    pictures, colours = draw(pipeline, each, num_steps=steps, width=128, height=128, guidance=guidance)
    about = {"benchmark": "steering", "n": each, "steps": steps, "guidance": guidance}
    for name, found in pictures.items():
        print(json.dumps({**about, "variant": name, **figures(found, pictures["plain"], colours, scorer)}), flush=True)
    if sheet:
        grid([one for row in zip(*pictures.values(), strict=True) for one in row], len(pictures)).save(sheet)


def time_at_full_size(sizes: Sequence[int], device: str, compiling: bool, rounds: int, tiny: bool) -> None:
    variant = tiny_variant(VARIANTS["flux-dev"]) if tiny else VARIANTS["flux-dev"]
    model = random_flux(variant.params, device)
    install(model, device)
    if compiling:
        for block in (*model.double_blocks, *model.single_blocks):
            block.compile(fullgraph=True)
    for size in sizes:
        inputs = in_dtype_of(model, random_inputs(variant.params, size // 16, variant.max_text, device))
        rest = {"img_ids": inputs["img_ids"], "txt_ids": inputs["txt_ids"]}
        texts = [{"txt": inputs["txt"], "vec": inputs["y"]}, {"txt": -inputs["txt"], "vec": -inputs["y"]}]
        positive, negative = (flow_velocity(model, **rest, **text, guidance=3.5) for text in texts)
        both = {key: torch.cat([rest[key]] * 2) for key in rest}
        both |= {key: torch.cat([text[key] for text in texts]) for key in texts[0]}
        pairs = {
            "one batch": one_batch(flow_velocity(model, **both, guidance=3.5)),
            "two passes": two_passes(positive, negative),
        }
        sigmas = get_schedule(28, inputs["img"].shape[1])
        calls = {
            name: partial(cfg_velocity(pair, sigmas, 3.0), inputs["img"], sigmas[3]) for name, pair in pairs.items()
        }
        calls |= {
            "thresholded": partial(cfg_velocity(pairs["two passes"], sigmas, 3.0, 1, 2.0), inputs["img"], sigmas[3])
        }
        peaks = {name: peak_of(call, device) for name, call in calls.items()}
        times = turns(calls, rounds, 0.05 if tiny else 1.0, device)
        about = {"benchmark": "steering", "name": variant.name, "size": size, "compiled": compiling, "device": device}
        for name, found in times.items():
            figures = {"ms": statistics.median(found), "ratio": ratio(times, name, "two passes")}
            rounded = {key: round(x, 4) for key, x in figures.items()}
            print(json.dumps({**about, "what": name, **rounded, "peak_gib": peaks[name]}), flush=True)


def peak_of(call: Any, device: str) -> float | None:
    """Peak GiB of tensors during a call; None where torch does not count them."""
    gc.collect()
    if not device.startswith("cuda"):
        return None
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return round(torch.cuda.max_memory_allocated() / 2**30, 2)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--each", type=int, default=24, help="pictures of each setting")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--guidance", type=float, default=3.5, help="distilled guidance")
    parser.add_argument("--sheet", type=Path, help="a file for all pictures, a row for each prompt")
    parser.add_argument("--gpu-timing", action="store_true", help="time of one batch and of two passes, at full size")
    parser.add_argument("--size", type=int, nargs="+", default=[512, 1024], help="with --gpu-timing: sides in pixels")
    parser.add_argument("--compile", action="store_true", help="with --gpu-timing: compiled blocks")
    parser.add_argument("--rounds", type=int, default=5, help="with --gpu-timing: measured rounds of a second")
    parser.add_argument("--tiny", action="store_true", help="with --gpu-timing: a few blocks of 64 features, 64x64")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    warnings.filterwarnings("ignore", "true CFG")
    if args.gpu_timing:
        sizes = [64] if args.tiny else args.size
        return time_at_full_size(sizes, args.device, args.compile, args.rounds, args.tiny)
    return draw_and_measure(args.each, args.steps, args.guidance, args.sheet)


if __name__ == "__main__":
    main()
