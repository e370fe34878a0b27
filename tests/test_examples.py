"""The examples: each method's identity, its effect, and a run of each script."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from statistics import median

import pytest
import torch
from golden_files import distance, flux_of, read
from PIL import Image
from torch.nn.functional import layer_norm

from flux_core import load_pipeline
from flux_core.hooks import At, AttentionMask, Capture, Custom, HookRun, Python, run_with_cache
from flux_core.hooks.sites import block_names
from flux_core.model.ops import attend
from flux_core.sampling import euler, flow_velocity, get_schedule

FOLDER = Path(__file__).parent.parent / "examples"
PLANS = ["perturbed_attention", "teacache"]
"""scripts with a `plan` for the command line"""
GOLDEN = read("transformer_dev")
INPUTS = GOLDEN.group("in.")
MODEL = flux_of(GOLDEN)
TEXT = INPUTS["txt"].shape[1]
SIGMAS = [1.0, 0.8, 0.5, 0.0]
NAMES = {"img_ids": "img_ids", "txt": "txt", "txt_ids": "txt_ids", "y": "vec", "guidance": "guidance"}
PICTURES = {
    "concept_attention": 4, "extended_kv": 3, "flow_edit": 1, "nag": 2, "perturbed_attention": 1,
    "regional_prompting": 1, "rf_inversion": 2, "teacache": 2,
}  # fmt: skip
"""published methods, and how many pictures a script draws side by side"""


def load(name):
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def forward(*plan, **inputs):
    return MODEL(**INPUTS | inputs, run=HookRun(plan, MODEL.params))


def velocity(run=None, **changes):
    return flow_velocity(MODEL, **{new: INPUTS[old] for old, new in NAMES.items()} | changes, run=run)


def test_scripts_are_short():
    lines = [len((FOLDER / f"{name}.py").read_text(encoding="utf-8").splitlines()) for name in PICTURES]
    assert median(lines) <= 50 and max(lines) <= 66


@pytest.mark.parametrize(("name", "count"), PICTURES.items())
def test_a_script_draws(name, count, tmp_path):
    load(name).main(["--num_steps", "2", "--output", str(tmp_path / "out.png")])
    assert Image.open(tmp_path / "out.png").size == (256 * count, 256)


def test_words_have_shares_and_a_probe_finds_the_object(capsys):
    load("gradients/attribution").main(["--prompt", "a red apple"])
    shares = [float(line.split()[-2]) for line in capsys.readouterr().out.splitlines()]
    assert len(shares) == 3 and sum(shares) == pytest.approx(100, abs=0.2) and min(shares) > 0
    load("gradients/probe").main(["--num_steps", "4"])
    right, chance = (float(word) for word in capsys.readouterr().out.splitlines()[1].split() if word[0].isdigit())
    assert right > chance + 15


def test_optimizers_come_nearer(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    load("gradients/optimized_noise").main(["--num_steps", "2", "--iterations", "4"])
    losses = [float(line) for line in capsys.readouterr().out.splitlines()]
    assert losses == sorted(losses, reverse=True) and Image.open("optimized_noise.png").size == (768, 256)
    load("gradients/learned_word").main(["--num_steps", "2", "--iterations", "2"])
    plain, learned = (Image.open("learned_word.png").crop((x, 0, x + 256, 256)) for x in (0, 512))
    assert plain.tobytes() != learned.tobytes()


@pytest.mark.parametrize("name", PLANS)
def test_a_plan_draws_what_its_script_draws_and_afresh_for_each_picture(name, tmp_path):
    module, pipeline = load(name), load_pipeline("flux-mini", "cpu")
    module.main(["--num_steps", "6", "--output", str(tmp_path / "out.png")])
    drawn = Image.open(tmp_path / "out.png")
    last = drawn.crop((drawn.width - 256, 0, drawn.width, 256))
    plan = Python(fn=module.plan)
    first, second = pipeline.generate("a castle", seed=0, num_steps=6, num_images=2, plan=plan)
    assert first.tobytes() == last.tobytes()
    assert second.tobytes() == pipeline.generate("a castle", seed=1, num_steps=6, plan=plan)[0].tobytes()
    assert first.tobytes() != pipeline.generate("a castle", seed=0, num_steps=6)[0].tobytes()


def test_a_function_is_the_command_of_its_file(tmp_path):
    """With each kind of flag and both spellings. A script calls it at its definition, an import does not."""
    (tmp_path / "one.py").write_text(
        '''"""What it does."""
from flux_core.script import command

@command
def main(num_steps=28, scale=2.0, words=("apple", "dog"), image=None, fast=False):
    """image: a file."""
    print([num_steps, scale, words, image, fast])
'''
    )

    def run(*flags):
        found = os.environ | {"PYTHONPATH": f"{FOLDER.parent}{os.pathsep}{tmp_path}"}
        return subprocess.run([sys.executable, *flags], env=found, capture_output=True, text=True, check=True).stdout

    assert run(str(tmp_path / "one.py")) == "[28, 2.0, ('apple', 'dog'), None, False]\n"
    flags = ["--num-steps", "4", "--scale", "3", "--words", "cat", "--image", "a.png", "--fast"]
    given = "[4, 3.0, ['cat'], 'a.png', True]\n"
    assert run(str(tmp_path / "one.py"), *flags) == given
    assert run("-c", f"import one; one.main({flags})") == given
    assert run("-c", "import one; one.main(['--num_steps', '4', '--no-fast'])").startswith("[4, 2.0,")
    described = run(str(tmp_path / "one.py"), "--help")
    assert "What it does.\nimage: a file." in described and "--num_steps NUM_STEPS, --num-steps" in described


def test_blind_attention_gives_image_tokens_their_own_values_and_text_what_it_had():
    module, seen = load("perturbed_attention"), {}
    own = {}

    def keep(store):
        return lambda at, x: store.update({at.name: x})

    block = "single_blocks.0"
    forward(
        Custom(sites=f"{block}.attend", fn=module.blind),
        Custom(sites=[f"{block}.img.attn", f"{block}.txt.attn", f"{block}.img.v"], fn=keep(seen), reads=True),
    )
    forward(Custom(sites=f"{block}.txt.attn", fn=keep(own), reads=True))
    v = seen[f"{block}.img.v"]
    assert torch.equal(seen[f"{block}.img.attn"], v.transpose(1, 2).flatten(2))
    assert torch.equal(seen[f"{block}.txt.attn"], own[f"{block}.txt.attn"])


def test_guidance_away_from_a_forward_is_the_formula_and_at_scale_zero_nothing():
    module = load("perturbed_attention")
    run = HookRun([Custom(sites="single_blocks.0.attend", fn=module.blind)], MODEL.params, SIGMAS)
    x, good, bad = INPUTS["img"], velocity(), velocity(run=run)
    assert torch.equal(module.away_from(good, bad, 0.0)(x, 0.8), good(x, 0.8))
    expected = 3 * good(x, 0.8) - 2 * bad(x, 0.8)
    assert distance(module.away_from(good, bad, 2.0)(x, 0.8), expected) <= 1e-6
    assert distance(good(x, 0.8), bad(x, 0.8)) > 1e-3


def test_a_mask_that_allows_everything_changes_nothing_and_regions_hide_texts():
    module = load("regional_prompting")
    plain, length = MODEL(**INPUTS), TEXT + INPUTS["img"].shape[1]
    everything = AttentionMask(blocks="layer.*", value=torch.ones(length, length, dtype=torch.bool))
    assert distance(forward(everything), plain) <= 1e-6
    regions = torch.tensor([0] * 12 + [1] * 12)
    mask = module.region_mask(regions, 3, 2)
    assert mask.shape == (30, 30) and torch.equal(mask, mask.T)
    assert mask[6:, 6:].all()  # image tokens see each other
    assert mask[6:18, :3].all() and not mask[6:18, 3:6].any()  # the first region sees its text alone
    assert not mask[:3, 3:6].any() and mask[18:, 3:6].all()


def test_a_text_out_of_sight_has_no_say():
    """With one text hidden from everything, other words there change nothing."""
    length = TEXT + INPUTS["img"].shape[1]
    mask = torch.ones(length, length, dtype=torch.bool)
    mask[:, 0] = False
    mask[0, 0] = True
    hide = AttentionMask(blocks="layer.*", value=mask)
    other = INPUTS["txt"].clone()
    other[:, 0] += 1
    assert torch.equal(forward(hide, txt=other), forward(hide))
    assert not torch.equal(MODEL(**INPUTS | {"txt": other}), MODEL(**INPUTS))


def test_flow_edit_to_the_same_prompt_is_the_source_and_else_follows_the_difference():
    module = load("flow_edit")
    source, v = INPUTS["img"], velocity()
    same = module.flow_edit(source, v, v, SIGMAS, lambda: torch.randn(source.shape))
    assert distance(same, source) <= 1e-5
    # velocities that are constants: the edit moves by their difference, whatever the noise
    edited = module.flow_edit(
        source, lambda x, s: 0 * x, lambda x, s: 0 * x + 2, SIGMAS, lambda: torch.randn(source.shape)
    )
    assert distance(edited, source - 2) <= 1e-6


def noise_like(x, seed=0):
    return torch.randn(x.shape, generator=torch.Generator().manual_seed(seed))


def beside(module, concepts, **inputs):
    """A forward with concept tokens before the text: its velocity, and what attention gave the texts, by site."""
    seen, txt = {}, torch.cat((concepts, inputs.pop("txt", INPUTS["txt"])), dim=1)
    run_beside = Custom(sites="layer.*.attend", fn=module.beside(concepts.shape[1]))
    watch = Capture(sites="double_blocks.*.txt.attn", into=seen)
    return forward(run_beside, watch, txt=txt, txt_ids=torch.zeros(*txt.shape[:2], 3), **inputs), seen


def test_concepts_read_the_image_and_have_no_say_in_the_picture():
    module = load("concept_attention")
    concepts, others = noise_like(torch.empty(2, 2, 2, INPUTS["txt"].shape[2]))
    velocity, seen = beside(module, concepts)
    assert distance(velocity, MODEL(**INPUTS)) <= 1e-6
    assert torch.equal(beside(module, others)[0], velocity)
    first = "0.double_blocks.0.txt.attn"  # later, the prompt reaches them through the image
    _, other_prompt = beside(module, concepts, txt=INPUTS["txt"] + 1)
    assert torch.equal(other_prompt[first][:, :2], seen[first][:, :2])
    assert distance(other_prompt[first][:, 2:], seen[first][:, 2:]) > 1e-2
    _, other_image = beside(module, concepts, img=INPUTS["img"] + 1)
    assert distance(other_image[first][:, :2], seen[first][:, :2]) > 1e-2


def test_a_concept_map_shares_every_image_token_out_and_is_a_mean_over_blocks():
    module, image = load("concept_attention"), torch.eye(4, 3)[None]  # four image tokens, three concepts
    prompt = torch.ones(1, 5, 3)
    outputs = {"0.b.img.attn": image, "0.b.txt.attn": torch.cat((9 * torch.eye(3)[None], prompt), dim=1)}
    maps = module.concept_maps(outputs, 3)
    assert maps.shape == (1, 4, 3) and torch.allclose(maps.sum(-1), torch.ones(1, 4))
    assert (maps[0].diagonal() > 0.99).all() and torch.allclose(maps[0, 3], torch.full((3,), 1 / 3))
    undecided = {"0.c.img.attn": image, "0.c.txt.attn": torch.ones(1, 8, 3)}
    assert torch.allclose(module.concept_maps(outputs | undecided, 3), (maps + 1 / 3) / 2)


def test_controlled_odes_end_where_they_are_drawn_and_without_control_change_no_bit():
    module, v = load("rf_inversion"), velocity()
    picture, noise, everywhere = INPUTS["img"], noise_like(INPUTS["img"]), dict.fromkeys(SIGMAS, 1.0)
    assert distance(euler(module.controlled(v, noise, 1.0, everywhere), picture, SIGMAS[::-1]), noise) <= 1e-6
    assert distance(euler(module.controlled(v, picture, 0.0, everywhere), noise, SIGMAS), picture) <= 1e-6
    assert torch.equal(euler(module.controlled(v, picture, 0.0, {}), noise, SIGMAS), euler(v, noise, SIGMAS))
    etas = (dict.fromkeys(SIGMAS[:steps], 0.9) for steps in range(4))
    far = [distance(euler(module.controlled(v, picture, 0.0, eta), noise, SIGMAS), picture) for eta in etas]
    assert far == sorted(far, reverse=True) and far[0] > 2 * far[3]


def test_a_controlled_velocity_is_the_formula():
    module, v, x, goal = load("rf_inversion"), velocity(), INPUTS["img"], noise_like(INPUTS["img"])
    there = v(x, 0.8) + 0.3 * ((goal - x) / (1 - 0.8) - v(x, 0.8))
    back = v(x, 0.8) + 0.3 * ((x - goal) / 0.8 - v(x, 0.8))
    assert distance(module.controlled(v, goal, 1.0, {0.8: 0.3})(x, 0.8), there) <= 1e-6
    assert distance(module.controlled(v, goal, 0.0, {0.8: 0.3})(x, 0.8), back) <= 1e-6


def test_extended_attention_is_attention_over_both():
    module, kept = load("extended_kv"), {}
    q, k, v, other_k, other_v = noise_like(torch.empty(5, 1, 2, TEXT + 9, 8))
    at = At("single_blocks.0.attend", 0, 1.0, 0, TEXT, ("image",))
    assert torch.equal(module.storing(kept)(attend, q, other_k, other_v, at), attend(q, other_k, other_v))
    k_both, v_both = torch.cat((k, other_k[:, :, TEXT:]), 2), torch.cat((v, other_v[:, :, TEXT:]), 2)
    by_hand = (q @ k_both.mT / 8**0.5).softmax(-1) @ v_both
    assert distance(module.extended(kept)(attend, q, k, v, at), by_hand.transpose(1, 2).flatten(2)) <= 1e-6


def test_a_reference_is_read_where_it_is_told_to_be_and_nowhere_else():
    module, kept, starts = load("extended_kv"), {}, noise_like(INPUTS["img"])
    own = {new: INPUTS[old][:1] for old, new in NAMES.items()}

    def drawn(x, *plans):
        velocities = (velocity(HookRun(plan, MODEL.params, SIGMAS), **own) for plan in plans)
        return euler(module.side_by_side(*velocities), x, SIGMAS)

    keep, read = (Custom(sites="single_blocks.0.attend", fn=fn) for fn in (module.storing(kept), module.extended(kept)))
    reference, alone = drawn(starts[:1], []), drawn(starts[1:], [])
    assert torch.equal(drawn(starts, [keep], []), torch.cat((reference, alone)))
    both = drawn(starts, [keep], [read])
    assert torch.equal(both[:1], reference)
    assert distance(both[1:], alone) > 1e-3


def test_normalized_guidance_extrapolates_and_keeps_a_tokens_size_within_tau():
    module = load("nag")
    positive, negative = noise_like(torch.empty(2, 3, 5, 8))
    assert torch.equal(module.normalized_guidance(positive, negative, 1.0, 2.5, 0.7), positive)
    assert torch.equal(module.normalized_guidance(positive, negative, 4.0, 2.5, 0.0), positive)
    free = module.normalized_guidance(positive, negative, 4.0, 1e9, 1.0)
    assert distance(free, 4 * positive - 3 * negative) <= 1e-6
    held = module.normalized_guidance(positive, negative, 4.0, 1.5, 1.0)
    sizes = [x.abs().sum(-1) for x in (positive, free, held)]
    assert torch.allclose(sizes[2], torch.minimum(sizes[1], 1.5 * sizes[0])) and (sizes[1] > 1.5 * sizes[0]).any()
    half = module.normalized_guidance(positive, negative, 4.0, 1.5, 0.5)
    assert distance(half, (held + positive) / 2) <= 1e-6


def test_a_negative_text_works_through_attention_alone():
    module, x = load("nag"), INPUTS["img"][:1]
    other = torch.cat((INPUTS["txt"][:1], INPUTS["txt"][:1].flip(1) + 1))
    rows = {new: INPUTS[old][:1].expand(2, *INPUTS[old].shape[1:]) for old, new in NAMES.items()} | {"txt": other}
    same = rows | {"txt": other[:1].expand(2, -1, -1)}

    def guided(scale, alpha, **inputs):
        guide = Custom(sites="layer.*.img.attn", fn=module.at_attention(scale, 2.5, alpha))
        run = HookRun([guide], MODEL.params, SIGMAS, ("positive", "negative"))
        return module.of_positive(velocity(run, **inputs))(x, 0.8)

    plain = velocity(**{name: value[:1] for name, value in rows.items()})(x, 0.8)
    two_rows = module.of_positive(velocity(**rows))(x, 0.8)
    assert torch.equal(guided(1.0, 0.5, **rows), two_rows) and torch.equal(guided(4.0, 0.0, **rows), two_rows)
    assert distance(two_rows, plain) <= 1e-6
    assert distance(guided(4.0, 0.5, **same), plain) <= 1e-5
    assert distance(guided(4.0, 0.5, **rows), plain) > 1e-2


def cached(threshold, num_steps=8):
    """What TeaCache draws, the cache, and at how many steps a block in the middle really ran."""
    sigmas, ran = get_schedule(num_steps, 24), []
    cache = load("teacache").TeaCache(threshold, block_names(MODEL.params), num_steps)
    count = Custom(sites="single_blocks.0.q", fn=lambda at, x: ran.append(at.step), reads=True)
    run = HookRun([*cache.plan, count], MODEL.params, sigmas)
    return euler(velocity(run), INPUTS["img"], sigmas), cache, ran


def test_teacache_at_threshold_zero_changes_no_bit_and_skips_nothing():
    x, cache, ran = cached(0.0)
    assert torch.equal(x, euler(velocity(), INPUTS["img"], get_schedule(8, 24)))
    assert cache.skipped == 0 and ran == list(range(8))


def test_teacache_sums_the_rescaled_change_of_the_modulated_input():
    cache, x = load("teacache").TeaCache(0.5, ["first", "last"], 9), torch.ones(2, 3)
    cache.decide(10 * x, 0)
    rescaled = 498.651651e-4 - 283.781631e-3 + 55.8554382e-2 - 3.82021401e-1 + 0.264230861  # of a change by a tenth
    for step, m, distance_then in ((1, 11, rescaled), (2, 12.1, 2 * rescaled), (3, 13.31, 0)):
        cache.decide(m * x, step)
        assert cache.distance == pytest.approx(distance_then, rel=1e-3) and cache.skipping == (step < 3)
    _, seen = run_with_cache(MODEL, "img_in,double_blocks.0.img_mod1.*", **INPUTS)
    cache = load("teacache").TeaCache(0.5, block_names(MODEL.params), 9)
    forward(*cache.plan)
    shift, scale = (seen[f"double_blocks.0.img_mod1.{name}"] for name in ("shift", "scale"))
    assert distance(cache.before, layer_norm(seen["img_in"], [48], eps=1e-6) * (1 + scale) + shift) <= 1e-6


def test_teacache_skips_more_as_the_threshold_grows_but_never_the_ends():
    exact, draws = cached(0.0)[0], [cached(threshold) for threshold in (0.5, 1e9)]
    (near, some, ran), (far, most, ends) = draws
    assert 0 < some.skipped < most.skipped == 6 and len(ran) == 8 - some.skipped and ends == [0, 7]
    assert 0 < distance(near, exact) < distance(far, exact)


def test_a_skipped_step_adds_to_what_enters_what_the_blocks_added_before():
    module, seen = load("teacache"), {}
    cache = module.TeaCache(1e9, block_names(MODEL.params), 3)
    first, last = block_names(MODEL.params)[0], block_names(MODEL.params)[-1]
    watch = Capture(sites=[f"{first}.img.in", f"{last}.img.out"], into=seen)
    euler(velocity(HookRun([*cache.plan, watch], MODEL.params, SIGMAS)), INPUTS["img"], SIGMAS)
    added = [seen[f"{step}.{last}.img.out"] - seen[f"{step}.{first}.img.in"] for step in range(3)]
    assert distance(added[1], added[0]) <= 1e-6 and distance(added[2], added[0]) > 1e-3
