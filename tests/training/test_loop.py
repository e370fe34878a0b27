"""The loop: it learns, it goes on where it was stopped, to the bit, and it says what is wrong."""

import hashlib
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest
import torch
from small import LONG, RECIPE, examples, small_adapter

from flux_core.errors import FileError, NonFiniteError, UsageError
from flux_core.lora import attach
from flux_core.training import PRESETS, Recipe, train
from flux_core.training.adapter import matching
from flux_core.training.loop import SCALE, State, checkpoints, drawn, factor, generator, levels, loss_of, validate
from flux_core.training.optimizers import BETAS, EPS, adamw


def bytes_of(folder):
    """Of the newest checkpoint."""
    return hashlib.sha256(checkpoints(folder)[-1].read_bytes()).hexdigest()


def run(folder=None, recipe=RECIPE, some=None, **options):
    adapter = small_adapter()
    return train(adapter, some or examples(), recipe, folder, **options), adapter.state()


def test_equal_runs_are_equal_and_other_seeds_are_not(tmp_path):
    first, second, other = (
        run(tmp_path / name, recipe) for name, recipe in [("a", RECIPE), ("b", RECIPE), ("c", replace(RECIPE, seed=6))]
    )
    assert first[0] == second[0] != other[0] and len(first[0]) == RECIPE.steps
    assert bytes_of(tmp_path / "a") == bytes_of(tmp_path / "b")
    assert all(torch.equal(x, second[1][name]) for name, x in first[1].items())


@pytest.mark.parametrize("stops", [(1,), (5, 6), (3, 11)])
def test_a_run_that_was_stopped_goes_on_to_the_bit(tmp_path, stops):
    whole = run(tmp_path / "whole")
    for stop in stops:
        losses, _ = run(tmp_path / "parts", on_step=lambda done, stop=stop: done.step == stop)
        assert losses == whole[0][:stop]
    assert run(tmp_path / "parts")[0] == whole[0]
    assert bytes_of(tmp_path / "parts") == bytes_of(tmp_path / "whole")


def test_a_norm_of_0_is_none():
    """Gradients are not clipped, as far above all of them; at 1e-3 they are."""
    free, wide, tight = (run(recipe=replace(RECIPE, max_grad_norm=x))[1] for x in (0.0, 1e6, 1e-3))
    assert all(torch.equal(x, wide[name]) for name, x in free.items())
    assert any(not torch.equal(x, tight[name]) for name, x in free.items())


def test_a_finished_run_computes_nothing(tmp_path):
    losses, state = run(tmp_path)
    again = run(tmp_path, on_step=lambda done: pytest.fail("a step"))
    assert again[0] == losses and all(torch.equal(x, again[1][name]) for name, x in state.items())


@pytest.mark.slow
def test_a_run_that_is_killed_goes_on_to_the_bit(tmp_path):
    """kill -9 at 20 random moments of one run: of a step, of writing, of loading."""
    whole, random, kills, done = run(tmp_path / "whole", LONG), Random(0), 0, False
    command = [sys.executable, str(Path(__file__).parent / "small.py"), str(tmp_path / "parts")]
    while not done:
        with subprocess.Popen(
            command, stdout=-1, text=True, env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
        ) as process:
            for _ in range(random.randint(1, 6)):
                process.stdout.readline()
            time.sleep(random.random() / 50)
            if kills < 20:
                process.send_signal(signal.SIGKILL)
            process.communicate()
            done = process.returncode == 0
        kills += not done
    assert kills == 20 and checkpoints(tmp_path / "parts")[-1].name == "step-0000150.safetensors"
    assert bytes_of(tmp_path / "parts") == bytes_of(tmp_path / "whole")
    assert run(tmp_path / "parts", LONG)[0] == whole[0]


def test_it_learns():
    """One picture at one level by heart."""
    recipe = Recipe(steps=60, lr=3e-2, seed=1)
    losses, _ = run(None, recipe, examples(1))
    assert sum(losses[-10:]) < 0.8 * sum(losses[:10])


@pytest.mark.parametrize("kind", ["mlp", "blocks", "second", "linears"])
def test_blocks_that_are_computed_again_give_the_same_numbers(kind):
    """Of MLPs but for the order of sums: their rows are multiplied apart."""
    found, expected = run(None, replace(RECIPE, checkpointing=kind))[0], run()[0]
    assert found == (pytest.approx(expected, rel=1e-5) if kind == "mlp" else expected)


def test_a_loss_is_the_mean_of_its_micro_batches():
    recipe, adapter = replace(RECIPE, batch=1, accumulation=4, steps=1), small_adapter()
    each = [loss_of(adapter, drawn(examples(), recipe, micro), recipe, micro).item() for micro in range(4)]
    assert run(None, recipe)[0] == [pytest.approx(sum(each) / 4, rel=1e-6)]


