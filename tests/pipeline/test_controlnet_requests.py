"""Requests that follow ControlNets: the conditions that they are made into, when nets come and go, what is refused."""

import gc
import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch
from controlnets import params_for, random_net, write_net, xlabs_params
from PIL import Image
from random_lora import factors, write
from safetensors.torch import save_file
from tiny import tiny_pipeline, tiny_variant

from flux_core.checkpoint.controlnet import load_controlnet
from flux_core.device.budget import Budget
from flux_core.errors import FileError, MemoryShortage, UsageError
from flux_core.hooks import Skip
from flux_core.images.given import Given, open_given
from flux_core.images.metadata import parse_request
from flux_core.pipeline import environment as surroundings
from flux_core.pipeline.controlnet import ControlNetCondition
from flux_core.pipeline.family import MAPS_KEPT, Maps
from flux_core.request.generation import GenerationRequest
from flux_core.sampling.family import pixels_of
from flux_core.variants import VARIANTS
from flux_core.vision.maps import load_map

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore")]  # notes for the user
OF = tiny_variant().params
SIZE = (48, 32)
FAST = {"width": 48, "height": 32, "num_steps": 4, "force": True}
CFG = {"negative_prompt": "a blue car", "true_cfg_scale": 3.0}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("nets")
    save_file(random_net(xlabs_params(OF)).state_dict(), folder / "pixels.safetensors")
    return {
        "plain": write_net(folder / "plain.safetensors", params_for(OF)),
        "other": write_net(folder / "other.safetensors", params_for(OF), seed=6),
        "union": write_net(folder / "union.safetensors", params_for(OF, modes=4)),
        "pixels": folder / "pixels.safetensors",
    }


@pytest.fixture
def pipeline():
    return tiny_pipeline()


def scene(seed=0, size=SIZE):
    levels = np.random.default_rng(seed).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    return Image.fromarray(levels).resize(size, Image.Resampling.NEAREST)


def drawn(pipeline, *nets, **fields):
    """The pixels of a picture that follows these."""
    (image,) = pipeline.generate("a red apple", 3, controlnet=nets or None, **{**FAST, **fields})
    return image.tobytes()


def by_hand(pipeline, *conditions, given=None, **fields):
    request = GenerationRequest(prompt="a red apple", seed=3, **{**FAST, **fields})
    return pipeline.draw(request, given, conditions=conditions).tobytes()


def condition(pipeline, file, pixels, *settings, **more):
    net = load_controlnet(file, dtype=torch.float32, of=OF)
    with torch.no_grad():
        cond = pixels if net.params.takes_pixels else pipeline.codec.encode_pixels(pixels)
    return ControlNetCondition(net, cond, *settings, **more)


# What is drawn ---------------------------------------------------------------------------------------


def test_a_map_of_ones_own_steers_as_its_condition_does(pipeline, files):
    expected = condition(pipeline, files["plain"], pixels_of(scene()), 0.7, 0.0, 0.5)
    found = drawn(pipeline, (files["plain"], scene(), 0.7, (0, 0.5)))
    assert found == by_hand(pipeline, expected) != by_hand(pipeline)
    assert found != drawn(pipeline, (files["plain"], scene(), 0.7))


def test_a_photograph_becomes_a_map_whose_name_is_the_mode(pipeline, files):
    edges = load_map("canny")(scene())
    pairs = (((None, None, None), 0), ((None, None, "tile"), 1), ((1.0, (0, 1), 3), 3))
    pictures = []
    for settings, mode in pairs:
        pictures.append(drawn(pipeline, (files["union"], ("canny", scene()), *settings)))
        assert pictures[-1] == by_hand(pipeline, condition(pipeline, files["union"], edges, mode=mode))
    assert len(set(pictures)) == 3


def test_pixels_are_taken_as_they_are(pipeline, files):
    expected = condition(pipeline, files["pixels"], pixels_of(scene()), 0.5)
    assert drawn(pipeline, (files["pixels"], scene(), 0.5)) == by_hand(pipeline, expected) != by_hand(pipeline)


def test_a_picture_of_another_size_is_stretched(pipeline, files):
    large = scene(size=(80, 90))
    expected = condition(pipeline, files["plain"], pixels_of(large.resize(SIZE, Image.Resampling.LANCZOS)))
    with pytest.warns(UserWarning, match="the ControlNet's picture is 80x90, not the shape of 48x32: it is stretched"):
        assert drawn(pipeline, (files["plain"], large)) == by_hand(pipeline, expected)


