"""Whether a LoRA draws things that it was not trained on in its style: the Noto example of flux-mini.

    python benchmarks/style.py [--lora weights/noto] [--scale 1] [--sheet FILE]

The things are those of `weights/noto/heldout`, with Noto's own picture of each, fixed before anything was trained. Each
is drawn by its caption there ("a noto anchor") at a seed of its own, with the LoRA and by the base.

A style is told by means and deviations of channels in an encoder (Huang and Belongie 2017), here those of flux-mini's
autoencoder after its first convolution and in its four stages, along the direction that tells Noto's pictures of the
things that were trained on from the base's: by ridge regression. Shape says nothing there. dinov2-mini, by whose
features things are told, sees a thing and hardly its style. The measure was chosen on fourteen other things, with
LoRAs of shorter runs in sight; it tells the base's pictures of those (0 of 14 are Noto) from Noto's (13 of 14). Prints
a line of JSON for each thing, and shares:

style    in that direction nearer to Noto's own picture of the thing than to the base's of that seed. Goal: 0.8
kept     by dinov2-mini, of all Noto's pictures, trained and held out, the nearest is that of the thing. Goal: 0.7
base     the same two for the base's picture of another seed
noto     the share of Noto's own pictures on Noto's side of the middle: whether the measure can tell
whole    nearer to Noto's own picture than to the base's by all of dinov2-mini's features
unharmed at scale 0 every pixel is the base's, to the bit (of the first four things)

`--sheet` writes the pictures: the base's above, the LoRA's below, Noto's own third. `--tiny`: two things, two steps.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from flux_core import load_pipeline
from flux_core.methods.charts import contact_sheet
from flux_core.methods.scoring import load_scorer
from flux_core.pipeline import Pipeline
from flux_core.training import Picture, parse_resolution, read_folder

NOTO = Path(__file__).resolve().parent.parent / "weights" / "noto"
SIZE = parse_resolution("256x256")
OTHER, OF_TRAINED = 1000, 2000
"""added to a seed for another picture of the base, and for those of the things that were trained on"""
RIDGE = 30.0
COLUMNS = 12
"""of the sheet"""


def draw(pipeline: Pipeline, things: list[Picture], steps: int, shift: int = 0) -> list[Image.Image]:
    """A picture of each caption, at the seed that is its place in the list."""
    return [pipeline.generate(one.caption, i + shift, num_steps=steps)[0] for i, one in enumerate(things)]


class Style:
    """Where a picture lies between two styles: about -1 for the one, 1 for the other."""

    def __init__(self, pipeline: Pipeline, one: list[Image.Image], other: list[Image.Image]) -> None:
        """one, other: pictures in both."""
        encoder = pipeline.ae.encoder
        self.encoder, self.device, self.seen = encoder, pipeline.device, list[Tensor]()
        for layer in (encoder.conv_in, *(stage.block[-1] for stage in encoder.down)):  # type: ignore[union-attr]
            layer.register_forward_hook(lambda layer, args, y: self.seen.append(y))
        known = torch.cat([self.features(one), self.features(other)])
        self.mean, self.deviation = known.mean(0), known.std(0) + 1e-6
        self.known = (known - self.mean) / self.deviation
        sides = torch.tensor([-1.0] * len(one) + [1.0] * len(other), device=self.device)
        kernel = self.known @ self.known.t() / known.shape[1]
        self.weights = torch.linalg.solve(
            kernel + RIDGE / len(sides) * torch.eye(len(sides), device=self.device), sides
        )

    @torch.no_grad()
    def features(self, pictures: list[Image.Image]) -> Tensor:
        """Mean and deviation of each channel, [N, D]."""
        return torch.stack([self._features(one) for one in pictures])

    def _features(self, picture: Image.Image) -> Tensor:
        self.seen.clear()
        x = torch.from_numpy(np.array(picture.convert("RGB"))).to(self.device).float() / 127.5 - 1
        self.encoder(x.permute(2, 0, 1)[None])
        found = [y[0].flatten(1) for y in self.seen]
        return torch.cat([part for y in found for part in (y.mean(1), y.std(1))])

    def __call__(self, pictures: list[Image.Image]) -> list[float]:
        features = (self.features(pictures) - self.mean) / self.deviation
        return (features @ self.known.t() / features.shape[1] @ self.weights).tolist()


def share(found: list[bool]) -> float:
    return round(sum(found) / len(found), 4)


def sheet_of(names: list[str], *rows: list[Image.Image]) -> Image.Image:
    """The rows of pictures, `COLUMNS` at a time."""
    labels, bands = ("base", "LoRA", "Noto"), []
    for first in range(0, len(names), COLUMNS):
        some = slice(first, first + COLUMNS)
        bands.append(contact_sheet([(label, row[some]) for label, row in zip(labels, rows, strict=True)], names[some]))
    page = Image.new("RGB", (max(one.width for one in bands), sum(one.height for one in bands)), "white")
    for i, one in enumerate(bands):
        page.paste(one, (0, sum(before.height for before in bands[:i])))
    return page


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lora", type=Path, default=NOTO)
    parser.add_argument("--scale", type=float, default=1.0)
    parser.add_argument("--steps", type=int, default=28)
    parser.add_argument("--sheet", type=Path, help="a file for the pictures")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--tiny", action="store_true", help="two things, two steps")
    args = parser.parse_args()
    steps, most = (2, 2) if args.tiny else (args.steps, None)
    things, trained = (read_folder(NOTO / name, SIZE.size_of).pictures[:most] for name in ("heldout", "pictures"))
    names = [one.path.stem for one in things]

    pipeline = load_pipeline("flux-mini", args.device)
    base, other = (draw(pipeline, things, steps, shift) for shift in (0, OTHER))
    of_trained = draw(pipeline, trained, steps, OF_TRAINED)
    with pipeline.load_lora(args.lora, args.scale) as handle:
        drawn = draw(pipeline, things, steps)
        handle.scale = 0.0
        at_zero = draw(pipeline, things[:4], steps)
    own, own_of_trained = ([Image.open(x.path).convert("RGB") for x in some] for some in (things, trained))

    style = Style(pipeline, of_trained, own_of_trained)
    places = {name: style(some) for name, some in (("lora", drawn), ("other", other), ("base", base), ("noto", own))}
    scorer = load_scorer("dinov2-mini", torch.device(args.device))
    features = {name: scorer.features(some) for name, some in (("lora", drawn), ("other", other), ("base", base))}
    of_noto = scorer.features([*own, *own_of_trained])
    found: dict[str, dict[str, list[bool]]] = {
        kind: {"style": [], "kept": [], "whole": []} for kind in ("lora", "other")
    }
    for i, name in enumerate(names):
        line = {"benchmark": "style", "thing": name, **{kind: round(all[i], 3) for kind, all in places.items()}}
        for kind, shares in found.items():
            here, x = places[kind][i], features[kind][i]
            shares["style"].append(abs(here - places["noto"][i]) < abs(here - places["base"][i]))
            shares["kept"].append(int((of_noto @ x).argmax()) == i)
            shares["whole"].append(bool(of_noto[i] @ x > features["base"][i] @ x))
        print(json.dumps(line), flush=True)
    result = {kind: {name: share(some) for name, some in shares.items()} for kind, shares in found.items()}
    unharmed = all(a.tobytes() == b.tobytes() for a, b in zip(at_zero, base, strict=False))
    told = {"things": len(things), "scale": args.scale, "steps": steps, "lora": result["lora"], "base": result["other"]}
    print(
        json.dumps({"benchmark": "style", **told, "noto": share([x > 0 for x in places["noto"]]), "unharmed": unharmed})
    )
    if args.sheet:
        sheet_of(names, base, drawn, own).save(args.sheet)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
