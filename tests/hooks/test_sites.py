"""Every site is called, has the value it documents, and changes nothing when it is replaced by itself."""

import pytest
import torch
from einops import rearrange
from golden_files import distance, flux_of, read

from flux_core.commands.sites import sites
from flux_core.errors import UsageError
from flux_core.hooks import Custom, HookRun, run_with_cache
from flux_core.hooks.sites import SITES, block_names, match_blocks, match_sites, site_names, split
from flux_core.model import Flux
from flux_core.variants import VARIANTS

GOLDEN = read("transformer_dev")
INPUTS = GOLDEN.group("in.")
MODEL = flux_of(GOLDEN)
PARAMS = MODEL.params
TEXT = INPUTS["txt"].shape[1]
SIZES = {
    "B": INPUTS["img"].shape[0], "L": INPUTS["img"].shape[1], "T": TEXT, "T+L": TEXT + INPUTS["img"].shape[1],
    "D": PARAMS.hidden_size, "H": PARAMS.num_heads, "P": PARAMS.head_dim, "P/2": PARAMS.head_dim // 2,
    "C": PARAMS.out_channels, "V": PARAMS.vec_in_dim, "1": 1, "2": 2, "3": 3,
}  # fmt: skip


@pytest.fixture(scope="module")
def cached():
    """(velocity, every site's value)"""
    return run_with_cache(MODEL, "*", **INPUTS)


@pytest.fixture(scope="module")
def modules():
    """What went into and came out of every module of one plain forward, by its name."""
    seen = {}
    handles = [
        module.register_forward_hook(lambda _, args, out, name=name: seen.update({name: (args, out)}))
        for name, module in MODEL.named_modules()
    ]
    MODEL(**INPUTS)
    for handle in handles:
        handle.remove()
    return seen


def test_every_site_fires_and_reading_changes_no_bit(cached):
    velocity, seen = cached
    assert set(seen) == set(site_names(PARAMS))
    assert torch.equal(velocity, MODEL(**INPUTS))


@pytest.mark.parametrize("name", site_names(PARAMS))
def test_a_site_has_its_shape_and_replacing_it_by_itself_changes_no_bit(name, cached):
    velocity, seen = cached
    site = next(site for site in SITES if site.name == split(name)[1])
    assert list(seen[name].shape) == [SIZES[word.strip()] for word in site.shape[1:-1].split(",")]
    run = HookRun([Custom(sites=name, fn=lambda x, at: x.clone())], PARAMS)
    assert torch.equal(MODEL(**INPUTS, run=run), velocity)


@pytest.mark.parametrize("name", site_names(PARAMS))
def test_what_stands_at_a_site_matters(name, cached):
    dead = name.startswith(f"double_blocks.{PARAMS.depth - 1}.txt_mod2") or name == "pe"
    run = HookRun([Custom(sites=name, fn=lambda x, at: x * 1.5 + 0.1)], PARAMS)
    last_text = name.startswith(f"single_blocks.{PARAMS.depth_single_blocks - 1}.txt") and not name.endswith(
        (".k", ".v", ".in")
    )
    changed = distance(MODEL(**INPUTS, run=run), cached[0])
    assert (changed == 0) == last_text or dead, changed


def test_outputs_of_blocks_are_the_official_ones(cached):
    _, seen = cached
    assert distance(seen["pe"], GOLDEN.tensors["inter.pe"]) <= 5e-6
    assert distance(seen["velocity"], GOLDEN.tensors["out.velocity"]) <= 5e-6
    for block in block_names(PARAMS):
        if block.startswith("double"):
            for stream in ("img", "txt"):
                assert distance(seen[f"{block}.{stream}.out"], GOLDEN.tensors[f"inter.{block}.{stream}"]) <= 5e-6
        else:
            joined = torch.cat((seen[f"{block}.txt.out"], seen[f"{block}.img.out"]), 1)
            assert distance(joined, GOLDEN.tensors[f"inter.{block}"]) <= 5e-6


def test_values_outside_the_blocks_are_what_the_modules_give(cached, modules):
    _, seen = cached
    assert torch.equal(seen["img_in"], modules["img_in"][1])
    assert torch.equal(seen["txt_in"], modules["txt_in"][1])
    assert torch.equal(seen["vec"], MODEL.embed_vec(INPUTS["timesteps"], INPUTS["y"], INPUTS["guidance"]))
    names = block_names(PARAMS)
    for before, block in zip([None, *names], names, strict=False):
        for stream in ("img", "txt"):
            left = seen[f"{before}.{stream}.out"] if before else seen[f"{stream}_in"]
            assert torch.equal(seen[f"{block}.{stream}.in"], left)


