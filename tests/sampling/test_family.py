"""Fill, Canny, Depth, Redux and Kontext against the official implementation: what is prepared, and what is drawn."""

import json

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from golden_files import flux_of, read
from PIL import Image
from transformers import SiglipVisionConfig, SiglipVisionModel

from flux_core.model import AutoEncoder
from flux_core.params import AutoEncoderParams
from flux_core.sampling import (
    denoise,
    family,
    prepare_control,
    prepare_fill,
    prepare_kontext,
    prepare_redux,
)
from flux_core.sampling.family import aspect_ratio_to_height_width, kontext_size

CONDITIONS = "img_cond", "img_cond_seq", "img_cond_seq_ids"


@pytest.fixture(scope="module")
def ae():
    golden = read("family/ae")
    made = AutoEncoder(AutoEncoderParams(**json.loads(golden.metadata["params"])))
    made.load_state_dict({name: x.float() for name, x in golden.group("weights.").items()})
    return made.eval()


class Case:
    """A file of tensors, with its pictures, and text encoders that return its tokens."""

    def __init__(self, name):
        self.golden = read(f"family/{name}")
        self.inputs, self.told = self.golden.group("in."), json.loads(self.golden.metadata["denoise"])

    def picture(self, name="image"):
        return Image.fromarray(self.inputs[name].numpy())

    def t5(self, prompts):
        return self.inputs["txt"]

    def clip(self, prompts):
        return self.inputs["vec"]

    def check(self, prepared, prefix, latents=()):
        """What was prepared: equal, or where it was encoded within 1e-4 and a rounding to bf16."""
        for name, theirs in self.golden.group(f"out.{prefix}").items():
            if name not in prepared:
                continue
            assert prepared[name].dtype == theirs.dtype or name == "img", name
            near = {"atol": 1e-4, "rtol": 2**-7} if name in latents else {"atol": 0, "rtol": 0}
            assert torch.allclose(prepared[name].float(), theirs.float(), **near), name

    def drawn(self, prepared, guidance, timesteps=None):
        given = {name: x.float() for name, x in prepared.items() if name in (*CONDITIONS, *TAKEN)}
        return denoise(flux_of(self.golden), **given, timesteps=timesteps or self.told["timesteps"], guidance=guidance)

    def near(self, found, name):
        assert torch.allclose(found, self.golden.tensors[name], atol=2e-5, rtol=0)


TAKEN = "img", "img_ids", "txt", "txt_ids", "vec"


def stored(case, prefix):
    return {k: x for k, x in case.golden.group(f"out.{prefix}").items() if isinstance(x, torch.Tensor)}


def test_fill_keeps_a_picture_and_paints_where_the_mask_is_white(ae, tmp_path):
    case = Case("fill")
    for name in ("image", "mask"):
        case.picture(name).save(tmp_path / f"{name}.png")
    files = tmp_path / "image.png", str(tmp_path / "mask.png")
    found = prepare_fill(case.t5, case.clip, case.inputs["noise"], "a cup", ae, *files)
    case.check(found, "prepare.", latents=["img_cond"])
    case.near(case.drawn(stored(case, "prepare."), case.told["guidance"]), "out.denoised")
    with pytest.raises(ValueError, match="the mask has 48x64 pixels, and 96x64 are drawn"):
        small = case.picture("mask").resize((48, 64))
        prepare_fill(case.t5, case.clip, case.inputs["noise"], "a cup", ae, files[0], small)


def canny(x):
    """The official edge detector: thresholds 50 and 200, on levels that are cut off, not rounded."""
    levels = ((x[0] + 1) * 127.5).to(torch.uint8).permute(1, 2, 0).numpy()
    edges = torch.from_numpy(cv2.Canny(levels, 50, 200)).float() / 127.5 - 1
    return edges[None, None].expand(1, 3, -1, -1)


def test_a_map_of_edges_or_depth_comes_beside_the_tokens(ae):
    case, seen = Case("control"), {}

    def depth(x):
        seen["size"] = x.shape
        found = case.inputs["depth.predicted_depth"][:, None].expand(-1, 3, -1, -1)
        return F.interpolate(found, x.shape[2:], mode="bicubic", antialias=True) / 127.5 - 1

    for name, encoder in (("canny", canny), ("depth", depth)):
        noise = case.inputs["noise"]
        found = prepare_control(case.t5, case.clip, noise, "a robot", ae, encoder, case.picture())
        case.check(found, "prepare.")
        case.check(found, f"{name}.", latents=["img_cond"])
        given = stored(case, "prepare.") | {"img_cond": case.golden.tensors[f"out.{name}.img_cond"]}
        case.near(case.drawn(given, case.told[f"guidance_{name}"]), f"out.{name}.denoised")
    assert seen["size"] == (1, 3, 64, 96)


