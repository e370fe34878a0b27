"""What a loss asks besides the pictures: its formula, and its identity case, since to ask nothing is plain training."""

import json
from dataclasses import replace

import pytest
import torch
from golden_files import FOLDER
from small import RECIPE, examples, small_adapter

from flux_core.errors import UsageError
from flux_core.sampling import pack
from flux_core.training.loop import each_loss, identity, levels, train
from flux_core.training.loss import Forwards, parts
from flux_core.training.objective import LOSSES, MAPS, WEIGHTINGS, on_table, shifted
from flux_core.training.settings import Settings

TABLES = json.loads((FOLDER / "train" / "timesteps.json").read_text(encoding="utf-8"))
NOISE = torch.randn(2, 16, 4, 6, generator=torch.Generator().manual_seed(7))
SIGMA = torch.tensor([0.3, 0.8])
PLAIN = replace(RECIPE, guidance=1.0)


def learned_adapter():
    """An adapter that changes something."""
    adapter, draw = small_adapter(), torch.Generator().manual_seed(8)
    with torch.no_grad():
        for x in adapter.parameters():
            x.copy_(0.3 * torch.randn(x.shape, generator=draw))
    return adapter


def batch(**fields):
    draw = torch.Generator().manual_seed(9)
    others = {kind: (torch.randn(3, 16, generator=draw), torch.randn(8, generator=draw)) for kind in ("class", "empty")}
    return [one._replace(others=others, **fields) for one in examples(2)]


def velocities(adapter, some, recipe=PLAIN, kind=None):
    """Learned and frozen, for the pictures' own texts, or another kind; and the target."""
    see = Forwards(adapter, some, recipe, NOISE, SIGMA, None)
    texts = [(one.txt, one.vec) if kind is None else one.others[kind] for one in some]
    with torch.no_grad():
        return see.learned(texts), see.frozen(texts), pack(NOISE - see.latents)


def loss(adapter, some, recipe):
    with torch.no_grad():
        return each_loss(adapter, some, recipe, NOISE, SIGMA)


def test_the_frozen_model_is_the_one_before_it_learned():
    adapter, some = learned_adapter(), batch()
    learned, frozen, _ = velocities(adapter, some)
    adapter.remove()
    plain, same, _ = velocities(adapter, some)
    assert torch.equal(frozen, plain) and torch.equal(plain, same) and not torch.equal(learned, frozen)


def test_a_contrastive_target_is_the_guided_velocity():
    adapter, some = learned_adapter(), batch()
    found, _, target = velocities(adapter, some)
    _, empty, _ = velocities(adapter, some, kind="empty")
    wanted = (found - empty - 3.0 * (target - empty)).square().mean((1, 2))
    torch.testing.assert_close(loss(adapter, some, replace(PLAIN, contrast=3.0)), wanted)
    at_one = loss(adapter, some, replace(PLAIN, contrast=1.0))
    torch.testing.assert_close(at_one, loss(adapter, some, PLAIN), rtol=1e-5, atol=0)


@pytest.mark.parametrize(("way", "kind"), [("differential", "class"), ("blank", "empty")])
def test_what_is_preserved_is_the_frozen_models_velocity(way, kind):
    adapter, some = learned_adapter(), batch()
    recipe = replace(PLAIN, preserve=way, preserve_weight=0.7)
    learned, frozen, _ = velocities(adapter, some, kind=kind)
    wanted = loss(adapter, some, PLAIN) + 0.7 * (learned - frozen).square().mean((1, 2))
    torch.testing.assert_close(loss(adapter, some, recipe), wanted)
    with torch.no_grad():
        fresh = [*parts(small_adapter(), some, recipe, NOISE, SIGMA)]
    assert fresh[1].abs().max() == 0  # nothing is lost before something is learned


