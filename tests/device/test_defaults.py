"""`torch.set_default_dtype` and `torch.set_default_device` change nothing of ours."""

from contextlib import contextmanager

import numpy as np
import pytest
import torch
from PIL import Image
from random_model import small_variant, write_scorer

from flux_core import load_pipeline
from flux_core.commands.explore import explore
from flux_core.device.defaults import plain_defaults
from flux_core.linears.gptq import gptq
from flux_core.methods.calibration import calibrated
from flux_core.methods.scoring import load_scorer
from flux_core.methods.stable_flow import Editing
from flux_core.model import AutoEncoder, Flux, strips
from flux_core.model.rope import embed_nd
from flux_core.request.generation import GenerationRequest
from flux_core.sampling import get_noise, get_schedule, image_ids, prepare
from flux_core.session.latents import read_latents

FAST = {"seed": 1, "num_steps": 3, "width": 32, "height": 48, "force": True}
INIT = Image.radial_gradient("L").convert("RGB")
CPU = torch.device("cpu")
pytestmark = pytest.mark.filterwarnings("ignore:true CFG takes two")
OTHERS = {
    "bfloat16": (torch.set_default_dtype, torch.bfloat16, torch.float32),
    "float64": (torch.set_default_dtype, torch.float64, torch.float32),
    "meta": (torch.set_default_device, "meta", None),
}


@contextmanager
def default(name):
    change, value, back = OTHERS[name]
    change(value)
    try:
        yield
    finally:
        change(back)


def bits(*tensors):
    return b"".join(x.detach().contiguous().view(torch.uint8).numpy().tobytes() for x in tensors)


def picture(dtype="float32", **fields):
    """Everything from the files on: text encoders, transformer, autoencoder."""
    pipeline = load_pipeline("flux-mini", "cpu", dtype)
    return pipeline.generate("a red apple", **{**FAST, **fields})[0].tobytes()


def in_strips():
    pipeline = load_pipeline("flux-mini", "cpu", vae_tiling=True)
    return pipeline.generate("a red apple", init_image=INIT, strength=0.7, **FAST)[0].tobytes()


def strips_of_many_rows():
    ae = load_pipeline("flux-mini", "cpu").ae
    x = torch.from_numpy(np.linspace(-1, 1, 16 * 20 * 4, dtype=np.float32)).reshape(1, 16, 20, 4)
    return bits(strips.decode(ae, x), strips.encode(ae, strips.decode(ae, x)))


def with_plan():
    plan = [
        {"kind": "scale", "sites": ["double_blocks.0.img.out"], "value": 0.3},
        {"kind": "add", "sites": ["vec"], "value": 0.1},
        {"kind": "first_block_cache", "threshold": 0.01},
    ]
    return picture(plan=plan)


def traceable_number():
    from flux_core.hooks import Custom, traceable

    scaled = traceable(lambda x, factor: x * factor)
    return picture(dtype="bfloat16", plan=[Custom(sites="single_blocks.*.out", fn=scaled, args=(0.3,))])


def edit():
    request = GenerationRequest(prompt="a red apple", **FAST)
    return bits(Editing(load_pipeline("flux-mini", "cpu"), request, ["a car"], ["layer.0"]).generated())


def session(folder):
    made = explore(prompt="a red apple", seeds=["1,2"], steps=["2"], width="32", height="32", force=True,
                   device="cpu", save_latents="every", output_dir=str(folder / "session"))  # fmt: skip
    files = [path for path in sorted(made.rglob("*")) if path.suffix in (".png", ".safetensors")]
    latents = [read_latents(path)[0] for path in files if path.suffix == ".safetensors"]
    return bits(*latents) + b"".join(path.read_bytes() for path in files if "images" in str(path.parent.name))


def features(folder):
    found = load_scorer(str(write_scorer_once(folder)), CPU)
    return bits(found.features([INIT, INIT.rotate(90)]))


