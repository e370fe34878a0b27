"""What fits where: the sizes that it is reckoned from, and the verdicts for memories as they are sold."""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from capped import Capped

from flux_core.commands import doctor
from flux_core.device import on_meta
from flux_core.device.alive import autoencoder_at_work, most_alive, transformer_at_work
from flux_core.device.memory import MEGAPIXEL, Picture, shares
from flux_core.device.verdict import verdict
from flux_core.model import AutoEncoder
from flux_core.text.encoders import STAYS
from flux_core.variants import VARIANTS, get_variant, plain

DEV = get_variant("flux-dev")
OFFICIAL = [row for row in VARIANTS.values() if not row.embedded]
FEW = {"bfloat16": "", "fp8": "--dtype fp8", "nf4": "--dtype nf4"}
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
        decoder = autoencoder_at_work(DEV.ae_params, MEGAPIXEL, kind)
        assert 1 <= decoder / (kind.itemsize * maps) < 1.01
        forward = transformer_at_work(DEV.params, 512, MEGAPIXEL, kind)
        assert forward == pytest.approx(
            transformer_at_work(DEV.params, 512, Picture(1024, 1024, rows=2), kind) / 2, rel=0.02
        )


def counted():
    """Of every network, for pictures with odd numbers of tokens, two rows, references, strips."""
    for params, text in {row.params: row.max_text for row in VARIANTS.values()}.items():
        for picture, kind in ((Picture(528, 272), torch.bfloat16), (Picture(64, 64, 2, behind=30), torch.float32)):
            yield transformer_at_work.__wrapped__(params, text, picture, kind)
    for params in {row.ae_params for row in VARIANTS.values()}:
        for picture, kind in ((Picture(528, 272), torch.bfloat16), (Picture(256, 144, tiled=True), torch.float32)):
            yield autoencoder_at_work.__wrapped__(params, picture, kind)


def made(*shape, dtype=torch.bfloat16):
    return torch.empty(shape, dtype=dtype, device="meta")


UNUSUAL = [
    lambda: torch.zeros_like(made(1000), dtype=torch.float64),
    lambda: made(100, 100).mean(-1, dtype=torch.float32),
    lambda: made(100, 100, dtype=torch.bool).sum(-1),
    lambda: made(1000, dtype=torch.uint8) / 2,
    lambda: torch.cat([made(1000), made(1000, dtype=torch.float32)]),
    lambda: F.conv_transpose2d(made(1, 4, 16, 16), made(4, 8, 3, 3), stride=2),
    lambda: F.layer_norm(made(100, 40, dtype=torch.float64), (40,)),
    lambda: F.batch_norm(made(4, 4, 4, 4), made(4), made(4)),
    lambda: torch.arange(1000, device="meta"),
    lambda: torch.arange(0.0, 10.0, 0.5, device="meta"),
    lambda: torch.var_mean(made(10, 10), dim=[1], keepdim=True, correction=0),
    lambda: torch.add(made(10), made(10, dtype=torch.float32), alpha=2),
]


def test_rules_for_shapes_count_what_torch_counts(monkeypatch):
    ours = [*counted(), *map(most_alive, UNUSUAL)]
    monkeypatch.setattr(on_meta, "RULES", {})
    assert ours == [*counted(), *map(most_alive, UNUSUAL)]


def test_a_plan_imports_no_compiler():
    code = """
import sys
from flux_core.device.memory import Picture
from flux_core.device.plan import is_whole, make_plan
from flux_core.variants import VARIANTS
assert is_whole(VARIANTS["flux-dev"], 80 << 30, "bfloat16", None)
assert make_plan(VARIANTS["flux-dev"], 12 << 30, "fp8", None, Picture(2048, 1024, tiled=True)).fits
print([name for name in ("sympy", "torch._dynamo", "torch._inductor", "transformers") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_as_many_bytes_are_alive_as_an_allocator_gives():
    """The same count of real tensors."""
    mini, kind = get_variant("flux-mini"), torch.float32
    with torch.no_grad():
        ae = AutoEncoder(mini.ae_params).eval()
        with Capped() as allocator:
            ae.decode(torch.zeros(1, 16, 16, 16, dtype=kind))
    assert allocator.peak == autoencoder_at_work(mini.ae_params, Picture(128, 128), kind)


@pytest.mark.parametrize(
    ("size", "said"),
    [
        (139.8 * GIB, "fits whole"),  # H200
        (39.4 * GIB, "fits whole"),  # A100 of 40 GB
        (31.4 * GIB, "fits, 57 of 57 blocks stay"),  # a card of 32 GB: parts take turns
        (23.65 * GIB, "fits, 57 of 57 blocks stay"),  # of 24 GB: what torch sees of it
        (15.7 * GIB, "fits, 44 of 57 blocks stay, 3.4 GB come at each step; all stay with --dtype fp8"),
        (7.7 * GIB, "fits, 12 of 57 blocks stay, 12.0 GB come at each step; all stay with --dtype nf4"),
        (2.2 * GIB, "does not fit"),
        (0, "does not say its memory"),
    ],
)
def test_cards(size, said):
    assert verdict(DEV, "cuda", int(size), FEW) == said


def test_a_card_whose_blocks_cannot_come_has_to_hold_all():
    assert verdict(DEV, "mps", 36 * GIB, {"float32": "", "bfloat16": "--dtype bfloat16"}) == "does not fit"
    assert verdict(DEV, "mps", 44 * GIB, {"float32": "", "bfloat16": "--dtype bfloat16"}) == (
        "fits whole with --dtype bfloat16"
    )


@pytest.mark.parametrize(
    ("size", "said"),
    [
        (128 * GIB, "fits whole"),
        (62.7 * GIB, "fits whole with --dtype bfloat16"),  # float32 by itself, twice the size
        (25.3e9, "does not fit whole: --memory auto leaves what finds no room in its files"),
        (4e9, "does not fit"),
    ],
)
def test_the_cpu(size, said):
    assert verdict(DEV, "cpu", int(size), FULL) == said


def test_doctor_has_a_row_for_each_plain_model_with_a_verdict_for_each_device(monkeypatch):
    sizes = {"cuda:0": 80 * GIB, "cuda:1": 24 * GIB, "cpu": 64 * GIB}
    monkeypatch.setattr("flux_core.device.choice.available_devices", lambda: list(sizes))
    monkeypatch.setattr(doctor, "ram", lambda: sizes["cpu"])
    monkeypatch.setattr(doctor, "_size", lambda device, ram: sizes[str(device)])
    monkeypatch.setattr(doctor, "_dtypes", lambda device: FULL if device.type == "cpu" else FEW)
    verdicts = (
        "9.8 + 23.8 + 0.2 = 33.7 GB: cuda:0 fits whole, cuda:1 fits, 57 of 57 blocks stay, "
        "cpu fits whole with --dtype bfloat16"
    )
    assert doctor._fits()[1:] == [f"{row.name:<14}{verdicts}" for row in OFFICIAL if row in plain()]
