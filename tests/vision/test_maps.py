"""Maps of edges and depth against the official encoders, and a depth model of transformers' own class."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from golden_files import read
from PIL import Image
from random_model import random_weights
from transformers import AutoImageProcessor, DepthAnythingConfig, DepthAnythingForDepthEstimation, Dinov2Config

from flux_core.errors import FileError, UsageError
from flux_core.vision.depth import depth_pixels, load_depth
from flux_core.vision.maps import MAPS, canny, load_map, map_picture, official_levels

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def golden():
    return read("family/control").tensors


@pytest.fixture(scope="module")
def resized(golden):
    """The picture at the size that is drawn."""
    return Image.fromarray(golden["out.resized"].numpy())


def write_depth_model(folder, **changes):
    """A Depth Anything that sees pictures at about 42x42, as transformers keeps one."""
    backbone = Dinov2Config(
        image_size=28,
        patch_size=14,
        hidden_size=16,
        num_hidden_layers=4,
        num_attention_heads=2,
        out_indices=[1, 2, 3, 4],
        reshape_hidden_states=False,
        use_mask_token=False,
    )
    config = DepthAnythingConfig(
        backbone_config=backbone,
        reassemble_hidden_size=16,
        neck_hidden_sizes=[4, 8, 12, 16],
        fusion_hidden_size=8,
        head_hidden_size=8,
        **changes,
    )
    random_weights(DepthAnythingForDepthEstimation(config), seed=5, std=0.3).save_pretrained(folder)
    sizes = {"size": {"height": 42, "width": 42}, "keep_aspect_ratio": True, "ensure_multiple_of": 14, "resample": 3}
    kind = {"image_processor_type": "DPTImageProcessor", "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    (folder / "preprocessor_config.json").write_text(json.dumps(sizes | kind))
    return folder


@pytest.fixture
def depth_model(tmp_path):
    return write_depth_model(tmp_path / "depth")


def change(file, **entries):
    file.write_text(json.dumps(json.loads(file.read_text()) | entries))


def test_edges_are_the_official_ones(golden, resized):
    found = canny(resized)
    assert found.mode == "RGB" and found.size == resized.size
    assert all(np.array_equal(channel, golden["out.canny"]) for channel in found.split())
    pixels = load_map("canny")(resized)
    assert torch.equal(pixels, (golden["out.canny"].float() / 127.5 - 1).expand(1, 3, -1, -1))
    assert np.array_equal(map_picture(pixels), found)


def test_levels_are_cut_off_as_the_official_code_does(golden, resized):
    assert np.array_equal(official_levels(resized).transpose(2, 0, 1), golden["out.depth.processor_input"][0])
    ramp = np.arange(256, dtype=np.uint8)
    found = official_levels(Image.fromarray(np.stack([ramp] * 3, axis=-1)[None]))[0, :, 0]
    assert (found < ramp).sum() == 63 and set(ramp - found) == {0, 1}


def test_a_depth_is_divided_and_not_stretched(golden):
    found = depth_pixels(golden["in.depth.predicted_depth"], 64, 96)
    assert torch.allclose(found, golden["out.depth.image"], atol=1e-6, rtol=0)
    assert found.min() < -1  # resampling went below black, and the model sees that


def test_a_maps_picture_is_what_the_model_sees_within_half_a_level(golden):
    theirs = golden["out.depth.image"]
    levels = torch.from_numpy(np.array(map_picture(theirs))).permute(2, 0, 1)[None]
    assert (levels / 127.5 - 1 - theirs.clamp(-1, 1)).abs().max() <= 0.5 / 127.5 + 1e-6
    beyond = torch.tensor([-2.0, -1.0, 1.0, 3.0]).expand(1, 3, 1, 4)
    assert np.array_equal(np.array(map_picture(beyond))[0, :, 0], [0, 0, 255, 255])


def test_depth_is_that_of_transformers_at_the_pictures_size(depth_model, resized):
    found = load_map("depth", model=str(depth_model))(resized)
    model, processor = (
        kind.from_pretrained(depth_model) for kind in (DepthAnythingForDepthEstimation, AutoImageProcessor)
    )
    with torch.no_grad():
        inputs = processor(torch.from_numpy(official_levels(resized)).permute(2, 0, 1)[None], return_tensors="pt")
        theirs = model(**inputs).predicted_depth
    assert theirs.shape[1:] != (64, 96) and theirs.std() > 1
    assert found.shape == (1, 3, 64, 96) and found.dtype == torch.float32
    torch.testing.assert_close(found, depth_pixels(theirs, 64, 96))


@pytest.mark.gpu
def test_on_a_card_depth_is_that_of_the_cpu(depth_model, resized, monkeypatch):
    """But for TF32, which cuDNN convolves in unless it is told otherwise, as in the official code."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    found = load_map("depth", "cuda", str(depth_model))(resized)
    assert found.is_cuda
    torch.testing.assert_close(found.cpu(), load_map("depth", model=str(depth_model))(resized), atol=1e-3, rtol=1e-3)


