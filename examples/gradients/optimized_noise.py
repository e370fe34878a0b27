"""Noise that is optimized through a whole picture for what the picture should be (after DOODL, arXiv 2303.13703).

Here: the mean of its tokens, so the colours of another picture. Noise keeps its mean and spread, without which the
model leaves what it knows.

    python examples/gradients/optimized_noise.py --prompt "a red apple" --colours "a blue heart" --iterations 16
"""

import torch
from torch import Tensor

from flux_core import load_pipeline
from flux_core.images.pictures import grid
from flux_core.sampling import Velocity, euler
from flux_core.script import command


def optimized(velocity: Velocity, x: Tensor, sigmas: list[float], mean: Tensor, iterations: int, lr: float) -> Tensor:
    """Noise [1, L, C] whose picture has that mean token [1, C], by Adam. Prints how far it is."""
    x = x.clone().requires_grad_()
    adam = torch.optim.Adam([x], lr)
    for _ in range(iterations):
        adam.zero_grad()
        loss = (euler(velocity, x, sigmas).mean(1) - mean).square().mean()
        loss.backward()
        adam.step()
        x.data = (x.data - x.data.mean()) / x.data.std()
        print(f"{loss.item():.4f}")
    return x.detach()


@command
def main(
    prompt="a red apple", colours="a blue heart", iterations=16, lr=0.01,
    seed=0, num_steps=8, output="optimized_noise.png",
):  # fmt: skip
    """Draws the prompt, the picture of those colours, and the prompt from optimized noise."""
    pipeline = load_pipeline("flux-mini")
    x, sigmas, velocity = pipeline.noise(seed), pipeline.schedule(num_steps), pipeline.velocity(prompt)
    other = euler(pipeline.velocity(colours), x, sigmas)
    found = optimized(velocity, x, sigmas, other.mean(1), iterations, lr)
    pictures = euler(velocity, x, sigmas), other, euler(velocity, found, sigmas)
    grid([pipeline.decode(tokens)[0] for tokens in pictures], columns=3).save(output)
