"""Strips of a picture: what the plain autoencoder gives, in less memory, and nothing to see where they meet."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from random_model import random_weights, small_variant

from flux_core import load_pipeline
from flux_core.device.alive import most_alive
from flux_core.model import AutoEncoder
from flux_core.model import strips as tiles
from flux_core.variants import get_variant

pytestmark = pytest.mark.usefixtures("one_thread")
TOLERANCE = 1e-5
"""relative, in fp32: sums in another order, through some 30 layers"""


@pytest.fixture(scope="module")
def ae():
    return random_weights(AutoEncoder(small_variant().ae_params))


@pytest.fixture(scope="module")
def mini():
    return load_pipeline("flux-mini", "cpu", "float32").ae


def latent(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def distance(x, y):
    return float((x.double() - y.double()).norm() / y.double().norm())


@pytest.mark.parametrize("rows", [1, 2, 3, 8])
@pytest.mark.parametrize("shape", [(1, 16, 18, 6), (2, 16, 10, 4), (1, 16, 1, 3)])
@torch.no_grad()
def test_it_is_the_plain_path(ae, monkeypatch, rows, shape):
    monkeypatch.setattr(tiles, "ROWS", rows)
    z = latent(*shape)
    kept, picture = z.clone(), ae.decode(z)
    assert distance(tiles.decode(ae, z), picture) < TOLERANCE
    assert distance(tiles.encode(ae, picture), ae.encode(picture)) < TOLERANCE
    assert torch.equal(z, kept)


@torch.no_grad()
def test_other_depths_and_widths():
    params = replace(small_variant().ae_params, ch_mult=(2, 1, 3), num_res_blocks=2)
    net, z = random_weights(AutoEncoder(params)), latent(1, 16, 20, 4)
    picture = net.decode(z)
    assert distance(tiles.decode(net, z), picture) < TOLERANCE
    assert distance(tiles.encode(net, picture), net.encode(picture)) < TOLERANCE


@torch.no_grad()
def test_in_bf16_it_is_as_near_to_fp32_as_the_plain_path(ae, monkeypatch):
    monkeypatch.setattr(tiles, "ROWS", 2)
    z = latent(1, 16, 5, 4)
    truth = ae.decode(z.bfloat16().float())
    half = AutoEncoder(small_variant().ae_params).bfloat16()
    half.load_state_dict(ae.state_dict())
    plain, ours = (decode(z.bfloat16()).float() for decode in (half.decode, lambda z: tiles.decode(half, z)))
    assert distance(ours, truth) < 1.1 * distance(plain, truth)


@torch.no_grad()
def test_no_seam_in_flux_mini(mini):
    """A hundredth of a level of 255, where strips decoded each by itself would be off by tens."""
    z = latent(1, 16, 20, 8)
    plain = mini.decode(z)
    naive = torch.cat([mini.decode(part) for part in z.split(tiles.ROWS, dim=2)], dim=2)
    assert 127.5 * (naive - plain).abs().max() > 10
    assert 127.5 * (tiles.decode(mini, z) - plain).abs().max() < 0.01


def peaks(net, z, x):
    """Bytes alive at most, (plain, in strips), decoding and encoding."""
    for plain, ours, given in ((net.decode, tiles.decode, z), (net.encode, tiles.encode, x)):
        whole, strips = (
            most_alive(partial(compute, *these), net.parameters())
            for compute, *these in ((plain, given), (ours, net, given))
        )
        yield whole, strips


def test_less_than_half_is_alive_at_once(monkeypatch):
    """The full-size network's proportions, in 16 strips, as many as 1024x1024 have."""
    monkeypatch.setattr(tiles, "ROWS", 1)
    net = AutoEncoder(replace(get_variant("flux-dev").ae_params, ch=32)).to("meta")
    for whole, strips in peaks(net, latent(1, 16, 16, 1).to("meta"), latent(1, 3, 128, 8).to("meta")):
        assert 2 * strips < whole


@pytest.mark.slow
def test_2048x2048_at_full_size():
    """6.4 and 5.4 GB in bf16 become 2.4 and 2.3: two feature maps of the last level and a few strips."""
    with torch.device("meta"):
        net = AutoEncoder(get_variant("flux-dev").ae_params).bfloat16()
        z, x = torch.empty(1, 16, 256, 256).bfloat16(), torch.empty(1, 3, 2048, 2048).bfloat16()
        for whole, strips in peaks(net, z, x):
            assert strips < 2.5e9 and 2.3 * strips < whole
