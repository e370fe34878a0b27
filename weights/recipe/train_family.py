"""Stage 6: LoRAs by which flux-mini sees a picture: edges or depth to follow, one to paint in, or one to change.

    python weights/recipe/train_family.py ROOT WORK weights/flux-mini canny  # or depth, fill, kontext

Writes `WORK/flux-mini-KIND/pytorch_lora_weights.safetensors`. All are trained by the project's own loop
(`flux_core/training`), which makes a `Condition` of what is seen: a map as 64 more channels beside the noisy picture,
with an input that is widened by zeros (FLUX.1 Canny and Depth), what is kept of a picture and the mask as 320 (FLUX.1
Fill), or the picture before as tokens behind it at an index of its own (FLUX.1 Kontext). Scenes, captions, edits, maps
and masks are made and encoded here, on the device. A run that was stopped goes on. What ships was trained for 3,916
steps of 96 (canny, rank 7) and 4,727 of 64 (kontext, rank 9), both on one H200 at once, in 6.6 minutes.
"""

import argparse
import os
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from depths import depth
from edges import canny
from edits import sample_edits
from einops import rearrange
from encode import CLIP_LENGTH, tokenize_all
from heldout import load_heldout
from masks import sample_masks
from render import Atlas, all_rgba, make_atlas, render
from safetensors.torch import load_file
from scenes import Pools, SceneBatch, sample_scenes
from sprites import load_sprites
from torch import Tensor
from trainer import say
from transformers import CLIPTextModel, CLIPTokenizer, T5EncoderModel, T5TokenizerFast

from flux_core.model import AutoEncoder, Flux
from flux_core.training import PRESETS, Example, Progress, Recipe, adapt, train
from flux_core.training.seen import WAYS, widen
from flux_core.variants import VARIANTS

VARIANT, SIZE = VARIANTS["flux-mini"], 256
TAKES = {"canny": "canny", "depth": "depth", "fill": "fill", "kontext": "reference"}
TARGETS = (*PRESETS["blocks"], "norm_out.linear", "proj_out")


