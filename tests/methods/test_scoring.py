"""The scorer equals transformers' DINOv2, called as its documentation does; other models are refused."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from random_model import write_scorer
from transformers import AutoImageProcessor, Dinov2Model

from flux_core.errors import FileError
from flux_core.methods.scoring import load_scorer

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_scorer(tmp_path_factory.mktemp("scorer"))


@pytest.fixture(scope="module")
def pictures():
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (h, w, 3), dtype=np.uint8)) for h, w in ((64, 64), (40, 90))]


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_features_are_those_of_transformers(folder, pictures, pooling):
    model, processor = Dinov2Model.from_pretrained(folder).eval(), AutoImageProcessor.from_pretrained(folder)
    with torch.no_grad():
        tokens = model(**processor(images=pictures, return_tensors="pt")).last_hidden_state
    wanted = tokens[:, 0] if pooling == "cls" else tokens[:, 1:].mean(dim=1)
    found = load_scorer(str(folder), CPU, pooling).features(pictures)
    torch.testing.assert_close(found, wanted / wanted.norm(dim=1, keepdim=True))


def test_a_picture_is_like_itself_and_less_like_another(folder, pictures):
    same, other = (
        load_scorer(str(folder), CPU).features(pictures) @ load_scorer(str(folder), CPU).features(pictures).T
    )[0]
    assert same == pytest.approx(1, abs=1e-6) and other < 0.9999


def test_what_is_no_scorer_is_told(folder, tmp_path):
    with pytest.raises(FileError, match="there is no scorer 'dinov3-mini'"):
        load_scorer("dinov3-mini", CPU)
    with pytest.raises(FileError, match="holds no model"):
        load_scorer(str(tmp_path), CPU)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "clip"}))
    with pytest.raises(FileError, match="holds a 'clip' model; a scorer is a dinov2"):
        load_scorer(str(tmp_path), CPU)


def test_a_folder_that_lacks_a_file_is_told(folder, tmp_path):
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    with pytest.raises(FileError, match="image processor could not be read"):
        load_scorer(str(tmp_path), CPU)
    (tmp_path / "preprocessor_config.json").write_bytes((folder / "preprocessor_config.json").read_bytes())
    with pytest.raises(FileError, match="the scorer could not be read"):
        load_scorer(str(tmp_path), CPU)
