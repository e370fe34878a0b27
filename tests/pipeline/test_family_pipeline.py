"""The family in the pipeline: each way a model takes pictures, against the official functions on the same weights.

Tokens are equal to the bit where both do the same sums in the same order, else within 2e-5, as golden runs are.
"""

import json
from dataclasses import replace
from pathlib import Path

import cv2
import family_files
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from family_files import SIGLIP_TOKENS, control_lora, noise, redux_adapter, small_model
from golden_files import read
from no_float64 import NoFloat64
from PIL import Image
from random_lora import factors, write
from safetensors.torch import load_file, save_file
from tiny import CONTEXT, tiny_pipeline, tiny_variant

from flux_core import load_pipeline
from flux_core.checkpoint.files import adapter_path
from flux_core.errors import FileError, UsageError
from flux_core.hooks import Capture, Lora, Skip
from flux_core.images.given import open_given
from flux_core.images.masks import Canvas, without_step
from flux_core.images.metadata import read_request
from flux_core.images.output import save_picture
from flux_core.lora import attach, attached
from flux_core.lora.known import checked
from flux_core.model import Flux, FluxParams
from flux_core.pipeline import load
from flux_core.pipeline.conditions import bytes_beside
from flux_core.pipeline.environment import is_replayed
from flux_core.pipeline.family import CHANNELS, behind, beside, tokens_behind
from flux_core.request.generation import GenerationRequest
from flux_core.sampling import (
    FlowInputs,
    denoise,
    euler,
    family,
    flow_velocity,
    get_noise,
    get_schedule,
    graph,
    pack,
    prepare,
    prepare_control,
    prepare_fill,
    prepare_kontext,
    prepare_redux,
    unpack,
)
from flux_core.sampling.guidance import cfg_velocity, two_passes
from flux_core.sampling.inpaint import mask_tokens, repaint
from flux_core.variants import FEATURES, VARIANTS, Takes
from flux_core.vision.redux import Redux, load_redux

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:.*it is stretched", "ignore:true CFG takes two forwards"),
]
WIDTH, HEIGHT, STEPS, SEED, PROMPT = 48, 32, 3, 3, "a red apple"
FAST = {"width": WIDTH, "height": HEIGHT, "num_steps": STEPS, "force": True}
SIZES = ((32, 64), (48, 48), (64, 32))
"""at which the tiny Kontext sees references"""
WAYS = ("fill", "canny", "canny-lora", "kontext", "redux")


ROOM, CUP, PHOTO = noise(WIDTH, HEIGHT), noise(70, 112, 1), noise(90, 70, 2)
MASK = Image.new("L", (WIDTH, HEIGHT), 0)
MASK.paste(255, (8, 4, 30, 20))
MASK.paste(100, (30, 20, 40, 32))
PICTURES = {
    "fill": {"init_image": ROOM, "mask": MASK},
    "canny": {"control": ("canny", PHOTO)},
    "canny-lora": {"control": ("canny", PHOTO)},
    "kontext": {"reference": [CUP, PHOTO]},
    "redux": {"reference": [(CUP, 1.0), (PHOTO, 0.5)]},
}


# Tiny models ------------------------------------------------------------------------------------------


def official_control_model(base: Flux, lora: dict[str, torch.Tensor], scale: float, channels: int = 128) -> Flux:
    """The official rule, in the weights: y = W x + scale (B A x + b); zeros for the map in `img_in`; other norms."""
    state = {name: x.clone() for name, x in base.state_dict().items()}
    state["img_in.weight"] = F.pad(state["img_in.weight"], (0, channels - base.in_channels))
    for name, x in lora.items():
        stem, end = name.rpartition(".lora_")[::2] if ".lora_" in name else (name, "")
        if end == "A.weight":
            state[f"{stem}.weight"] += scale * lora[f"{stem}.lora_B.weight"] @ x
        elif end == "B.bias":
            state[f"{stem}.bias"] += scale * x
        elif not end:
            state[name] = x
    model = Flux(replace(base.params, in_channels=channels))
    model.load_state_dict(state)
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def siglip(tmp_path_factory):
    return family_files.siglip(tmp_path_factory.mktemp("siglip"))


def tiny_rows():
    """The family's rows at sizes that forward in a millisecond."""
    for name, row in VARIANTS.items():
        if row.takes:
            takes = replace(row.takes, sizes=SIZES) if row.takes.sizes else row.takes
            yield name, replace(tiny_variant(name), takes=takes)


