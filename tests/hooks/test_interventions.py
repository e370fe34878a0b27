"""Each intervention against a closed form or a plain computation, and its identity."""

import pytest
import torch
from einops import rearrange
from golden_files import distance, flux_of, read
from safetensors.torch import load_file, save_file
from torch import nn

from flux_core.errors import FileError, UsageError
from flux_core.hooks import (
    Add,
    AttentionMaps,
    Capture,
    Custom,
    FirstBlockCache,
    HookRun,
    Replace,
    Scale,
    ShareKV,
    Skip,
    run_with_cache,
)
from flux_core.hooks.sites import block_names
from flux_core.sampling import euler, flow_velocity, get_schedule

GOLDEN = read("transformer_dev")
INPUTS = GOLDEN.group("in.")
MODEL = flux_of(GOLDEN)
PARAMS = MODEL.params
TEXT = INPUTS["txt"].shape[1]
SIGMAS = get_schedule(6, 24)


@pytest.fixture(scope="module")
def plain():
    return MODEL(**INPUTS)


def forward(*plan, branches=("image",), **inputs):
    return MODEL(**INPUTS | inputs, run=HookRun(plan, PARAMS, branches=branches))


def sampled(*plan, sigmas=SIGMAS):
    names = {"img_ids": "img_ids", "txt": "txt", "txt_ids": "txt_ids", "y": "vec", "guidance": "guidance"}
    run = HookRun(plan, PARAMS, sigmas)
    x = euler(flow_velocity(MODEL, **{new: INPUTS[old] for old, new in names.items()}, run=run), INPUTS["img"], sigmas)
    run.finish()
    return x


def test_skipping_blocks_is_a_model_without_them(plain):
    short = flux_of(GOLDEN)
    short.double_blocks = nn.ModuleList([short.double_blocks[0]])
    short.single_blocks = nn.ModuleList([short.single_blocks[0], short.single_blocks[2]])
    assert torch.equal(forward(Skip(blocks="layer.1,layer.3")), short(**INPUTS))
    assert not torch.equal(plain, short(**INPUTS))


def test_steps_limit_an_intervention_to_them():
    seen = {}
    sampled(Capture(sites="velocity", into=seen), Skip(blocks="double_blocks.1", steps="2-3"))
    every = {}
    sampled(Capture(sites="velocity", into=every))
    assert [torch.equal(seen[f"{i}.velocity"], every[f"{i}.velocity"]) for i in range(3)] == [True, True, False]
    assert torch.equal(sampled(Skip(blocks="double_blocks.1", steps=range(6))), sampled(Skip(blocks="double_blocks.1")))


def test_a_number_scales_adds_or_takes_the_place(plain):
    _, seen = run_with_cache(MODEL, "vec", **INPUTS)
    half, more, zero = seen["vec"] * 0.5, seen["vec"] + 0.25, torch.zeros_like(seen["vec"])
    for change, value in ((Scale(sites="vec", value=0.5), half), (Add(sites="vec", value=0.25), more)):
        assert torch.equal(forward(change), forward(Replace(sites="vec", value=value)))
    assert torch.equal(forward(Replace(sites="vec", value=0)), forward(Replace(sites="vec", value=zero)))
    assert torch.equal(forward(Scale(sites="*.gate", value=1)), plain)
    assert torch.equal(forward(Add(sites="*.img.attn", value=0)), plain)


def test_gates_at_zero_are_skipped_blocks():
    assert distance(forward(Replace(sites="layer.1.*.gate", value=0)), forward(Skip(blocks="layer.1"))) <= 1e-6


def test_a_tensor_comes_from_a_file_and_a_wrong_name_is_told(tmp_path):
    direction = torch.randn(PARAMS.hidden_size)
    save_file({"smile": direction}, tmp_path / "d.safetensors")

    def add(name):
        return Add(sites="vec", value={"file": tmp_path / "d.safetensors", "tensor": name})

    assert torch.equal(forward(add("smile")), forward(Add(sites="vec", value=direction)))
    with pytest.raises(FileError, match=r"no tensor 'smil'.*smile"):
        forward(add("smil"))


def test_captures_go_to_a_file_that_appears_at_the_end_and_replaces_none(tmp_path):
    path, seen = tmp_path / "seen.safetensors", {}
    plan = [Capture(sites="single_blocks.*.img.out", steps=[0, 5], to=path)]
    sampled(*plan, Capture(sites="single_blocks.*.img.out", steps=[0, 5], into=seen))
    stored = load_file(path)
    assert set(stored) == {f"{step}.single_blocks.{i}.img.out" for step in (0, 5) for i in range(3)} == set(seen)
    assert all(torch.equal(stored[name], seen[name]) for name in seen)
    sampled(*plan)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["seen.safetensors", "seen_1.safetensors"]