def test_a_batch_has_one_size_and_an_epoch_every_picture():
    some, recipe = examples(5), replace(RECIPE, batch=2)
    some[1:4] = [one._replace(latents=torch.zeros(16, 6, 4)) for one in some[1:4]]
    for epoch in range(2):
        batches = [drawn(some, recipe, 3 * epoch + at) for at in range(3)]  # ceil(2 / 2) + ceil(3 / 2)
        assert all(len({one.size for one in batch}) == 1 and len(batch) == 2 for batch in batches)
        assert {one.name for batch in batches for one in batch} == {one.name for one in some}


def test_each_picture_is_seen_once_before_any_is_seen_again():
    some, seen = examples(5), []
    for micro in range(10):
        seen += [one.name for one in drawn(some, replace(RECIPE, batch=1), micro)]
    assert len(set(seen[:5])) == len(set(seen[5:])) == 5 and seen[:5] != seen[5:]


def test_levels_and_noise_hang_on_their_number_alone():
    torch.manual_seed(3)
    first = levels(RECIPE, 7, 4), torch.randn(3, generator=generator(RECIPE, "noise", 7))
    torch.manual_seed(4)
    assert torch.equal(levels(RECIPE, 7, 4), first[0]) and not torch.equal(levels(RECIPE, 8, 4), first[0])
    assert torch.equal(torch.randn(3, generator=generator(RECIPE, "noise", 7)), first[1])
    assert (1000 * first[0] % 1 < 1e-3).all() or (1000 * first[0] % 1 > 0.999).any()


def test_the_rate():
    recipe = Recipe(steps=13, warmup=3, schedule="cosine")
    rates = [factor(recipe, step) for step in range(13)]
    assert (
        rates[:4] == [1 / 3, 2 / 3, 1, 1]
        and rates[8] == pytest.approx(0.5)
        and rates == [*rates[:3], *sorted(rates[3:])[::-1]]
    )
    assert {factor(Recipe(steps=4), step) for step in range(4)} == {1}


def test_what_differs_is_named(tmp_path):
    run(tmp_path, replace(RECIPE, steps=2))
    for change, said in [
        ({"lr": 1e-3}, r"with lr 0\.01, not 0\.001"),
        ({"steps": 3}, "with steps 2, not 3"),
        ({"seed": 6}, "with seed 5, not 6"),
    ]:
        with pytest.raises(UsageError, match=said):
            run(tmp_path, replace(RECIPE, **{"steps": 2} | change))
    with pytest.raises(UsageError, match=r"with modules 7, .* not 3, "):
        train(small_adapter(("to_q",)), examples(), replace(RECIPE, steps=2), tmp_path)
    with pytest.raises(UsageError, match="with pictures"):
        run(tmp_path, replace(RECIPE, steps=2), examples(4))


def test_what_is_wrong_is_said(tmp_path):
    for wrong, said in [({"weighting": "snr"}, "weighting must be one of none, sigma_sqrt, cosmap, not 'snr'"),
                        ({"steps": 0}, "steps must be at least 1")]:  # fmt: skip
        with pytest.raises(UsageError, match=said):
            replace(RECIPE, **wrong)
    with pytest.raises(UsageError, match="nothing to train on"):
        train(small_adapter(), [], RECIPE)
    first, *others = examples()
    with pytest.raises(NonFiniteError, match=r"step \d: the loss of .*2\.png.* is nan"):
        run(None, RECIPE, [*others, first._replace(name="2.png", latents=first.latents * torch.nan)])
    (tmp_path / "step-0000001.safetensors").write_bytes(b"half a file")
    with pytest.raises(FileError, match="the checkpoint could not be read"):
        run(tmp_path)


@torch.no_grad()
def test_what_is_saved_is_what_was_trained(tmp_path):
    """Loaded as any LoRA, beside the same weights."""
    adapter, (some, *_) = small_adapter(), examples()
    train(adapter, examples(), RECIPE)
    for name in ("a", "b"):
        path = adapter.save(tmp_path / name)
    assert path.read_bytes() == (tmp_path / "a" / path.name).read_bytes()
    trained = loss_of(adapter, [some], RECIPE, 0)
    adapter.remove()
    plain = loss_of(adapter, [some], RECIPE, 0)
    with attach(adapter.model, tmp_path / "a"):
        loaded = loss_of(adapter, [some], RECIPE, 0)
    assert loaded.item() == pytest.approx(trained.item(), rel=1e-6) != plain.item()


def test_a_run_of_a_constant_rate_may_go_on_for_longer(tmp_path):
    short, long = (replace(RECIPE, schedule="constant", steps=steps) for steps in (4, 9))
    run(tmp_path, short)
    assert run(tmp_path, long)[0] == run(None, long)[0]


def test_the_average_goes_on_to_the_bit_and_is_what_is_validated(tmp_path):
    recipe = replace(RECIPE, ema=0.9)
    whole, parts = small_adapter(), small_adapter()
    train(whole, examples(), recipe, tmp_path / "whole")
    for stop in (4, 12):
        train(parts, examples(), recipe, tmp_path / "parts", on_step=lambda done, stop=stop: done.step == stop)
    assert bytes_of(tmp_path / "parts") == bytes_of(tmp_path / "whole")
    judged = validate(parts, examples(2), recipe)
    with whole.averaged():
        averaged = whole.state()
    assert judged == validate(whole, examples(2), recipe) and judged != validate(
        whole, examples(2), replace(recipe, seed=1)
    )
    whole.average = None
    assert validate(whole, examples(2), recipe) != judged
    whole.load(averaged)
    assert validate(whole, examples(2), recipe) == judged


