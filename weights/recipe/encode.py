"""Between the stages: scenes to latents and captions to token ids, once, so that stage 2 reads nothing else.

    python weights/recipe/encode.py ROOT WORK --size 256

Writes `WORK/scenes_SIZE.safetensors`: packed, normalized latents [N, tokens, 64] in bf16, and K wordings of each
scene as T5 ids [N, K, max_text] and CLIP ids [N, K, CLIP_LENGTH]. The same seed gives the same scenes at every size.
"""

import argparse
import multiprocessing
import os
from functools import partial
from pathlib import Path

import numpy as np
import torch
from render import all_rgba, make_atlas, render
from scenes import SHARES, sample_scenes
from sprites import load_sprites
from torch import Tensor
from trainer import read_shards, restore, say, write
from transformers import CLIPTokenizer, T5TokenizerFast

from flux_core.model import AutoEncoder
from flux_core.sampling import pack
from flux_core.variants import VARIANTS

VARIANT = VARIANTS["flux-mini"]
CHUNK = 10_000
CLIP_LENGTH = 40
"""CLIP is causal, so ids behind the end of the text change nothing and need not be trained on"""


def load_autoencoder(work: Path, device: str) -> AutoEncoder:
    """The autoencoder of stage 1."""
    ae = AutoEncoder(VARIANT.ae_params)
    restore(ae, read_shards(work, "ae"))
    return ae.to(device, torch.bfloat16, memory_format=torch.channels_last).eval()


def tokenize(tokenizer, texts: list[str], length: int) -> Tensor:
    """Padded ids [n, length] as the smallest integers that hold a vocabulary of a few thousand."""
    ids = tokenizer(texts, padding="max_length", truncation=True, max_length=length, return_tensors="np").input_ids
    return torch.from_numpy(ids.astype(np.int16))


def tokenize_all(tokenizer, captions: list[list[str]], length: int) -> Tensor:
    """Ids [N, K, length] of K wordings of N scenes, on all cores."""
    flat = [text for wordings in captions for text in wordings]
    chunks = [flat[i : i + CHUNK] for i in range(0, len(flat), CHUNK)]
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    with multiprocessing.get_context("fork").Pool() as pool:
        ids = pool.map(partial(_ids, tokenizer, length), chunks)
    return torch.from_numpy(np.concatenate(ids)).view(len(captions), -1, length)


def _ids(tokenizer, length: int, texts: list[str]) -> np.ndarray:
    return tokenize(tokenizer, texts, length).numpy()


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--size", type=int, required=True)
    parser.add_argument("--scenes", type=int, default=300_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--pairs", type=float, default=SHARES[2], help="share of scenes with two things in a relation")
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--device", default="cuda")
    args = parser.parse_args()

    path = args.work / f"scenes_{args.size}.safetensors"
    if path.exists():
        return say(f"{path} is there already")
    sprites = load_sprites(args.root)
    scenes, captions = sample_scenes(
        args.scenes, args.seed, sprites, k=4, workers=os.cpu_count() or 1, pairs=args.pairs
    )
    say(f"sampled {len(captions)} scenes")
    t5 = tokenize_all(T5TokenizerFast.from_pretrained(args.work / "t5_tokenizer"), captions, VARIANT.max_text)
    clip = tokenize_all(CLIPTokenizer.from_pretrained(args.work / "clip_tokenizer"), captions, CLIP_LENGTH)
    say("tokenized")

    atlas = make_atlas(all_rgba(sprites), args.device)
    ae = load_autoencoder(args.work, args.device)
    encode = torch.compile(ae.encode) if args.device == "cuda" else ae.encode
    latents = torch.empty(args.scenes, (args.size // 16) ** 2, VARIANT.params.in_channels, dtype=torch.bfloat16)
    for i in range(0, args.scenes, args.batch):
        index = range(i, min(i + args.batch, args.scenes))
        image = render(scenes[i : index.stop], atlas, args.size, chunk=args.batch)
        image = image.to(torch.bfloat16, memory_format=torch.channels_last)
        latents[i : index.stop] = pack(encode(image)).to("cpu", non_blocking=False)
    say("encoded")
    write(path, {"latents": latents, "t5": t5, "clip": clip})
    say("written")


if __name__ == "__main__":
    main()
