"""Regional prompting: each part of the picture attends to its own prompt, by an attention mask.

The texts of all regions are concatenated in the text stream. An image token attends to all image tokens and to the
text of its own region; a text token attends to its own text and its region's image tokens. Only the mask changes, so
`attend` is replaced, in chosen steps (after github.com/instantX-research/Regional-Prompting-FLUX).

    python examples/regional_prompting.py --left "a red apple" --right "a dog face"
"""

import argparse

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from flux_core import GenerationRequest, load_pipeline
from flux_core.hooks import Custom, HookRun
from flux_core.sampling import euler, flow_velocity, get_noise, get_schedule, prepare


def region_mask(regions: Tensor, text_len: int, count: int) -> Tensor:
    """Attention mask [T + L, T + L], bool. regions [L]: the region of every image token; text_len: of each text."""
    of = torch.cat((torch.arange(count).repeat_interleave(text_len), regions))
    is_image = torch.arange(len(of)) >= count * text_len
    return (of[:, None] == of[None, :]) | (is_image[:, None] & is_image[None, :])


def masked(mask: Tensor):
    """Attention with this mask."""

    def attend_masked(attend, q: Tensor, k: Tensor, v: Tensor, at) -> Tensor:
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask.to(q.device))
        return rearrange(out, "B H L D -> B L (H D)")

    return attend_masked


@torch.no_grad()
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--left", default="a red apple")
    parser.add_argument("--right", default="a dog face")
    parser.add_argument("--steps", default="0-9", help="steps at which the regions are separate")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--num_steps", type=int, default=28)
    parser.add_argument("--output", default="regional_prompting.png")
    args = parser.parse_args(argv)

    pipeline = load_pipeline("flux-mini")
    request = GenerationRequest(prompt=f"{args.left} | {args.right}", seed=args.seed, num_steps=args.num_steps)
    noise = get_noise(1, request.height, request.width, pipeline.device, pipeline.dtype, request.seed)
    parts = [prepare(pipeline.t5, pipeline.clip, noise, prompt) for prompt in (args.left, args.right)]
    text_len = parts[0]["txt"].shape[1]
    joined = {name: torch.cat([part[name] for part in parts], dim=1) for name in ("txt", "txt_ids")}
    vec = torch.stack([part["vec"] for part in parts]).mean(0)
    columns = parts[0]["img_ids"][0, :, 2]
    mask = region_mask((columns >= request.width // 32).long(), text_len, len(parts))
    x, sigmas = parts[0]["img"], get_schedule(request.num_steps, columns.numel())
    run = HookRun([Custom(sites="layer.*.attend", fn=masked(mask), steps=args.steps)], pipeline.variant.params, sigmas)
    fixed = {"img_ids": parts[0]["img_ids"], **joined, "vec": vec, "guidance": request.guidance}
    pipeline.picture(euler(flow_velocity(pipeline.model, **fixed, run=run), x, sigmas), request).save(args.output)


if __name__ == "__main__":
    main()
