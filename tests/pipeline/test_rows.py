"""Rows of one batch: the pictures that each row would be alone, and the same bits again from what a picture records."""

import json

import pytest
import torch
from controlnets import params_for, write_net
from PIL import Image
from tiny import short_of_memory, tiny_pipeline, tiny_variant

import flux_core.pipeline.environment as surroundings
from flux_core import load_pipeline
from flux_core.device.rows import rows_that_fill, tell_idle_rows
from flux_core.errors import MemoryShortage, UsageError
from flux_core.hooks import Custom, FirstBlockCache, Skip
from flux_core.images.given import open_given
from flux_core.images.metadata import parse_request, png_bytes, read_request
from flux_core.images.output import save_picture
from flux_core.pipeline.environment import environment
from flux_core.request.batch import Batch, batches, check_rows
from flux_core.request.generation import GenerationRequest

pytestmark = pytest.mark.usefixtures("one_thread")
FAST = {"width": 48, "height": 32, "num_steps": 3, "force": True}
CFG = {"negative_prompt": "a blue car", "true_cfg_scale": 3.0}
PROMPTS = ("a red apple", "two green pigs", "a house")
PHOTO = Image.radial_gradient("L").convert("RGB")


@pytest.fixture
def pipeline():
    return tiny_pipeline()


def three(**fields) -> list[GenerationRequest]:
    """Requests that differ in all that rows may differ in."""
    own = zip(PROMPTS, (1, 2, 3), (1.5, 3.5, 6.0), strict=True)
    each = [{"prompt": prompt, "seed": seed, "guidance": guidance} for prompt, seed, guidance in own]
    if "true_cfg_scale" in fields:
        each = [one | {"negative_prompt": f"no {one['prompt']}"} for one in each]
    return [GenerationRequest(**{**FAST, **fields, **one}) for one in each]


def tokens(draw, *args, **kwargs) -> torch.Tensor:
    """The last step's tokens of what is drawn so."""
    kept = []
    draw(*args, on_step=lambda step: kept.append(step.x.clone()), **kwargs)
    return kept[-1]


def tokens_of_rows(pipeline, requests, source=None) -> list[torch.Tensor]:
    kept: list[list[torch.Tensor]] = [[] for _ in requests]
    tell = [lambda step, one=one: one.append(step.x.clone()) for one in kept]
    pipeline.draw_rows(requests, source, tell)
    return [one[-1] for one in kept]


