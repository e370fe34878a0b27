"""The core beside the official implementation: its weights and inputs, its outputs."""

import json

import pytest
import torch
from golden_files import distance, flux_of, read

from flux_core.model import AutoEncoder, AutoEncoderParams, Flux
from flux_core.model.rope import embed_nd
from flux_core.sampling import denoise, get_noise, get_schedule, image_ids, pack, prepare, unpack
from flux_core.variants import VARIANTS

FORWARD, DENOISED = 5e-6, 2e-5


class Recorder:
    """A run that changes nothing and keeps what every block gives."""

    def __init__(self):
        self.seen = {}

    def value(self, name, x):
        return x

    def double_block(self, name, block, img, txt, mods, pe):
        self.seen[f"{name}.img"], self.seen[f"{name}.txt"] = out = block(img, txt, *mods, pe)
        return out

    def single_block(self, name, block, x, txt_len, mods, pe):
        self.seen[name] = block(x, *mods, pe)
        return self.seen[name]


def denoise_first_row(golden, model):
    inputs, run = golden.group("in."), json.loads(golden.metadata["denoise"])
    tensors = {name: inputs[name][:1] for name in ("img", "img_ids", "txt", "txt_ids")}
    return denoise(model, **tensors, vec=inputs["y"][:1], timesteps=run["timesteps"], guidance=run["guidance"])


@pytest.mark.parametrize("name", ["dev", "schnell"])
def test_forward_and_every_block(name):
    golden, run = read(f"transformer_{name}"), Recorder()
    velocity = flux_of(golden)(**golden.group("in."), run=run)
    assert distance(velocity, golden.tensors["out.velocity"]) <= FORWARD
    blocks = golden.group("inter.")
    del blocks["pe"]
    assert run.seen.keys() == blocks.keys()
    assert max(distance(run.seen[block], blocks[block]) for block in blocks) <= FORWARD


@pytest.mark.parametrize("name", ["dev", "schnell"])
def test_position_embedding(name):
    golden = read(f"transformer_{name}")
    ids = torch.cat((golden.tensors["in.txt_ids"], golden.tensors["in.img_ids"]), dim=1)
    params = json.loads(golden.metadata["params"])
    assert distance(embed_nd(ids, params["axes_dim"], params["theta"]), golden.tensors["inter.pe"]) <= FORWARD


@pytest.mark.parametrize("name", ["dev", "schnell"])
def test_denoise(name):
    golden = read(f"transformer_{name}")
    assert distance(denoise_first_row(golden, flux_of(golden)), golden.tensors["out.denoised"]) <= DENOISED


def test_bf16_rounds_where_the_official_code_rounds():
    golden = read("transformer_dev_bf16")
    official = golden.tensors["out.velocity"]
    ours = flux_of(golden, torch.bfloat16)(**golden.group("in."))
    truth = flux_of(golden)(**{name: x.float() for name, x in golden.group("in.").items()})
    assert ours.dtype == torch.bfloat16
    assert distance(ours, official) <= 2e-2
    assert distance(ours, truth) <= 1.1 * distance(official, truth)


def test_bf16_denoise():
    golden = read("transformer_dev_bf16")
    ours = denoise_first_row(golden, flux_of(golden, torch.bfloat16))
    assert distance(ours, golden.tensors["out.denoised"]) <= 2e-2


def test_autoencoder():
    golden = read("autoencoder")
    ae = AutoEncoder(AutoEncoderParams(**json.loads(golden.metadata["params"]))).requires_grad_(False)
    ae.load_state_dict(golden.group("weights."))
    latent, image = golden.tensors["out.latent"], golden.tensors["out.image"]
    assert distance(ae.encode(golden.tensors["in.image"]), latent) <= FORWARD
    assert distance(ae.decode(latent), image) <= FORWARD


SAMPLER = read("sampler").tensors


@pytest.mark.parametrize("name", SAMPLER)
def test_sampler_is_equal(name):
    what, size, *rest = name.split(".")
    height, width = (int(side) for side in size.split("x"))
    match what:
        case "noise":
            ours = get_noise(1, height, width, "cpu", getattr(torch, rest[1]), int(rest[0]))
        case "packed":
            ours = pack(get_noise(1, height, width, "cpu", torch.float32, 0))
        case "unpacked":
            ours = unpack(SAMPLER[f"packed.{size}"], height, width)
        case "img_ids":
            ours = image_ids(1, height // 16, width // 16)
        case "schedule":
            steps, shift = int(rest[0]), rest[1] == "dev"
            schedule = get_schedule(steps, height * width // 256, shift=shift)
            ours = torch.tensor(schedule, dtype=torch.float64)
    assert torch.equal(ours, SAMPLER[name])


def test_prepare_repeats_one_prompt_for_every_image():
    noise = get_noise(3, 64, 96, "cpu", torch.float32, 0)
    inputs = prepare(lambda p: torch.ones(len(p), 5, 7), lambda p: torch.ones(len(p), 9), noise, "a prompt")
    shapes = {name: tuple(x.shape) for name, x in inputs.items()}
    assert shapes == {
        "img": (3, 24, 64),
        "img_ids": (3, 24, 3),
        "txt": (3, 5, 7),
        "txt_ids": (3, 5, 3),
        "vec": (3, 9),
    }
    assert torch.equal(inputs["img_ids"][2:], image_ids(1, 4, 6))


def test_every_row_has_its_own_time_and_guidance():
    golden = read("transformer_dev")
    model, inputs = flux_of(golden), golden.group("in.")
    two = {name: x[:1].repeat(2, *[1] * (x.ndim - 1)) for name, x in inputs.items()}
    two |= {"timesteps": torch.tensor([0.9, 0.2]), "guidance": torch.tensor([1.0, 7.0])}
    together = model(**two)
    alone = torch.cat([model(**{name: x[i : i + 1] for name, x in two.items()}) for i in range(2)])
    assert distance(together, alone) <= 1e-6
    assert distance(alone[0], alone[1]) > 1e-2


@pytest.mark.parametrize(
    ("name", "tensors", "parameters"),
    [("flux-dev", 780, 11_901_408_320), ("flux-schnell", 776, 11_891_178_560)],
)
def test_sizes_of_the_official_models(name, tensors, parameters):
    row = VARIANTS[name]
    with torch.device("meta"):
        flux, ae = Flux(row.params), AutoEncoder(row.ae_params)
    assert len(flux.state_dict()) == tensors
    assert sum(p.numel() for p in flux.parameters()) == parameters
    assert len(ae.state_dict()) == 244
    assert sum(p.numel() for p in ae.parameters()) == 83_819_683
