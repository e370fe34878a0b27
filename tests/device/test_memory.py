"""What fits where: the sizes that it is reckoned from, and the verdicts for memories as they are sold."""

import pytest
import torch
from capped import Capped

from flux_core.commands import doctor
from flux_core.device.alive import autoencoder_at_work, transformer_at_work
from flux_core.device.memory import fit, shares
from flux_core.model import AutoEncoder
from flux_core.text.encoders import STAYS
from flux_core.variants import VARIANTS, get_variant

DEV = get_variant("flux-dev")
OFFICIAL = [row for row in VARIANTS.values() if not row.embedded]
HALF = {"bfloat16": "", "fp8": "--dtype fp8"}
FEW = HALF | {"nf4": "--dtype nf4"}
FULL = {"float32": "", "bfloat16": "--dtype bfloat16"}
GIB = 2**30


@pytest.mark.parametrize(("name", "parameters"), [("flux-dev", 11_901_408_320), ("flux-schnell", 11_891_178_560)])
def test_the_official_sizes(name, parameters):
    text, transformer, autoencoder = shares(get_variant(name))
    assert transformer.weights == 2 * parameters
    assert autoencoder.weights == 2 * 83_819_683
    assert text.weights == 2 * (4_762_310_656 + 123_060_480)
    assert transformer.aside == 2 * (19 * 12 + 38 * 3 + 2) * 3072 * 3073
    assert 8.6e9 < shares(get_variant(name), "fp8")[1].weights - transformer.aside < 8.8e9
    assert shares(get_variant("flux-dev-krea")) == shares(DEV)


@pytest.mark.parametrize("row", OFFICIAL, ids=lambda row: row.name)
def test_the_text_encoders_are_those_of_the_row(row):
    from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

    with torch.device("meta"):
        t5, clip = T5EncoderModel(T5Config(**row.t5_config)), CLIPTextModel(CLIPTextConfig(**row.clip_config))
    assert sum(p.numel() for p in t5.parameters()) == row.t5_size.all
    assert sum(p.numel() for p in clip.parameters()) == row.clip_size.all
    linears = {name: x for name, x in t5.named_modules() if isinstance(x, torch.nn.Linear)}
    assert sum(x.weight.numel() for name, x in linears.items() if not STAYS.fullmatch(name)) == row.t5_size.in_formats


def test_what_is_alive_at_work():
    """At 1024x1024 the decoder holds three feature maps of 256 x 1024 x 1024 numbers at once."""
    maps = 3 * 256 * 1024 * 1024
    for kind in (torch.bfloat16, torch.float32):
        decoder = autoencoder_at_work(DEV.ae_params, 1024, 1024, kind, tiled=False)
        assert 1 <= decoder / (kind.itemsize * maps) < 1.01
        forward = transformer_at_work(DEV.params, 512, 1024, 1024, 1, kind)
        assert forward == pytest.approx(transformer_at_work(DEV.params, 512, 1024, 1024, 2, kind) / 2, rel=0.02)


def test_as_many_bytes_are_alive_as_an_allocator_gives():
    """The same count of real tensors."""
    mini, kind = get_variant("flux-mini"), torch.float32
    with torch.no_grad():
        ae = AutoEncoder(mini.ae_params).eval()
        with Capped() as allocator:
            ae.decode(torch.zeros(1, 16, 16, 16, dtype=kind))
    assert allocator.peak == autoencoder_at_work(mini.ae_params, 128, 128, kind, tiled=False)


@pytest.mark.parametrize(
    ("size", "ram", "verdict"),
    [
        (139.8 * GIB, 128 * GIB, "fits whole"),  # H200
        (79.2 * GIB, 64 * GIB, "fits whole"),  # A100, H100
        (39.4 * GIB, 64 * GIB, "fits whole"),  # A100 of 40 GB
        (31.4 * GIB, 64 * GIB, "fits with --offload"),  # a card of 32 GB
        (23.65 * GIB, 64 * GIB, "fits with --offload"),  # of 24 GB: what torch sees of it
        (31.4 * GIB, 0, "fits with --offload"),  # where the system does not tell its memory
        (31.4 * GIB, 32 * GIB, "fits whole with --dtype fp8"),
        (15.7 * GIB, 16 * GIB, "does not fit (--offload keeps 22.5 GB in the CPU's memory of 17.2 GB)"),
        (22.0 * GIB, 64 * GIB, "fits with --offload"),  # A10, L4: 24 GB less what their error correction takes
        (15.7 * GIB, 64 * GIB, "fits with --dtype fp8 and --offload"),
        (11.6 * GIB, 64 * GIB, "fits with --dtype fp8 and --offload"),  # of 12 GB
        (9.9 * GIB, 64 * GIB, "fits with --dtype fp8 and --t5-dtype fp8 and --offload"),
        (7.7 * GIB, 64 * GIB, "does not fit"),
        (0, 64 * GIB, "does not say its memory"),
    ],
)
def test_cards(size, ram, verdict):
    assert fit(DEV, int(size), HALF, int(ram)) == verdict


@pytest.mark.parametrize(
    ("size", "ram", "verdict"),
    [
        (11.6 * GIB, 64 * GIB, "fits with --dtype fp8 and --offload"),
        (15.7 * GIB, 16e9, "fits whole with --dtype nf4 and --t5-dtype nf4"),
        (7.7 * GIB, 16 * GIB, "fits with --dtype nf4 and --t5-dtype nf4 and --offload"),
        (5.7 * GIB, 16 * GIB, "may just fit with --dtype nf4 and --t5-dtype nf4 and --offload"),
        (5.2 * GIB, 64 * GIB, "does not fit"),
    ],
)
def test_small_cards_take_four_bits(size, ram, verdict):
    assert fit(DEV, int(size), FEW, int(ram)) == verdict


@pytest.mark.parametrize(
    ("size", "verdict"),
    [
        (128 * GIB, "fits whole"),
        (62.7 * GIB, "fits whole with --dtype bfloat16"),  # float32 by itself, twice the size
        (25.3e9, "does not fit"),
    ],
)
def test_the_cpu(size, verdict):
    assert fit(DEV, int(size), FULL, None) == verdict


def test_doctor_has_a_row_for_each_model_with_a_verdict_for_each_device(monkeypatch):
    sizes = {"cuda:0": 80 * GIB, "cuda:1": 16 * GIB, "cpu": 64 * GIB}
    monkeypatch.setattr("flux_core.device.choice.available_devices", lambda: list(sizes))
    monkeypatch.setattr(doctor, "ram", lambda: sizes["cpu"])
    monkeypatch.setattr(doctor, "_size", lambda device, ram: sizes[str(device)])
    monkeypatch.setattr(doctor, "_dtypes", lambda device: FULL if device.type == "cpu" else HALF)
    verdicts = (
        "9.8 + 23.8 + 0.2 = 33.7 GB: cuda:0 fits whole, cuda:1 fits with --dtype fp8 and --offload, "
        "cpu fits whole with --dtype bfloat16"
    )
    assert doctor._fits()[1:] == [f"{row.name:<14}{verdicts}" for row in OFFICIAL]


def test_a_card_without_bf16_or_with_both():
    assert fit(DEV, 64 * GIB, {"float32": ""}, 128 * GIB) == "fits with --offload"
    assert fit(DEV, 32 * GIB, {"float32": ""}, 128 * GIB) == "does not fit"
    assert fit(DEV, 24 * GIB, FULL, 36 * GIB) == "fits with --dtype bfloat16 and --offload"
    assert fit(DEV, int(33.6 * GIB), {"bfloat16": ""}, 32 * GIB) == "may just fit whole"
