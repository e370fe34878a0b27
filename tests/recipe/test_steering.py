"""What flux-mini learns to see in stages 6 and 7: masks, depth, and networks beside it that at first change nothing."""

import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "weights" / "recipe"))

from captions import Scene, Thing
from depths import depth
from masks import sample_masks
from random_model import random_weights
from render import make_atlas, render, to_images
from safetensors.torch import load_file
from scenes import pack
from train_beside import Edges, Seen, alone, batch_of, loss_of
from train_family import Pool, filled
from trainer import Trainer, write

from flux_core.checkpoint.controlnet import load_controlnet
from flux_core.model import AutoEncoder, Flux
from flux_core.sampling.family import fill_condition
from flux_core.training.seen import condition_of
from flux_core.variants import VARIANTS
from flux_core.vision.redux import load_redux

pytestmark = pytest.mark.usefixtures("one_thread")
ROW = VARIANTS["flux-mini"]
ROUND, SQUARE = 0, 1


@pytest.fixture(scope="module")
def atlas():
    """A red disk and a blue square."""
    rgba = torch.zeros(2, 256, 256, 4, dtype=torch.uint8)
    y, x = torch.meshgrid(*[torch.arange(256) - 127.5] * 2, indexing="ij")
    rgba[ROUND][x.hypot(y) < 120] = torch.tensor([220, 20, 20, 255], dtype=torch.uint8)
    rgba[SQUARE, 20:236, 20:236] = torch.tensor([20, 20, 220, 255], dtype=torch.uint8)
    return make_atlas(rgba)


def scenes(count):
    """A small disk on the left, a larger square on the right."""
    things = [Thing(sprite, -1, name, []) for sprite, name in ((ROUND, "disk"), (SQUARE, "square"))]
    places = [(0.22, 0.5, 0.3), (0.72, 0.5, 0.5)]
    return pack([Scene("pair", things, places, "across", background=(0.8, 0.9, 0.8)) for _ in range(count)])


def test_depth_is_where_things_are_and_brighter_where_they_are_larger_and_in_their_middle(atlas):
    map = depth(scenes(1), atlas, 128)[0]
    picture = render(scenes(1), atlas, 128, shadow=False)[0]
    there = (picture - picture[:, :1, :1]).abs().amax(0) > 0.5
    assert ((map > 0.2) != there).float().mean() < 0.01 and map[~there].max() < 0.5 and map[0, 0] == 0
    assert map[64, 92] > map[64, 28] + 0.1 > 0.4 and map[64, 92] > map[40, 92] + 0.02


def test_masks_are_black_and_white_paint_a_thing_or_more_and_leave_some(atlas):
    found = sample_masks(scenes(200), 64, np.random.default_rng(0))
    shares = found.mean((1, 2, 3))
    assert found.shape == (200, 1, 64, 64) and set(found.unique().tolist()) == {0.0, 1.0}
    assert shares.min() > 0.01 and shares.max() < 0.96 and 0.2 < shares.mean() < 0.6
    things = (depth(scenes(1), atlas, 64)[0] > 0.2).flatten()
    left, right = things.clone(), things.clone()
    left.view(64, 64)[:, 28:], right.view(64, 64)[:, :28] = False, False
    whole = [sum(bool(mask.flatten().bool()[part].all()) for mask in found) for part in (left, right)]
    assert min(whole) > 25  # one in eight is around each


def test_what_is_kept_is_what_fill_sees(atlas):
    torch.manual_seed(0)
    ae = AutoEncoder(replace(ROW.ae_params, ch=32, ch_mult=(1, 1, 1, 1), num_res_blocks=1)).eval().requires_grad_(False)
    image, mask = render(scenes(2), atlas, 64), sample_masks(scenes(2), 64, np.random.default_rng(1))
    seen = filled(image, mask, SimpleNamespace(latents=lambda x: ae.encode(x).bfloat16()))
    assert torch.equal(condition_of("fill", [*seen]).tokens, fill_condition(ae, image, mask))


def small_flux():
    params = replace(ROW.params, vec_in_dim=6, context_in_dim=16, hidden_size=32, num_heads=2, axes_dim=(4, 6, 6))
    return random_weights(Flux(params), std=0.2)


def pool(*seen):
    draw = torch.Generator().manual_seed(2)
    shapes = (6, 16, 32, 32), (6, *seen), (12, 4, 16), (12, 6)
    return Pool(*(torch.randn(shape, generator=draw) for shape in shapes))


def dice():
    return torch.Generator().manual_seed(3)


def trained(kind, flux, pool, steps=2):
    """Another network after some steps, and the loss of each."""
    trainer, losses = Trainer(kind.net, 1e-3, steps, 1.0, warmup=1), []
    for _ in range(steps):
        losses.append(loss_of(kind, flux, pool, 2, dice()))
        trainer.update(losses[-1])
    return trainer, losses


def test_a_controlnet_begins_by_changing_nothing_learns_alone_and_is_loaded_again(tmp_path):
    flux, some = small_flux(), pool(1, 16, 32, 32)
    before, kind = {name: x.clone() for name, x in flux.state_dict().items()}, Edges(flux)
    _, seen, inputs = batch_of(some, 2, dice())
    x, sigma = torch.randn(2, 256, 64, generator=dice()), torch.tensor([0.3, 0.9])
    plain = flux(x, inputs.img_ids, inputs.txt, inputs.txt_ids, sigma, inputs.vec, inputs.guidance)
    assert torch.equal(kind.velocity(flux, inputs, seen, x, sigma), plain)
    trainer, losses = trained(kind, flux, some)
    assert losses[1] < losses[0] and all(torch.equal(x, before[name]) for name, x in flux.state_dict().items())
    assert all(p.requires_grad for p in kind.net.parameters())
    write(tmp_path / "net.safetensors", trainer.average(torch.float32))
    trainer.load_average()
    args = x, inputs.img_ids, x, inputs.txt, inputs.txt_ids, sigma, inputs.vec
    loaded = load_controlnet(tmp_path / "net.safetensors", dtype=torch.float32, of=flux.params)
    for wanted, found in zip(kind.net(*args), loaded(*args), strict=True):
        assert len(found) == 2 and all(map(torch.equal, wanted, found))


def test_redux_learns_two_layers_by_the_features_that_the_picture_gives_when_it_draws(atlas, tmp_path, monkeypatch):
    flux = small_flux()
    kind = Seen(flux)
    shown = alone(scenes(1), 1, np.random.default_rng(0))
    assert (shown.sprite[0] >= 0).sum() == 1 and shown.sprite[0, 0] == SQUARE
    assert (np.abs(shown.xy[0, 0] - 0.5) + shown.size[0, 0] / 2 <= 0.5 + 1e-6).all()
    image = render(shown, atlas, 256)
    features = kind.features(image)
    assert features.shape == (1, 16, 384)
    kind.silence = torch.zeros(1, 4, 16), torch.zeros(1, 6)
    trainer, losses = trained(kind, flux, pool(2, 16, 384))
    assert losses[1] < losses[0]
    write(tmp_path / "redux.safetensors", trainer.average(torch.float32))
    trainer.load_average()
    row = replace(VARIANTS["flux-mini-redux"], params=flux.params)
    words = load_redux(row, tmp_path / "redux.safetensors", row.takes.words, dtype=torch.float32)
    found, wanted = words(to_images(image)[0]), kind.redux.said(features.float())
    assert torch.nn.functional.cosine_similarity(found, wanted, dim=-1).mean() > 0.99
    assert set(load_file(tmp_path / "redux.safetensors")) == set(kind.net.state_dict())