# What a row shows --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields", [{}, CFG, {"plan": (Skip(blocks="layer.0", steps="1-2"),)}], ids=["plain", "true guidance", "plan"]
)
def test_rows_are_the_pictures_alone(pipeline, fields):
    requests = three(**fields)
    for row, request in zip(tokens_of_rows(pipeline, requests), requests, strict=True):
        torch.testing.assert_close(row, tokens(pipeline.draw, request), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("fields", [{}, CFG], ids=["plain", "true guidance"])
@pytest.mark.parametrize("way", ["image", "mask", "controlnet"])
def test_rows_follow_the_pictures_that_they_share(pipeline, tmp_path, fields, way):
    mask = Image.new("L", PHOTO.size)
    mask.paste(255, (0, 0, 128, 256))
    net = write_net(tmp_path / "net.safetensors", params_for(tiny_variant().params))
    ways = {
        "image": {"init_image": PHOTO},
        "mask": {"init_image": PHOTO, "mask": mask},
        "controlnet": {"controlnet": [(net, PHOTO.resize((48, 32)))]},
    }
    given, records = open_given(**ways[way], variant=tiny_variant())
    if way == "image":
        records["strength"] = 0.5
    requests = three(**fields, **records)
    for row, request in zip(tokens_of_rows(pipeline, requests, given), requests, strict=True):
        torch.testing.assert_close(row, tokens(pipeline.draw, request, given), rtol=1e-4, atol=1e-4)
        without = request.model_copy(update=dict.fromkeys(records))
        assert not torch.allclose(row, tokens(pipeline.draw, without), atol=1e-2)


def test_one_row_is_a_picture_alone(pipeline):
    request = three()[0]
    (row,) = pipeline.draw_rows([request])
    assert png_bytes(row) == png_bytes(pipeline.draw(request)) and "batch" not in json.loads(row.info["flux_core"])


def test_hooks_see_all_rows_and_the_number_of_the_first(pipeline):
    seen = set()
    look = Custom(sites="velocity", fn=lambda at, x: seen.add((at.image, at.branches, len(x))), reads=True)
    pipeline.draw_rows(three(**CFG), functions=[look], image=5)
    assert seen == {(5, ("positive", "negative"), 6)}


# Again -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fields", [{}, CFG, {"plan": (FirstBlockCache(schedule="1"),)}], ids=str)
def test_a_row_is_drawn_again_from_its_own_picture_alone(pipeline, tmp_path, fields):
    requests = three(**fields)
    expected = tokens_of_rows(pipeline, requests)
    for row, image in enumerate(pipeline.draw_rows(requests)):
        request = read_request(save_picture(image, tmp_path, str(row)))
        assert request.batch == Batch(rows=3, row=row)
        assert torch.equal(tokens(tiny_pipeline().draw, request), expected[row])
        assert png_bytes(tiny_pipeline().draw(request)) == png_bytes(image)
        assert tiny_pipeline().generate(request)[0].tobytes() == image.tobytes()


@pytest.mark.slow
@pytest.mark.parametrize("size", [64, 128])
def test_rows_of_flux_mini_have_the_bits_of_their_number_and_of_no_neighbour(size):
    """And other bits than alone: without what it records, no row would be repeated."""
    pipeline = load_pipeline("flux-mini", "cpu")
    requests = three(width=size, height=size, num_steps=2)
    rows = tokens_of_rows(pipeline, requests)
    for number, (row, request) in enumerate(zip(rows, requests, strict=True)):
        again = request.model_copy(update={"batch": Batch(rows=3, row=number)})
        alone = tokens(pipeline.draw, request)
        assert torch.equal(tokens(pipeline.draw, again), row)
        assert not torch.equal(alone, row) and torch.allclose(alone, row, atol=1e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bfloat16", "fp8", "int8"])
@pytest.mark.parametrize("size", [128, 256, 512])
def test_rows_on_a_card_have_the_bits_of_their_place_and_of_no_neighbour(dtype, size):
    pipeline = load_pipeline("flux-mini", "cuda", dtype)
    requests = three(width=size, height=size, num_steps=4)
    for number, row in enumerate(tokens_of_rows(pipeline, requests)):
        again = requests[number].model_copy(update={"batch": Batch(rows=3, row=number)})
        assert torch.equal(tokens(pipeline.draw, again), row)


@pytest.mark.parametrize(
    ("record", "finding"),
    [
        ({"rows": 3, "row": 3}, "there is no row 3 of 3"),
        ({"rows": 1, "row": 0}, "greater than or equal to 2"),
        ({"rows": 2}, "batch: Field required"),
        ({"rows": 100_000, "row": 0}, "less than or equal to 1024"),
    ],
)
def test_a_record_of_no_batch_is_refused(record, finding):
    recorded = {"prompt": "a", "seed": 1, "batch": record}
    with pytest.raises(UsageError, match=finding):
        parse_request(json.dumps(recorded), "a.png")


def test_what_is_replayed_counts_all_rows(pipeline, monkeypatch):
    asked = []
    monkeypatch.setattr(surroundings, "is_worth_it", lambda *args: asked.append(args[2]) or False)
    alone, row = three()[0], three()[0].model_copy(update={"batch": Batch(rows=3, row=0)})
    for request in (alone, row):
        environment(pipeline.placement, request)
    assert asked[1] == 3 * asked[0] > 0


# What shares a batch -----------------------------------------------------------------------------------


def test_batches_are_of_what_fits_together_in_the_order_of_their_first():
    assert batches("aBbcCAdD", 2, str.islower) == [["a", "b"], ["B", "C"], ["c", "d"], ["A", "D"]]
    assert batches("abc", 1, len) == [["a"], ["b"], ["c"]] and batches("", 3, len) == []


def test_a_plan_that_decides_for_all_rows_is_refused(pipeline):
    cache = FirstBlockCache(threshold=0.1)
    with pytest.raises(UsageError, match=r"first_block_cache decides for all rows .* Next: leave --batch out"):
        pipeline.draw_rows(three(plan=(cache,)))
    fits = FirstBlockCache(schedule="1"), FirstBlockCache(threshold=0), Skip(blocks="layer.0")
    check_rows(fits, pipeline.variant.params, 3)
    check_rows((cache,), pipeline.variant.params, 1)


def test_rows_that_do_not_fit_are_told_of_a_smaller_batch(pipeline):
    short_of_memory(pipeline, torch.OutOfMemoryError("CUDA out of memory"))
    with pytest.raises(MemoryShortage, match=r"drawing 3 pictures of 48x32 pixels.* Next: .*, or --batch 1$"):
        pipeline.draw_rows(three())
    with pytest.raises(MemoryShortage, match=r"or --batch 1, which draws it alone$"):
        pipeline.draw(three()[0].model_copy(update={"batch": Batch(rows=3, row=0)}))


def test_rows_are_some_and_each_has_a_callback_or_none_has(pipeline):
    for requests, callbacks in (([], ()), (three(), [None]), (three()[:1], [None, None])):
        with pytest.raises(UsageError, match=f"{len(requests)} requests and {len(callbacks)} callbacks"):
            pipeline.draw_rows(requests, on_steps=callbacks)


def test_where_one_row_fills_the_device_that_is_told(capsys):
    card, cpu = torch.device("cuda"), torch.device("cpu")
    large, small = (GenerationRequest(prompt="a", name="flux-dev", width=side, height=side) for side in (1024, 512))
    assert (rows_that_fill(card, large), rows_that_fill(card, small), rows_that_fill(cpu, small)) == (1, 4, 1)
    for device, request, rows in ((card, large, 1), (card, small, 4)):
        tell_idle_rows(device, request, rows)
    assert capsys.readouterr().err == ""
    tell_idle_rows(card, large, 4)
    assert (
        "--batch 4 gains nothing at 1024x1024: one picture's 4,096 tokens fill cuda already" in capsys.readouterr().err
    )
    tell_idle_rows(cpu, small, 2)
    assert "1,024 tokens fill cpu already" in capsys.readouterr().err