def test_a_picture_as_words_follows_those_of_t5():
    case = Case("redux")
    tower = SiglipVisionModel(SiglipVisionConfig(**json.loads(case.golden.metadata["siglip"]))).eval()
    tower.load_state_dict(case.golden.group("siglip."))
    up, down = case.golden.group("redux.redux_up."), case.golden.group("redux.redux_down.")

    def encoder(picture):
        assert np.array_equal(picture, case.inputs["image"])
        tokens = tower(pixel_values=case.golden.tensors["out.pixel_values"]).last_hidden_state
        return F.linear(F.silu(F.linear(tokens, **up)), **down)

    found = prepare_redux(case.t5, case.clip, case.inputs["noise"], "", encoder, case.picture())
    case.check(found, "prepare.", latents=["txt"])
    case.near(case.drawn(stored(case, "prepare."), case.told["guidance"]), "out.denoised")


@pytest.mark.parametrize("target", ["auto", "target"])
def test_kontext_sees_a_picture_behind_its_own(ae, monkeypatch, target):
    case = Case("kontext")
    monkeypatch.setattr(
        family, "PREFERED_KONTEXT_RESOLUTIONS", [tuple(x) for x in json.loads(case.golden.metadata["resolutions"])]
    )
    size = json.loads(case.golden.metadata["target_wh"]) if target == "target" else (None, None)
    seed = int(case.golden.metadata["seed"])
    found, height, width = prepare_kontext(case.t5, case.clip, "make it green", ae, case.picture(), seed, "cpu", *size)
    assert [height, width] == case.golden.tensors[f"out.{target}.size_hw"].tolist()
    case.check(found, f"{target}.", latents=["img_cond_seq"])
    resized = (found["img_cond_orig"][0].permute(1, 2, 0) + 1) * 127.5
    theirs = case.golden.tensors["out.image_resized"].float()
    assert torch.allclose(resized, theirs, atol=1.01)  # another Pillow may differ by a level
    steps = case.golden.tensors[f"out.{target}.timesteps"].tolist()
    case.near(case.drawn(stored(case, f"{target}."), case.told["guidance"], steps), f"out.{target}.denoised")


def test_kontexts_sizes():
    golden = read("family/kontext")
    for (width, height), expected in zip(
        golden.tensors["in.sizes_wh"].tolist(), golden.tensors["out.resolution_wh"].tolist(), strict=True
    ):
        assert list(kontext_size(width, height)) == expected
    ratios = json.loads(golden.metadata["aspect_ratios"])
    assert [list(map(int, aspect_ratio_to_height_width(x))) for x in ratios] == golden.tensors["out.aspect_wh"].tolist()


def test_several_prompts_are_as_many_pictures_each_with_the_condition(ae):
    """As the official functions begin: `if bs == 1 and not isinstance(prompt, str): bs = len(prompt)`."""
    draw = torch.Generator().manual_seed(0)
    words, vectors = torch.randn(2, 4, 8, generator=draw), torch.randn(2, 8, generator=draw)
    encoders = {"t5": lambda prompts: words[: len(prompts)], "clip": lambda prompts: vectors[: len(prompts)]}
    picture, noise = Image.new("RGB", (32, 32), "red"), torch.randn(1, 16, 4, 4, generator=draw)
    redux = prepare_redux(
        **encoders, img=noise, prompt=["a", "b"], encoder=lambda _: torch.ones(1, 3, 8), img_cond_path=picture
    )
    assert redux["img"].shape[0] == 2 and redux["txt"].shape == (2, 7, 8) and redux["txt_ids"].shape == (2, 7, 3)
    kontext, *_ = prepare_kontext(
        **encoders,
        prompt=["a", "b"],
        ae=ae,
        img_cond_path=picture,
        seed=1,
        device="cpu",
        target_width=32,
        target_height=32,
    )
    assert {x.shape[0] for name, x in kontext.items() if name != "img_cond_orig"} == {2}
    assert not torch.equal(*kontext["img"])  # noise of its own
