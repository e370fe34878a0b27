"""TAEF1, a tiny decoder of FLUX.1's latents: 1.2 million parameters, in milliseconds, for previews.

Source: madebyollin/taesd `taesd.py`, with its numbering of layers: a sequence in which only convolutions and blocks
have weights.
"""

from torch import Tensor, nn

WIDTH = 64
BLOCKS = (3, 3, 3, 1)
"""before each of three enlargements, and after them"""


class Clamp(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return (x / 3).tanh() * 3


class Block(nn.Module):
    """relu(three convolutions of x, and x)"""

    def __init__(self, width: int) -> None:
        super().__init__()
        layers = [_conv(width, width), nn.ReLU(), _conv(width, width), nn.ReLU(), _conv(width, width)]
        self.conv, self.fuse = nn.Sequential(*layers), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.fuse(self.conv(x) + x)


class TinyDecoder(nn.Sequential):
    """Latents as the transformer has them, [B, 16, h, w], to pixels from 0 to 1, [B, 3, 8h, 8w]."""

    def __init__(self, channels: int = 16) -> None:
        layers: list[nn.Module] = [Clamp(), _conv(channels, WIDTH), nn.ReLU()]
        for number in BLOCKS[:-1]:
            layers += [*(Block(WIDTH) for _ in range(number)), nn.Upsample(scale_factor=2), _conv(WIDTH, WIDTH, False)]
        layers += [*(Block(WIDTH) for _ in range(BLOCKS[-1])), _conv(WIDTH, 3)]
        super().__init__(*layers)


def _conv(inputs: int, outputs: int, bias: bool = True) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1, bias=bias)