def test_a_capture_sees_what_a_change_left():
    seen = {}
    forward(Replace(sites="double_blocks.0.img.v", value=2), Capture(sites="double_blocks.0.img.v", into=seen))
    assert (seen["0.double_blocks.0.img.v"] == 2).all()


@pytest.mark.parametrize("block", ["double_blocks.1", "single_blocks.0"])
def test_attention_maps_are_the_probabilities_that_attention_used(block):
    maps, tokens = {}, {"queries": "all", "keys": "all", "heads": "each"}
    _, seen = run_with_cache(MODEL, [f"{block}.{s}.{x}" for s in ("img", "txt") for x in ("v", "attn")], **INPUTS)
    forward(AttentionMaps(blocks=block, into=maps, **tokens))
    probabilities = maps[f"0.{block}.attention_map"]
    v = torch.cat((seen[f"{block}.txt.v"], seen[f"{block}.img.v"]), 2)
    out = rearrange(probabilities @ v, "B H L D -> B L (H D)")
    assert distance(out, torch.cat((seen[f"{block}.txt.attn"], seen[f"{block}.img.attn"]), 1)) <= 1e-5
    part = {}
    forward(AttentionMaps(blocks=block, into=part, queries="img", keys=[2, 0]))
    expected = probabilities.mean(1)[:, TEXT:][..., [0, 2]]  # tokens come in their order
    assert distance(part[f"0.{block}.attention_map"], expected) <= 1e-6


# Sharing keys and values -----------------------------------------------------------------------------

BRANCHES = ("source", "edit")
ALL = "layer.*"


def test_sharing_among_equal_branches_changes_no_bit():
    same = {name: x[:1].expand(2, *x.shape[1:]).clone() for name, x in INPUTS.items()}
    assert torch.equal(forward(ShareKV(blocks=ALL), branches=BRANCHES, **same), MODEL(**same))


def test_the_source_is_left_alone_and_the_target_is_not(plain):
    shared = forward(ShareKV(blocks="layer.1"), branches=BRANCHES)
    assert torch.equal(shared[0], plain[0])
    assert distance(shared[1], plain[1]) > 1e-3


def test_one_batch_is_two_passes_captured_then_put_in_place():
    blocks = "layer.1,layer.2"
    sites = [f"{block}.img.{x}" for block in ("double_blocks.1", "single_blocks.0") for x in "kv"]
    first = {name: x[:1] for name, x in INPUTS.items()}
    second = {name: x[1:] for name, x in INPUTS.items()}
    _, seen = run_with_cache(MODEL, sites, **first)
    two_passes = forward(*(Replace(sites=site, value=seen[site]) for site in sites), **second)
    assert distance(forward(ShareKV(blocks=blocks), branches=BRANCHES)[1:], two_passes) <= 1e-6


@pytest.mark.parametrize("tokens", ["img", "txt", "all"])
@pytest.mark.parametrize("what", ["k", "v", "kv"])
def test_only_what_is_asked_for_is_shared(tokens, what):
    seen = {}
    share = ShareKV(blocks="single_blocks.0", tokens=tokens, what=what)
    forward(share, Capture(sites="single_blocks.0.*.[qkv]", into=seen), branches=BRANCHES)
    for stream in ("img", "txt"):
        for letter in "qkv":
            source, edit = seen[f"0.single_blocks.0.{stream}.{letter}"]
            assert torch.equal(source, edit) == (letter in what and tokens in (stream, "all"))


def test_rows_of_several_images_read_from_their_own_source():
    from flux_core.hooks.share_kv import read_from

    x = torch.arange(6.0)[:, None]  # two images x three branches
    assert read_from(x, torch.tensor([0, 1, 0])).flatten().tolist() == [0, 1, 0, 3, 4, 3]


def test_a_branch_that_is_not_there_is_named():
    with pytest.raises(UsageError, match="no branch 'sorce'; there are source, edit"):
        HookRun([ShareKV(blocks="layer.0", source="sorce")], PARAMS, branches=BRANCHES)
    with pytest.raises(UsageError, match="only one branch"):
        HookRun([ShareKV(blocks="layer.0", source="image")], PARAMS)


