"""Look at what a stage has learned: a sheet of pictures for fixed prompts.

    python weights/recipe/preview.py WORK SHEET.png [--size 256] [--guidance 4] [--distilled]

Without --distilled, guidance is classifier-free, by two forwards; with it, one forward and the guidance embedding.
"""

import argparse
from pathlib import Path

import torch
from encode import CLIP_LENGTH, load_autoencoder, tokenize
from networks import VARIANT, Networks
from PIL import Image
from trainer import read_shards, restore
from transformers import CLIPTokenizer, T5TokenizerFast

from flux_core.sampling import euler, get_noise, get_schedule, pack, unpack

PROMPTS = """a red apple|a dog face|a rocket|a pizza|an octopus|a guitar|a smiling face with sunglasses|a castle
a green pig face|a blue banana|a purple car|a pink tree|an orange cat face|a black heart|a yellow fish|a gray rose
a cat face to the left of a dog face|an apple and a banana|a rocket above a house|a car to the right of a tree
a red car and a blue house|a pig face below a star|a crown next to a key|a hamburger on top of a pizza
two apples|three bananas|four dogs|three blue stars|two red cats|four mushrooms|two hearts|three fish
a bee on a blue background|a tiger face on a light green background|a watermelon against a black backdrop
a puppy|a spooky ghost|a birthday cake, purple background|a red circle|a blue square and a green triangle""".replace(
    "\n", "|"
).split("|")


@torch.no_grad()
def draw(nets: Networks, ids, empty, noise: torch.Tensor, guidance: float, distilled: bool) -> torch.Tensor:
    """Packed latents of one batch of prompts."""
    n = len(noise)
    txt, vec = nets.encode_text(*ids)
    no_txt, no_vec = (x.expand(n, *x.shape[1:]) for x in nets.encode_text(*empty))

    def velocity(x: torch.Tensor, sigma: float) -> torch.Tensor:
        t, ones = torch.full((n,), sigma, device=x.device), torch.ones(n, device=x.device)
        if distilled:
            return nets.velocity(x, t, txt, vec, guidance * ones)
        cond, uncond = nets.velocity(x, t, txt, vec, ones), nets.velocity(x, t, no_txt, no_vec, ones)
        return uncond + guidance * (cond - uncond)

    return euler(velocity, noise, get_schedule(VARIANT.num_steps, noise.shape[1]))


def sheet(pictures: torch.Tensor, columns: int = 8) -> Image.Image:
    """Pictures [n, 3, H, W] in [-1, 1] side by side."""
    n, _, height, width = pictures.shape
    page = Image.new("RGB", (columns * width, -(-n // columns) * height))
    for i, picture in enumerate(pictures):
        pixels = ((picture.clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).cpu().numpy()
        page.paste(Image.fromarray(pixels), (i % columns * width, i // columns * height))
    return page


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("sheet", type=Path)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--guidance", type=float, default=4.0)
    parser.add_argument("--distilled", action="store_true")
    parser.add_argument("--device", default="cuda")
    args = parser.parse_args()

    torch.set_float32_matmul_precision("high")
    nets = Networks().to(args.device).eval()
    restore(nets, read_shards(args.work, "networks"))
    if args.distilled:
        restore(nets.flux, read_shards(args.work, "distilled"))
    t5 = T5TokenizerFast.from_pretrained(args.work / "t5_tokenizer")
    clip = CLIPTokenizer.from_pretrained(args.work / "clip_tokenizer")

    def ids(texts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        pair = tokenize(t5, texts, VARIANT.max_text), tokenize(clip, texts, CLIP_LENGTH)
        return pair[0].long().to(args.device), pair[1].long().to(args.device)

    noise = torch.cat([get_noise(1, args.size, args.size, args.device, torch.float32, i) for i in range(len(PROMPTS))])
    tokens = draw(nets, ids(PROMPTS), ids([""]), pack(noise), args.guidance, args.distilled)
    ae = load_autoencoder(args.work, args.device)
    latents = unpack(tokens, args.size, args.size).to(torch.bfloat16)
    with torch.no_grad():
        pictures = torch.cat([ae.decode(z[None]).float() for z in latents])
    sheet(pictures).save(args.sheet)


if __name__ == "__main__":
    main()
