"""The modulation of a schedule, computed before its first step: to the bit what each forward would compute itself."""

import pytest
import torch
from golden_files import flux_of, read
from tiny import tiny_pipeline

from flux_core.hooks import Capture, Custom, HookRun, Scale
from flux_core.model import ModulationTable
from flux_core.sampling import flow_velocity

GOLDEN = read("transformer_dev")
INPUTS = GOLDEN.group("in.")
SIGMAS = [1.0, 0.75, 0.3]


@torch.no_grad()
def test_a_table_holds_what_a_forward_computes():
    model, (y, guidance) = flux_of(GOLDEN), (INPUTS["y"], INPUTS["guidance"])
    table = ModulationTable(model, SIGMAS, y, guidance)
    for sigma in SIGMAS:
        live = model.modulations(model.embed_vec(torch.full_like(guidance, sigma), y, guidance))
        assert len(live.tensors()) == 12 * len(model.double_blocks) + 3 * len(model.single_blocks) + 2
        for a, b in zip(live.tensors(), table.at(sigma).tensors(), strict=True):
            assert torch.equal(a, b) and a.stride() == b.stride()  # compiled blocks are specialized on strides


def velocity(model, run=None, sigmas=()):
    conditions = (INPUTS[name] for name in ("img_ids", "txt", "txt_ids", "y", "guidance"))
    return flow_velocity(model, *conditions, run=run, sigmas=sigmas)


@torch.no_grad()
def test_a_known_schedule_changes_no_bit():
    model, embedded = flux_of(GOLDEN), []
    model.vector_in.register_forward_hook(lambda *_: embedded.append(1))
    live, known = velocity(model), velocity(model, sigmas=SIGMAS)
    for sigma in (*SIGMAS, 0.5):  # the last is not in it
        assert torch.equal(live(INPUTS["img"], sigma), known(INPUTS["img"], sigma))
    assert len(embedded) == 4 + len(SIGMAS) + 1


@torch.no_grad()
@pytest.mark.parametrize(
    ("plan", "needs"),
    [
        (Scale(sites="vec", value=0.5), True),
        (Custom(sites="vec", fn=lambda x, at: x * 2), True),
        (Capture(sites="vec", into={}), True),
        (Scale(sites="*.gate", value=0.5), False),
        (Capture(sites="*.img.q", into={}), False),
    ],
    ids=["scaled", "function", "read", "gates", "inside"],
)
def test_a_plan_that_reaches_for_vec_gets_it(plan, needs):
    model = flux_of(GOLDEN)
    runs = [HookRun([plan], model.params, [*SIGMAS, 0.0]) for _ in range(2)]
    assert all(run.needs_vec is needs for run in runs)
    live, known = velocity(model, runs[0]), velocity(model, runs[1], SIGMAS)
    plain = velocity(model)
    for sigma in SIGMAS:
        assert torch.equal(live(INPUTS["img"], sigma), known(INPUTS["img"], sigma))
        assert plan.kind == "capture" or not torch.equal(known(INPUTS["img"], sigma), plain(INPUTS["img"], sigma))


@torch.no_grad()
def test_a_projection_that_is_elsewhere_comes_for_the_call():
    """`meta` cannot come back, so that it is asked for is all that shows; on a card the offload test sees it."""
    model = flux_of(GOLDEN)
    model.double_blocks[0].img_mod.lin.to("meta")
    with pytest.raises(NotImplementedError, match="meta"):
        velocity(model, sigmas=SIGMAS)(INPUTS["img"], 1.0)


def test_a_picture_computes_its_modulation_once_for_each_step():
    pipeline, calls = tiny_pipeline(), []
    pipeline.model.double_blocks[0].img_mod.lin.register_forward_hook(lambda *_: calls.append(len(calls)))
    seen = []
    pipeline.generate(
        "a red apple", 1, num_steps=3, width=32, height=32, force=True, on_step=lambda _: seen.append(len(calls))
    )
    assert seen == [3, 3, 3]