class Encoder:
    """The model's autoencoder and text encoders, for batches."""

    def __init__(self, folder: Path, device: str) -> None:
        self.device, self.dtype = device, torch.bfloat16 if device == "cuda" else torch.float32
        self.ae = AutoEncoder(VARIANT.ae_params)
        self.ae.load_state_dict(load_file(folder / VARIANT.ae_file))
        self.ae.to(device, memory_format=torch.channels_last).eval()
        t5, clip = folder / VARIANT.t5, folder / VARIANT.clip
        self.t5 = T5EncoderModel.from_pretrained(t5, dtype=self.dtype).to(device)
        self.clip = CLIPTextModel.from_pretrained(clip, dtype=self.dtype).to(device)
        self.words = T5TokenizerFast.from_pretrained(t5), CLIPTokenizer.from_pretrained(clip)

    @torch.no_grad()
    def latents(self, images: Tensor) -> Tensor:
        """[B, 16, h, w] in bf16, of pixels [B, 3, H, W] from -1 to 1."""
        return torch.cat([self.ae.encode(some.to(self.device)).bfloat16() for some in images.split(64)])

    @torch.no_grad()
    def texts(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        """[N, T, D] and [N, V]"""
        ids = (
            tokenize_all(words, [[text] for text in texts], length)[:, 0].long().split(4096)
            for words, length in zip(self.words, (VARIANT.max_text, CLIP_LENGTH), strict=True)
        )
        t5, clip = ([some.to(self.device) for some in every] for every in ids)
        txt = torch.cat([self.t5(input_ids=some).last_hidden_state for some in t5])
        return txt, torch.cat([self.clip(input_ids=some).pooler_output for some in clip])


@dataclass
class Pool:
    """A source of the loop that draws any of its scenes."""

    latents: Tensor
    seen: Tensor
    """[N, …], what is seen beside each"""
    txt: Tensor
    vec: Tensor
    name: str = "scenes"
    digest: str = "scenes"

    @property
    def size(self) -> tuple[int, ...]:
        return tuple(self.latents.shape[1:])

    def draw(self, generator: torch.Generator | None) -> Example:
        i = 0 if generator is None else int(torch.randint(len(self.latents), (1,), generator=generator))
        per = len(self.txt) // len(self.latents)
        j = i * per + (0 if generator is None else int(torch.randint(per, (1,), generator=generator)))
        return Example(self.name, self.latents[i].float(), self.txt[j], self.vec[j], self.seen[i].float())


def pictures(scenes: SceneBatch, atlas: Atlas) -> Tensor:
    return render(scenes, atlas, SIZE).clamp(-1, 1)


def map_of(kind: str, image: Tensor, scenes: SceneBatch, atlas: Atlas) -> Tensor:
    """A map [B, 3, H, W] from -1 to 1 of scenes, whose pictures are `image`."""
    if kind == "canny":
        found = canny(((image + 1) * 127.5).round().to(torch.uint8)).float()
    else:
        found = depth(scenes, atlas, SIZE)
    return (2 * found - 1)[:, None].expand(-1, 3, -1, -1)


def filled(image: Tensor, mask: Tensor, encoder: Encoder) -> Tensor:
    """What Fill sees of pictures, as latents [B, 5, 16, h, w]: what is kept, and 8x8 pixels of the mask for each."""
    patches = rearrange(mask, "b 1 (h ph) (w pw) -> b (ph pw) h w", ph=8, pw=8)
    return torch.cat([encoder.latents(image * (1 - mask)).unsqueeze(1), patches.unflatten(1, (4, 16)).bfloat16()], 1)


def pool_of(kind: str, count: int, root: Path, encoder: Encoder, seed: int) -> Pool:
    """Scenes with what is seen of them, or pairs of scenes, encoded."""
    sprites = load_sprites(root)
    atlas, rng = make_atlas(all_rgba(sprites), encoder.device), np.random.default_rng(seed)
    if kind == "kontext":
        pools = Pools(sprites.without_pixels(), load_heldout(sprites.without_pixels()))
        before, scenes, texts, _ = sample_edits(count, seed, pools)
    else:
        scenes, wordings = sample_scenes(count, seed, sprites, k=2, workers=os.cpu_count() or 1)
        texts = [text for both in wordings for text in both]
    latents, seen = [], []
    for i in range(0, count, 256):
        some = scenes[i : i + 256]
        image = pictures(some, atlas)
        latents.append(encoder.latents(image))
        if kind == "fill":
            seen.append(filled(image, sample_masks(some, SIZE, rng).to(image), encoder))
        else:
            one = pictures(before[i : i + 256], atlas) if kind == "kontext" else map_of(kind, image, some, atlas)
            seen.append(encoder.latents(one).unsqueeze(1))
    pool = Pool(torch.cat(latents), torch.cat(seen), *encoder.texts(texts))
    say(f"drew and encoded {count} scenes and {len(texts)} texts")
    return pool


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path, help="folder with fluent/package and emoji/package")
    parser.add_argument("work", type=Path, help="folder of states and results")
    parser.add_argument("folder", type=Path, help="the model that ships")
    parser.add_argument("kind", choices=TAKES)
    parser.add_argument("--steps", type=int, default=4500)
    parser.add_argument("--minutes", type=float, default=1e9, help="of training, after which it ends where it is")
    parser.add_argument("--scenes", type=int, default=20_000)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--guidance", type=float, default=1.0, help="that the model is told; what it may draw with")
    parser.add_argument("--device", default="cuda")
    args = parser.parse_args()

    torch.set_float32_matmul_precision("high")
    takes, cuda, folder = TAKES[args.kind], args.device == "cuda", args.work / f"flux-mini-{args.kind}"
    pool = pool_of(args.kind, args.scenes, args.root, Encoder(args.folder, args.device), seed=3)
    model = Flux(VARIANT.params)
    model.load_state_dict(load_file(args.folder / VARIANT.flow_file))
    model.to(args.device, torch.bfloat16 if cuda else torch.float32)
    widen(model, takes)
    targets = (*TARGETS, "x_embedder") if WAYS[takes].widens else TARGETS
    adapter = adapt(model, targets, args.rank, args.rank, torch.Generator().manual_seed(1))
    if cuda:
        for block in (*model.double_blocks, *model.single_blocks):
            block.compile(dynamic=False)
    recipe = Recipe(
        args.steps, args.lr, args.batch, warmup=min(200, args.steps // 10), schedule="cosine", weight_decay=0.0,
        ema=0.995, timesteps="flux_shift", on_table=False, guidance=args.guidance, seed=1, takes=takes,
    )  # fmt: skip
    losses: list[float] = []
    began = time.monotonic()

    def told(done: Progress) -> bool:
        losses.append(done.loss)
        if done.step % 200 == 0:
            say(f"step {done.step} loss {sum(losses[-200:]) / len(losses[-200:]):.4f} rate {done.rate:.1e}")
        return time.monotonic() - began > 60 * args.minutes

    train(adapter, [pool] * args.batch, recipe, folder / "checkpoints", every=500, on_step=told)
    with adapter.averaged():
        path = adapter.save(folder, torch.bfloat16)
    say(f"{path}: {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