def test_regularization_pictures_ask_for_the_frozen_models_velocity():
    """Nothing of them is lost before something is learned; the others are learned as without them."""
    adapter, some = learned_adapter(), [batch()[0], batch(prior=True, weight=0.5)[1]]
    recipe = replace(PLAIN, preserve="regularization")
    found, frozen, _ = velocities(adapter, some)
    plain = loss(adapter, some, PLAIN)
    wanted = torch.stack([plain[0], 0.5 * (found - frozen).square().mean((1, 2))[1]])
    torch.testing.assert_close(loss(adapter, some, recipe), wanted)
    fresh = loss(small_adapter(), some, recipe)
    assert fresh[1] == 0 and fresh[0] == loss(small_adapter(), some, PLAIN)[0]
    assert torch.equal(loss(adapter, batch(), recipe), loss(adapter, batch(), PLAIN))


def test_masks_count_where_they_are_white_and_keep_the_rest():
    adapter, mask = learned_adapter(), torch.zeros(4, 6)
    mask[1:3, 2:5] = torch.tensor([1.0, 0.5, 0.25])
    some = batch(mask=mask)
    found, frozen, target = velocities(adapter, some)
    packed = pack(mask.expand(2, 16, 4, 6))
    inside = (packed * (found - target).square()).mean((1, 2))
    outside = ((1 - packed) * (found - frozen).square()).mean((1, 2))
    torch.testing.assert_close(loss(adapter, some, PLAIN), inside)
    torch.testing.assert_close(loss(adapter, some, replace(PLAIN, mask_prior=0.5)), inside + 0.5 * outside)
    assert torch.equal(loss(adapter, batch(mask=torch.ones(4, 6)), PLAIN), loss(adapter, batch(), PLAIN))
    half = [batch(mask=mask)[0], batch()[1]]
    torch.testing.assert_close(loss(adapter, half, PLAIN), torch.stack([inside[0], loss(adapter, batch(), PLAIN)[1]]))


def test_a_weight_is_a_factor():
    adapter = learned_adapter()
    plain, weighed = loss(adapter, batch(), PLAIN), loss(adapter, batch(weight=0.25), PLAIN)
    torch.testing.assert_close(weighed, 0.25 * plain)


def test_gradients_are_those_of_the_whole_loss():
    """The loop takes those of one part before it computes the next."""
    recipe = replace(PLAIN, preserve="blank", contrast=2.0, steps=1, batch=2, accumulation=2, warmup=0)
    one, other = learned_adapter(), learned_adapter()
    from flux_core.training.loop import drawn, loss_of

    for micro in range(2):
        (loss_of(one, drawn(batch(), recipe, micro), recipe, micro) / 2).backward()
    norm = torch.nn.utils.clip_grad_norm_(one.parameters(), recipe.max_grad_norm)
    told = []
    losses = train(other, batch(), recipe, on_step=told.append)
    assert told[0].norm == pytest.approx(float(norm), rel=1e-5)
    with torch.no_grad():
        fresh = learned_adapter()
        each = [loss_of(fresh, drawn(batch(), recipe, micro), recipe, micro).item() for micro in range(2)]
    assert losses == pytest.approx([sum(each) / 2], rel=1e-6)


@pytest.mark.parametrize("case", ["dev", "dev_wide", "dev_outer", "schnell_tall"])
def test_losses_are_kohyas(case):
    from test_golden_steps import Case

    told = Case(case)
    error = told.tensors["out.pred_packed"] - pack(told.tensors["out.target"])
    timesteps = told.tensors["out.timesteps"].float() / 1000
    for name, value in told.facts["kohya_losses"].items():
        kind, weighting, loss, *how = name.split("/")
        if (kind, weighting) == ("raw", "none") and loss in LOSSES:
            c = torch.full_like(timesteps, 0.1)
            c = c**timesteps if how[:1] == ["exponential"] else c
            assert LOSSES[loss](error, c[:, None, None]).mean().item() == pytest.approx(value, rel=1e-5), name