def test_modulations_are_thirds_and_sixths_of_their_linears(cached, modules):
    _, seen = cached
    for block in block_names(PARAMS):
        sets = {"modulation": ("mod",)}
        if block.startswith("double"):
            sets = {f"{stream}_mod": (f"{stream}_mod1", f"{stream}_mod2") for stream in ("img", "txt")}
        for linear, stems in sets.items():
            parts = [f"{block}.{stem}.{part}" for stem in stems for part in ("shift", "scale", "gate")]
            chunks = modules[f"{block}.{linear}.lin"][1][:, None].chunk(len(parts), -1)
            for name, chunk in zip(parts, chunks, strict=True):
                assert torch.equal(seen[name], chunk), name


def heads(x):
    return rearrange(x, "B L (K H D) -> K B H L D", K=3, H=PARAMS.num_heads)


def test_values_inside_double_blocks_are_what_their_linears_give_and_take(cached, modules):
    _, seen = cached
    for block in block_names(PARAMS)[: PARAMS.depth]:
        for stream in ("img", "txt"):
            qkv = heads(modules[f"{block}.{stream}_attn.qkv"][1])
            for letter, x in zip("qkv", qkv, strict=True):
                assert torch.equal(seen[f"{block}.{stream}.{letter}"], x)
            assert torch.equal(seen[f"{block}.{stream}.attn"], modules[f"{block}.{stream}_attn.proj"][0][0])
            assert torch.equal(seen[f"{block}.{stream}.mlp"], modules[f"{block}.{stream}_mlp"][1])


def test_values_inside_single_blocks_are_what_their_linears_give_and_take(cached, modules):
    _, seen = cached
    dim = PARAMS.hidden_size
    for block in block_names(PARAMS)[PARAMS.depth :]:
        qkv = heads(modules[f"{block}.linear1"][1][..., : 3 * dim])
        for letter, x in zip("qkv", qkv, strict=True):
            assert torch.equal(torch.cat((seen[f"{block}.txt.{letter}"], seen[f"{block}.img.{letter}"]), 2), x)
        entering, leaving = modules[f"{block}.linear2"]
        assert torch.equal(torch.cat((seen[f"{block}.txt.attn"], seen[f"{block}.img.attn"]), 1), entering[0][..., :dim])
        assert torch.equal(torch.cat((seen[f"{block}.txt.linear2"], seen[f"{block}.img.linear2"]), 1), leaving)


def test_q_and_k_of_all_tokens_are_what_attention_takes(cached):
    _, seen = cached
    for block in block_names(PARAMS):
        q, k = seen[f"{block}.q"], seen[f"{block}.k"]
        v = torch.cat((seen[f"{block}.txt.v"], seen[f"{block}.img.v"]), 2)
        out = rearrange(torch.softmax(q @ k.mT / PARAMS.head_dim**0.5, -1) @ v, "B H L D -> B L (H D)")
        assert distance(out, torch.cat((seen[f"{block}.txt.attn"], seen[f"{block}.img.attn"]), 1)) <= 1e-5


# Names ---------------------------------------------------------------------------------------------

DEV = VARIANTS["flux-dev"].params


def test_flat_numbers_count_through_both_kinds():
    assert match_blocks(("layer.18-20",), DEV) == ["double_blocks.18", "single_blocks.0", "single_blocks.1"]
    assert match_sites(("layer.28.img.k",), DEV) == ["single_blocks.9.img.k"]
    assert match_blocks(("double_blocks.*", "single_blocks.*"), DEV) == block_names(DEV) and len(block_names(DEV)) == 57


def test_globs_and_ranges_choose_many_in_the_order_of_the_forward():
    assert match_sites(("single_blocks.9-10.mod.gate", "double_blocks.3.img.k"), DEV) == [
        "double_blocks.3.img.k",
        "single_blocks.9.mod.gate",
        "single_blocks.10.mod.gate",
    ]
    assert len(match_sites(("*.img.k",), DEV)) == 57


@pytest.mark.parametrize(
    ("pattern", "hint"),
    [
        ("single_block.9", "single_blocks.9"),
        ("layer.57", "layer"),
        ("single_blocks.30-38", ""),
        ("double_blocks.5-3", ""),
    ],
)
def test_a_name_that_means_nothing_is_an_error_with_the_nearest(pattern, hint):
    with pytest.raises(UsageError, match=f"no block is called '{pattern}'") as error:
        match_blocks((pattern,), DEV)
    assert hint in str(error.value)


def test_the_command_lists_every_site_with_its_shape():
    text = sites("flux-dev")
    for site in SITES:
        assert any(site.name in line and site.shape in line and site.meaning in line for line in text.splitlines())
    assert f"{len(site_names(DEV)):,} sites of flux-dev" in text and "layer.0-56" in text


def test_schnell_has_the_sites_of_dev():
    assert site_names(VARIANTS["flux-schnell"].params) == site_names(DEV)
    assert isinstance(MODEL, Flux)
