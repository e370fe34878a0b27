"""Attribution to words: input times gradient at the text tokens (Shrikumar et al., arXiv 1605.01713).

How much would the velocity change, if a word's tokens were smaller? The gradient of one forward says it to first order:

    share of a word = sum over its tokens of |token . d |v|^2 / d token|

    python examples/gradients/attribution.py --prompt "a red apple left of a dog face"
"""

import torch
from torch import Tensor

from flux_core import load_pipeline
from flux_core.script import command


def attribution(pipeline, prompt: str, x: Tensor, sigma: float) -> list[tuple[str, float]]:
    """Each word's share, in percent."""
    velocity, values = pipeline.forward(prompt, x, sigma, "txt_in", grad=True)
    (slope,) = torch.autograd.grad(velocity.square().mean(), [values["txt_in"]])
    scores = (slope * values["txt_in"]).sum(-1)[0].abs()
    found = [(word, scores[list(tokens)].sum().item()) for word, tokens in pipeline.words(prompt)]
    return [(word, 100 * score / sum(score for _, score in found)) for word, score in found]


@command
def main(prompt="a red apple left of a dog face", sigma=0.7, seed=0):
    pipeline = load_pipeline("flux-mini")
    for word, share in attribution(pipeline, prompt, pipeline.noise(seed), sigma):
        print(f"{word:12} {share:5.1f} %")