@pytest.mark.parametrize("fields", [{}, CFG, {"plan": (Skip(blocks="layer.0", steps="1-2"),)}], ids=str)
def test_several_are_added_up_beside_plans_and_true_guidance(pipeline, files, fields):
    pair = [(files["plain"], scene(), 0.7), (files["union"], scene(1), 0.3, None, "depth")]
    first = condition(pipeline, files["plain"], pixels_of(scene()), 0.7)
    second = condition(pipeline, files["union"], pixels_of(scene(1)), 0.3, mode=2)
    found = drawn(pipeline, *pair, **fields)
    assert found == by_hand(pipeline, first, second, **fields) != by_hand(pipeline, first, **fields)


def test_a_LoRA_goes_with_it(pipeline, files, tmp_path):
    file = write(tmp_path / "style.safetensors", factors(OF, seed=8))
    expected = condition(pipeline, files["plain"], pixels_of(scene()))
    alone = drawn(pipeline, (files["plain"], scene()))
    with pipeline.load_lora(file):
        found = drawn(pipeline, (files["plain"], scene()))
        assert found == by_hand(pipeline, expected)
    assert found != alone


@pytest.mark.parametrize(
    ("name", "pictures"),
    [
        ("flux-dev-canny", {"control": ("canny", scene(4))}),
        ("flux-dev-kontext", {"reference": scene(4)}),
        ("flux-dev-fill", {"init_image": scene(4), "mask": Image.new("L", SIZE, 255)}),
    ],
    ids=lambda one: one if isinstance(one, str) else "",
)
def test_models_that_take_a_picture_follow_one_too(files, name, pictures, monkeypatch):
    row = VARIANTS[name]
    if row.takes.sizes:
        monkeypatch.setitem(VARIANTS, name, replace(row, takes=replace(row.takes, sizes=(SIZE,))))  # not a megapixel
    pipeline = tiny_pipeline(name)
    given, records = open_given(**pictures)
    found = drawn(pipeline, (files["plain"], scene()), **pictures)
    expected = condition(pipeline, files["plain"], pixels_of(scene()))
    assert found == by_hand(pipeline, expected, given=given, name=name, **records) != drawn(pipeline, **pictures)


@pytest.mark.parametrize("padding", [None, 8])
def test_what_is_painted_in_follows_the_same_part_of_its_map(pipeline, files, padding):
    photo, map, mask = scene(2, (96, 64)), scene(3, (96, 64)), Image.new("L", (96, 64))
    mask.paste(255, (56, 24, 72, 40))
    fields = {"init_image": photo, "mask": mask, "mask_padding": padding}
    box = (40, 16, 88, 48) if padding else (0, 0, 96, 64)
    part = map.crop(box).resize(SIZE, Image.Resampling.LANCZOS)
    given, records = open_given(photo, mask)
    expected = condition(pipeline, files["plain"], pixels_of(part))
    found = drawn(pipeline, (files["plain"], map), **fields)
    assert found == by_hand(pipeline, expected, given=given, mask_padding=padding, **records)
    assert found != drawn(pipeline, **fields)


def test_at_scale_zero_the_picture_is_the_plain_one(pipeline, files):
    assert drawn(pipeline, (files["plain"], scene(), 0.0), (files["pixels"], scene(), 0)) == drawn(pipeline)


def test_parts_that_take_turns_draw_the_same(files):
    net = files["plain"], scene()
    assert drawn(tiny_pipeline(offload=True), net) == drawn(tiny_pipeline(), net)


# When nets come and go ---------------------------------------------------------------------------------


def test_a_net_is_loaded_once_and_is_gone_after_a_picture_without_it(pipeline, files):
    nets = pipeline.denoiser.controlnets.loaded
    drawn(pipeline, (files["plain"], scene()), (files["plain"], scene(1), 0.5))
    (net,) = nets.values()
    drawn(pipeline, (files["plain"], scene(2)), (files["other"], scene()))
    assert len(nets) == 2 and net in nets.values()  # which have the same header
    gone = weakref.ref(net)
    del net
    drawn(pipeline, (files["other"], scene()))
    assert len(nets) == 1
    drawn(pipeline)
    gc.collect()
    assert not nets and gone() is None