def test_a_map_is_read_without_torch_or_opencv():
    code = "import sys; from flux_core.vision.maps import MAPS; print(*MAPS, *{'torch', 'cv2'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == list(MAPS)
    with pytest.raises(UsageError, match=r"no map 'dept': there are canny, depth\. Did you mean depth"):
        load_map("dept")


def test_edges_without_opencv_say_what_to_install():
    code = (
        "import sys; sys.modules['cv2'] = None\n"
        "from flux_core.vision.maps import load_map\n"
        "try: load_map('canny')\n"
        "except Exception as error: print(type(error).__name__, error)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "UsageError the map canny needs OpenCV. Next: pip install opencv-python-headless\n"


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ({"model_type": "dpt"}, "holds a 'dpt' model; a depth model is a depth_anything, as LiheYoung/"),
        ({"neck_hidden_sizes": "x"}, "the depth model could not be read: "),
        ({"backbone_config": {"model_type": "x"}}, "the depth model could not be read: "),
        ({"fusion_hidden_size": 16}, "the depth model could not be read: "),
        ({"depth_estimation_type": "metric"}, "gives metric depth, which grows with distance. Next: take a relative"),
    ],
)
def test_another_network_is_told(depth_model, entries, words):
    change(depth_model / "config.json", **entries)
    with pytest.raises(FileError) as caught:
        load_depth(str(depth_model))
    assert str(caught.value).startswith(str(depth_model)) and words in str(caught.value)


def test_a_folder_that_lacks_something_is_told(depth_model, tmp_path):
    with pytest.raises(FileError, match="there is no depth model 'depth': give a folder, or a hub id as LiheYoung/"):
        load_depth("depth")
    with pytest.raises(FileError, match=r"there is no depth model .*give a folder"):
        load_depth(str(depth_model / "model.safetensors"))
    (depth_model / "model.safetensors").rename(depth_model / "pytorch_model.bin")  # which would be a pickle
    with pytest.raises(FileError, match="the depth model could not be read"):
        load_depth(str(depth_model))
    (depth_model / "preprocessor_config.json").unlink()
    with pytest.raises(FileError, match="its image processor could not be read"):
        load_depth(str(depth_model))


def test_code_in_a_folder_is_not_run(depth_model):
    ran = depth_model / "ran"
    (depth_model / "own.py").write_text(f"open({str(ran)!r}, 'w')\n")
    change(depth_model / "config.json", auto_map={"AutoModelForDepthEstimation": "own.Model"})
    change(depth_model / "preprocessor_config.json", auto_map={"AutoImageProcessor": "own.Processor"})
    load_depth(str(depth_model))
    change(depth_model / "preprocessor_config.json", image_processor_type="Processor")
    with pytest.raises(FileError, match="its image processor could not be read"):
        load_depth(str(depth_model))
    assert not ran.exists()
