"""Redux against the official encoder and inputs; and files that are no adapter, or fit neither model nor SigLIP."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from golden_files import read
from PIL import Image
from safetensors.torch import save_file
from transformers import SiglipConfig, SiglipModel, SiglipVisionConfig, SiglipVisionModel

from flux_core.checkpoint.redux import check_redux
from flux_core.commands.info import info
from flux_core.errors import FileError
from flux_core.sampling import prepare_redux
from flux_core.variants import VARIANTS
from flux_core.vision.redux import load_redux

GOLDEN = read("family/redux")
PARAMS = json.loads(GOLDEN.metadata["params"])
DEV = VARIANTS["flux-dev"]
TINY = replace(DEV, params=replace(DEV.params, context_in_dim=PARAMS["context_in_dim"]))
"""of which only the width of its words counts here"""
ADAPTER = GOLDEN.group("redux.")


@pytest.fixture(scope="module")
def siglip(tmp_path_factory):
    """The file's SigLIP in a folder, as transformers keeps the half that sees."""
    folder = tmp_path_factory.mktemp("siglip")
    config = SiglipVisionConfig(**json.loads(GOLDEN.metadata["siglip"]))
    tower = SiglipVisionModel(config)
    tower.load_state_dict(GOLDEN.group("siglip."))
    return with_processor(tower, folder, config.image_size)


def with_processor(model, folder, size):
    model.save_pretrained(folder)
    entries = {"image_processor_type": "SiglipImageProcessor", "size": {"height": size, "width": size}, "resample": 3}
    (folder / "preprocessor_config.json").write_text(
        json.dumps(entries | {"image_mean": [0.5] * 3, "image_std": [0.5] * 3})
    )
    return folder


@pytest.fixture
def adapter(tmp_path):
    save_file(ADAPTER, tmp_path / "redux.safetensors")
    return tmp_path / "redux.safetensors"


@pytest.fixture
def picture():
    return Image.fromarray(GOLDEN.tensors["in.image"].numpy())


def test_words_are_the_official_ones(adapter, siglip, picture):
    redux = load_redux(TINY, adapter, str(siglip))
    found = redux(picture)
    assert found.shape == (1, 9, 40) and found.dtype == torch.float32
    assert torch.allclose(found, GOLDEN.tensors["out.redux"], atol=1e-5, rtol=0)
    assert not any(x.requires_grad or x.is_meta for x in redux.parameters())


def test_they_follow_t5s_words_rounded_as_the_official_code_does(adapter, siglip, picture):
    def t5(prompts):
        return GOLDEN.tensors["in.txt"]

    def clip(prompts):
        return GOLDEN.tensors["in.vec"]

    redux = load_redux(TINY, adapter, str(siglip))
    found = prepare_redux(t5, clip, GOLDEN.tensors["in.noise"], "", redux, picture)
    theirs = GOLDEN.group("out.prepare.")
    assert found.keys() == theirs.keys()
    for name in found:
        near = {"atol": 1e-5, "rtol": 2**-7} if name == "txt" else {"atol": 0, "rtol": 0}
        assert torch.allclose(found[name], theirs[name], **near), name


def test_several_pictures_follow_each_other_times_their_weights(adapter, siglip, picture):
    redux, other = load_redux(TINY, adapter, str(siglip)), picture.rotate(180)
    found = redux.words([(picture, 1.0), (other, 0.5)])
    assert torch.equal(found, torch.cat((redux(picture), 0.5 * redux(other)), dim=1))
    assert not torch.allclose(redux(picture), redux(other), atol=1e-3)


def test_in_bf16_they_are_near(adapter, siglip, picture):
    found = load_redux(TINY, adapter, str(siglip), dtype=torch.bfloat16)(picture)
    theirs = GOLDEN.tensors["out.redux"]
    assert found.dtype == torch.bfloat16 and (found - theirs).norm() < 0.02 * theirs.norm()


@pytest.mark.gpu
def test_on_a_card_they_are_near_in_bf16(adapter, siglip, picture):
    found, theirs = load_redux(TINY, adapter, str(siglip), "cuda")(picture), GOLDEN.tensors["out.redux"]
    assert found.is_cuda and found.dtype == torch.bfloat16 and (found.cpu() - theirs).norm() < 0.02 * theirs.norm()


def test_diffusers_folder_is_the_same_adapter(siglip, picture, adapter, tmp_path):
    inside = tmp_path / "pipeline" / "image_embedder"
    inside.mkdir(parents=True)
    save_file(ADAPTER, inside / "diffusion_pytorch_model.safetensors")
    (inside / "config.json").write_text(json.dumps({"_class_name": "ReduxImageEncoder"}))
    theirs = load_redux(TINY, adapter, str(siglip))(picture)
    for path in (inside, inside.parent):
        assert torch.equal(load_redux(TINY, path, str(siglip))(picture), theirs)