def write_scorer_once(folder):
    with plain_defaults():
        return write_scorer(folder / "scorer")


def codes():
    pipeline = load_pipeline("flux-mini", "cpu")
    found = calibrated(pipeline, [GenerationRequest(prompt="a red apple", **FAST)])
    return b"".join(name.encode() + bits(x.view(torch.uint8)) for name, x in sorted(found.items()))


def rounded():
    weight = torch.from_numpy(np.linspace(-3, 3, 32 * 16, dtype=np.float32)).reshape(16, 32).bfloat16()
    moment = torch.from_numpy(np.cov(np.random.default_rng(0).standard_normal((32, 99))).astype(np.float32))
    return bits(*(x.float() for x in gptq(weight, moment)))


def prepared():
    def encoder(size):
        return lambda prompts: torch.from_numpy(np.ones((len(prompts), *size), dtype=np.float32))

    found = prepare(encoder((4, 8)), encoder((6,)), get_noise(1, 32, 32, CPU, torch.float32, 1), ["a", "b"])
    assert all(x.dtype == torch.float32 for x in found.values())
    return bits(*found.values())


WORK = {
    "draw": picture,
    "in bfloat16": lambda: picture("bfloat16"),
    "in fp8": lambda: picture("fp8"),
    "steered": lambda: picture(negative_prompt="a car", true_cfg_scale=3.0, mimic_scale=1.5, cfg_zero=1),
    "from a picture": lambda: picture(init_image=INIT, strength=0.7),
    "in strips": in_strips,
    "strips of many rows": strips_of_many_rows,
    "plan": with_plan,
    "a number for a traceable function": traceable_number,
    "edit": edit,
    "calibrate": codes,
    "gptq": rounded,
    "prepare": prepared,
    "noise": lambda: bits(get_noise(2, 40, 64, CPU, torch.bfloat16, 5)),
    "schedule": lambda: str([get_schedule(28, 1024), get_schedule(4, 256, shift=False)]).encode(),
    "ids": lambda: bits(image_ids(2, 3, 5)),
    "rope": lambda: bits(embed_nd(image_ids(1, 300, 5), (4, 6, 6), 10_000)),
}
IN_A_FOLDER = {"explore": session, "score": features}


@pytest.fixture(scope="module")
def expected():
    return {}


@pytest.mark.parametrize("other", OTHERS)
@pytest.mark.parametrize("name", WORK)
def test_no_bit_hangs_on_torchs_defaults(small, one_thread, expected, name, other):
    work = WORK[name]
    if name not in expected:
        expected[name] = work()
    with default(other):
        assert work() == expected[name]


@pytest.mark.parametrize("other", OTHERS)
@pytest.mark.parametrize("name", IN_A_FOLDER)
def test_nor_of_files_and_scores(small, one_thread, tmp_path, capsys, name, other):
    folders = [tmp_path / "plain", tmp_path / "other"]
    for folder in folders:
        folder.mkdir()
    wanted = IN_A_FOLDER[name](folders[0])
    with default(other):
        assert IN_A_FOLDER[name](folders[1]) == wanted


@pytest.mark.parametrize("other", OTHERS)
def test_plain_defaults_end_with_their_block(other):
    with default(other):
        before = torch.empty(0).dtype, torch.empty(0).device
        with pytest.raises(KeyError), plain_defaults():
            assert (torch.empty(0).dtype, torch.empty(0).device) == (torch.float32, CPU)
            raise KeyError
        assert (torch.empty(0).dtype, torch.empty(0).device) == before


def test_a_network_that_a_user_makes_is_made_as_they_asked():
    """`Flux(params)` is a module like any other of torch's: its parameters follow the defaults, as theirs do."""
    variant = small_variant()
    with default("float64"):
        networks = Flux(variant.params), AutoEncoder(variant.ae_params)
    assert all(p.dtype == torch.float64 for network in networks for p in network.parameters())