def test_levels_have_other_tools_names():
    for row in TABLES["maps"]:
        draw, name = torch.tensor(row["draw"]["values"]) if row["draw"] else None, row["name"]
        if row["tool"] == "diffusers" and name == "mode":
            found = 1000 * on_table(MAPS["mode"].sigma(draw, scale=row["params"]["mode_scale"]))
            assert found.tolist() == pytest.approx(row["timesteps"], abs=1e-3)
        elif name.startswith("content_or_style"):
            found = 1000 - 1000 * on_table(MAPS[name.partition("=")[2]].sigma(draw))
            assert found.tolist() == pytest.approx(row["index"], abs=1e-3)
        elif row["tool"] == "kohya" and name.startswith("sigma/"):
            how = name.partition("/")[2]
            given = {"scale": row["params"]["mode_scale"]} if how == "mode" else {}
            u = MAPS["uniform" if how == "none" else how].sigma(draw, **given)
            found = shifted(on_table(u), row["params"]["discrete_flow_shift"])
            assert found.tolist() == pytest.approx(row["sigmas"], rel=1e-5, abs=1e-6)
        elif row["tool"] == "SimpleTuner" and name in ("uniform", "mixflow_enabled"):
            found = shifted(MAPS[name.removesuffix("_enabled")].sigma(draw), row["params"]["flow_schedule_shift"])
            assert found.tolist() == pytest.approx(row["sigmas"], rel=1e-5, abs=1e-6)
    some = torch.linspace(0, 1, 11)
    x = MAPS["beta"].sigma(some)
    torch.testing.assert_close(3 * x**2 - 2 * x**3, some, rtol=0, atol=1e-6)


def test_a_shift_moves_the_levels_of_any_way():
    plain = replace(PLAIN, timesteps="uniform", timestep_options={})
    moved = replace(plain, timestep_options={"shift": 3.0})
    torch.testing.assert_close(levels(moved, 4, 6), shifted(levels(plain, 4, 6), 3.0))


def test_the_bells_of_ai_toolkit():
    for row in TABLES["loss_weightings"]["rows"]:
        if row["name"].startswith("linear_timesteps"):
            sigmas = torch.tensor(row["at_timesteps"]) / 1000
            found = MAPS[row["name"].split()[0]].weight(sigmas)
            assert found.tolist() == pytest.approx(row["weights"], rel=1e-5, abs=1e-6)
    adapter = learned_adapter()
    bell = loss(adapter, batch(), replace(PLAIN, timesteps="linear_timesteps"))
    torch.testing.assert_close(bell, MAPS["linear_timesteps"].weight(SIGMA) * loss(adapter, batch(), PLAIN))


def test_what_is_not_asked_for_is_no_part_of_a_run():
    """So runs of versions that had no word for it go on."""
    known = identity(RECIPE, batch(), small_adapter())
    assert not {"loss", "huber_c", "preserve", "contrast", "mask_prior"} & known.keys()
    assert identity(replace(RECIPE, preserve="blank"), batch(), small_adapter())["preserve"] == '"blank"'


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"preserve": "differential", "trigger": "zwx"}, "--preserve differential needs --trigger and --class-word"),
        ({"preserve": "differential", "trigger": "zwx", "class_word": "zwx"}, "--class-word 'zwx' is the trigger"),
        ({"preserve": "differential", "trigger": "zwx", "class_word": " "}, "--class-word ' ' is no word"),
        ({"lora_plus": 0.0}, "--lora-plus 0 would leave the factors at zero"),
        ({"class_word": "dog"}, "--class-word goes with --preserve differential"),
        ({"loss": "huber", "huber_c": 0.0}, "nothing would learn"),
        ({"huber_c": 0.2}, "--huber-c goes with --loss huber or smooth_l1"),
        ({"preserve_weight": 2.0}, "--preserve-weight goes with --preserve"),
        ({"timesteps": "flux_shift", "timestep_shift": 3.0}, "--timestep-shift goes with --timesteps"),
        ({"timesteps": "shift", "timestep_shift": 0.0}, "--timestep-shift 0 makes every noise level 0"),
    ],
)
def test_what_does_not_go_together_is_said(given, said):
    with pytest.raises(UsageError, match=said):
        Settings({"data": "x", **given})


def test_triggers_may_be_the_folders_own():
    kept = {"preserve": "differential", "class_word": "pig"}
    given = {"data": ["x,trigger=<a>", "y,trigger=zwx"], "token": "<a>", **kept}
    assert Settings(given).triggers == ["<a>", "zwx"]


def test_weightings_are_still_those_of_diffusers():
    assert [*WEIGHTINGS] == ["none", "sigma_sqrt", "cosmap"]
