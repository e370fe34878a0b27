"""A word learned from a picture: textual inversion (Gal et al., arXiv 2208.01618) after the text is embedded.

A vector stands for the prompt's first word where the text enters the first block. It is learned by the training loss of
the flow, on one picture; CLIP's vector stays that of the word, so the colours come first, and the shape late.

    python examples/gradients/learned_word.py --prompt "thing" --picture "a blue heart" --iterations 150
"""

import torch
from torch import Tensor

from flux_core import load_pipeline
from flux_core.hooks import Custom
from flux_core.images.pictures import grid
from flux_core.sampling import euler
from flux_core.script import command


def in_place_of(tokens: tuple[int, ...], vector: Tensor) -> Custom:
    """A plan that puts a vector [D] in place of those text tokens."""

    def replaced(txt: Tensor, at) -> Tensor:
        index = torch.tensor(tokens, device=txt.device)
        return txt.index_copy(1, index, vector.to(txt).expand(len(txt), len(tokens), -1))

    return Custom(sites="txt_in", fn=replaced)


@command
def main(
    prompt="thing", picture="a blue heart", iterations=16, lr=1.0,
    seed=0, num_steps=8, output="learned_word.png",
):  # fmt: skip
    """Draws the prompt, the picture, and the prompt with the learned word."""
    pipeline = load_pipeline("flux-mini")
    x, sigmas, draw = pipeline.noise(seed), pipeline.schedule(num_steps), torch.Generator().manual_seed(seed)
    plain, target = (euler(pipeline.velocity(text), x, sigmas) for text in (prompt, picture))
    word = torch.zeros(pipeline.variant.params.hidden_size, requires_grad=True)
    plan, adam = in_place_of(pipeline.words(prompt)[0][1], word), torch.optim.Adam([word], lr)
    velocity = pipeline.velocity(prompt, run=pipeline.run(plan))
    for _ in range(iterations):
        noise, sigma = torch.randn(x.shape, generator=draw).to(x), torch.rand((), generator=draw).item()
        adam.zero_grad()
        (velocity(sigma * noise + (1 - sigma) * target, sigma) - (noise - target)).square().mean().backward()
        adam.step()
    with torch.no_grad():
        learned = euler(velocity, x, sigmas)
    grid([pipeline.decode(tokens)[0] for tokens in (plain, target, learned)], columns=3).save(output)
