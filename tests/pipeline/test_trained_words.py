"""Trained tokens of files in a pipeline: prompts name them, pictures record them, and they go with their file."""

import re

import pytest
import torch
from safetensors.torch import save_file

from flux_core import load_pipeline
from flux_core.errors import FileError, UsageError
from flux_core.request.generation import GenerationRequest
from flux_core.text.trained import embedding_of

SIZE = {"width": 128, "height": 128, "num_steps": 1}


@pytest.fixture(scope="module")
def pipeline():
    return load_pipeline("flux-mini")


@pytest.fixture
def word(pipeline, tmp_path):
    """A file that says that zwx is a red apple, as other tools name its tensors."""
    found = {}
    for key, encoder in (("clip_l", pipeline.clip), ("t5xxl", pipeline.t5)):
        ids = [i for i, begin, end in encoder.pieces("red apple") if begin < end]
        found[key] = embedding_of(encoder.ready()).weight[ids].detach().clone()
    save_file(found, tmp_path / "zwx.safetensors")
    return tmp_path / "zwx.safetensors"


def test_a_prompt_names_a_word_while_its_file_is_there(pipeline, word):
    apple, unknown = pipeline.prompts("a red apple"), pipeline.prompts("a zwx")
    with pipeline.load_lora(word) as handle:
        assert handle.summary == "zwx.safetensors: trained tokens of prompts: zwx (2)"
        assert all(map(torch.equal, pipeline.prompts("a zwx"), apple))
        assert all(map(torch.equal, pipeline.prompts("a red apple"), apple))
    assert all(map(torch.equal, pipeline.prompts("a zwx"), unknown)) and not torch.equal(unknown[0], apple[0])


def test_a_picture_records_the_file_and_is_drawn_again(pipeline, word):
    """By its hash, in a process that was never told where the file is but once."""
    plan = [{"kind": "lora", "file": str(word)}]
    (picture,) = pipeline.generate("a zwx", 1, plan=plan, **SIZE)
    (apple,) = pipeline.generate("a red apple", 1, **SIZE)
    assert picture.tobytes() == apple.tobytes()
    request = GenerationRequest.model_validate_json(picture.info["flux_core"])
    assert request.loras[0].file == "zwx.safetensors" and re.fullmatch("[0-9a-f]{64}", request.loras[0].sha256)
    (again,) = pipeline.generate(request)
    assert again.tobytes() == picture.tobytes()
    crowd = " ".join(["zwx"] * 20)
    assert pipeline.text_notes(crowd) != pipeline.text_notes(crowd, request.loras) != []
    assert pipeline.text_notes("zwx", request.loras) == []


def test_two_files_of_one_word_and_a_file_for_another_model_are_refused(pipeline, word, tmp_path):
    other = tmp_path / "other.safetensors"
    save_file({"bundle_emb.zwx.clip_l": torch.ones(1, 128)}, other)
    with pipeline.load_lora(word), pipeline.load_lora(other), pytest.raises(UsageError, match="two files have vectors"):
        pipeline.prompts("a zwx")
    save_file({"clip_l": torch.ones(1, 768)}, other)
    with pytest.raises(FileError, match=r"clip_l, of the token other, has the shape \[1, 768\], and the text encoder "):
        pipeline.load_lora(other)
    save_file({"clip_l": torch.full((1, 128), torch.nan)}, other)
    with pytest.raises(Exception, match="NaN or infinity in clip_l"):
        pipeline.load_lora(other)
