"""ConceptAttention (Helbling et al., arXiv 2502.04320): heat maps of words, from the outputs of attention.

A T5 token of each word is put in front of the prompt's tokens. These concept tokens attend to each other and to the
image; prompt and image never attend to them, so the picture does not change. With o the outputs of attention,

    map[image token, concept] = softmax over concepts of (o_image . o_concept)

is averaged over the later double blocks (15-18 of FLUX.1-dev) and the steps.

    python examples/concept_attention.py --prompt "a red apple left of a dog face" --concepts apple dog background
"""

import torch
from torch import Tensor

from flux_core import load_pipeline
from flux_core.hooks import Capture, Custom
from flux_core.images.pictures import grid
from flux_core.methods.concept_maps import beside, concept_map, overlay
from flux_core.sampling import euler
from flux_core.script import command


def concept_maps(outputs: dict[str, Tensor], count: int) -> Tensor:
    """Maps [B, L, count] from the values at `img.attn` and `txt.attn` of the same blocks and steps."""
    pairs = [(x, outputs[name.replace(".img.", ".txt.")]) for name, x in outputs.items() if ".img." in name]
    return torch.stack([concept_map(img, txt[:, :count]) for img, txt in pairs]).mean(0)


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