def test_the_whole_siglip_with_its_text_half_and_older_names(adapter, siglip, picture, tmp_path):
    """As the hub has it: `vision_model.` before the names, the half that reads beside them."""
    vision = json.loads(GOLDEN.metadata["siglip"])
    text = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 1, "num_attention_heads": 2}
    both = SiglipModel(SiglipConfig(text_config=text | {"vocab_size": 32}, vision_config=vision))
    folder = with_processor(both, tmp_path / "whole", vision["image_size"])
    older = {f"vision_model.{name}": x.clone() for name, x in GOLDEN.group("siglip.").items()}
    kept = {name: x for name, x in both.state_dict().items() if not name.startswith("vision_model.")}
    save_file(older | kept, folder / "model.safetensors", metadata={"format": "pt"})
    assert json.loads((folder / "config.json").read_text())["model_type"] == "siglip"
    found = load_redux(TINY, adapter, str(folder))(picture)
    assert torch.equal(found, load_redux(TINY, adapter, str(siglip))(picture))


def test_any_shape_of_picture_is_squeezed_into_a_square(adapter, siglip):
    wide = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 200, 3), dtype=np.uint8))
    assert load_redux(TINY, adapter, str(siglip))(wide).shape == (1, 9, 40)


def test_words_of_another_width_are_told_before_anything_is_loaded(adapter):
    with pytest.raises(FileError) as caught:
        check_redux(adapter, DEV)
    finding = "is the FLUX.1 Redux adapter, whose words have 40 features, and flux-dev takes 4096. Next: choose"
    assert str(caught.value).startswith(f"{adapter} {finding}")


def without(name):
    return {key: x for key, x in ADAPTER.items() if key != name}


@pytest.mark.parametrize(
    ("state", "words"),
    [
        (
            {"img_in.weight": torch.zeros(8, 4)},
            "is a FLUX.1 transformer of hidden size 8, and no Redux adapter. Next: give",
        ),
        (
            {"x": torch.zeros(3)},
            "is no kind of weights that is known here, and no Redux adapter. Next: give flux1-redux",
        ),
        (without("redux_down.weight"), "1 missing (redux_down.weight)"),
        (without("redux_up.bias"), "1 missing (redux_up.bias)"),
        (ADAPTER | {"more": torch.zeros(3)}, "1 unexpected (more)"),
        (ADAPTER | {"redux_up.weight": torch.zeros(5)}, "redux_up.weight [5] instead of [5, 0]"),
        (ADAPTER | {"redux_down.weight": torch.zeros(40, 60)}, "redux_down.weight [40, 60] instead of [40, 120]"),
        (ADAPTER | {"redux_up.bias": torch.zeros(120, dtype=torch.int64)}, "redux_up.bias is I64"),
    ],
)
def test_what_is_no_adapter_is_told(tmp_path, state, words):
    path = tmp_path / "file.safetensors"
    save_file(state, path)
    with pytest.raises(FileError) as caught:
        load_redux(TINY, path)
    assert str(caught.value).startswith(str(path)) and words in str(caught.value) and "Next: " in str(caught.value)


def test_another_siglip_is_told(adapter, siglip, tmp_path):
    up = {"redux_up.weight": torch.zeros(120, 32)}
    save_file(ADAPTER | up, tmp_path / "wide.safetensors")
    with pytest.raises(FileError, match=r"wide\.safetensors takes 32 features of SigLIP, and .* has 24\. Next: take"):
        load_redux(TINY, tmp_path / "wide.safetensors", str(siglip))
    with pytest.raises(
        FileError, match="there is no SigLIP 'siglip': give a folder, or a hub id as google/siglip-so400m"
    ):
        load_redux(TINY, adapter, "siglip")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "clip"}))
    with pytest.raises(FileError, match="holds a 'clip' model; a SigLIP is a siglip, as google/"):
        load_redux(TINY, adapter, str(tmp_path))


def test_info_names_the_models_that_it_goes_with(adapter, monkeypatch):
    said = info(str(adapter))
    assert said.startswith(f"{adapter}: the FLUX.1 Redux adapter\n")
    assert "\ngoes with no model: " in said and "whose words have 40 features" in said
    monkeypatch.setitem(VARIANTS, "flux-dev-redux", replace(VARIANTS["flux-dev-redux"], params=TINY.params))
    assert "\ngoes with: flux-dev-redux\n" in f"{info(str(adapter))}\n"
