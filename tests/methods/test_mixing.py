"""A type of GGUF for each block under a budget: the choice is the best there is, and the file is what was chosen."""

import json
from itertools import product
from random import Random

import pytest
import torch

from flux_core.checkpoint import load_into
from flux_core.checkpoint.files import text_files
from flux_core.checkpoint.layouts import write_gguf_model
from flux_core.errors import FileError, UsageError
from flux_core.hooks.sites import block_names
from flux_core.linears.gguf import GgufLinear
from flux_core.main import main
from flux_core.methods.importance import PROMPTS, default_prompts, read_prompts
from flux_core.methods.mixing import KINDS, choose, in_types, read_importance, sizes_of, weighted
from flux_core.model import Flux
from flux_core.pipeline import load_pipeline
from flux_core.request.prompt_lines import read_lines
from flux_core.variants import VARIANTS

MINI = VARIANTS["flux-mini"]


def tables(draw, blocks=4):
    """Random errors that fall, and bytes that grow, from type to type."""
    names = [f"block {i}" for i in range(blocks)]
    errors = {x: dict(zip(KINDS, sorted((draw.random() for _ in KINDS), reverse=True), strict=True)) for x in names}
    sizes = {x: dict(zip(KINDS, sorted(draw.sample(range(1, 900), len(KINDS))), strict=True)) for x in names}
    return errors, sizes


@pytest.mark.parametrize("seed", range(20))
def test_no_other_choice_has_less_error_in_these_bytes(seed):
    draw = Random(seed)
    errors, sizes = tables(draw)
    least, most = (100 + sum(of[kind] for of in sizes.values()) for kind in (KINDS[0], KINDS[-1]))
    for budget in (least, draw.randint(least, most), most, 10 * most):
        mix = choose(errors, sizes, 100, budget)
        every = [dict(zip(sizes, kinds, strict=True)) for kinds in product(KINDS, repeat=len(sizes))]
        fits = [x for x in every if 100 + sum(sizes[block][kind] for block, kind in x.items()) <= budget]
        best = min(sum(errors[block][kind] for block, kind in x.items()) for x in fits)
        assert mix.error == pytest.approx(best) and mix.bytes <= budget
        assert mix.bytes == 100 + sum(sizes[block][kind] for block, kind in mix.kinds.items())
        assert list(mix.kinds) == list(sizes)


def test_at_full_size_the_budget_is_used_and_more_bytes_have_less_error():
    sizes, rest = sizes_of(VARIANTS["flux-dev"].params)
    draw = Random(0)
    scales = dict(zip(KINDS, (54, 12, 3.2, 0.4, 0), strict=True))
    errors = {block: {kind: (0.5 + draw.random() / 2) * x for kind, x in scales.items()} for block in sizes}
    mixes = [choose(errors, sizes, rest, budget * 10**8) for budget in range(70, 130, 5)]
    for budget, mix in zip(range(70, 130, 5), mixes, strict=True):
        assert 0.985 * budget * 10**8 < mix.bytes <= budget * 10**8
    assert [mix.error for mix in mixes] == sorted((mix.error for mix in mixes), reverse=True)


def test_below_the_smallest_file_the_error_says_its_bytes(capsys):
    sizes, rest = sizes_of(MINI.params)
    least = rest + sum(of["Q4_K"] for of in sizes.values())
    nothing = {block: dict.fromkeys(KINDS, 0.0) for block in sizes}
    with pytest.raises(UsageError, match=f"Next: --budget {least}, or more"):
        choose(nothing, sizes, rest, least - 1)
    assert choose(nothing, sizes, rest, least).bytes == least
    assert main(["save", "--dtype", "mixed", "--budget", "1MB"]) == 2
    assert f"--budget {least}" in capsys.readouterr().err


def test_the_file_has_what_was_chosen(tmp_path):
    """Its bytes are no more than reckoned, and its layers are those that were measured."""
    sizes, rest = sizes_of(MINI.params)
    kinds = {block: "Q8_0" if i % 3 else "BF16" for i, block in enumerate(sizes)} | {"single_blocks.1": "Q4_K"}
    write_gguf_model(tmp_path, MINI, text_files(MINI), torch.bfloat16, "Q8_0", kinds)
    reckoned = rest + sum(sizes[block][kind] for block, kind in kinds.items())
    assert 0.99 * reckoned < (tmp_path / "flux-mini.gguf").stat().st_size <= reckoned
    model = Flux(MINI.params)
    load_into(model, tmp_path / "flux-mini.gguf")
    pipeline = load_pipeline("flux-mini", "cpu", "float32")
    before = dict(pipeline.model.named_modules())
    with in_types(pipeline.model, kinds):
        for name, layer in pipeline.model.named_modules():
            found = model.get_submodule(name)
            assert isinstance(found, GgufLinear) == isinstance(layer, GgufLinear)
            if isinstance(layer, GgufLinear):
                assert found.kind == layer.kind == kinds[".".join(name.split(".")[:2])]
                assert torch.equal(found.weight, layer.weight)
    assert dict(pipeline.model.named_modules()) == before


def test_an_importance_study_weights_blocks(tmp_path):
    names = block_names(MINI.params)
    rows = [{"block": block, "importance": i - 1} for i, block in enumerate(names)]
    path = tmp_path / "importance.json"
    path.write_text(json.dumps({"model": "flux-mini", "blocks": rows}))
    importance = read_importance(path, "flux-mini", MINI.params)
    assert importance[names[0]] == importance[names[1]] == 0 and importance[names[-1]] == len(names) - 2
    sizes, rest = sizes_of(MINI.params)
    errors = {block: {kind: float(len(KINDS) - i) for i, kind in enumerate(KINDS)} for block in names}
    budget = rest + sum(of["Q4_K"] for of in sizes.values()) + 6 * 10**6
    kinds = choose(weighted(errors, importance), sizes, rest, budget).kinds
    assert KINDS.index(kinds[names[0]]) == 0 < KINDS.index(kinds[names[-1]])
    with pytest.raises(UsageError, match="of the blocks of 'flux-mini', not of flux-dev"):
        read_importance(path, "flux-dev", VARIANTS["flux-dev"].params)
    path.write_text("[1]")
    with pytest.raises(UsageError, match=r"holds no importance of blocks\. Next: give the importance\.json"):
        read_importance(path, "flux-mini", MINI.params)
    with pytest.raises(FileError):
        read_importance(tmp_path / "none.json", "flux-mini", MINI.params)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--dtype", "mixed"], "--dtype mixed goes with --budget"),
        (["--dtype", "q8_0", "--budget", "7GB"], "only it has --budget"),
        (["--dtype", "bf16", "--importance", "x.json"], "only it has --budget and --importance"),
        (["--dtype", "mixed", "--budget", "much"], "--budget must be a size"),
        (["--dtype", "mixed", "--budget", "7GB", "--format", "official"], "--format gguf goes with"),
    ],
)
def test_wrong_flags(capsys, flags, said):
    assert main(["save", *flags]) == 2
    assert said in capsys.readouterr().err


def test_what_it_is_chosen_by_is_not_what_it_is_judged_by():
    chosen = {line.request({"name": "flux-mini"}).prompt for line in read_lines(str(PROMPTS / "calibration.txt"))}
    assert not chosen & {one.prompt for one in read_prompts(default_prompts("flux-mini"))}
