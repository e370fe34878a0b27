"""ConceptAttention (Helbling et al., arXiv 2502.04320): heat maps of words, from the outputs of attention.

A T5 token of each word is put in front of the prompt's tokens. These concept tokens attend to each other and to the
image; prompt and image never attend to them, so the picture does not change. With o the outputs of attention,

    map[image token, concept] = softmax over concepts of (o_image . o_concept)

is averaged over the later double blocks (15-18 of FLUX.1-dev) and the steps.

    python examples/concept_attention.py --prompt "a red apple left of a dog face" --concepts apple dog background
"""

import argparse

import torch
from PIL import Image
from torch import Tensor

from flux_core import GenerationRequest, load_pipeline
from flux_core.hooks import At, Capture, Custom, HookRun
from flux_core.images.pictures import grid
from flux_core.sampling import euler, flow_velocity, get_noise, get_schedule, prepare


def beside(count: int):
    """Attention in which the first `count` tokens attend to themselves and the image, and no other token to them."""

    def attend_beside(attend, q: Tensor, k: Tensor, v: Tensor, at: At) -> Tensor:
        others = attend(q[:, :, count:], k[:, :, count:], v[:, :, count:])
        k, v = (torch.cat((x[:, :, :count], x[:, :, at.txt_len :]), dim=2) for x in (k, v))
        return torch.cat((attend(q[:, :, :count], k, v), others), dim=1)

    return attend_beside


def concept_maps(outputs: dict[str, Tensor], count: int) -> Tensor:
    """Maps [B, L, count] from the values at `img.attn` and `txt.attn` of the same blocks and steps."""
    pairs = [(x, outputs[name.replace(".img.", ".txt.")]) for name, x in outputs.items() if ".img." in name]
    return torch.stack([(img @ txt[:, :count].mT).softmax(dim=-1) for img, txt in pairs]).mean(0)


def overlay(picture: Image.Image, heat: Tensor) -> Image.Image:
    """The picture blended with a heat map [h, w] of values from 0 (black) over red and yellow to 1 (white)."""
    colours = (3 * heat[..., None] - torch.arange(3)).clamp(0, 1) * 255
    hot = Image.fromarray(colours.byte().numpy()).resize(picture.size, Image.Resampling.BICUBIC)
    return Image.blend(picture, hot, 0.7)


@torch.no_grad()
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompt", default="a red apple left of a dog face")
    parser.add_argument("--concepts", nargs="+", default=["apple", "dog", "background"])
    parser.add_argument("--blocks", default="double_blocks.2-3", help="double blocks whose outputs are compared")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--num_steps", type=int, default=28)
    parser.add_argument("--output", default="concept_attention.png")
    args = parser.parse_args(argv)

    pipeline = load_pipeline("flux-mini")
    request = GenerationRequest(prompt=args.prompt, seed=args.seed, num_steps=args.num_steps)
    noise = get_noise(1, request.height, request.width, pipeline.device, pipeline.dtype, request.seed)
    inputs = prepare(pipeline.t5, pipeline.clip, noise, request.prompt)
    x, count = inputs.pop("img"), len(args.concepts)
    concepts = pipeline.t5(args.concepts)[None, :, 0]
    inputs["txt"] = torch.cat((concepts.to(x.device), inputs["txt"]), dim=1)
    inputs["txt_ids"] = x.new_zeros(1, inputs["txt"].shape[1], 3)
    sigmas, outputs = get_schedule(request.num_steps, x.shape[1]), {}
    watch = Capture(sites=[f"{args.blocks}.{stream}.attn" for stream in ("img", "txt")], into=outputs)
    run = HookRun([Custom(sites="layer.*.attend", fn=beside(count)), watch], pipeline.variant.params, sigmas)
    drawn = euler(flow_velocity(pipeline.model, **inputs, guidance=request.guidance, run=run), x, sigmas)
    picture = pipeline.picture(drawn, request)
    maps = concept_maps(outputs, count)[0].float().unflatten(0, (request.height // 16, -1))
    grid([picture, *(overlay(picture, maps[..., i]) for i in range(count))], columns=count + 1).save(args.output)


if __name__ == "__main__":
    main()
