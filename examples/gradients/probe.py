"""A linear probe on a block's image tokens (Alain and Bengio, arXiv 1610.01644): do they know object from ground?

Tokens of a half-drawn picture are captured after a block. A logistic regression is fitted to them, with labels from the
finished picture (how far a token is from the corner's), and judged on another one.

    python examples/gradients/probe.py --block single_blocks.3
"""

import torch
from torch import Tensor

from flux_core import load_pipeline
from flux_core.sampling import euler
from flux_core.script import command


def labelled(pipeline, prompt: str, block: str, x: Tensor, sigmas: list[float]) -> tuple[Tensor, Tensor]:
    """Tokens [L, D] after the block at sigma 0.5, and whether each belongs to the object, [L] of 0 and 1."""
    picture = euler(pipeline.velocity(prompt), x, sigmas)
    _, values = pipeline.forward(prompt, (x + picture) / 2, 0.5, f"{block}.img.out")
    distance = (picture[0] - picture[0, :1]).norm(dim=-1)
    return values[f"{block}.img.out"][0].float().cpu(), (distance > distance.mean()).float().cpu()


def fitted(tokens: Tensor, labels: Tensor) -> Tensor:
    """Weights [D + 1], the constant first, of the logistic regression."""
    weights = torch.zeros(tokens.shape[1] + 1, requires_grad=True)
    solver = torch.optim.LBFGS([weights], max_iter=50, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        solver.zero_grad()
        logits = tokens @ weights[1:] + weights[0]
        value = torch.nn.functional.binary_cross_entropy_with_logits(logits, labels) + 1e-3 * weights.square().sum()
        value.backward()
        return value

    solver.step(loss)
    return weights.detach()


@command
def main(prompt="a red apple", other="a blue heart", block="single_blocks.3", seed=0, num_steps=8):
    """other: the picture that the probe is judged on."""
    pipeline = load_pipeline("flux-mini")
    x, sigmas = pipeline.noise(seed), pipeline.schedule(num_steps)
    pictures = {text: labelled(pipeline, text, block, x, sigmas) for text in (prompt, other)}
    weights = fitted(*pictures[prompt])
    for text, (tokens, labels) in pictures.items():
        right = ((tokens @ weights[1:] + weights[0] > 0) == labels.bool()).float().mean()
        print(f"{text}: {100 * right:.1f} % of tokens; {100 * max(labels.mean(), 1 - labels.mean()):.1f} % by chance")
