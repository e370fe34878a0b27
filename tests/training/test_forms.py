"""T-LoRA, LoKr, and ranks and rates of their own: plain LoRA where they should be, what they say elsewhere, and files
that are drawn as they were trained."""

import json
from dataclasses import replace

import pytest
import torch
from golden_files import distance, read
from random_model import random_weights, small_variant
from safetensors.torch import load_file, safe_open
from small import PARAMS as SMALL
from small import RECIPE, examples

from flux_core.errors import FileError, UsageError
from flux_core.linears.formats import quantize
from flux_core.lora import attach, read_lora
from flux_core.lora.convert import convert
from flux_core.lora.merge import merging
from flux_core.lora.ranks import RankSchedule
from flux_core.model import Flux
from flux_core.training import PRESETS, adapt, train
from flux_core.training.adapter import by_pattern, matching
from flux_core.training.lokr import shapes, split
from flux_core.training.loop import State, checkpoints, each_loss, noise_like
from flux_core.training.plan import count

PARAMS = replace(small_variant("flux-dev").params, mlp_ratio=4.0)
PATTERNS = (*PRESETS["blocks"], "norm_out.linear", "x_embedder")
SCHEDULE = RankSchedule(1, 1.0)
LEVELS = (1.0, 0.7, 0.5, 0.1, 0.0)


def model_of(params=PARAMS):
    return random_weights(Flux(params), std=0.1)


def adapter_of(model=None, patterns=PATTERNS, moved=True, **form):
    """Rank 4 and alpha 3, whose numbers are moved to where all of them matter."""
    draw = torch.Generator().manual_seed(7)
    adapter = adapt(model or model_of(), patterns, 4, 3.0, draw, **form)
    with torch.no_grad():
        for x in adapter.parameters() if moved else ():
            x.add_(0.05 * torch.randn(x.shape, generator=draw))
    return adapter


def velocity(model, sigma=0.5, params=PARAMS):
    """At that level; several are several pictures."""
    levels = torch.tensor(sigma if isinstance(sigma, list) else [sigma])
    draw, rows = torch.Generator().manual_seed(1), len(levels)
    shapes = (6, 64), (4, params.context_in_dim), (params.vec_in_dim,)
    img, txt, y = (torch.randn(1, *shape, generator=draw).expand(rows, *shape) for shape in shapes)
    return model(img, torch.zeros(rows, 6, 3), txt, torch.zeros(rows, 4, 3), levels, y, torch.full((rows,), 3.5))


def small_adapter(rank=4, **form):
    draw = torch.Generator().manual_seed(0)
    model = Flux(SMALL)
    with torch.no_grad():
        for x in model.parameters():
            x.copy_(0.2 * torch.randn(x.shape, generator=draw))
    return adapt(model, ("to_q", "proj_out", "norm_out.linear"), rank, 4, draw, **form)


def run(folder=None, recipe=RECIPE, rates=(), on_step=None, **form):
    adapter = small_adapter(**form)
    adapter.rates = dict(rates)
    losses = train(adapter, examples(), recipe, folder, every=1, on_step=on_step)
    return losses, {name: x.detach() for name, x in adapter.named_parameters().items()}


def same(one, other):
    return one[0] == other[0] and all(torch.equal(x, other[1][name]) for name, x in one[1].items())


@pytest.fixture(scope="module")
def plain():
    return run()


# T-LoRA ------------------------------------------------------------------------------------------------


def test_active_ranks_in_closed_form():
    """The table of SimpleTuner's documentation for a curve of 1, and what its formula says of others."""
    levels = (0, 0.25, 0.5, 0.75, 0.999)
    assert [RankSchedule(1).active(64, t) for t in levels] == [64, 48, 32, 16, 1]
    assert [RankSchedule(1, 2.0).active(64, t) for t in levels] == [64, 36, 16, 4, 1]
    assert [RankSchedule(4, 0.0).active(16, t) for t in LEVELS] == [16] * 5
    assert [RankSchedule(8).active(4, t) for t in LEVELS] == [4] * 5
    for step in range(1001):  # whole numbers of ranks are not lost in rounding
        exact = 1 + (1000 - step) * 10 // 1000
        for level in (step / 1000, float(torch.tensor(step / 1000, dtype=torch.float32))):
            assert RankSchedule(1).active(11, level) == exact