@pytest.fixture
def pipeline_of(monkeypatch, tmp_path, siglip):
    """A function from one of WAYS to a tiny pipeline of it, whose row stands in for the official one."""
    for name, row in list(tiny_rows()):
        monkeypatch.setitem(VARIANTS, name, row)
    monkeypatch.setattr(family, "PREFERED_KONTEXT_RESOLUTIONS", [*SIZES])

    def made(way: str, **settings):
        pipeline = tiny_pipeline("flux-mini-fill" if way == "fill-lora" else f"flux-dev-{way}", **settings)
        if way == "canny-lora":
            pipeline.loras.become(control_lora(tmp_path / "control.safetensors", pipeline.model.params), 0.85)
        if way == "redux":
            adapter = redux_adapter(tmp_path / "redux.safetensors", CONTEXT)
            pipeline.denoiser.redux = load_redux(pipeline.variant, adapter, str(siglip))
        return pipeline

    return made


# The official way --------------------------------------------------------------------------------------


def edges(x: torch.Tensor) -> torch.Tensor:
    """The official map of edges: thresholds 50 and 200, levels that are cut off."""
    levels = ((x[0] + 1) * 127.5).to(torch.uint8).permute(1, 2, 0).numpy()
    return (torch.from_numpy(cv2.Canny(levels, 50, 200)).float() / 127.5 - 1)[None, None].expand(1, 3, -1, -1)


def prepared(pipeline, way: str, prompt: str = PROMPT) -> dict[str, torch.Tensor]:
    """The official inputs for the pictures of that way, as `denoise` takes them."""
    start, given = get_noise(1, HEIGHT, WIDTH, "cpu", torch.float32, SEED), (pipeline.t5, pipeline.clip)
    if way == "fill":
        found = prepare_fill(*given, start, prompt, pipeline.ae, ROOM, MASK)
    elif way.startswith("canny"):
        found = prepare_control(*given, start, prompt, pipeline.ae, edges, PHOTO)
    elif way == "redux":
        redux = pipeline.denoiser.redux
        found = prepare_redux(*given, start, prompt, lambda _: torch.cat((redux(CUP), 0.5 * redux(PHOTO)), dim=1), CUP)
    else:
        found = kontext(pipeline, prompt, CUP, PHOTO)
    return {name: x.float() for name, x in found.items()}


def kontext(pipeline, prompt: str, *pictures: Image.Image) -> dict[str, torch.Tensor]:
    """Official inputs for a reference, and those of more behind it, at the next index of the position ids.

    The official noise is bf16; ours is the plain noise in the model's dtype.
    """
    parts = []
    for index, picture in enumerate(pictures):
        part, _, _ = prepare_kontext(
            pipeline.t5, pipeline.clip, prompt, pipeline.ae, picture, SEED, "cpu", WIDTH, HEIGHT
        )
        part["img_cond_seq_ids"][..., 0] += index
        parts.append(part)
    behind = {name: torch.cat([part[name] for part in parts], dim=1) for name in ("img_cond_seq", "img_cond_seq_ids")}
    start = pack(get_noise(1, HEIGHT, WIDTH, "cpu", torch.float32, SEED))
    return {name: x for name, x in parts[0].items() if name != "img_cond_orig"} | behind | {"img": start}


def schedule(inputs, steps: int = STEPS) -> list[float]:
    return get_schedule(steps, inputs["img"].shape[1], shift=True)


def officially(pipeline, way: str, model: Flux | None = None) -> torch.Tensor:
    """The tokens of the picture, by the official functions alone."""
    inputs, guidance = prepared(pipeline, way), pipeline.variant.guidance
    with torch.no_grad():
        return denoise(model or pipeline.model, **inputs, timesteps=schedule(inputs), guidance=guidance)


