"""The pipeline draws what the request says: the same pixels each time, and never a picture of NaN."""

import json

import pytest
import torch
from no_float64 import NoFloat64
from PIL import Image
from tiny import tiny_pipeline

from flux_core.device.choice import available_devices, pick_device, pick_dtype
from flux_core.errors import MemoryShortage, NonFiniteError, UsageError
from flux_core.pipeline import Pipeline, load_pipeline
from flux_core.request.generation import GenerationRequest
from flux_core.sampling import denoise, get_noise, get_schedule, prepare, unpack

pytestmark = pytest.mark.usefixtures("one_thread")
FAST = {"width": 48, "height": 32, "num_steps": 2, "force": True}
"""not square, so that sides cannot be confused"""


@pytest.fixture(scope="module")
def pipeline() -> Pipeline:
    return tiny_pipeline()


def draw(pipeline: Pipeline, prompt: str = "a red apple", seed: int = 3, **fields) -> Image.Image:
    return pipeline.generate(prompt, seed, **{**FAST, **fields})[0]


def test_the_same_request_gives_the_same_pixels(pipeline):
    first = draw(pipeline)
    assert draw(pipeline).tobytes() == first.tobytes()
    assert draw(tiny_pipeline()).tobytes() == first.tobytes()
    request = GenerationRequest(prompt="a red apple", seed=3, **FAST)
    assert pipeline.generate(request)[0].tobytes() == first.tobytes()


@pytest.mark.parametrize(
    "change", [{"seed": 4}, {"prompt": "a blue apple"}, {"num_steps": 3}, {"guidance": 9.0}, {"height": 64}]
)
def test_every_part_of_a_request_matters(pipeline, change):
    assert draw(pipeline, **change).tobytes() != draw(pipeline).tobytes()


def test_pixels_do_not_depend_on_how_many_are_drawn(pipeline):
    many = pipeline.generate("a red apple", 3, num_images=3, **FAST)
    assert [image.tobytes() for image in many] == [draw(pipeline, seed=3 + i).tobytes() for i in range(3)]


