"""The scorer's loss and views on tiny inputs; no downloaded data and no trained weights are needed."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "weights" / "recipe"))

import train_scorer
from palette import COLOURS
from render import Atlas, make_atlas
from scenes import SceneBatch
from shapes import SHAPES
from sprites import Sprites, plain_names
from train_scorer import (
    CONFIG,
    Scorer,
    another_view,
    crop,
    instance_loss,
    shares,
    unseen,
    views,
    windows,
    write_scorer,
)
from trainer import Trainer
from transformers import AutoImageProcessor, Dinov2Config, Dinov2Model

pytestmark = pytest.mark.usefixtures("one_thread")
THINGS = 12
TINY = Dinov2Config(
    image_size=32,
    patch_size=8,
    hidden_size=32,
    num_hidden_layers=1,
    num_attention_heads=2,
    use_mask_token=False,
)


def some_scenes(n: int) -> SceneBatch:
    """One to four things side by side, a quarter of them painted."""
    rng = np.random.default_rng(0)
    there = np.arange(4) < rng.integers(1, 5, size=(n, 1))
    return SceneBatch(
        np.where(there, rng.integers(THINGS, size=(n, 4)), -1).astype(np.int16),
        np.stack([np.tile(np.arange(4) / 4 + 0.125, (n, 1)), rng.uniform(0.2, 0.8, (n, 4))], -1).astype(np.float32),
        rng.uniform(0.1, 0.25, (n, 4)).astype(np.float32),
        np.where(there & (rng.random((n, 4)) < 0.25), rng.integers(len(COLOURS), size=(n, 4)), -1).astype(np.int8),
        np.ones((n, 3), np.float32),
        np.zeros(n, np.int8),
    )


@pytest.fixture(scope="module")
def atlas() -> Atlas:
    dice = torch.Generator().manual_seed(0)
    return make_atlas(torch.randint(0, 256, (THINGS, 256, 256, 4), generator=dice, dtype=torch.uint8))


def test_what_is_in_a_scene_is_shared_by_its_things():
    scenes = some_scenes(3)
    scenes.sprite[:] = [[4, -1, -1, -1], [1, 2, -1, -1], [7, 7, 7, -1]]
    wanted = torch.zeros(3, THINGS)
    wanted[0, 4], wanted[1, [1, 2]], wanted[2, 7] = 1, 0.5, 1
    assert torch.equal(shares(scenes, THINGS), wanted)


def test_the_loss_is_the_cross_entropy_of_both_poolings():
    logits = torch.randn(2, 3, 5, generator=torch.manual_seed(0))
    wanted = torch.tensor([[1.0, 0, 0, 0, 0], [0, 0.5, 0.5, 0, 0], [0, 0, 0, 0, 1]])
    loss, named = instance_loss(logits, wanted)
    by_hand = torch.stack([F.cross_entropy(pooling, wanted) for pooling in logits]).mean()
    assert torch.allclose(loss, by_hand)
    assert instance_loss(torch.stack([100 * wanted, -100 * wanted]), wanted)[1] == 1 and 0 <= named <= 1


def test_crop_takes_what_the_window_shows():
    pictures = torch.rand(2, 3, 16, 16, generator=torch.manual_seed(0))
    whole = torch.tensor([[0.0, 0, 1, 1]]).expand(2, 4)
    seen = crop(pictures, whole, torch.tensor([False, True]), 16)
    assert torch.allclose(seen[0], pictures[0], atol=1e-5)
    assert torch.allclose(seen[1], pictures[1].flip(-1), atol=1e-5)
    part = torch.tensor([[0.25, 0.5, 0.5, 0.5]]).expand(2, 4)
    seen = crop(pictures, part, torch.tensor([False, True]), 8)
    assert torch.allclose(seen[0], pictures[0, :, 8:, 4:12], atol=1e-5)
    assert torch.allclose(seen[1], pictures[1, :, 8:, 4:12].flip(-1), atol=1e-5)


def test_another_view_shows_the_same_things_otherwise():
    scenes = some_scenes(500)
    seen = another_view(scenes, np.random.default_rng(1))
    there = scenes.sprite >= 0
    assert np.array_equal(seen.sprite, scenes.sprite)
    half = seen.size[..., None] / 2
    assert (seen.xy - half)[there].min() >= -1e-6 and (seen.xy + half)[there].max() <= 1 + 1e-6
    side_by_side = there[:, 1:]
    assert (np.diff(seen.xy[..., 0], axis=1)[side_by_side] > 0).all()  # in their order
    painted = scenes.colour >= 0
    assert (seen.colour[painted] >= 0).all() and (seen.colour[~there] == -1).all()
    assert (seen.colour != scenes.colour)[painted].mean() > 0.8
    assert 0.4 < (seen.colour >= 0)[there & ~painted].mean() < 0.6
    assert 0.5 < (seen.background != scenes.background).any(1).mean() < 0.9
    assert (np.abs(seen.xy - scenes.xy)[there].max(-1) > 0.01).mean() > 0.9
    ratio = (seen.size / scenes.size)[:, 0]
    assert ratio.std() > 0.2
    assert np.allclose((seen.size / scenes.size)[there], np.broadcast_to(ratio[:, None], there.shape)[there], rtol=1e-4)
    assert seen.xy.dtype == seen.size.dtype == seen.background.dtype == np.float32


@pytest.mark.parametrize("part", [False, True])
def test_windows_lie_on_the_canvas_and_hold_a_thing(part):
    scenes = some_scenes(300)
    x, y, width, height = windows(scenes, np.random.default_rng(0), 0.3, 0.9, part).T
    assert min(x.min(), y.min()) >= 0 and max((x + width).max(), (y + height).max()) <= 1 + 1e-6
    middle, there = scenes.xy, scenes.sprite >= 0
    low, high = np.stack([x, y], 1)[:, None], np.stack([x + width, y + height], 1)[:, None]
    assert (((low - 1e-6 <= middle) & (middle <= high + 1e-6)).all(-1) & there).any(1).all()


def test_views_hang_on_the_seed_alone(atlas):
    scenes = some_scenes(3)
    pictures = views(scenes, atlas, np.random.default_rng(7), size=32)
    assert pictures.shape == (3, 3, 32, 32) and pictures.dtype == torch.float32
    assert pictures.min() >= -1 and pictures.max() <= 1
    torch.manual_seed(5)  # nothing hangs on it
    assert torch.equal(pictures, views(scenes, atlas, np.random.default_rng(7), size=32))


def test_unseen_things_are_never_shown(monkeypatch, tmp_path, atlas):
    """Run the stage on a table of random sprites and look at every scene that it draws from."""
    n = 64
    names = [f"{a}{b}" for a in "bdfgklmn" for b in ("ark", "elk", "ilt", "olm", "unt", "ant", "erf", "ost")]
    table = Sprites(
        names=names,
        aliases=[[]] * n,
        keywords=[[]] * n,
        group=["animals-nature"] * n,
        subgroup=[""] * n,
        hexcodes=names,
        tone=[False] * n,
        countable=[True] * n,
        weight=[1.0] * n,
    )
    never = unseen(table)
    assert len(never) == 4 and set(never) <= set(plain_names(table))
    shown = []

    class Enough(Exception):
        pass

    def look(scenes, atlas, rng, freedom):
        shown.append(scenes)
        if len(shown) == 40:
            raise Enough
        return torch.zeros(len(scenes), 3, 32, 32)

    sample = train_scorer.sample_scenes
    monkeypatch.setattr(train_scorer, "load_sprites", lambda root: table)
    monkeypatch.setattr(train_scorer, "all_rgba", lambda sprites: range(n + len(SHAPES)))
    monkeypatch.setattr(train_scorer, "make_atlas", lambda rgba, device: atlas)
    monkeypatch.setattr(train_scorer, "views", look)
    monkeypatch.setattr(train_scorer, "Scorer", lambda n: Scorer(n, TINY))
    monkeypatch.setattr(
        train_scorer, "sample_scenes", lambda *a, workers, **k: sample(*a, workers=1, heldout=nothing_held(), **k)
    )
    monkeypatch.setattr(sys, "argv", ["x", str(tmp_path), str(tmp_path), "--device", "cpu", "--scenes", "3000"])
    with pytest.raises(Enough):
        train_scorer.main()
    things = set(SceneBatch.concat(shown).sprite.ravel().tolist())
    assert not things & set(never) and set(range(n)) - set(never) <= things


def nothing_held():
    from heldout import HeldOut

    return HeldOut(set(), set(), set())


def test_the_folder_opens_and_is_small(tmp_path):
    torch.manual_seed(0)
    backbone = write_scorer(tmp_path, Scorer(THINGS).backbone.eval())
    assert sum(f.stat().st_size for f in tmp_path.iterdir()) <= 6 * 2**20
    opened = Dinov2Model.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    picture = np.random.default_rng(0).integers(256, size=(90, 150, 3), dtype=np.uint8)
    pixels = AutoImageProcessor.from_pretrained(tmp_path)(picture, return_tensors="pt")["pixel_values"]
    side = CONFIG.image_size
    assert pixels.shape == (1, 3, side, side) and pixels.min() < -0.5 and pixels.max() > 0.5
    with torch.inference_mode():
        one, two = (m(pixels.bfloat16()).last_hidden_state for m in (backbone, opened))
    assert one.shape == (1, (side // CONFIG.patch_size) ** 2 + 1, CONFIG.hidden_size) and torch.equal(one, two)


def train(stage: Trainer, scenes: SceneBatch, atlas: Atlas, steps: int) -> list[float]:
    losses = []
    for _ in range(steps):
        rng = np.random.default_rng(stage.step)
        some = scenes[rng.integers(len(scenes), size=4)]
        loss, _ = instance_loss(stage.module(views(some, atlas, rng, size=32)), shares(some, THINGS))
        stage.update(loss)
        losses.append(loss.item())
    return losses


def new_stage() -> Trainer:
    torch.manual_seed(0)
    return Trainer(Scorer(THINGS, TINY), lr=1e-3, steps=20, minutes=60, warmup=2)


def test_training_that_was_cut_goes_on_as_if_it_had_not_been(tmp_path, atlas):
    scenes = some_scenes(50)
    whole, first, second = new_stage(), new_stage(), new_stage()
    losses = train(whole, scenes, atlas, 4)
    train(first, scenes, atlas, 2)
    first.save(tmp_path / "state.safetensors")
    second.resume(tmp_path / "state.safetensors")
    assert train(second, scenes, atlas, 2) == losses[2:]
    for a, b in zip(whole.params + whole.ema, second.params + second.ema, strict=True):
        assert torch.equal(a, b)