def test_with_all_ranks_at_least_it_is_plain_lora(plain):
    assert same(run(schedule=RankSchedule(4)), plain) and not same(run(schedule=SCHEDULE), plain)


@torch.no_grad()
def test_each_picture_of_a_batch_has_its_own_ranks():
    adapter = adapter_of(schedule=SCHEDULE)
    adapter.at(torch.tensor(LEVELS))
    together = velocity(adapter.model, list(LEVELS))
    for level, row in zip(LEVELS, together, strict=True):
        adapter.at(torch.tensor([level]))
        assert distance(row, velocity(adapter.model, level)[0]) <= 1e-6
    assert distance(together[1], velocity(adapter_of().model, 0.7)[0]) > 1e-3


def test_ranks_that_do_not_count_do_not_learn():
    adapter = small_adapter(schedule=SCHEDULE)
    with torch.no_grad():
        adapter.factors["single_transformer_blocks.0.attn.to_q"].up.fill_(0.1)
    some = examples(1)
    noise = noise_like(some, torch.Generator().manual_seed(0))
    each_loss(adapter, some, RECIPE, noise, torch.tensor([0.5])).mean().backward()
    one = adapter.factors["single_transformer_blocks.0.attn.to_q"]
    assert SCHEDULE.active(4, 0.5) == 2
    assert one.down.grad[:2].any(1).all() and not one.down.grad[2:].any()
    assert one.up.grad[:, :2].any() and not one.up.grad[:, 2:].any()


@torch.no_grad()
@pytest.mark.parametrize("form", [{}, {"rslora": True}, {"ranks": {"x_embedder": 7, "norm_out.linear": 2}}])
def test_a_file_is_drawn_at_each_level_as_it_was_trained(form, tmp_path):
    adapter, model = adapter_of(schedule=SCHEDULE, **form), model_of()
    handle = attach(model, adapter.save(tmp_path))
    found = []
    for level in LEVELS:
        adapter.at(torch.tensor([level]))
        handle.set(level)
        found.append(velocity(model, level))
        assert distance(found[-1], velocity(adapter.model, level)) <= 1e-5
    handle.scale = 0.5
    handle.set(1.0)
    handle.scale = 1.0
    assert torch.equal(velocity(model, 1.0), found[0])
    with attach(other := model_of(), adapter_of(**form).save(tmp_path / "plain")) as constant:
        constant.set(1.0)
        assert distance(velocity(other, 1.0), found[0]) > 1e-3
    assert torch.equal(velocity(other, 1.0), velocity(model_of(), 1.0))
    assert "T-LoRA from rank 1, curve 1" in handle.summary


@torch.no_grad()
def test_of_a_rank_that_is_not_cheaper_ranks_are_left_out_too(tmp_path):
    """Where plain LoRA's difference is computed dense."""
    adapter = adapt(model_of(), ["to_q"], 60, 60, torch.Generator().manual_seed(1), schedule=SCHEDULE)
    for one in adapter.factors.values():
        one.up.normal_(0, 0.02, generator=torch.Generator().manual_seed(2))
    handle = attach(model := model_of(), adapter.save(tmp_path))
    for level in LEVELS:
        adapter.at(torch.tensor([level]))
        handle.set(level)
        assert distance(velocity(model, level), velocity(adapter.model, level)) <= 1e-5


@torch.no_grad()
def test_beside_codes(tmp_path):
    params = replace(PARAMS, hidden_size=256, axes_dim=(32, 48, 48), depth=1, depth_single_blocks=1)
    models = [random_weights(Flux(params), std=0.05) for _ in range(2)]
    for model in models:
        quantize(model, "fp8")
    adapter = adapter_of(models[0], PRESETS["attention"], schedule=SCHEDULE)
    handle = attach(models[1], adapter.save(tmp_path))
    for level in LEVELS[:3]:
        adapter.at(torch.tensor([level]))
        handle.set(level)
        assert distance(velocity(models[1], level), velocity(models[0], level)) <= 1e-5