def levels(pipeline, x: torch.Tensor) -> np.ndarray:
    with torch.no_grad():
        pixels = pipeline.ae.decode(unpack(x, HEIGHT, WIDTH))[0].clamp(-1, 1)
    return ((pixels + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0).numpy()


def drawn(pipeline, way: str, **fields) -> tuple[torch.Tensor, Image.Image]:
    """The tokens after the last step, and the picture."""
    last = {}
    given = FAST | PICTURES.get(way, {}) | fields
    (image,) = pipeline.generate(PROMPT, SEED, on_step=lambda step: last.update(x=step.x), **given)
    return last["x"], image


def composited(painted: np.ndarray, mask: Image.Image = MASK) -> np.ndarray:
    """With the room's own pixels where the mask is black, and its tone beside them."""
    return np.asarray(without_step(Image.fromarray(painted), ROOM, mask))


# Truths -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
def test_it_is_the_official_picture(pipeline_of, way):
    """To the bit: the same sums in the same order."""
    pipeline = pipeline_of(way)
    x, image = drawn(pipeline, way)
    expected = officially(pipeline, way)
    assert torch.equal(x, expected)
    picture = levels(pipeline, expected)
    assert np.array_equal(image, composited(picture) if way == "fill" else picture)


@pytest.mark.parametrize("way", WAYS)
def test_its_pictures_matter_and_the_same_request_gives_the_same_pixels(pipeline_of, way):
    pipeline = pipeline_of(way)
    x, image = drawn(pipeline, way)
    again, same = drawn(pipeline, way)
    assert torch.equal(x, again) and image.tobytes() == same.tobytes()
    assert drawn(pipeline_of(way), way)[1].tobytes() == image.tobytes()
    others = {
        "fill": [{"init_image": noise(WIDTH, HEIGHT, 9)}, {"mask": MASK.transpose(Image.Transpose.ROTATE_180)}],
        "kontext": [{"reference": [CUP]}, {"reference": [PHOTO, CUP]}, {"reference": [CUP, CUP]}],
        "redux": [{"reference": [CUP]}, {"reference": [(CUP, 1.0), (PHOTO, 0.4)]}, {"reference": [PHOTO, CUP]}],
    }.get(way, [{"control": ("canny", CUP)}, {"control": PHOTO}])
    for change in others:
        assert not torch.allclose(drawn(pipeline, way, **change)[0], x, atol=1e-4), change
    assert torch.equal(drawn(pipeline, way)[0], x)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_way_in_every_precision_without_float64(pipeline_of, way, dtype):
    pipeline = pipeline_of(way, dtype=dtype)
    with NoFloat64():
        x, image = drawn(pipeline, way, init_image=ROOM, mask=MASK)
    assert x.dtype == getattr(torch, dtype) and image.size == (WIDTH, HEIGHT)


@pytest.mark.parametrize("way", WAYS)
def test_parts_that_take_turns_draw_the_same(pipeline_of, way):
    assert torch.equal(drawn(pipeline_of(way, offload=True), way)[0], drawn(pipeline_of(way), way)[0])


@pytest.mark.parametrize("offload", [False, True])
def test_what_makes_words_is_counted_or_goes_home(pipeline_of, monkeypatch, offload):
    pipeline, moves, move = pipeline_of("redux", offload=offload), [], Redux.to
    monkeypatch.setattr(Redux, "to", lambda redux, device: moves.append(str(device)) or move(redux, device))
    pipeline.fallback.device = torch.device("cpu", 0)  # the CPU by another name
    given, records = open_given(**PICTURES["redux"])
    request = GenerationRequest(name="flux-dev-redux", prompt=PROMPT, seed=SEED, **records, **FAST)
    of_all = sum(p.nbytes for p in pipeline.denoiser.redux.parameters())
    assert bytes_beside(pipeline.denoiser.seen(request, given)) == (0 if offload else of_all)
    assert moves == ["cpu:0", "cpu"] if offload else ["cpu:0"]


@pytest.mark.parametrize("way", ["kontext", "redux"])
def test_references_count_where_it_is_decided_whether_steps_are_replayed(pipeline_of, monkeypatch, way):
    pipeline, (given, records) = pipeline_of(way), open_given(**PICTURES[way])
    request = GenerationRequest(name=f"flux-dev-{way}", prompt=PROMPT, seed=SEED, **records, **FAST | {"num_steps": 4})
    behind = tokens_behind(request, given, pipeline.denoiser.redux)
    assert behind == sum(one.extra_tokens for one in pipeline.denoiser.seen(request, given)) > 0
    monkeypatch.setattr(pipeline.fallback, "device", torch.device("cuda"))
    room = graph.TOKENS - pipeline.variant.max_text - WIDTH * HEIGHT // 256
    assert is_replayed(pipeline.placement, request, behind=room)
    assert not is_replayed(pipeline.placement, request, behind=room + 1)


def test_kontext_with_one_reference_is_the_official_one_to_the_bit(pipeline_of):
    pipeline = pipeline_of("kontext")
    inputs = {name: x.float() for name, x in kontext(pipeline, PROMPT, PHOTO).items()}
    with torch.no_grad():
        expected = denoise(pipeline.model, **inputs, timesteps=schedule(inputs), guidance=pipeline.variant.guidance)
    assert torch.equal(drawn(pipeline, "kontext", reference=PHOTO)[0], expected)


def test_kontext_draws_at_its_references_size_by_default(pipeline_of):
    pipeline = pipeline_of("kontext")
    (image,) = pipeline.generate(PROMPT, SEED, reference=PHOTO, num_steps=1, force=True)
    assert image.size == (48, 48)  # of SIZES, the nearest in shape to 90x70


def test_a_control_lora_is_the_official_model_of_it(pipeline_of, tmp_path):
    """Its branches sum in another order than weights that hold the sum: within 2e-5."""
    pipeline, plain = pipeline_of("canny-lora"), tiny_pipeline("flux-dev-canny-lora")
    lora = load_file(tmp_path / "control.safetensors")
    model = official_control_model(plain.model, lora, 0.85)
    expected = officially(pipeline, "canny-lora", model)
    assert torch.allclose(drawn(pipeline, "canny-lora")[0], expected, atol=2e-5, rtol=0)
    weak = officially(pipeline, "canny-lora", official_control_model(plain.model, lora, 0.8))
    assert not torch.allclose(weak, expected, atol=2e-3)


def test_a_control_lora_attached_is_the_official_wrapper(tmp_path):
    """The golden file's base, LoRA and inputs."""
    golden = read("family/control_lora")
    told, inputs = json.loads(golden.metadata["denoise"]), golden.group("in.")
    base = Flux(FluxParams(**json.loads(golden.metadata["base_params"])))
    base.load_state_dict(golden.group("base."))
    path = write(tmp_path / "control.safetensors", golden.group("lora."))
    given = {name: x.float() for name, x in inputs.items() if name != "noise"}
    with torch.no_grad(), attach(base.eval(), path, float(golden.metadata["scale"])):
        found = denoise(base, **given, timesteps=told["timesteps"], guidance=told["guidance"])
    assert torch.allclose(found, golden.tensors["out.denoised"], atol=2e-5, rtol=0)


def test_a_map_of_ones_own_is_seen_as_it_is(pipeline_of):
    pipeline = pipeline_of("canny")
    start = get_noise(1, HEIGHT, WIDTH, "cpu", torch.float32, SEED)
    found = prepare_control(pipeline.t5, pipeline.clip, start, PROMPT, pipeline.ae, lambda x: x, PHOTO)
    inputs = {name: x.float() for name, x in found.items()}
    with torch.no_grad():
        expected = denoise(pipeline.model, **inputs, timesteps=schedule(inputs), guidance=pipeline.variant.guidance)
    assert torch.equal(drawn(pipeline, "canny", control=PHOTO)[0], expected)


def test_fill_draws_a_part_alone_as_a_picture_of_its_own(pipeline_of):
    pipeline, large = pipeline_of("fill"), noise(130, 90, 4)
    mask = Image.new("L", large.size)
    mask.paste(255, (70, 20, 95, 41))
    _, records = open_given(large, mask)
    _, image = drawn(pipeline, "fill", init_image=large, mask=mask, mask_padding=8)
    canvas = Canvas.of(GenerationRequest(prompt=PROMPT, **records, mask_padding=8, **FAST), large, mask)
    start = get_noise(1, HEIGHT, WIDTH, "cpu", torch.float32, SEED)
    inputs = prepare_fill(pipeline.t5, pipeline.clip, start, PROMPT, pipeline.ae, canvas.image, canvas.mask)
    inputs = {name: x.float() for name, x in inputs.items()}
    with torch.no_grad():
        x = denoise(pipeline.model, **inputs, timesteps=schedule(inputs), guidance=pipeline.variant.guidance)
    assert image.size == large.size
    assert np.array_equal(image, canvas.finished(Image.fromarray(levels(pipeline, x))))
    kept = np.asarray(mask) == 0
    assert np.array_equal(np.asarray(image)[kept], np.asarray(large)[kept])


def test_a_part_that_is_drawn_alone_follows_its_part_of_the_map(pipeline_of):
    pipeline, large = pipeline_of("canny"), noise(130, 90, 4)
    mask = Image.new("L", large.size)
    mask.paste(255, (70, 20, 95, 41))
    found, _ = drawn(pipeline, "", init_image=large, mask=mask, mask_padding=8, control=("canny", large))
    _, records = open_given(large, mask)
    canvas = Canvas.of(GenerationRequest(prompt=PROMPT, **records, mask_padding=8, **FAST), large, mask)
    start = get_noise(1, HEIGHT, WIDTH, "cpu", torch.float32, SEED)
    part = large.crop(canvas.box)
    inputs = prepare_control(pipeline.t5, pipeline.clip, start, PROMPT, pipeline.ae, edges, part)
    inputs = {name: x.float() for name, x in inputs.items()}
    with torch.no_grad():
        latent, sigmas = pack(pipeline.ae.encode(family.pixels_of(canvas.image))), schedule(inputs)
        keep = repaint(latent, inputs["img"], mask_tokens(family.mask_of(canvas.mask)), sigmas)
        expected = denoise(pipeline.model, **inputs, timesteps=sigmas, guidance=30.0, on_step=keep)
    assert torch.equal(found, expected)


# Guidance, plans and LoRAs beside them --------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
@torch.no_grad()
def test_true_cfg_sees_the_pictures_in_both_rows(pipeline_of, way):
    """Two passes to the bit; as rows of one batch within 2e-5."""
    pipeline, steer = pipeline_of(way), {"negative_prompt": "a blue car", "true_cfg_scale": 3.0}

    def velocity(prompt):
        inputs = prepared(pipeline, way, prompt)
        return flow_velocity(pipeline.model, **{k: x for k, x in inputs.items() if k != "img"}, guidance=guidance)

    guidance, sigmas = torch.tensor([pipeline.variant.guidance]), schedule(start := prepared(pipeline, way))
    passes = two_passes(velocity(PROMPT), velocity("a blue car"))
    expected = euler(cfg_velocity(passes, sigmas, 3.0), start["img"], sigmas)
    assert torch.allclose(drawn(pipeline, way, **steer)[0], expected, atol=2e-5, rtol=0)
    pipeline.denoiser.one_batch = False
    assert torch.allclose(found := drawn(pipeline, way, **steer)[0], expected, atol=2e-6, rtol=0)
    assert not torch.allclose(found, drawn(pipeline, way)[0], atol=1e-3)


@pytest.mark.parametrize("way", WAYS)
@torch.no_grad()
def test_a_plan_works_beside_them(pipeline_of, way):
    pipeline, seen = pipeline_of(way), {}
    skip = [Skip(blocks="layer.0")]
    inputs = prepared(pipeline, way)
    start, sigmas = inputs.pop("img"), schedule(inputs | {"img": inputs["img_ids"]})
    guidance = torch.tensor([pipeline.variant.guidance])
    with pipeline.run(skip, sigmas) as run:
        velocity = flow_velocity(pipeline.model, **inputs, guidance=guidance, run=run)
        expected = euler(velocity, start, sigmas)
    look = Capture(sites=["double_blocks.0.img.in", "double_blocks.0.txt.in", "velocity"], into=seen)
    found, image = drawn(pipeline, way, plan=[*skip, look])
    assert torch.allclose(found, expected, atol=2e-6, rtol=0)
    assert not torch.allclose(found, drawn(pipeline, way)[0], atol=1e-4)
    assert [entry["kind"] for entry in json.loads(image.info["flux_core"])["plan"]] == ["skip"]
    tokens, words = WIDTH * HEIGHT // 256, 4
    behind = sum(w * h // 256 for w, h in ((32, 64), (48, 48))) if way == "kontext" else 0
    sizes = {key: {x.shape[1] for name, x in seen.items() if key in name} for key in ("img.in", "txt.in", "velocity")}
    assert sizes == {"img.in": {tokens + behind}, "txt.in": {words + (2 * SIGLIP_TOKENS if way == "redux" else 0)},
                     "velocity": {tokens + behind}}  # fmt: skip


@torch.no_grad()
def test_a_lora_works_on_top_of_a_control_lora(pipeline_of, tmp_path):
    """The user's own goes, and the model's stays."""
    pipeline = pipeline_of("canny-lora")
    plain = pipeline.loras.components.flux.params
    style = write(tmp_path / "style.safetensors", factors(replace(plain, in_channels=64), seed=1, strength=0.3))
    before, _ = drawn(pipeline, "canny-lora")
    with attach(pipeline.model, style, 0.7):
        expected = officially(pipeline, "canny-lora")
    assert not torch.allclose(expected, before, atol=1e-3)
    entry = {"kind": "lora", "file": str(style), "scale": 0.7}
    found, image = drawn(pipeline, "canny-lora", plan=[entry])
    assert torch.equal(found, expected)
    record = json.loads(image.info["flux_core"])["plan"]
    assert [one["file"] for one in record] == ["style.safetensors"]  # the model's own is no LoRA of the request
    assert torch.equal(drawn(pipeline, "canny-lora")[0], before)
    with pipeline.load_lora(style, 0.7):
        assert torch.equal(drawn(pipeline, "canny-lora")[0], expected)
    assert torch.equal(drawn(pipeline, "canny-lora")[0], before)


def test_an_entry_that_names_the_models_own_lora_says_its_scale(pipeline_of, tmp_path):
    """As where it became the model's at that scale; a request without one draws at the row's."""
    pipeline, weak = pipeline_of("canny-lora"), pipeline_of("canny-lora")
    file = tmp_path / "control.safetensors"
    weak.loras._of_model.remove()
    weak.loras.become(file, 0.3)

    def drawn(pipeline, *scales):
        plan = [Lora(file=str(file), scale=scale) for scale in scales]
        return pipeline.generate(PROMPT, SEED, plan=plan, **FAST, **PICTURES["canny-lora"])[0].tobytes()

    plain = drawn(pipeline)
    assert drawn(pipeline, 0.3) == drawn(weak) != plain == drawn(pipeline)
    assert drawn(pipeline, 0.85) == drawn(weak, 0.85) == plain and len(attached(pipeline.model)) == 1


def test_a_control_lora_counts_as_a_lora_beside_the_layers_and_two_are_one_too_many(pipeline_of, tmp_path):
    pipeline = pipeline_of("canny-lora")
    assert pipeline.loras.branched(()) and not pipeline_of("canny").loras.branched(())
    with pytest.raises(FileError, match="is a control LoRA"):
        pipeline.load_lora(tmp_path / "control.safetensors")


def test_a_lora_makes_a_model_that_fills(pipeline_of, tmp_path):
    pipeline = pipeline_of("fill-lora")
    lora = control_lora(tmp_path / "fill.safetensors", pipeline.model.params, channels=384)
    model = official_control_model(pipeline.model, load_file(lora), 0.85, channels=384)
    pipeline.loras.become(lora, 0.85)
    x, _ = drawn(pipeline, "fill")
    assert torch.allclose(x, officially(pipeline, "fill", model), atol=2e-5, rtol=0)


@pytest.mark.parametrize(
    ("name", "file", "finding"),
    [
        ("fill", "canny", r"for another model: .* takes 64 features of a picture, and flux-mini-fill gives 320"),
        ("kontext", "canny", r"for another model: .* takes 64 .*, and flux-mini-kontext gives 0"),
        ("canny", "kontext", r"no control LoRA: .* takes 0 .* gives 64. Next: give one for flux-mini-canny"),
    ],
)
def test_a_lora_of_another_model_is_found_by_its_header_before_a_network_is_loaded(monkeypatch, name, file, finding):
    other = adapter_path(VARIANTS[f"flux-mini-{file}"])
    monkeypatch.setenv("FLUX_LORA", str(other))
    monkeypatch.setattr(load, "load_components", None)
    with pytest.raises(FileError, match=finding):
        load_pipeline(f"flux-mini-{name}", "cpu")


def test_features_are_those_that_official_models_take():
    rows = [row for row in VARIANTS.values() if row.takes.channels and not row.adapter]
    assert {row.params.in_channels - row.params.out_channels - row.takes.features for row in rows} == {0}
    assert FEATURES.keys() == CHANNELS.keys()


@pytest.mark.parametrize(("channels", "names"), [(128, "flux-mini-canny or flux-mini-depth"), (384, "flux-mini-fill")])
def test_a_control_lora_is_said_to_go_with_models_of_its_width(tmp_path, channels, names):
    lora = control_lora(tmp_path / "lora.safetensors", VARIANTS["flux-mini"].params, channels=channels)
    with pytest.raises(FileError, match=rf"{channels - 64} of them .* and --name {names}$"):
        checked(Lora(file=str(lora)), VARIANTS["flux-mini"].params)


@pytest.mark.parametrize("kind", ["fill", "depth"])
def test_what_does_not_ship_is_made_by_a_command_and_found_by_a_variable(kind):
    made = rf"train_family\.py data work weights/flux-mini {kind} .*` .*point FLUX_MINI_{kind.upper()}_LORA"
    with pytest.raises(FileError, match=made):
        load_pipeline(f"flux-mini-{kind}", "cpu")


# Any model repaints -----------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_model_without_channels_repaints_by_blending_latents():
    """diffusers' rule where the mask is black or white (`tests/sampling/test_inpaint.py`), to the bit."""
    pipeline = tiny_pipeline()
    black_and_white = MASK.point(lambda level: 255 if level == 255 else 0)
    for mask, strength in ((black_and_white, 1.0), (black_and_white, 0.5), (MASK, 1.0)):
        inputs = prepare(pipeline.t5, pipeline.clip, get_noise(1, HEIGHT, WIDTH, "cpu", torch.float32, SEED), PROMPT)
        start, sigmas = inputs.pop("img"), get_schedule(4, 6, shift=True)
        latent = pack(pipeline.ae.encode(family.pixels_of(ROOM)))
        keep = repaint(latent, start, mask_tokens(family.mask_of(mask)), sigmas)
        skipped = 0 if strength == 1 else 2
        x = sigmas[skipped] * start + (1 - sigmas[skipped]) * latent
        expected = denoise(pipeline.model, x, **inputs, timesteps=sigmas[skipped:], guidance=3.5, on_step=keep)
        fields = {"init_image": ROOM, "mask": mask, "strength": strength, "num_steps": 4}
        found, image = drawn(pipeline, "", **fields)
        black = mask_tokens(family.mask_of(mask)) == 0
        assert torch.equal(found, expected) and torch.equal(found[black], latent[black])
        assert np.array_equal(image, composited(levels(pipeline, expected), mask))


def test_a_white_mask_at_strength_1_is_the_plain_picture_of_that_seed():
    pipeline = tiny_pipeline()
    white = Image.new("L", ROOM.size, 255)
    with pytest.warns(UserWarning, match="the mask is white everywhere"):
        found, image = drawn(pipeline, "", init_image=ROOM, mask=white)
    plain, picture = drawn(pipeline, "")
    assert torch.equal(found, plain) and image.tobytes() == picture.tobytes()


def test_a_users_own_step_callback_sees_what_is_kept():
    pipeline, seen = tiny_pipeline(), []
    black = mask_tokens(family.mask_of(MASK)) == 0
    pipeline.generate(PROMPT, SEED, init_image=ROOM, mask=MASK, on_step=lambda step: seen.append(step.x[black]), **FAST)
    with torch.no_grad():
        latent = pack(pipeline.ae.encode(family.pixels_of(ROOM)))
    start, sigmas = pack(get_noise(1, HEIGHT, WIDTH, "cpu", torch.float32, SEED)), get_schedule(STEPS, 6, shift=True)
    for x, sigma in zip(seen, sigmas[1:], strict=True):
        assert torch.equal(x, ((1 - sigma) * latent + sigma * start)[black])


def test_the_family_repaints_too(pipeline_of):
    """Canny, Kontext and Redux have no channels for a mask: what is kept is blended in beside their pictures."""
    for way in ("canny", "kontext", "redux"):
        pipeline = pipeline_of(way)
        found, image = drawn(pipeline, way, init_image=ROOM, mask=MASK)
        with torch.no_grad():
            latent = pack(pipeline.ae.encode(family.pixels_of(ROOM)))
        black = mask_tokens(family.mask_of(MASK)) == 0
        assert torch.equal(found[black], latent[black])
        assert np.array_equal(np.asarray(image)[np.asarray(MASK) == 0], np.asarray(ROOM)[np.asarray(MASK) == 0])


# Recorded, and refused ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
def test_a_saved_picture_names_its_pictures_by_file_and_hash(pipeline_of, way, tmp_path, monkeypatch):
    """And is drawn again from them."""
    monkeypatch.chdir(tmp_path)
    for name, image in (("room", ROOM), ("mask", MASK), ("cup", CUP), ("photo", PHOTO)):
        image.save(f"{name}.png")
    files = {
        "fill": {"init_image": "room.png", "mask": "mask.png"},
        "kontext": {"reference": ["cup.png", "photo.png"]},
        "redux": {"reference": [("cup.png", 1.0), ("photo.png", 0.5)]},
    }.get(way, {"control": "canny:photo.png"})
    pipeline = pipeline_of(way)
    _, image = drawn(pipeline, way, **files)
    assert image.tobytes() == drawn(pipeline, way)[1].tobytes()
    read = read_request(save_picture(image, tmp_path, "saved"))
    given, records = open_given(**files)
    assert {name: getattr(read, name) for name in records} == records
    assert pipeline.draw(read, given).tobytes() == image.tobytes()
    with pytest.raises(UsageError, match="goes with a request that names one"):
        pipeline.draw(read)


@pytest.mark.parametrize("way", WAYS)
def test_without_its_pictures_nothing_is_drawn(pipeline_of, way):
    pipeline = pipeline_of(way)
    with pytest.raises(UsageError, match=f"flux-dev-{way} .*Next: --"):
        pipeline.generate(PROMPT, SEED, **FAST)
    request = GenerationRequest(name=f"flux-dev-{way}", prompt=PROMPT, seed=SEED, **FAST)
    with pytest.raises(UsageError, match="Next: "):
        pipeline.draw_rows([request, request.model_copy(update={"seed": 4})])


@pytest.mark.parametrize("way", WAYS)
def test_a_velocity_by_hand_has_no_pictures(pipeline_of, way):
    """What a model sees behind its tokens may be missing; what it sees beside them may not."""
    pipeline = pipeline_of(way)
    given = {"width": WIDTH, "height": HEIGHT}
    x = pipeline.noise(SEED, **given)
    if way in ("kontext", "redux"):
        assert pipeline.velocity(PROMPT, **given)(x, 1.0).shape == x.shape
    else:
        with pytest.raises(UsageError, match=f"flux-dev-{way} sees a picture beside what it draws. Next: pipeline.gen"):
            pipeline.velocity(PROMPT, **given)


def test_one_condition_leaves_what_another_gave():
    """A model's own and those of a caller are applied one after another."""
    x, size = torch.randn(1, 16, 4, 6), (48, 32)
    first = FlowInputs(*(torch.zeros(shape) for shape in ((1, 6, 3), (1, 2, 8), (1, 2, 3), (1, 4), (1,))))
    inputs = beside(2 * x).apply(beside(x).apply(first, size), size)
    tokens = pack(x.bfloat16()).float()
    assert torch.equal(inputs.img_cond, torch.cat((tokens, 2 * tokens), -1))
    inputs = behind([2 * x]).apply(behind([x]).apply(first, size), size)
    assert torch.equal(inputs.img_cond_seq, torch.cat((tokens, 2 * tokens), 1))
    assert inputs.img_cond_seq_ids.shape == (1, 12, 3)


# From files ----------------------------------------------------------------------------------------------------


@pytest.fixture
def of_files(monkeypatch, tmp_path):
    """A function from a row's name to a small model's files, and a place for its adapter; the row is in the table."""

    def written(name: str, **changes) -> tuple[dict[str, Path], Path]:
        row, files = small_model(tmp_path / name, name, **changes)
        monkeypatch.setitem(VARIANTS, name, row)
        return files, tmp_path / f"{name}.safetensors"

    return written


def test_a_control_lora_comes_from_its_variable(of_files, monkeypatch):
    """The whole way: files, loader, real text encoders; and the hash of the adapter among the weights."""
    name = "flux-dev-depth-lora"
    files, path = of_files(name)
    control_lora(path, VARIANTS[name].params)
    monkeypatch.setenv("FLUX_DEV_DEPTH_LORA", str(path))
    pipeline = load_pipeline(name, "cpu", **files)
    x, image = drawn(pipeline, "", control=PHOTO)
    start = get_noise(1, HEIGHT, WIDTH, "cpu", torch.float32, SEED)
    inputs = prepare_control(pipeline.t5, pipeline.clip, start, PROMPT, pipeline.ae, lambda x: x, PHOTO)
    plain = Flux(VARIANTS[name].params)
    plain.load_state_dict(load_file(files["model"]))
    model = official_control_model(plain, load_file(path), 0.85)
    with torch.no_grad():
        inputs = {key: value.float() for key, value in inputs.items()}
        expected = denoise(model, **inputs, timesteps=schedule(inputs), guidance=10.0)
    assert torch.allclose(x, expected, atol=2e-5, rtol=0)
    record = json.loads(image.info["flux_core"])
    assert path.name in record["weights"] and record["weights"] == pipeline.weights and record["plan"] == []
    monkeypatch.setenv("FLUX_DEV_DEPTH_LORA", "nowhere.safetensors")
    with pytest.raises(FileError, match=r"FLUX_DEV_DEPTH_LORA=nowhere\.safetensors does not exist. Next: point"):
        load_pipeline(name, "cpu", **files)


def test_a_lora_that_leaves_the_input_as_it_is_makes_no_control_model(of_files, monkeypatch):
    name = "flux-dev-canny-lora"
    files, path = of_files(name)
    control_lora(path, VARIANTS[name].params)
    save_file({key: x for key, x in load_file(path).items() if "img_in" not in key}, path)
    monkeypatch.setenv("FLUX_LORA", str(path))
    with pytest.raises(FileError, match=r"canny-lora\.safetensors is no control LoRA: .* Next: give one"):
        load_pipeline(name, "cpu", **files)


def test_redux_comes_from_its_variable(of_files, monkeypatch, siglip):
    name = "flux-schnell-redux"
    files, path = of_files(name, takes=Takes(words=str(siglip)))
    redux_adapter(path, VARIANTS[name].params.context_in_dim)
    monkeypatch.setenv("FLUX_REDUX", str(path))
    pipeline = load_pipeline(name, "cpu", **files)
    x, image = drawn(pipeline, "", reference=[CUP, PHOTO])
    start = get_noise(1, HEIGHT, WIDTH, "cpu", torch.float32, SEED)
    encoder, both = load_redux(VARIANTS[name], path, str(siglip)), [(CUP, 1.0), (PHOTO, 1.0)]
    inputs = prepare_redux(pipeline.t5, pipeline.clip, start, PROMPT, lambda _: encoder.words(both), CUP)
    with torch.no_grad():
        expected = denoise(pipeline.model, **inputs, timesteps=get_schedule(STEPS, 6, shift=False), guidance=0.0)
    assert torch.equal(x, expected)
    assert path.name in json.loads(image.info["flux_core"])["weights"]
