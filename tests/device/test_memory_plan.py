"""Plans of a model in a budget: what lies where, by shapes alone."""

from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from flux_core.device.budget import CONTEXT
from flux_core.device.memory import MEGAPIXEL, Picture, at_least, shares
from flux_core.device.plan import describe, is_whole, make_plan
from flux_core.device.rates import Rates
from flux_core.main import main
from flux_core.model import Flux
from flux_core.sampling import image_ids
from flux_core.variants import VARIANTS, get_variant

DEV = get_variant("flux-dev")
GB = 10**9
DTYPES = ["bfloat16", "float32", "fp8", "int8", "nf4"]


def planned(budget, dtype="bfloat16", side=1024):
    return make_plan(DEV, budget, dtype, None, Picture(side, side))


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_parts_of_the_transformer_are_all_of_it(dtype):
    plan, share = planned(80 * GB, dtype), shares(DEV, dtype)[1]
    assert plan.outside + sum(plan.blocks) + share.aside == share.weights
    assert len(plan.blocks) == 57 and 0.05 * GB < plan.outside < 0.3 * GB


def test_the_operations_are_those_of_a_forward():
    """But for what is done once a step, for one vector: 0.01 of 74 * 10^12."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter, torch.no_grad():
        flux = Flux(DEV.params)
        img, txt, y = (torch.empty(1, *shape) for shape in ((4096, 64), (512, 4096), (768,)))
        one, ids = torch.empty(1), image_ids(1, 64, 64, torch.device("meta"))
        flux(img, ids, txt, torch.empty(1, 512, 3), one, y, one)
    assert planned(80 * GB).tera == pytest.approx(counter.get_total_flops() / 1e12, rel=1e-3)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_larger_budget_copies_less_and_none_is_exceeded(dtype):
    plans = [planned(budget * GB // 2, dtype) for budget in range(2, 160)]
    for plan in plans:
        if plan.fits:
            buffers = plan.slots * max(plan.blocks) if plan.streamed else 0
            stay = sum(plan.blocks) - plan.streamed
            assert CONTEXT + plan.outside + plan.at_work + buffers + stay <= plan.budget
    copied = [plan.streamed for plan in plans if plan.slots != 1]
    assert copied == sorted(copied, reverse=True) and copied[-1] == 0 and plans[-1].slots == 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_smallest_budget_is_the_smallest(dtype):
    smallest = planned(GB, dtype).smallest
    assert planned(smallest, dtype).fits and not planned(smallest - 1, dtype).fits
    assert f"it takes at least {at_least(smallest)}" in " ".join(describe(planned(GB, dtype), 28, None, {}))


def test_a_step_takes_its_products_or_its_copies():
    plan = planned(8 * GB)
    assert plan.seconds(100, 1e15) == pytest.approx(plan.tera / 100)
    assert plan.seconds(1e9, 25e9) == pytest.approx(plan.streamed / 25e9)
    lines = list(
        describe(plan, 28, Rates(100, 25e9), {"int8": planned(8 * GB, "int8"), "fp32": planned(GB, "float32")})
    )
    assert f"at least {plan.tera / 100:.2f} s, 28 steps {28 * plan.tera / 100:.0f} s" in " ".join(lines)
    assert [line for line in lines if "--dtype" in line] == [lines[-1]] and "--dtype int8: 34 of" in lines[-1]


def test_doctor_plans_without_a_card_and_without_weights(capsys):
    assert main(["doctor", "--name", "flux-dev", "--memory", "12GB"]) == 0
    told = capsys.readouterr().out.splitlines()
    assert told[0] == "flux-dev in 12.0 GB, 1360x768 pixels, bfloat16"
    assert "text encoders 9.8 GB: whole" in told
    assert any(
        "26 of 57 blocks stay on the card, the others, 8.2 GB, come through 2 buffers of 0.5 GB" in x for x in told
    )
    assert main(["doctor", "--memory", "6GiB", "--dtype", "int8", "--t5-dtype", "nf4"]) == 0
    assert "text encoders 4.4 GB: whole" in capsys.readouterr().out
    assert main(["doctor", "--name", "flux-mini", "--memory", "2GB"]) == 0
    assert "all blocks stay on the card" in capsys.readouterr().out
    assert main(["doctor", "--memory", "12GB", "--t5-dtype", "float32"]) == 0
    assert "text encoders 19.3 GB: blocks of T5 come" in capsys.readouterr().out
    assert main(["doctor", "--memory", "auto", "--device", "cpu", "--name", "flux-mini"]) == 0
    for wrong in (["--memory", "much"], ["--name", "flux-max"], ["--memory", "8GB", "--dtype", "int3"]):
        assert main(["doctor", *wrong]) == 2
        assert len(capsys.readouterr().err.splitlines()) == 1


def test_the_page_says_what_the_code_plans():
    page = (Path(__file__).parents[2] / "docs" / "memory.md").read_text(encoding="utf-8")
    for dtype, title in [("bfloat16", "bf16"), ("fp8", "fp8, int8"), ("int8", "fp8, int8"), ("nf4", "nf4")]:
        plans = [planned(budget * GB, dtype) for budget in (6, 8, 12, 16, 24)]
        cells = (f"{len(x.resident)} of 57 stay, {x.streamed / 1e9:.1f} GB a step" * bool(x.streamed) for x in plans)
        assert f"| {title} | {' | '.join(cell or 'all stay' for cell in cells)} |" in page


def test_a_reference_is_seen_and_not_decoded():
    kontext, redux = VARIANTS["flux-dev-kontext"], VARIANTS["flux-dev-redux"]
    assert Picture(64, 64).with_reference(DEV) == Picture(64, 64)
    assert Picture(64, 64).with_reference(kontext).behind == 4150  # its largest size
    assert Picture(64, 64).with_reference(redux).behind == 729
    for row in (kontext, redux):
        alone, beside = (make_plan(row, 0, "nf4", None, one) for one in (MEGAPIXEL, MEGAPIXEL.with_reference(row)))
        assert alone.autoencoder == beside.autoencoder
        assert alone.at_work < beside.at_work and alone.tera < beside.tera


def test_on_a_card_without_bf16_the_rest_is_in_fp32():
    plan, wide = (make_plan(DEV, 0, "nf4", None, MEGAPIXEL, kind) for kind in (None, torch.float32))
    assert wide.text.weights == 2 * plan.text.weights and wide.autoencoder.weights == 2 * plan.autoencoder.weights
    assert plan.transformer.weights < wide.transformer.weights < 1.1 * plan.transformer.weights
    assert plan.transformer.aside < wide.transformer.aside
    assert wide.at_work > 1.4 * plan.at_work
    whole = wide.home + max(wide.at_work, wide.autoencoder.at_work)
    assert is_whole(DEV, whole, "nf4", None) and not is_whole(DEV, whole, "nf4", None, kind=torch.float32)


def test_what_fits_whole_stays_whole():
    mini = get_variant("flux-mini")
    assert is_whole(mini, GB, "float32", None) and not is_whole(mini, GB // 2, "float32", None)
    for dtype, t5, least in (("bfloat16", None, 40), ("int8", None, 31), ("nf4", "nf4", 17)):
        assert is_whole(DEV, (least + 1) * GB, dtype, t5) and not is_whole(DEV, (least - 1) * GB, dtype, t5)