# First-block cache -----------------------------------------------------------------------------------


def test_a_threshold_of_zero_caches_nothing():
    assert torch.equal(sampled(FirstBlockCache(threshold=0)), sampled())


def test_a_scheduled_step_runs_the_first_block_alone():
    ran = []

    def count(call, x, at):
        ran.append((at.step, at.name))
        return call(x)

    blocks = block_names(PARAMS)
    sampled(Custom(sites=blocks, fn=count), FirstBlockCache(schedule="1-5/2", follow=True))
    assert ran == [(step, name) for step in range(6) for name in (blocks[:1] if step % 2 else blocks)]


def test_a_cached_step_adds_what_the_last_full_one_added():
    entered = {}

    def first(at, img):
        entered[at.step] = img

    seen = {}
    plan = [
        FirstBlockCache(schedule=[3, 4]),
        Custom(sites="double_blocks.0.img.out", fn=first, reads=True),
        Capture(sites="single_blocks.2.img.out", into=seen),
    ]
    sampled(*plan)
    last = {step: seen[f"{step}.single_blocks.2.img.out"] for step in range(6)}
    rest = {step: last[step] - entered[step] for step in range(6)}
    assert distance(rest[3], rest[2]) <= 1e-6 and distance(rest[4], rest[2]) <= 1e-6
    assert distance(rest[5], rest[2]) > 1e-3


def test_a_huge_threshold_caches_after_the_warm_up_and_never_too_many_in_a_row():
    ran = []

    def count(call, x, at):
        ran.append(at.step)
        return call(x)

    sampled(
        Custom(sites="double_blocks.1", fn=count), FirstBlockCache(threshold=9e9, warmup=2, max_in_row=2, follow=True)
    )
    assert ran == [0, 1, 4]


def test_two_passes_of_one_step_have_memories_of_their_own():
    names = {"img_ids": "img_ids", "txt": "txt", "txt_ids": "txt_ids", "y": "vec", "guidance": "guidance"}
    fixed = {new: INPUTS[old] for old, new in names.items()}

    def guided(plan):
        run = HookRun(plan, PARAMS, SIGMAS)
        one = flow_velocity(MODEL, **fixed, run=run)
        other = flow_velocity(MODEL, **fixed | {"txt": torch.zeros_like(fixed["txt"])}, run=run)
        return euler(lambda x, sigma: one(x, sigma) * 2 - other(x, sigma), INPUTS["img"], SIGMAS)

    mixed = []

    def look(at, velocity):
        mixed.append((at.step, at.call))

    guided([Custom(sites="velocity", fn=look, reads=True)])
    assert mixed == [(step, call) for step in range(6) for call in (0, 1)]
    cached, plain = guided([FirstBlockCache(schedule=[2])]), guided([])
    assert 0 < distance(cached, plain) < 0.2  # with one memory for both the two velocities would be mixed up


# Functions ----------------------------------------------------------------------------------------------


def test_a_function_around_a_block_may_call_it_twice_or_change_its_result():
    def twice(call, x, at):
        return call(call(x))

    model = flux_of(GOLDEN)
    model.single_blocks = nn.ModuleList([model.single_blocks[i] for i in (0, 1, 1, 2)])
    seen = HookRun([Custom(sites="single_blocks.1", fn=twice)], PARAMS)
    # the loop computes the modulation of a block once; the doubled block has the same vec, so the same modulation
    assert torch.equal(MODEL(**INPUTS, run=seen), model(**INPUTS))


def test_attention_can_be_replaced_for_chosen_blocks(plain):
    def slow(attend, q, k, v, at):
        return rearrange(torch.softmax(q @ k.mT / q.shape[-1] ** 0.5, -1) @ v, "B H L D -> B L (H D)")

    assert distance(forward(Custom(sites="layer.*.attend", fn=slow)), plain) <= 1e-6
    silent = Custom(sites="single_blocks.0.attend", fn=lambda attend, q, k, v, at: 0 * attend(q, k, v))
    assert torch.equal(forward(silent), forward(Replace(sites="single_blocks.0.*.attn", value=0)))


def test_a_function_knows_where_and_when_it_is_called():
    seen = []

    def look(at, x):
        seen.append((at.name, at.step, at.sigma, at.txt_len, at.branches))

    sampled(Custom(sites="double_blocks.1.txt.k", fn=look, reads=True, steps=[4]))
    assert seen == [("double_blocks.1.txt.k", 4, SIGMAS[4], TEXT, ("image",))]
