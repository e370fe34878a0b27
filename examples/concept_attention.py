"""ConceptAttention (Helbling et al., arXiv 2502.04320): heat maps of words, from the outputs of attention.

A T5 token of each word is put in front of the prompt's tokens. These concept tokens attend to each other and to the
image; prompt and image never attend to them, so the picture does not change. With o the outputs of attention,

    map[image token, concept] = softmax over concepts of (o_image . o_concept)

is averaged over the later double blocks (15-18 of FLUX.1-dev) and the steps.

    python examples/concept_attention.py --prompt "a red apple left of a dog face" --concepts apple dog background
"""

import torch
from PIL import Image
from torch import Tensor

from flux_core import load_pipeline
from flux_core.hooks import At, Capture, Custom
from flux_core.images.pictures import grid
from flux_core.sampling import euler
from flux_core.script import command


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


@command
def main(
    prompt="a red apple left of a dog face", concepts=("apple", "dog", "background"), blocks="double_blocks.2-3",
    seed=0, num_steps=28, output="concept_attention.png",
):  # fmt: skip
    """blocks: double blocks whose outputs are compared."""
    pipeline, outputs, count = load_pipeline("flux-mini"), {}, len(concepts)
    (txt, vec), *words = (pipeline.prompts(text) for text in (prompt, *concepts))
    both = torch.cat([*(word[:, :1] for word, _ in words), txt], dim=1), vec
    watch = Capture(sites=[f"{blocks}.{stream}.attn" for stream in ("img", "txt")], into=outputs)
    sigmas = pipeline.schedule(num_steps)
    with pipeline.run([Custom(sites="layer.*.attend", fn=beside(count)), watch], sigmas) as run:
        drawn = euler(pipeline.velocity(both, run=run), pipeline.noise(seed), sigmas)
    picture = pipeline.decode(drawn)[0]
    maps = concept_maps(outputs, count)[0].float().unflatten(0, (pipeline.variant.height // 16, -1))
    grid([picture, *(overlay(picture, heat) for heat in maps.unbind(-1))], columns=count + 1).save(output)