def test_it_is_the_official_way_by_hand(pipeline):
    """The steps of a script on the official package, with its names."""
    noise = get_noise(1, 32, 48, "cpu", torch.float32, 3)
    inputs = prepare(pipeline.t5, pipeline.clip, noise, "a red apple")
    sigmas = get_schedule(2, inputs["img"].shape[1], shift=True)
    with torch.no_grad():
        x = denoise(pipeline.model, **inputs, timesteps=sigmas, guidance=3.5)
        pixels = pipeline.ae.decode(unpack(x, 32, 48))[0].clamp(-1, 1)
    levels = ((pixels + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0)
    assert draw(pipeline).tobytes() == levels.numpy().tobytes()


def test_images_carry_their_own_request(pipeline):
    images = pipeline.generate("a red apple", 3, num_images=2, **FAST)
    records = [json.loads(image.info["flux_core"]) for image in images]
    assert [record["seed"] for record in records] == [3, 4]
    assert records[0]["dtype"] == "float32" and records[0]["weights"] == {"flux-mini.safetensors": "abc"}
    assert "Seed: 4, Size: 48x32" in images[1].info["parameters"]


def test_sizes_between_multiples_of_16_are_the_middle_of_the_next(pipeline):
    with pytest.warns(UserWarning, match="17x40 is drawn at 32x48"):
        small = draw(pipeline, width=17, height=40)
    whole = draw(pipeline, width=32, height=48)
    assert small.size == (17, 40)
    assert small.tobytes() == whole.crop((7, 4, 24, 44)).tobytes()
    assert json.loads(small.info["flux_core"])["width"] == 17


def test_a_prompt_that_is_too_long_is_told(pipeline):
    with pytest.warns(UserWarning, match="longer than 4 tokens; dropped: 'and a pear'"):
        draw(pipeline, "a very red apple and a pear")


def test_text_is_encoded_once_for_a_request():
    pipeline = tiny_pipeline()
    pipeline.generate("a red apple", 3, num_images=3, **FAST)
    assert pipeline.t5.calls == pipeline.clip.calls == 1


INIT = Image.radial_gradient("L").convert("RGB")


def test_strength_reaches_from_the_picture_to_pure_noise(pipeline):
    def with_strength(strength):
        return draw(pipeline, init_image=INIT, strength=strength, num_steps=4, fit="stretch")

    latent = pipeline.ae.encode
    with torch.no_grad():
        pixels = torch.tensor(list(INIT.resize((48, 32), Image.Resampling.LANCZOS).tobytes())).float()
        again = pipeline.ae.decode(latent((pixels / 127.5 - 1).view(32, 48, 3).permute(2, 0, 1)[None]))[0]
    levels = ((again.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0)
    assert with_strength(0.0).tobytes() == levels.numpy().tobytes()
    assert with_strength(1.0).tobytes() == draw(pipeline, num_steps=4).tobytes()
    assert with_strength(0.5).tobytes() not in (with_strength(0.0).tobytes(), with_strength(1.0).tobytes())


def test_strength_skips_the_first_steps(pipeline):
    seen = []
    draw(pipeline, init_image=INIT, strength=0.8, num_steps=4, on_step=lambda step: seen.append(step.sigma))
    sigmas = get_schedule(4, 6)
    assert seen == pytest.approx(sigmas[0:4])  # int(0.2 * 4) = 0: nothing is skipped
    seen.clear()
    image = draw(pipeline, init_image=INIT, strength=0.5, num_steps=4, on_step=lambda step: seen.append(step.sigma))
    assert seen == pytest.approx(sigmas[2:4])
    record = json.loads(image.info["flux_core"])
    assert record["strength"] == 0.5 and record["init_image"]["file"] == ""


def test_an_init_image_of_any_size_is_fitted(pipeline, tmp_path):
    INIT.resize((33, 71)).save(tmp_path / "odd.png")
    assert draw(pipeline, init_image=tmp_path / "odd.png").size == (48, 32)


def test_a_request_with_an_init_image_needs_the_picture(pipeline):
    asked = GenerationRequest(prompt="x", init_image={"file": "cat.png", "sha256": "0"}, **FAST)
    with pytest.raises(UsageError, match="init image"):
        pipeline.generate(asked)
    image = pipeline.generate(asked, init_image=INIT)[0]
    assert json.loads(image.info["flux_core"])["init_image"]["sha256"] != "0"


def test_schnell_draws_without_guidance_and_shift():
    image = tiny_pipeline("flux-schnell").generate("x", 0, width=32, height=32, force=True)[0]
    assert "Distilled CFG Scale" not in image.info["parameters"] and "Steps: 4" in image.info["parameters"]


def test_a_step_callback_sees_every_step_and_may_change_the_latents(pipeline):
    steps = []
    draw(pipeline, num_steps=3, on_step=lambda step: steps.append((step.index, step.x.shape)))
    assert steps == [(i, (1, 6, 64)) for i in range(3)]
    changed = draw(pipeline, on_step=lambda step: torch.zeros_like(step.x) if step.index == 1 else None)
    assert changed.tobytes() != draw(pipeline).tobytes()


@pytest.mark.parametrize("part", ["model.final_layer.linear.bias", "ae.decoder.conv_out.bias"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_numbers_give_no_picture(part, value):
    pipeline = tiny_pipeline()
    owner, _, name = part.partition(".")
    getattr(pipeline, owner).get_parameter(name).data[0] = value
    with pytest.raises(NonFiniteError, match="step 1" if owner == "model" else "decoded picture"):
        draw(pipeline)


@pytest.mark.parametrize("fields", [{}, {"init_image": INIT}])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_no_float64_anywhere(fields, dtype):
    pipeline = tiny_pipeline(dtype=dtype)
    with NoFloat64():
        draw(pipeline, **fields)


def test_a_request_for_another_model_or_dtype_is_refused(pipeline):
    with pytest.raises(UsageError, match="flux-schnell, but flux-mini"):
        draw(pipeline, name="flux-schnell")
    with pytest.raises(UsageError, match="bfloat16, but"):
        draw(pipeline, dtype="bf16")


def test_running_out_of_memory_is_one_of_our_errors():
    pipeline = tiny_pipeline()
    pipeline.model.forward = lambda *_: torch.empty(2**60)
    with pytest.raises(MemoryShortage, match=r"drawing 48x32 pixels: 4611686018427387904 bytes more .* Next: "):
        draw(pipeline)


@pytest.mark.parametrize("name", ["cuda:99", "gpu", "cpu:1", "mps:7", "meta", ""])
def test_devices_that_are_not_there_name_those_that_are(name):
    with pytest.raises(UsageError, match=r"Use one of: auto, .*cpu"):
        pick_device(name)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_cuda_without_cuda_says_why():
    with pytest.raises(UsageError, match="--device cuda is not there: torch"):
        pick_device("cuda")


def test_the_device_and_dtype_are_found_out():
    best = pick_device()
    assert str(best) == available_devices()[0] and pick_device("cpu").type == "cpu"
    assert pick_dtype(None, torch.device("cpu")) == torch.float32
    assert pick_dtype("auto", torch.device("mps")) == torch.float32
    assert pick_dtype("bf16", torch.device("cpu")) == pick_dtype(torch.bfloat16, torch.device("cpu"))
    with pytest.raises(UsageError, match="float16"):
        pick_dtype("float16", torch.device("cpu"))


def test_a_model_from_a_folder_draws_with_its_own_tokenizers(small):
    """Files, loader, real text encoders, command: everything but trained weights."""
    pipeline = load_pipeline("flux-mini", device="cpu")
    assert pipeline.weights and pipeline.dtype == torch.float32
    side = {"width": small.width, "height": small.height, "num_steps": 2}
    image = pipeline.generate("a red apple", 1, **side)[0]
    assert json.loads(image.info["flux_core"])["weights"] == pipeline.weights
    assert load_pipeline(small.name).generate("a red apple", 1, **side)[0].tobytes() == image.tobytes()


class Counted:
    """A tokenizer, and the number of characters that it was given."""

    def __init__(self, tokenizer, lengths):
        self.tokenizer, self.lengths = tokenizer, lengths

    def __getattr__(self, name):
        return getattr(self.tokenizer, name)

    def pieces(self, text):
        self.lengths.append(len(text))
        return self.tokenizer.pieces(text)


@pytest.mark.parametrize("prompt", ["an apple " * 120_000, "x" * 1_000_000, "\U0001f468\u200d\U0001f469 \x00" * 50_000])
def test_a_megabyte_of_prompt_is_cut_with_a_warning(small, prompt):
    pipeline = load_pipeline("flux-mini", device="cpu")
    lengths = []
    for encoder in (pipeline.t5, pipeline.clip):
        encoder.tokenizer = Counted(encoder.tokenizer, lengths)
    with pytest.warns(UserWarning, match="dropped|64 KB"):
        pipeline.generate(prompt, 1, width=16, height=16, num_steps=1, force=True)
    assert 0 < sum(lengths) <= 3 * len(prompt)  # once by each encoder, and once to say what is dropped