def test_the_header_of_a_t_lora(tmp_path):
    with safe_open(adapter_of(schedule=RankSchedule(2, 1.5)).save(tmp_path), "pt") as file:
        found = json.loads(file.metadata()["lycoris_config"])
    assert found == {"algo": "tlora", "linear_dim": 4, "linear_alpha": 3.0, "tlora_min_rank": 2, "tlora_alpha": 1.5}


def test_what_cannot_be_masked_is_refused(tmp_path):
    path = adapter_of(schedule=SCHEDULE).save(tmp_path)
    lora = read_lora(path, PARAMS)
    with pytest.raises(UsageError, match=r"is a T-LoRA.*Next: leave --lora-merge out"):
        attach(model_of(), path, merge=True)
    with pytest.raises(UsageError, match=r"is a T-LoRA.*Next: draw with --lora"), merging([lora], [1.0]):
        pass
    with pytest.raises(UsageError, match=r"is a T-LoRA.*Next: draw with it here"):
        convert(lora, PARAMS, "kohya")


@pytest.mark.parametrize("config", [{"tlora_min_rank": 0}, {"tlora_min_rank": "x"}, {"tlora_alpha": -1}])
def test_a_schedule_that_is_none(config, tmp_path):
    from flux_core.checkpoint import write_safetensors

    path = tmp_path / "x.safetensors"
    header = {"lycoris_config": json.dumps({"algo": "tlora", **config})}
    write_safetensors(path, adapter_of(patterns=["to_q"]).state(), header)
    with pytest.raises(FileError, match=r"T-LoRA's schedule in its header is none.*Next: save it again"):
        read_lora(path, PARAMS)
    write_safetensors(path, adapter_of(patterns=["to_q"], lokr=4).state(), {"lycoris_config": '{"algo": "tlora"}'})
    with pytest.raises(FileError, match="is lokr, which has no ranks to leave out"):
        read_lora(path, PARAMS)


# LoKr --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size, factor, pair", [
    (3072, -1, (48, 64)), (3072, 8, (8, 384)), (64, 16, (8, 8)), (21, 8, (3, 7)), (13, -1, (1, 13)),
])  # fmt: skip
def test_how_a_size_is_cut(size, factor, pair):
    assert split(size, factor) == pair


def test_sizes_are_those_of_lycoris():
    """Of a file that its own writer wrote, at factor 4 and rank 3."""
    golden = read("lora/lycoris_lokr").tensors
    for stem, rows in (
        ("lycoris_transformer_blocks_0_attn_to_q", 64),
        ("lycoris_transformer_blocks_1_ff_net_0_proj", 256),
    ):
        for role, shape in shapes(rows, 64, 3, 4).items():
            assert tuple(golden[f"{stem}.lokr_{role}"].shape) == shape
    assert shapes(64, 64, 8, 4) == {"w1": (4, 4), "w2": (16, 16)}


@torch.no_grad()
@pytest.mark.parametrize("factor", [2, 4, -1])
def test_lokr_begins_as_the_model_and_is_a_kronecker_product(factor, tmp_path):
    model = model_of()
    before = velocity(model)
    begun = adapter_of(model, moved=False, lokr=factor)
    assert torch.equal(velocity(model), before) and begun.changes()[0][1] == 0

    adapter, dense = adapter_of(lokr=factor), model_of()
    for one in adapter.factors.values():
        rows = one.rows_of(dense.get_submodule(one.target.module).weight)
        rows += one.change(rows)
    assert distance(velocity(dense), velocity(adapter.model)) <= 1e-5
    assert any(one.later == "w2" for one in adapter.factors.values()) or factor == 2

    path = adapter.save(tmp_path)
    attach(other := model_of(), path)
    assert distance(velocity(other), velocity(adapter.model)) <= 1e-5
    begun.load(load_file(path))
    assert all(torch.equal(x, begun.named_parameters()[name]) for name, x in adapter.named_parameters().items())
    with safe_open(path, "pt") as file:
        header = file.metadata()
    assert header.keys() == {"format", "lycoris_config"} and json.loads(header["lycoris_config"]) == {
        "algo": "lokr", "factor": factor, "linear_dim": 4, "linear_alpha": 3.0,
    }  # fmt: skip


