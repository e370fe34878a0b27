"""The family on a card, on flux-mini and what it learned to see: kernels, graphs, budgets, turns, compiled blocks."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from controlnets import params_for, random_net, write_net, xlabs_params
from golden_files import distance
from PIL import Image
from safetensors.torch import save_file

from flux_core import kernels, load_pipeline
from flux_core.device.memory import Picture
from flux_core.device.plan import make_plan
from flux_core.kernels import describe
from flux_core.sampling import graph as replay
from flux_core.variants import VARIANTS

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore:.*it is stretched")]
WIDTH, HEIGHT, STEPS = 128, 96, 5
SEES = ("flux-mini-canny", "flux-mini-kontext", "controlnet", "controlnet of pixels")
FORMATS = ("bfloat16", "fp8", "int8", "nf4")
FAR = {"bfloat16": 0.06, "fp8": 0.1, "int8": 0.06, "nf4": 0.15}
"""a velocity from that of fp32, at most"""
PARAMS = VARIANTS["flux-mini"].params


def noise(width, height, seed=0):
    """Rectangles of noise: a picture with edges."""
    small = np.random.default_rng(seed).integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.NEAREST)


@dataclass
class Drawn:
    image: bytes
    velocity: torch.Tensor
    """of the first step, in fp32 on the CPU"""
    forwards: int
    """that Python made"""


@dataclass
class Artist:
    """Draws what a model of SEES sees."""

    name: str
    given: dict

    def load(self, device="cuda", dtype="bfloat16", **settings):
        return load_pipeline(self.name, device, dtype, **settings)

    def draw(self, pipeline, seed=3, **fields):
        made, velocities, model = [], [], type(pipeline.model)

        def counted(forward):
            return lambda *args: made.append(1) or forward(*args)

        fields = {"width": WIDTH, "height": HEIGHT, "num_steps": STEPS, "force": True, **self.given, **fields}
        with pytest.MonkeyPatch.context() as patch:
            for name in ("_blocks", "_blocks_run"):
                patch.setattr(model, name, counted(getattr(model, name)))
            (image,) = pipeline.generate(
                "a red apple", seed, **fields, on_step=lambda step: velocities.append(step.velocity)
            )
        return Drawn(image.tobytes(), velocities[0].float().cpu(), len(made))


@pytest.fixture(scope="module")
def nets(tmp_path_factory):
    """Files of ControlNets for flux-mini: InstantX's kind, and XLabs'."""
    folder = tmp_path_factory.mktemp("nets")
    save_file(random_net(xlabs_params(PARAMS), std=0.05).state_dict(), folder / "pixels.safetensors")
    return write_net(folder / "plain.safetensors", params_for(PARAMS), std=0.05), folder / "pixels.safetensors"


@pytest.fixture
def artist(request, nets):
    picture = noise(WIDTH, HEIGHT)
    return {
        "flux-mini-canny": Artist("flux-mini-canny", {"control": picture}),
        "flux-mini-kontext": Artist("flux-mini-kontext", {"reference": noise(96, 128, 1)}),
        "controlnet": Artist("flux-mini", {"controlnet": [(str(nets[0]), picture, 0.5)]}),
        "controlnet of pixels": Artist("flux-mini", {"controlnet": [(str(nets[1]), picture, 0.5)]}),
    }[request.param]


every_way = pytest.mark.parametrize("artist", SEES, indirect=True)


def smallest(artist, pipeline, dtype):
    """Bytes for a picture, with the tokens and the networks that come beside it."""
    behind = WIDTH * HEIGHT // 128 if "reference" in artist.given else 0  # twice the picture's own tokens
    beside = sum(p.nbytes for net in pipeline.denoiser.controlnets.loaded.values() for p in net.parameters())
    return make_plan(pipeline.variant, 0, dtype, None, Picture(WIDTH, HEIGHT, behind=behind)).smallest + beside


@every_way
@pytest.mark.parametrize("dtype", FORMATS)
def test_kernels_are_as_near_to_fp32_as_the_plain_functions(artist, dtype, monkeypatch):
    def velocities(pipeline):
        """Of several noises: of a single one the two differ by a third either way."""
        return torch.cat([artist.draw(pipeline, seed, num_steps=1).velocity for seed in range(6)])

    truth = velocities(artist.load("cpu", "float32"))
    with monkeypatch.context() as patch:
        patch.setattr(kernels, "can_fuse", lambda device: False)
        pipeline = artist.load(dtype=dtype)
        plain = velocities(pipeline)
        assert describe(pipeline.model)["kernels"] == "plain"
    pipeline = artist.load(dtype=dtype)
    fused = velocities(pipeline)
    assert describe(pipeline.model)["kernels"] != "plain"
    found = distance(fused, truth), distance(plain, truth)
    assert found[0] < FAR[dtype] and found[0] < 1.2 * found[1], found


@every_way
@pytest.mark.parametrize("dtype", ["bfloat16", "fp8"])
def test_a_replayed_picture_is_the_same_to_the_bit(artist, dtype, monkeypatch):
    """Channels and tokens are in the recording; with residuals, which Python adds, every step is computed."""
    pipeline = artist.load(dtype=dtype)
    first, again = artist.draw(pipeline), artist.draw(pipeline)
    monkeypatch.setattr(replay, "TOKENS", 0)
    monkeypatch.setattr(replay, "MORE_LAUNCHES", 0)
    slow = artist.draw(pipeline)
    assert first.image == again.image == slow.image
    assert (first.forwards, slow.forwards) == (STEPS if "controlnet" in artist.given else 2, STEPS)


@pytest.mark.parametrize("artist", ["controlnet"], indirect=True)
def test_a_plain_picture_between_two_that_follow_is_replayed(artist):
    pipeline = artist.load()
    followed = artist.draw(pipeline)
    plain = artist.draw(pipeline, controlnet=None)
    assert plain.forwards == 2 and plain.image != followed.image
    assert artist.draw(pipeline).image == followed.image
    assert artist.draw(artist.load(), controlnet=None).image == plain.image


@every_way
@pytest.mark.parametrize("dtype", ["bfloat16", "int8", "nf4"])
def test_the_pixels_are_the_same_in_every_budget_and_where_parts_take_turns(artist, dtype):
    pipeline = artist.load(dtype=dtype)
    expected, least = artist.draw(pipeline).image, smallest(artist, pipeline, dtype)
    del pipeline
    assert artist.draw(artist.load(dtype=dtype, offload=True)).image == expected
    for budget in (least, least + 20_000_000):
        pipeline = artist.load(dtype=dtype, memory=str(budget))
        assert pipeline.fallback.offload
        assert artist.draw(pipeline).image == expected
        del pipeline


@pytest.mark.parametrize("artist", SEES[:3], indirect=True)
def test_compiled_blocks_draw_what_they_draw_uncompiled(artist):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    plain = artist.draw(artist.load())
    compiled = artist.draw(artist.load(compile=True))
    assert distance(compiled.velocity, plain.velocity) < FAR["bfloat16"]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2
    torch._dynamo.reset()
