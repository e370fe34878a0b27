"""Regional prompting: each part of the picture attends to its own prompt, by an attention mask.

The texts of all regions are concatenated in the text stream. An image token attends to all image tokens and to the
text of its own region; a text token attends to its own text and its region's image tokens. Only the mask changes, and
only in chosen steps (after github.com/instantX-research/Regional-Prompting-FLUX).

    python examples/regional_prompting.py --left "a red apple" --right "a dog face"
"""

import torch
from torch import Tensor

from flux_core import load_pipeline
from flux_core.hooks import AttentionMask
from flux_core.sampling import euler
from flux_core.script import command


def region_mask(regions: Tensor, text_len: int, count: int) -> Tensor:
    """Attention mask [T + L, T + L], bool. regions [L]: the region of every image token; text_len: of each text."""
    of = torch.cat((torch.arange(count).repeat_interleave(text_len), regions))
    is_image = torch.arange(len(of)) >= count * text_len
    return (of[:, None] == of[None, :]) | (is_image[:, None] & is_image[None, :])


@command
def main(left="a red apple", right="a dog face", steps=None, seed=0, num_steps=28, output="regional_prompting.png"):
    """steps: at which the regions are separate; by default 0-9 of 28."""
    pipeline = load_pipeline("flux-mini")
    texts, vecs = zip(*(pipeline.prompts(prompt) for prompt in (left, right)), strict=True)
    both = torch.cat(texts, dim=1), torch.cat(vecs).mean(0, keepdim=True)
    high, wide = pipeline.variant.height // 16, pipeline.variant.width // 16
    regions = (torch.arange(wide) >= wide // 2).long().repeat(high)
    mask = region_mask(regions, texts[0].shape[1], len(texts))
    apart = AttentionMask(blocks="layer.*", value=mask, steps=steps or f"0-{num_steps // 3}")
    sigmas = pipeline.schedule(num_steps)
    velocity = pipeline.velocity(both, run=pipeline.run(apart, sigmas))
    pipeline.decode(euler(velocity, pipeline.noise(seed), sigmas))[0].save(output)