def test_lokr_learns_and_goes_on_to_the_bit(tmp_path):
    whole = run(tmp_path / "whole", lokr=4)
    assert sum(whole[0][-4:]) < sum(run(recipe=replace(RECIPE, lr=0.0), lokr=4)[0][-4:])
    run(tmp_path / "parts", lokr=4, on_step=lambda done: done.step == 5)
    assert same(run(tmp_path / "parts", lokr=4), whole)


def test_gradients_of_lokr_are_those_of_the_product():
    adapter = adapter_of(patterns=["transformer_blocks.0.attn.to_k"], lokr=2)
    (one,) = adapter.factors.values()
    x = torch.randn(3, 32, generator=torch.Generator().manual_seed(2))
    one(x, torch.zeros(3, 32), torch.nn.Identity()).square().sum().backward()
    w1, w2 = (y.detach().clone().requires_grad_() for y in (one.w1, one.w2_a))
    (x @ (one.scale * torch.kron(w1, w2 @ one.w2_b.detach())).t()).square().sum().backward()
    assert distance(one.w1.grad, w1.grad) <= 1e-5 and distance(one.w2_a.grad, w2.grad) <= 1e-5


@pytest.mark.parametrize("form, said", [
    ({"lokr": 4, "dora": True}, "DoRA and LoKr do not go together"),
    ({"schedule": SCHEDULE, "dora": True}, "DoRA and T-LoRA do not go together"),
    ({"lokr": 4, "rslora": True}, "none of LoKr's"),
    ({"schedule": RankSchedule(5)}, "least rank is 5, more than the rank 4"),
])  # fmt: skip
def test_what_does_not_go_together(form, said):
    with pytest.raises(UsageError, match=said):
        adapter_of(**form)


# Ranks and rates of their own --------------------------------------------------------------------------


def test_ranks_that_are_all_equal_are_plain(plain, tmp_path):
    names = list(small_adapter().factors)
    assert same(run(ranks=dict.fromkeys(names, 4)), plain)
    one, other = adapter_of(), adapter_of(ranks=dict.fromkeys(matching(PARAMS, PATTERNS), 4))
    assert one.save(tmp_path / "a").read_bytes() == other.save(tmp_path / "b").read_bytes()


RANKS = {"norm_out.linear": 2, "single_transformer_blocks.0.proj_out": 9, "transformer_blocks.1.attn.to_q": 1}


@torch.no_grad()
@pytest.mark.parametrize("rslora", [False, True])
def test_ranks_of_their_own_are_read_by_us_and_by_diffusers(rslora, tmp_path):
    """alpha / rank is that of all, and so in PEFT's patterns, which are whole names."""
    adapter, model = adapter_of(ranks=RANKS, rslora=rslora), model_of()
    assert {name: one.rank for name, one in adapter.factors.items() if one.rank != 4} == RANKS
    assert rslora or {one.scale for one in adapter.factors.values()} == {0.75}
    attach(model, adapter.save(tmp_path))
    assert distance(velocity(model), velocity(adapter.model)) <= 1e-5
    from test_adapter import theirs, with_theirs
    from test_adapter import velocity as its

    with_theirs(other := theirs(PARAMS)).load_lora_weights(tmp_path)
    assert distance(its(other), its(adapter.model)) <= 1e-5


def first_step(recipe, **options):
    """How far one step of AdamW without decay moved what begins at zero: by the rate each."""
    _, learned = run(None, replace(recipe, steps=1, warmup=0, weight_decay=0.0, max_grad_norm=1e6), **options)
    return {name: x for name, x in learned.items() if name.endswith("up")}