def test_half_precision_learns_under_a_scale_and_says_where_it_overflows(tmp_path):
    recipe = replace(RECIPE, precision="fp16")
    losses, _ = run(tmp_path, recipe)
    plain = run()[0]
    assert losses[0] == pytest.approx(plain[0], rel=0.005) and losses[0] != plain[0] and losses[-1] < losses[0]
    state = State(small_adapter(), recipe)
    (x, *_), before = state.parameters, state.adapter.state()
    x.grad = torch.full_like(x, torch.inf)
    assert state.update(1e-2, str, []) == math.inf and state.scale == SCALE / 2  # nothing is learned, and half as far
    assert all(torch.equal(x, before[name]) for name, x in state.adapter.state().items())
    state.scale, x.grad = 1.0, torch.full_like(x, torch.inf)
    with pytest.raises(NonFiniteError, match=r"the gradient of a\.png is not finite"):
        state.update(1e-2, str, ["a.png"])
    large = [one._replace(txt=one.txt * 1e6) for one in examples()]
    with pytest.raises(NonFiniteError, match="Next: leave --precision fp16 out"):
        run(None, recipe, large)


@pytest.mark.parametrize("patterns", [("to_v",), ("to_q",), ("proj_mlp",), ("to_q", "proj_mlp")])
def test_some_rows_of_a_layer_may_learn_alone(patterns):
    adapter = small_adapter(patterns)
    layer = adapter.model.single_blocks[0].linear1
    x = torch.randn(2, layer.in_features)
    assert torch.equal(layer(x), layer.base(x))  # `up` is zero at first


def test_the_newest_checkpoints_stay(tmp_path):
    run(tmp_path, every=5, keep=2)
    assert [path.name for path in checkpoints(tmp_path)] == ["step-0000010.safetensors", "step-0000012.safetensors"]


def test_presets_name_what_they_say():
    from small import PARAMS

    assert len(matching(PARAMS, PRESETS["attention"])) == 4 + 3 * PARAMS.depth_single_blocks
    blocks = matching(PARAMS, PRESETS["blocks"])
    assert len(blocks) == 14 * PARAMS.depth + 6 * PARAMS.depth_single_blocks and "proj_out" not in blocks
    with pytest.raises(UsageError, match=r"no Linear of the transformer is named 'to_x'\. Did you mean to_"):
        matching(PARAMS, ["to_x"])


@pytest.mark.gpu
@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit"])
def test_on_a_card_a_stopped_run_goes_on_to_the_bit(tmp_path, optimizer):
    """The fused AdamW, and bitsandbytes' 8-bit one, whose tensors here are larger than what it leaves in 32 bits."""
    recipe, some = replace(RECIPE, optimizer=optimizer), examples()

    def on_card(folder, **options):
        adapter = small_adapter(rank=256)
        adapter.model.to("cuda")
        return train(adapter, some, recipe, folder, **options)

    whole = on_card(tmp_path / "whole")
    for stop in (5, 6):
        assert on_card(tmp_path / "parts", on_step=lambda done, stop=stop: done.step == stop) == whole[:stop]
    assert on_card(tmp_path / "parts") == whole
    assert bytes_of(tmp_path / "parts") == bytes_of(tmp_path / "whole")


def test_a_mask_and_a_weight_are_told_only_where_they_are():
    """So examples without them are those of versions that knew of none."""
    one = examples(1)[0]
    plain = b"".join(x.numpy().tobytes() for x in (one.latents, one.txt, one.vec))
    assert one.digest == one._replace(weight=1.0).digest == hashlib.sha256(plain).hexdigest()
    mask = torch.ones(4, 6)
    others = [one._replace(mask=mask), one._replace(mask=0 * mask), one._replace(weight=0.5), one._replace(seen=mask)]
    assert len({one.digest, *(other.digest for other in others)}) == 5


@pytest.mark.gpu
def test_the_fused_optimizer_is_the_plain_one():
    """Twenty updates of equal numbers by equal gradients, in one kernel and one after another."""
    draw = torch.Generator("cuda").manual_seed(0)
    first = [torch.randn(64, 33, generator=draw, device="cuda").requires_grad_() for _ in range(3)]
    second = [x.detach().clone().requires_grad_() for x in first]
    fused, plain = adamw(first, 1e-2, 1e-2), torch.optim.AdamW(second, 1e-2, BETAS, EPS, 1e-2, foreach=False)
    assert fused.defaults["fused"]
    for _ in range(20):
        for a, b in zip(first, second, strict=True):
            a.grad = b.grad = torch.randn(a.shape, generator=draw, device="cuda")
        fused.step()
        plain.step()
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
