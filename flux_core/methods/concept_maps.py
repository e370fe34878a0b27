"""ConceptAttention (Helbling et al., arXiv 2502.04320): heat maps of words, from the outputs of attention.

A T5 token of each word is put in front of the prompt's tokens. These concept tokens attend to each other and to the
image; prompt and image never attend to them, so the picture does not change. With o the outputs of attention,

    map[image token, concept] = softmax over concepts of (o_image . o_concept)

is averaged over the later double blocks (15-18 of FLUX.1-dev) and the steps.

    words = Words(pipeline, ["apple", "dog", "background"])
    image = pipeline.draw(request, None, None, words.hooks, [words])
    maps = words.maps()  # [L, 3]
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import product
from typing import Literal

import torch
from PIL import Image
from torch import Tensor

from ..errors import UsageError
from ..hooks import At, Custom, Intervention
from ..hooks.capture import Collector
from ..hooks.seam import Placed, Read
from ..params import FluxParams
from ..pipeline import Pipeline
from ..sampling import FlowInputs

Key = tuple[int, str]
"""a step, counted from 0, and the name of a double block"""


class Words:
    """A condition of a picture that adds concept tokens to it, and what is read of them. Changes no pixel but for the
    rounding of longer sums."""

    def __init__(self, pipeline: Pipeline, words: Sequence[str]) -> None:
        """UsageError for less than two: maps say where one is rather than the others."""
        if len(words) < 2:
            raise UsageError("a map compares words. Next: two of them at least, as in apple, background")
        self.words, self.params = tuple(words), pipeline.variant.params
        with torch.no_grad():
            self.tokens = torch.cat([pipeline.prompts(word)[0][:, :1] for word in words], dim=1)
        self.found: dict[Key, Tensor] = {}
        """maps [L, words] by step and block, on the CPU"""

    @property
    def hooks(self) -> tuple[Intervention, ...]:
        """What a picture is drawn with beside this condition: attention beside the others, and the reader of maps."""
        attend = Custom(sites=("layer.*.attend",), fn=beside(len(self.words)))
        return attend, _Reader(count=len(self.words), into=self.found)

    def apply(self, inputs: FlowInputs, size: tuple[int, int]) -> FlowInputs:
        """The inputs with the words' tokens in front of the text."""
        rows = inputs.txt.shape[0]
        txt = torch.cat((self.tokens.to(inputs.txt).expand(rows, -1, -1), inputs.txt), dim=1)
        ids = torch.cat((torch.zeros_like(inputs.txt_ids[:, :1]).expand(-1, len(self.words), -1), inputs.txt_ids), 1)
        return replace(inputs, txt=txt, txt_ids=ids)

    def run(self, inputs: FlowInputs) -> None:
        return None

    def maps(self, steps: Sequence[int] | None = None, blocks: Sequence[str] | None = None) -> Tensor:
        """The mean over those steps (by default all) and double blocks (the later ones), [L, words], rows sum to 1.

        Blocks that were left out have none. UsageError if that is all.
        """
        blocks = blocks or later_blocks(self.params)
        keys = product(steps or sorted({step for step, _ in self.found}), blocks)
        if not (there := [self.found[key] for key in keys if key in self.found]):
            raise UsageError(f"there is no map of {', '.join(blocks)} at these steps. Next: a block that is computed")
        return torch.stack(there).mean(0)


def later_blocks(params: FluxParams) -> list[str]:
    """The last fifth of the double blocks, two at least."""
    number = min(params.depth, max(2, -(-params.depth // 5)))
    return [f"double_blocks.{i}" for i in range(params.depth - number, params.depth)]


class _Reader(Collector):
    """Keeps the map of each step and double block of a batch's first row."""

    kind: Literal["concept_maps"] = "concept_maps"
    count: int

    def place(self, params: FluxParams, branches: tuple[str, ...]) -> list[Placed]:
        blocks = [f"double_blocks.{i}" for i in range(params.depth)]
        return [Read((f"{block}.img.attn", f"{block}.txt.attn"), self._keeping(block)) for block in blocks]

    def _keeping(self, block: str) -> Callable[..., None]:
        def keep(at: At, img: Tensor, txt: Tensor) -> None:
            self.into[at.step, block] = concept_map(img[:1], txt[:1, : self.count])[0].float().cpu()

        return keep


def beside(count: int) -> Callable[..., Tensor]:
    """Attention in which the first `count` tokens attend to themselves and the image, and no other token to them."""

    def attend_beside(attend: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, at: At) -> Tensor:
        others = attend(q[:, :, count:], k[:, :, count:], v[:, :, count:])
        k, v = (torch.cat((x[:, :, :count], x[:, :, at.txt_len :]), dim=2) for x in (k, v))
        return torch.cat((attend(q[:, :, :count], k, v), others), dim=1)

    return attend_beside


def concept_map(img: Tensor, concepts: Tensor) -> Tensor:
    """softmax over concepts of (o_image . o_concept): [B, L, D], [B, C, D] -> [B, L, C]"""
    return (img @ concepts.mT).softmax(dim=-1)


def overlay(picture: Image.Image, heat: Tensor) -> Image.Image:
    """The picture blended with a heat map [h, w] of values from 0 (black) over red and yellow to 1 (white)."""
    colours = (3 * heat[..., None] - torch.arange(3, dtype=heat.dtype, device=heat.device)).clamp(0, 1) * 255
    hot = Image.fromarray(colours.byte().numpy()).resize(picture.size, Image.Resampling.BICUBIC)
    return Image.blend(picture, hot, 0.7)