def test_lora_plus_and_rates_are_factors_of_the_rate(plain, tmp_path):
    assert same(run(recipe=replace(RECIPE, lora_plus=1.0), rates={}), plain)
    names = list(small_adapter().factors)
    same_rates = run(recipe=RECIPE, rates=dict.fromkeys(names, RECIPE.lr))
    assert same(same_rates, plain)
    usual, faster = first_step(RECIPE), first_step(replace(RECIPE, lora_plus=8.0))
    own = first_step(RECIPE, rates={"norm_out.linear": 3 * RECIPE.lr})
    for name, x in usual.items():
        torch.testing.assert_close(faster[name], 8 * x, rtol=1e-5, atol=1e-9)
        torch.testing.assert_close(own[name], (3 if name == "norm_out.linear.up" else 1) * x, rtol=1e-5, atol=1e-9)


def test_with_rates_a_run_goes_on_to_the_bit_and_says_what_differs(tmp_path):
    options = {"recipe": replace(RECIPE, lora_plus=4.0), "rates": {"norm_out.linear": 1e-3}}
    whole = run(tmp_path / "whole", **options)
    run(tmp_path / "parts", on_step=lambda done: done.step == 5, **options)
    assert same(run(tmp_path / "parts", **options), whole)
    ends = [checkpoints(tmp_path / name)[-1].read_bytes() for name in ("whole", "parts")]
    assert ends[0] == ends[1]
    without = options | {"recipe": RECIPE}
    for changed, said in (
        (options | {"rates": {}}, "with rates .*, not without"), (without, r"with lora_plus 4\.0, not 1\.0\."),
    ):  # fmt: skip
        with pytest.raises(UsageError, match=f"was trained {said}"):
            run(tmp_path / "parts", **changed)
    run(tmp_path / "plain")
    for changed, said in (
        (options, r"with lora_plus 1\.0, not 4\.0\."),
        ({"rates": options["rates"]}, "without rates, not with"),
    ):
        with pytest.raises(UsageError, match=f"was trained {said}"):
            run(tmp_path / "plain", **changed)


def test_the_identity_of_a_plain_run_is_as_it_was(tmp_path):
    run(tmp_path)
    with safe_open(checkpoints(tmp_path)[-1], "pt") as file:
        known = file.metadata().keys()
    new = {"lora_plus", "rates", "rank_pattern", "alpha_pattern", "algo"}
    assert not known & new and {"r", "lora_alpha", "use_dora", "modules"} <= known


def test_prodigy_has_one_rate():
    with pytest.raises(UsageError, match="prodigy finds one rate for all"):
        State(small_adapter(), replace(RECIPE, optimizer="prodigy", lora_plus=2.0))


@pytest.mark.parametrize("text, said", [
    ("to_q", "'to_q' has no value. Next: NAME=VALUE, as in --ranks to_q=4"),
    ("to_x=3", "no Linear of the transformer is named 'to_x'"),
    ("ff.net.2=3", "nothing that learns is named ff.net.2"),
])  # fmt: skip
def test_patterns_that_are_none(text, said):
    with pytest.raises(UsageError, match=said):
        by_pattern(text, int, "flux-dev", PARAMS, matching(PARAMS, ["to_q"]))


def test_values_by_pattern():
    learns = matching(PARAMS, PRESETS["attention"])
    found = by_pattern("attention=8, transformer_blocks.0.*=2", int, "flux-dev", PARAMS, learns)
    assert found.keys() == set(learns) and found["transformer_blocks.1.attn.to_q"] == 8
    assert found["transformer_blocks.0.attn.to_q"] == 2 and by_pattern("", int, "flux-dev", PARAMS, learns) == {}


@pytest.mark.parametrize(
    "form", [{}, {"lokr": 4}, {"lokr": -1, "ranks": {"x_embedder": 9}}, {"ranks": {"x_embedder": 9}}]
)
def test_the_plan_counts_what_learns(form):
    adapter = adapter_of(moved=False, **form)
    assert count(PARAMS, list(PATTERNS), adapter.form) == sum(x.numel() for x in adapter.parameters())


def test_a_plain_adapter_takes_no_notice_of_levels():
    adapter = small_adapter()
    adapter.at(torch.tensor([0.3]))
    adapter.set(0.3)
    assert adapter.group(0.3) == () and all(one.mask is None for one in adapter.factors.values())