def test_maps_are_kept_as_many_as_a_picture_may_need():
    maps = Maps(torch.device("cpu"))
    made = [maps.made("", scene(i), SIZE) for i in range(MAPS_KEPT)]
    assert all(maps.made("", scene(i), SIZE) is map for i, map in enumerate(made))
    maps.made("canny", scene(0), SIZE)
    assert maps.made("", scene(0), SIZE) is not made[0] and maps.made("", scene(3), SIZE) is made[3]


def test_a_budget_counts_each_net_once(pipeline, files):
    size = sum(p.nbytes for p in load_controlnet(files["plain"], dtype=torch.float32, of=OF).parameters())
    pipeline.placement.budget = Budget(size + 1000, "1MB", lambda picture: 1000)
    drawn(pipeline, (files["plain"], scene()), (files["plain"], scene(1)))
    with pytest.raises(MemoryShortage, match=r"--memory 1MB .* takes at least 0\.01 GB"):
        drawn(pipeline, (files["plain"], scene()), (files["other"], scene()))
    drawn(pipeline)


def test_no_graph_replays_what_a_net_steers(pipeline, files, monkeypatch):
    monkeypatch.setattr(surroundings, "is_worth_it", lambda *args: True)  # as for a small picture on a card
    (plain,) = pipeline.generate("a red apple", 3, **FAST)
    (steered,) = pipeline.generate("a red apple", 3, controlnet=[(files["plain"], scene())], **FAST)
    found = [parse_request(image.info["flux_core"], "it").environment["replay"] for image in (plain, steered)]
    assert found == ["graph", "none"]


# What is refused -----------------------------------------------------------------------------------------


def steered(files, name="plain"):
    given, records = open_given(controlnet=[(files[name], scene())], variant=tiny_variant())
    return given, GenerationRequest(prompt="a red apple", seed=3, **FAST, **records)


def test_a_request_is_drawn_with_its_own_nets_alone(pipeline, files):
    given, request = steered(files)
    plain = request.model_copy(update={"controlnet": None})
    for one, pictures in (
        (request, None),
        (plain, given),
        (request, given._replace(controlnets=given.controlnets * 2)),
    ):
        with pytest.raises(UsageError, match="a ControlNet goes with a request that names one"):
            pipeline.draw(one, pictures)
    with pytest.raises(UsageError, match=r"other\.safetensors is another ControlNet than the request's"):
        pipeline.draw(request, steered(files, "other")[0])
    with pytest.raises(UsageError, match="a ControlNet goes with a request"):
        pipeline.draw_rows([request])
    assert not pipeline.denoiser.controlnets.loaded


def test_nothing_but_what_is_given_names_a_file(files):
    given, request = steered(files)
    (use,) = request.controlnet
    assert use.net == "plain.safetensors" and str(files["plain"].parent) not in request.model_dump_json()
    assert given.controlnets[0].net.sha256 == use.net_sha256 and Given().controlnets == ()
    with pytest.raises(UsageError, match="names a folder"):
        replace_use(request, net="/tmp/plain.safetensors")


def replace_use(request, **changes):
    (use,) = request.controlnet
    return GenerationRequest(**dict(request) | {"controlnet": [use.model_dump() | changes]})


@pytest.mark.parametrize("changes", [{"scale": 101}, {"start": -0.1}, {"end": 1.1}, {"mode": -1}, {"more": 1}], ids=str)
def test_a_record_has_the_bounds_of_the_flag(files, changes):
    with pytest.raises(UsageError, match="controlnet"):
        replace_use(steered(files)[1], **changes)


@pytest.mark.parametrize("net", ["plain.safetensors", ("plain.safetensors",), (1, 2, 3, 4, 5, 6)], ids=str)
def test_python_has_one_shape(pipeline, net):
    with pytest.raises(UsageError, match=r"a ControlNet is \(file, picture, scale, \(start, end\), mode\)"):
        drawn(pipeline, net)


def test_a_model_with_other_sizes_is_named(pipeline, files, tmp_path):
    wide = write_net(tmp_path / "wide.safetensors", params_for(replace(OF, hidden_size=32, num_heads=4)))
    with pytest.raises(FileError, match="for another transformer: hidden size 32 instead of 16"):
        drawn(pipeline, (wide, scene()))
