"""ConceptAttention beside a picture: it changes nothing, and its maps share every place out among the words."""

import numpy as np
import pytest
import torch

from flux_core import load_pipeline
from flux_core.errors import UsageError
from flux_core.hooks import Skip
from flux_core.methods.concept_maps import Words, later_blocks
from flux_core.request.generation import GenerationRequest
from flux_core.variants import VARIANTS


@pytest.fixture(scope="module")
def pipeline():
    return load_pipeline("flux-mini", "cpu")


@pytest.mark.filterwarnings("ignore:double_blocks.1 is skipped")
@pytest.mark.parametrize("fields", [{}, {"true_cfg_scale": 2.0}, {"plan": [Skip(blocks="double_blocks.1")]}])
def test_words_look_and_the_picture_stays(pipeline, fields):
    fields |= {"prompt": "a red apple", "seed": 5, "width": 144, "height": 128, "num_steps": 3}
    request = GenerationRequest(name="flux-mini", **fields)
    words = Words(pipeline, ["apple", "background"])
    found, plain = pipeline.draw(request, None, None, words.hooks, [words]), pipeline.draw(request)
    assert np.abs(np.asarray(found).astype(int) - np.asarray(plain)).max() <= 1
    skipped = {"double_blocks.1"} if fields.get("plan") else set()
    assert {step for step, _ in words.found} == {0, 1, 2}
    assert {block for _, block in words.found} == {f"double_blocks.{i}" for i in range(4)} - skipped
    maps = words.maps()
    assert maps.shape == (72, 2) and torch.allclose(maps.sum(1), torch.ones(72))
    one = words.maps([1], ["double_blocks.3"])
    assert torch.equal(one, words.found[1, "double_blocks.3"]) and not torch.equal(one, maps)
    for block in skipped:
        with pytest.raises(UsageError, match="there is no map"):
            words.maps(None, [block])


def test_a_word_alone_is_refused_and_the_papers_blocks_are_the_default(pipeline):
    with pytest.raises(UsageError, match="two of them at least"):
        Words(pipeline, ["apple"])
    assert later_blocks(VARIANTS["flux-dev"].params) == [f"double_blocks.{i}" for i in (15, 16, 17, 18)]  # section 4
    assert later_blocks(VARIANTS["flux-mini"].params) == ["double_blocks.2", "double_blocks.3"]
