"""The examples: each method's identity, what it changes, and that the script draws."""

import importlib.util
from pathlib import Path

import pytest
import torch
from golden_files import distance, flux_of, read
from PIL import Image

from flux_core.hooks import Custom, HookRun
from flux_core.sampling import flow_velocity

FOLDER = Path(__file__).parent.parent / "examples"
SCRIPTS = sorted(FOLDER.glob("*.py"))
GOLDEN = read("transformer_dev")
INPUTS = GOLDEN.group("in.")
MODEL = flux_of(GOLDEN)
TEXT = INPUTS["txt"].shape[1]
SIGMAS = [1.0, 0.8, 0.5, 0.0]


def load(name):
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def forward(*plan, **inputs):
    return MODEL(**INPUTS | inputs, run=HookRun(plan, MODEL.params))


def velocity(run=None, **changes):
    names = {"img_ids": "img_ids", "txt": "txt", "txt_ids": "txt_ids", "y": "vec", "guidance": "guidance"}
    return flow_velocity(MODEL, **{new: INPUTS[old] for old, new in names.items()} | changes, run=run)


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_a_script_is_short_and_draws(path, tmp_path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 85
    load(path.stem).main(["--num_steps", "2", "--output", str(tmp_path / "out.png")])
    assert Image.open(tmp_path / "out.png").size == (256, 256)


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
    everything = Custom(sites="layer.*.attend", fn=module.masked(torch.ones(length, length, dtype=torch.bool)))
    assert distance(forward(everything), plain) <= 1e-6
    regions = torch.tensor([0] * 12 + [1] * 12)
    mask = module.region_mask(regions, 3, 2)
    assert mask.shape == (30, 30) and torch.equal(mask, mask.T)
    assert mask[6:, 6:].all()  # image tokens see each other
    assert mask[6:18, :3].all() and not mask[6:18, 3:6].any()  # the first region sees its text alone
    assert not mask[:3, 3:6].any() and mask[18:, 3:6].all()


def test_a_text_out_of_sight_has_no_say():
    """With one text hidden from everything, other words there change nothing."""
    module = load("regional_prompting")
    length = TEXT + INPUTS["img"].shape[1]
    mask = torch.ones(length, length, dtype=torch.bool)
    mask[:, 0] = False
    mask[0, 0] = True
    hide = Custom(sites="layer.*.attend", fn=module.masked(mask))
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
