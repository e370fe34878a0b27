"""What writing methods from the docs brought up: each was silent, or told in torch's own words, and has its test."""

import gc
import json
import warnings
from itertools import pairwise

import pytest
import torch
from golden_files import distance, flux_of, read
from safetensors.torch import load_file, save_file

from flux_core import GenerationRequest, load_pipeline
from flux_core.errors import DiskError, FileError, HookError, UsageError
from flux_core.hooks import (
    Add,
    AttentionMaps,
    AttentionMask,
    Capture,
    Custom,
    HookRun,
    Replace,
    Sampler,
    Scale,
    Skip,
    Wrap,
    load_capture,
    parse_plan,
    run_with_cache,
    traceable,
)
from flux_core.hooks.store import Key
from flux_core.sampling import euler, flow_velocity, get_schedule, prepare

GOLDEN = read("transformer_dev")
INPUTS = GOLDEN.group("in.")
MODEL = flux_of(GOLDEN)
PARAMS = MODEL.params
TEXT = INPUTS["txt"].shape[1]
SIGMAS = get_schedule(3, 24)
FIXED = {"img_ids": "img_ids", "txt": "txt", "txt_ids": "txt_ids", "y": "vec", "guidance": "guidance"}


def velocity(run):
    return flow_velocity(MODEL, **{new: INPUTS[old] for old, new in FIXED.items()}, run=run)


def forward(*plan, **options):
    return MODEL(**INPUTS, run=HookRun(plan, PARAMS, **options))


def midpoint(velocity, x, sigmas, on_step=None):
    for a, b in pairwise(sigmas):
        x = x + (b - a) * velocity(x + (b - a) / 2 * velocity(x, a), (a + b) / 2)
    return x


def heun(velocity, x, sigmas):
    for a, b in pairwise(sigmas):
        first = velocity(x, a)
        x = x + (b - a) / 2 * (first + velocity(x + (b - a) * first, b))
    return x


# 1: nothing is lost --------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler, forwards", [(midpoint, 6), (heun, 6), (euler, 3)])
@pytest.mark.parametrize("rising", [False, True])
def test_every_forward_is_captured(sampler, forwards, rising):
    seen, calls = {}, []
    sigmas = SIGMAS[::-1] if rising else SIGMAS
    look = Custom(sites="velocity", fn=lambda at, x: calls.append((at.step, at.call, at.num_steps)), reads=True)
    with HookRun([Capture(sites="velocity", into=seen), look], PARAMS, sigmas) as run:
        sampler(velocity(run), INPUTS["img"], sigmas)
    assert len(seen) == len(set(calls)) == forwards
    assert {step for step, _, _ in calls} == {0, 1, 2} and {count for *_, count in calls} == {3}


def test_forwards_without_a_sampler_are_counted():
    seen = {}
    run = HookRun([Capture(sites="vec", into=seen)], PARAMS)
    for _ in range(3):
        MODEL(**INPUTS, run=run)
    assert set(seen) == {"0.vec", "0.1.vec", "0.2.vec"}


@pytest.fixture
def pipeline(small, one_thread):
    return load_pipeline("flux-mini", "cpu")


def test_pictures_in_one_dict_have_keys_of_their_own(pipeline):
    seen, images = {}, []
    plan = [
        Capture(sites="vec", into=seen),
        Capture(sites="img_in", steps=[1], into=seen),
        Custom(sites="vec", fn=lambda at, x: images.append(at.image), reads=True),
    ]
    pipeline.generate("a red apple", 1, num_steps=2, plan=plan)
    assert set(seen) == {"0.vec", "1.vec", "1.img_in"}
    first = dict(seen)
    pipeline.generate("a red apple", 2, num_steps=2, num_images=2, plan=plan)
    each = ("0.0.vec", "1.0.vec", "1.0.img_in")
    assert set(seen) == {f"{image}.{key}" for image in range(3) for key in each}
    assert torch.equal(seen["0.1.0.img_in"], first["1.img_in"]) and images == [0, 0, 0, 0, 1, 1]


def test_other_sites_and_steps_of_another_picture_overwrite_nothing():
    """Whichever key comes first, and whether captures share a dict or not: a run is one picture."""

    def drawn(into, *options):
        plan = [Capture(**{"sites": "vec", "into": into} | option) for option in options]
        with HookRun(plan, PARAMS, SIGMAS) as run:
            euler(velocity(run), INPUTS["img"], SIGMAS)

    seen = {}
    drawn(seen, {})
    drawn(seen, {"sites": ["img_in", "vec"]})
    assert {key for key in seen if key.endswith("vec")} == {
        f"{image}.{step}.0.vec" for image in (0, 1) for step in range(3)
    }
    assert {key for key in seen if "img_in" in key} == {f"1.{step}.0.img_in" for step in range(3)}
    seen = {}
    drawn(seen, {"steps": [1]})
    drawn(seen, {"sites": "img_in"}, {})
    assert len(seen) == 7 and "0.1.0.vec" in seen and {key for key in seen if key[0] == "1"} == {
        f"1.{step}.0.{site}" for step in range(3) for site in ("vec", "img_in")
    }  # fmt: skip
    seen = {}
    drawn(seen, {}, {})
    assert set(seen) == {"0.vec", "1.vec", "2.vec"}


def test_where_one_file_cannot_be_written_the_others_are(tmp_path):
    (tmp_path / "file").write_text("")
    bad, good = (Capture(sites="vec", to=tmp_path / name, stream=False) for name in ("file/a", "b"))
    run = HookRun([bad, good], PARAMS, SIGMAS)
    velocity(run)(INPUTS["img"], 1.0)
    with pytest.raises(DiskError, match="file"):
        run.finish()
    assert set(load_file(tmp_path / "b")) == {"0.vec"} and len(list(tmp_path.iterdir())) == 2
    with pytest.raises(UsageError, match="this run has ended"):
        velocity(run)(INPUTS["img"], 1.0)


@pytest.mark.parametrize("text", ["3.vec", "3.1.vec", "2.3.0.single_blocks.4.img.out", "0.double_blocks.0.head.2"])
def test_a_key_says_picture_step_forward_and_site(text):
    key = Key.of(text)
    assert text in (key.short, key.full) and Key.of(key.full) == key


def test_words_that_are_no_keys():
    assert Key.of("mine") is None and Key.of("3") is None and Key.of("3.4") is None


def test_a_capture_survives_an_interrupt_and_says_what_it_is_of(pipeline, tmp_path, capsys):
    def stop(step):
        if step.index == 1:
            raise KeyboardInterrupt

    path = tmp_path / "new" / "seen.safetensors"
    with pytest.raises(KeyboardInterrupt):
        pipeline.generate("a red apple", 1, num_steps=4, on_step=stop, plan=Capture(sites="vec", to=path))
    assert set(load_file(path)) == {"0.vec", "1.vec"} and str(path) in capsys.readouterr().out
    assert [x.name for x in path.parent.iterdir()] == ["seen.safetensors"]
    found = load_capture(path)
    assert found["vec"].shape[:2] == (2, 1) and found.steps("vec") == [(0, 0), (1, 0)] and found.sites == ("vec",)
    assert len(found.sigmas) == 5 and found.branches == ("image",) and found.request["prompt"] == "a red apple"


# 2: schedules and steps --------------------------------------------------------------------------------


def test_steps_of_a_rising_schedule_and_beyond_the_ends():
    run = HookRun([], PARAMS, [0.0, 0.25, 0.5, 1.0])
    steps = []
    for sigma in (-1.0, 0.0, 0.1, 0.25, 0.5, 0.7, 1.0, 2.0):
        run.begin(sigma)
        steps.append(run.step)
    assert steps == [0, 0, 0, 1, 2, 2, 2, 2]
    run = HookRun([], PARAMS, [1.0, 0.5, 0.25, 0.0])
    for sigma, step in ((2.0, 0), (1.0, 0), (0.7, 0), (0.5, 1), (0.0, 2), (-1.0, 2)):
        run.begin(sigma)
        assert run.step == step


@pytest.mark.parametrize("sigmas", [[], [1.0, 0.5, 0.7, 0.0], [1.0, 1.0]])
def test_a_schedule_that_turns_is_refused(sigmas):
    with pytest.raises(UsageError, match="all fall or all rise"):
        HookRun([], PARAMS, sigmas)


@pytest.mark.parametrize("entry", [
    Skip(blocks="layer.0", steps=[3]), Capture(sites="vec", into={}, steps=[3]),
    Custom(sites="vec", fn=lambda x, at: x, steps=[3]), Scale(sites="vec", value=1, steps="0-3"),
])  # fmt: skip
def test_a_step_beyond_the_schedule_is_refused_for_all(entry, pipeline):
    with pytest.raises(UsageError, match="there is no step 3, the last is 2"):
        HookRun([entry], PARAMS, SIGMAS)
    with pytest.raises(UsageError, match="there is no step 3, the last is 2"):
        pipeline.generate("a red apple", 1, num_steps=3, plan=[entry])


# 3: patterns, readers ----------------------------------------------------------------------------------


def test_overlapping_patterns_apply_a_function_once():
    twice = forward(Custom(sites=["vec", "vec", "ve[c]"], fn=lambda x, at: x * 1.1))
    assert torch.equal(twice, forward(Custom(sites="vec", fn=lambda x, at: x * 1.1)))
    calls = []

    def count(call, x, at):
        calls.append(at.name)
        return call(x)

    forward(Custom(sites=["layer.0-1", "double_blocks.*", "layer.1"], fn=count))
    assert calls == ["double_blocks.0", "double_blocks.1"]


def test_readers_of_blocks_and_of_attention_get_what_these_return():
    seen, kept = {}, {}

    def look(at, x):
        seen[at.name] = x

    sites = ["double_blocks.1", "single_blocks.0", "double_blocks.1.attend"]
    plain = forward()
    values = ["double_blocks.1.*.out", "single_blocks.0.*.out", "double_blocks.1.*.attn"]
    read = forward(Custom(sites=sites, fn=look, reads=True), Capture(sites=values, into=kept))
    assert torch.equal(read, plain)
    img, txt = seen["double_blocks.1"]
    assert torch.equal(img, kept["0.double_blocks.1.img.out"]) and torch.equal(txt, kept["0.double_blocks.1.txt.out"])
    joined = torch.cat([kept[f"0.single_blocks.0.{stream}.out"] for stream in ("txt", "img")], 1)
    assert torch.equal(seen["single_blocks.0"], joined)
    attention = torch.cat([kept[f"0.double_blocks.1.{stream}.attn"] for stream in ("txt", "img")], 1)
    assert torch.equal(seen["double_blocks.1.attend"], attention)


# 4: files ------------------------------------------------------------------------------------------------


def test_a_run_that_is_dropped_writes_its_files_and_one_that_is_discarded_none(tmp_path):
    path = tmp_path / "seen.safetensors"
    run = HookRun([Capture(sites="vec", to=path)], PARAMS, SIGMAS)
    euler(velocity(run), INPUTS["img"], SIGMAS)
    assert not path.exists()
    del run
    gc.collect()
    assert set(load_file(path)) == {"0.vec", "1.vec", "2.vec"}
    seen = {}
    run = HookRun([Capture(sites="vec", to=tmp_path / "b"), Capture(sites="vec", into=seen)], PARAMS, SIGMAS)
    velocity(run)(INPUTS["img"], 1.0)
    run.discard()
    assert not seen and [x.name for x in tmp_path.iterdir()] == ["seen.safetensors"]


@pytest.mark.parametrize("stream", [True, False])
def test_a_file_is_written_as_values_come(tmp_path, stream):
    path = tmp_path / "seen.safetensors"
    seen, sites = {}, ["*.img.out", "vec", "pe"]
    with HookRun(
        [Capture(sites=sites, to=path, stream=stream), Capture(sites=sites, into=seen)], PARAMS, SIGMAS
    ) as run:
        euler(velocity(run), INPUTS["img"], SIGMAS)
        assert sum(x.stat().st_size for x in tmp_path.iterdir()) > 0 if stream else not list(tmp_path.iterdir())
    stored = load_file(path)
    assert set(stored) == set(seen) and all(torch.equal(stored[key], seen[key]) for key in seen)


def test_a_file_that_cannot_be_written_is_told_and_leaves_nothing(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DiskError, match="file"):
        forward(Capture(sites="vec", to=tmp_path / "file" / "seen.safetensors"))


def test_numbers_of_several_widths_are_read_back(tmp_path):
    path = tmp_path / "seen.safetensors"
    plan = [
        Capture(sites="single_blocks.0.img.out", to=path, dtype="bf16", tokens=[0, 2]),
    ]
    forward(*plan)
    stored = load_capture(path)["single_blocks.0.img.out"]
    assert stored.dtype == torch.bfloat16 and stored.shape == (1, INPUTS["img"].shape[0], 2, PARAMS.hidden_size)


def test_maps_of_several_blocks_lie_in_one_file(tmp_path):
    path = tmp_path / "maps.safetensors"
    forward(AttentionMaps(blocks="double_blocks.*,single_blocks.0.head.1", to=path))
    gc.collect()
    assert [x.name for x in tmp_path.iterdir()] == ["maps.safetensors"]
    assert {name.rpartition(".")[0] for name in load_capture(path).sites} == {
        "double_blocks.0", "double_blocks.1", "single_blocks.0.head.1",
    }  # fmt: skip


@pytest.mark.parametrize("data, said", [(b"x", "could not be read"), (None, "could not be read")])
def test_no_capture(tmp_path, data, said):
    path = tmp_path / "seen.safetensors"
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(FileError, match=said):
        load_capture(path)
    save_file({"a": torch.zeros(1)}, path)
    with pytest.raises(FileError, match="no captured values"):
        load_capture(path)


def test_a_site_that_is_not_in_a_file(tmp_path):
    path = tmp_path / "seen.safetensors"
    with HookRun([Capture(sites="vec", to=path)], PARAMS) as run:
        MODEL(**INPUTS, run=run)
    with pytest.raises(FileError, match=r"holds no site 'vek'. Did you mean vec"):
        load_capture(path)["vek"]


# Captures of parts --------------------------------------------------------------------------------------


def test_tokens_means_dtypes_and_graphs():
    whole, part, mean, joined, graph = {}, {}, {}, {}, {}
    sites = ["single_blocks.0.img.q", "single_blocks.0.q", "single_blocks.0.img.out"]
    x = INPUTS["img"].clone().requires_grad_()
    run = HookRun([
        Capture(sites=sites, into=whole),
        Capture(sites=sites, into=part, tokens=[1, 3], dtype=torch.float64),
        Capture(sites=sites[2], into=mean, reduce="mean"),
        Capture(sites=sites[1], into=joined, tokens="txt"),
        Capture(sites=sites[2], into=graph, detach=False, device=None),
    ], PARAMS)  # fmt: skip
    MODEL(**INPUTS | {"img": x}, run=run)
    q, both, out = (whole[f"0.{site}"] for site in sites)
    assert torch.equal(part[f"0.{sites[0]}"], q[:, :, [1, 3]].double())
    assert torch.equal(part[f"0.{sites[1]}"], both[:, :, [1, 3]].double())
    assert torch.equal(mean[f"0.{sites[2]}"], out.mean(1)) and not out.requires_grad
    assert torch.equal(joined[f"0.{sites[1]}"], both[:, :, :TEXT])
    graph[f"0.{sites[2]}"].sum().backward()
    assert x.grad.abs().sum() > 0


@pytest.mark.parametrize("options, said", [
    ({"sites": "vec", "tokens": "img"}, "vec has no tokens"), ({"sites": "vec", "reduce": "mean"}, "vec has no tokens"),
    ({"sites": "layer.0.img.q", "tokens": "txt"}, "has no txt tokens"),
    ({"sites": "layer.0.img.q", "tokens": [99]}, "none is 99"),
    ({"sites": "vec", "dtype": "int3"}, "'int3' is no dtype"),
    ({"sites": "vec", "to": "x", "into": None, "device": "cuda"}, "go with a dict"),
])  # fmt: skip
def test_what_a_capture_cannot_do_is_told(options, said):
    with pytest.raises(UsageError, match=said):
        forward(*parse_plan([{"kind": "capture", "into": {}} | options]))


# 5: the ways in ------------------------------------------------------------------------------------------


def test_a_text_is_one_prompt(pipeline):
    x = pipeline.noise(3)
    assert torch.equal(pipeline.velocity("ab")(x, 0.7), pipeline.velocity(["ab"])(x, 0.7))
    encoded = pipeline.prompts("ab")
    assert torch.equal(pipeline.velocity("ab")(x, 0.7), pipeline.velocity(encoded)(x, 0.7))
    two = pipeline.noise([3, 4])
    assert torch.equal(pipeline.velocity(["ab", "c"])(two, 0.7), pipeline.velocity([encoded, "c"])(two, 0.7))
    with pytest.raises(UsageError, match=r"x is \[1, 256, 64\], but 2 prompt"):
        pipeline.velocity(["a", "b"])(x, 0.7)
    with pytest.raises(UsageError, match=r"x is \[1, 256, 64\], but 1 prompt\(s\) at 64x32 pixels take \[1, 8, 64\]"):
        pipeline.velocity("a", width=64, height=32)(x, 0.7)
    for wrong in (lambda: pipeline.velocity([]), lambda: pipeline.decode(x, width=64, height=32),
                  lambda: pipeline.forward("ab", x, 0.5, "layer.0")):  # fmt: skip
        with pytest.raises(UsageError):
            wrong()
    with pytest.raises(UsageError, match="3 guidances"):
        pipeline.velocity(["a", "b"], [1, 2, 3])


def test_rows_are_pictures(pipeline):
    x = pipeline.noise(range(3, 6))
    with pytest.raises(UsageError, match=r"3 rows\. Next: pipeline.decode"):
        pipeline.picture(x, GenerationRequest(prompt="a", seed=1))
    images = pipeline.decode(x)
    assert len(images) == 3 and images[2].tobytes() == pipeline.decode(pipeline.noise(5))[0].tobytes()


def test_one_forward_takes_what_prepare_gives(pipeline):
    from flux_core.sampling import get_noise

    noise = get_noise(1, 32, 32, "cpu", torch.float32, 1)
    with torch.no_grad():
        inputs = prepare(pipeline.t5, pipeline.clip, noise, "a red apple")
        _, values = run_with_cache(pipeline.model, "vec", timesteps=0.5, guidance=3.5, **inputs)
    _, expected = pipeline.forward("a red apple", inputs["img"], 0.5, "vec", width=32, height=32)
    assert distance(values["vec"], expected["vec"]) <= 1e-6


# 6: what a function returns ---------------------------------------------------------------------------


def narrow(x, at):
    return x[:, :, :2]


def text(call, x, at):
    return "x"


WRONG = [
    ("single_blocks.2.img.q", narrow, r"narrow at single_blocks\.2\.img\.q, step 0, returned \[2, 3, 2, 16\] float32; "
     r"expected \[2, 3, 24, 16\] float32"),
    ("vec", lambda x, at: None, "at vec, step 0, returned None; expected"),
    ("vec", lambda x, at: x.numpy(), "returned a ndarray"),
    ("vec", lambda x, at: x.double(), "float64; expected .* float32"),
    ("velocity", lambda x, at: x[:1, :1].bfloat16(), "bfloat16; expected"),
    ("velocity", lambda x, at: x[:1, :1], r"returned \[1, 1, \d+\]"),
    ("double_blocks.0", text, "text at double_blocks.0, step 0, returned a str; expected \\(img, txt\\)"),
    ("double_blocks.0", lambda call, x, at: (x[0][:, 1:], x[1]), "at double_blocks.0, step 0, returned"),
    ("single_blocks.0", text, "at single_blocks.0, step 0, returned a str"),
    ("single_blocks.1.attend", lambda attend, q, k, v, at: v, "at single_blocks.1.attend, step 0, returned"),
    ("double_blocks.1.head.1", lambda x, at: x[:, 1:], "at double_blocks.1.head.1, step 0, returned"),
    ("single_blocks.0.mod.gate", lambda x, at: x.expand(-1, 4, -1), "at single_blocks.0.mod.gate"),
]  # fmt: skip


@pytest.mark.parametrize("site, fn, said", WRONG)
def test_what_does_not_fit_is_told_with_function_site_and_shapes(site, fn, said):
    plain = forward()
    with pytest.raises(HookError, match=said):
        forward(Custom(sites=site, fn=fn))
    assert torch.equal(forward(), plain)


def test_an_exception_carries_its_place_and_the_pipeline_is_clean(pipeline):
    before = pipeline.generate("a red apple", 1, num_steps=2)[0].tobytes()

    def boom(x, at):
        raise KeyError("nothing")

    for site in ("vec", "single_blocks.1.img.k", "double_blocks.1.attend"):
        fn = (lambda attend, q, k, v, at: boom(q, at)) if site.endswith("attend") else boom
        with pytest.raises(
            HookError, match=rf"at {site}, step 1, raised KeyError: 'nothing' \(test_hook_faults.py, line"
        ) as e:
            pipeline.generate("a red apple", 1, num_steps=2, plan=Custom(sites=site, fn=fn, steps=[1]))
        assert isinstance(e.value.__cause__, KeyError)
        assert pipeline.generate("a red apple", 1, num_steps=2)[0].tobytes() == before


def test_what_is_not_the_functions_fault_passes_it_as_it_is(pipeline, monkeypatch):
    def tell(step):
        raise KeyError("a callback")

    for plan in (Sampler(fn=euler), Wrap(fn=lambda velocity, sampling: velocity)):
        with pytest.raises(KeyError, match="a callback"):
            pipeline.generate("a red apple", 1, num_steps=2, plan=plan, on_step=tell)
    block = pipeline.model.single_blocks[1]
    monkeypatch.setattr(block, "forward", lambda *args: 1 / 0)
    plans = [Custom(sites="layer.3", fn=lambda call, x, at: call(x)), Wrap(fn=lambda velocity, sampling: velocity)]
    for plan in plans:
        with pytest.raises(ZeroDivisionError):
            pipeline.generate("a red apple", 1, num_steps=2, plan=plan)


def test_the_inner_of_two_functions_is_named():
    def outer(call, x, at):
        return call(x)

    def inner(call, x, at):
        return call(x) if at.name == "" else 1 / 0

    plan = [Custom(sites="double_blocks.1", fn=inner), Custom(sites="double_blocks.1", fn=outer, follow=True)]
    with pytest.raises(HookError, match=r"inner at double_blocks\.1, step 0, raised ZeroDivisionError"):
        forward(*plan)


@traceable
def wide(x, value):
    return x + value


@pytest.mark.parametrize("compiled", [False, True])
def test_traceable_functions_are_told_alike(compiled):
    model = flux_of(GOLDEN)
    if compiled:
        for block in (*model.double_blocks, *model.single_blocks):
            block.compile(fullgraph=True)
    plan = [Custom(sites="single_blocks.1.img.q", fn=wide, args=(torch.zeros(5, 1, 1, 1, 1),))]
    with pytest.raises(HookError, match=r"wide at single_blocks.1.img.q, step 0, returned \[5, 2"):
        model(**INPUTS, run=HookRun(plan, PARAMS))
    with pytest.raises(HookError, match=r"add at double_blocks.0.img.attn, step 0, raised RuntimeError: The size"):
        model(**INPUTS, run=HookRun([Add(sites="double_blocks.0.img.attn", value=torch.zeros(7))], PARAMS))


def test_a_reader_that_writes_is_told():
    for site in ("vec", "double_blocks.0.img.out", "single_blocks.0.img.q", "single_blocks.0", "double_blocks.1"):

        def stain(at, x):
            (x if torch.is_tensor(x) else x[0]).mul_(2)

        with pytest.raises(HookError, match=f"stain at {site}, step 0, changed a value in place"):
            forward(Custom(sites=site, fn=stain, reads=True))


def test_functions_inside_a_skipped_block_are_told():
    with pytest.warns(UserWarning, match="double_blocks.1 is skipped: .* has no effect at double_blocks.1.img.q then"):
        HookRun([Skip(blocks="double_blocks.1"), Custom(sites="*.img.q", fn=lambda x, at: x)], PARAMS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        HookRun([Skip(blocks="layer.1", steps=[0]), Capture(sites="layer.1.img.q", steps=[1], into={})], PARAMS, SIGMAS)
        HookRun([Skip(blocks="layer.1"), Capture(sites="layer.1.img.out", into={})], PARAMS)


# 7: messages ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("entries, said", [
    ([{"kind": "skip", "blocks": "layer.0", "skip": 1}], r"entry 1 of the plan \(skip\) has no key 'skip'"),
    ([{"kind": "add", "sites": "vec", "value": {"file": "a.safetensors"}}], "value: the value lacks 'tensor'"),
    ([{"kind": "add", "sites": "vec", "value": {"file": "a", "tensr": "x"}}], "no key 'tensr'. Did you mean tensor"),
    ([{"kind": "attention_mask", "blocks": "layer.0", "value": 3}], "neither a tensor nor"),
])  # fmt: skip
def test_entries_say_what_is_wrong(entries, said):
    with pytest.raises(UsageError, match=said):
        parse_plan(entries)


def test_a_tensor_of_a_wrong_shape_is_told(pipeline):
    plan = [Add(sites="img_in", value=torch.zeros(2, 5, 1, 1))]
    with pytest.raises(
        HookError, match=r"add at img_in, step 0, returned \[2, 5, 256, \d+\] float32; expected \[1, 256"
    ):
        pipeline.generate("a red apple", 1, num_steps=2, plan=plan)


def test_a_tensor_of_a_file_is_taken_times_a_number(tmp_path):
    save_file({"smile": torch.ones(PARAMS.hidden_size)}, tmp_path / "d.safetensors")
    value = {"file": str(tmp_path / "d.safetensors"), "tensor": "smile", "times": -2}
    assert torch.equal(forward(Add(sites="vec", value=value)), forward(Add(sites="vec", value=-2)))


def test_one_intervention_is_a_plan_and_json_too(pipeline):
    def drawn(plan):
        return pipeline.generate("a red apple", 1, num_steps=2, plan=plan)[0].tobytes()

    assert (
        drawn(Skip(blocks="layer.1")) == drawn([Skip(blocks="layer.1")]) == drawn({"kind": "skip", "blocks": "layer.1"})
    )
    assert torch.equal(MODEL(**INPUTS, run=HookRun(Skip(blocks="layer.1"), PARAMS)), forward(Skip(blocks="layer.1")))


def test_attend_is_no_value():
    with pytest.raises(UsageError, match=r"attend is attention itself.*double_blocks.0.img.attn"):
        HookRun([Capture(sites="double_blocks.0.attend", into={})], PARAMS)


def test_a_plan_is_added_to_that_of_the_request(pipeline):
    request = GenerationRequest(prompt="a red apple", seed=1, num_steps=2, width=32, height=32, force=True,
                                plan=[Skip(blocks="layer.1")])  # fmt: skip
    both = pipeline.generate(request, plan=[Scale(sites="vec", value=0.5)])[0]
    assert [entry["kind"] for entry in json.loads(both.info["flux_core"])["plan"]] == ["skip", "scale"]
    seen = {}
    again = pipeline.generate(request, plan=Capture(sites="vec", into=seen))[0]
    assert again.tobytes() == pipeline.generate(request)[0].tobytes() and len(seen) == 2


# Heads, masks, positions ----------------------------------------------------------------------------------


@pytest.mark.parametrize("block", ["double_blocks.1", "single_blocks.0"])
def test_one_head_is_read_scaled_and_mapped(block):
    seen, maps, every = {}, {}, {}
    forward(
        Capture(sites=f"{block}.head.1", into=seen),
        AttentionMaps(blocks=f"{block}.head.1", into=maps, keys="all"),
        AttentionMaps(blocks=block, into=every, keys="all", heads="each"),
        Capture(sites=f"{block}.*.attn", into=seen),
    )
    attention = torch.cat([seen[f"0.{block}.{stream}.attn"] for stream in ("txt", "img")], 1)
    width = PARAMS.head_dim
    assert torch.equal(seen[f"0.{block}.head.1"], attention[..., width : 2 * width])
    assert torch.equal(maps[f"0.{block}.head.1.attention_map"], every[f"0.{block}.attention_map"][:, 1])
    mask = torch.ones(PARAMS.hidden_size)
    mask[width : 2 * width] = 0
    ablated = forward(Replace(sites=f"{block}.head.1", value=0))
    assert torch.equal(ablated, forward(Scale(sites=f"{block}.*.attn", value=mask)))
    assert not torch.equal(ablated, forward())
    assert torch.equal(forward(Scale(sites=f"{block}.head.*", value=1)), forward())


def test_a_mask_is_data():
    length = TEXT + INPUTS["img"].shape[1]
    everything = torch.ones(length, length, dtype=torch.bool)
    assert distance(forward(AttentionMask(blocks="layer.*", value=everything)), forward()) <= 1e-6
    no_text = everything.clone()
    no_text[TEXT:, :TEXT] = False
    bias = torch.zeros(length, length).masked_fill(~no_text, -1e9)
    masked = forward(AttentionMask(blocks="layer.*", value=no_text))
    assert distance(masked, forward(AttentionMask(blocks="layer.*", value=bias))) <= 1e-5

    def slow(attend, q, k, v, at):
        weights = torch.softmax((q @ k.mT / q.shape[-1] ** 0.5).masked_fill(~no_text, -torch.inf), -1)
        return (weights @ v).transpose(1, 2).flatten(2)

    assert distance(masked, forward(Custom(sites="layer.*.attend", fn=slow))) <= 1e-5
    assert distance(masked, forward()) > 1e-3


def test_rotations_by_step():
    """Position interpolation at the first step alone, as methods for sizes beyond the trained ones have it."""
    from flux_core.model.rope import embed_nd

    ids = torch.cat((INPUTS["txt_ids"], INPUTS["img_ids"]), 1)
    half = embed_nd(ids * 0.5, PARAMS.axes_dim, PARAMS.theta)
    plan = Custom(sites="pe", fn=lambda x, at: half if at.sigma > 0.9 else x)
    with HookRun([plan, Capture(sites="pe", into=(seen := {}))], PARAMS, SIGMAS) as run:
        first, second = velocity(run)(INPUTS["img"], 1.0), velocity(run)(INPUTS["img"], SIGMAS[1])
    assert torch.equal(seen["0.pe"], half) and torch.equal(second, velocity(None)(INPUTS["img"], SIGMAS[1]))
    assert distance(first, velocity(None)(INPUTS["img"], 1.0)) > 1e-4


def test_the_pooled_prompt_is_a_site(pipeline):
    """Modulation guidance: y + w (y' - y) is the vector of another prompt at w = 1; no table hides it."""
    other = pipeline.forward("a blue heart", pipeline.noise(0), 0.5, "y")[1]["y"]
    plan = Replace(sites="y", value=other)
    mixed = pipeline.generate("a red apple", 1, num_steps=2, plan=plan)[0]
    txt = pipeline.forward("a red apple", pipeline.noise(0), 0.5, "txt_in")[1]["txt_in"]
    expected = pipeline.generate("a blue heart", 1, num_steps=2, plan=Replace(sites="txt_in", value=txt))[0]
    assert mixed.tobytes() == expected.tobytes()


# Velocities and samplers ---------------------------------------------------------------------------------


def test_a_wrapper_and_a_sampler_are_in_the_place_of_their_own(pipeline):
    def away(velocity, sampling):
        worse = sampling.of(Skip(blocks="layer.1"))
        return lambda x, sigma: velocity(x, sigma) + 2 * (velocity(x, sigma) - worse(x, sigma))

    image = pipeline.generate("a red apple", 1, num_steps=3, plan=[Wrap(fn=away), Sampler(fn=midpoint)])[0]
    sigmas, x = pipeline.schedule(3), pipeline.noise(1)
    with pipeline.run(Skip(blocks="layer.1"), sigmas) as run, torch.no_grad():
        good, worse = pipeline.velocity("a red apple"), pipeline.velocity("a red apple", run=run)
        x = midpoint(lambda x, s: good(x, s) + 2 * (good(x, s) - worse(x, s)), x, sigmas)
    assert image.tobytes() == pipeline.decode(x)[0].tobytes()
    plain = pipeline.generate("a red apple", 1, num_steps=3)[0]
    assert pipeline.generate("a red apple", 1, num_steps=3, plan=Sampler(fn=euler))[0].tobytes() == plain.tobytes()
    once = pipeline.generate("a red apple", 1, num_steps=3, plan=Wrap(fn=away, steps=[1]))[0]
    assert once.tobytes() not in (plain.tobytes(), image.tobytes())


def test_a_sampler_that_tells_of_no_step_tells_of_the_last(pipeline):
    steps = []
    pipeline.generate("a red apple", 1, num_steps=3, plan=Sampler(fn=midpoint), on_step=lambda s: steps.append(s.index))
    assert steps == [2]
    pipeline.generate("a red apple", 1, num_steps=3, plan=Sampler(fn=euler), on_step=lambda s: steps.append(s.index))
    assert steps == [2, 0, 1, 2]


@pytest.mark.parametrize("entry, said", [
    (Wrap(fn=lambda velocity, sampling: None), "expected a function velocity"),
    (Wrap(fn=lambda velocity, sampling: lambda x, sigma: x[:, :1]), r"returned \[1, 1, 64\] float32; expected"),
    (Wrap(fn=lambda velocity, sampling: 1 / 0), "raised ZeroDivisionError"),
    (Sampler(fn=lambda velocity, x, sigmas, on_step: None), "returned None; expected"),
])  # fmt: skip
def test_what_these_return_is_looked_at(pipeline, entry, said):
    with pytest.raises(HookError, match=said):
        pipeline.generate("a red apple", 1, num_steps=2, plan=entry)


@pytest.mark.parametrize("entry", [Wrap(fn=print), Sampler(fn=print), {"kind": "lora", "file": "x"}])
def test_what_is_no_part_of_a_forward_is_refused_there(entry, pipeline):
    with pytest.raises(UsageError, match="no part of a forward"):
        pipeline.run(entry)


# Gradients -----------------------------------------------------------------------------------------------


def test_gradients_through_a_forward_are_those_of_differences(pipeline):
    x = pipeline.noise(0).requires_grad_()
    velocity, values = pipeline.forward("a red apple", x, 0.6, ["txt_in", "layer.1.img.q"], grad=True)
    wanted = [x, values["txt_in"], values["double_blocks.1.img.q"]]
    slopes = torch.autograd.grad(velocity.square().mean(), wanted)
    assert all(slope.abs().max() > 0 for slope in slopes)
    for site, slope in zip(("txt_in", "double_blocks.1.img.q"), slopes[1:], strict=True):
        direction, (plus, minus) = slope / slope.norm(), (0.1, -0.1)
        found = [
            pipeline.forward("a red apple", x, 0.6, plan=Add(sites=site, value=step * direction))[0].square().mean()
            for step in (plus, minus)
        ]
        assert ((found[0] - found[1]) / 0.2).item() == pytest.approx(slope.norm().item(), rel=0.03)


def test_without_grad_nothing_keeps_a_graph(pipeline):
    velocity, values = pipeline.forward("a red apple", pipeline.noise(0).requires_grad_(), 0.6, "txt_in")
    assert not velocity.requires_grad and not values["txt_in"].requires_grad
    assert not pipeline.velocity("a red apple")(pipeline.noise(0), 0.6).requires_grad


def test_a_gradient_where_blocks_come_and_go_is_refused(pipeline):
    pipeline.placement._streams = {1: "a ring"}
    with pytest.raises(UsageError, match="a gradient needs all blocks where they compute"):
        pipeline.forward("a red apple", pipeline.noise(0), 0.6, "txt_in", grad=True)
    pipeline.forward("a red apple", pipeline.noise(0), 0.6, "txt_in")


def test_gradients_reach_through_a_whole_picture(pipeline):
    sigmas, direction = pipeline.schedule(3), torch.zeros(pipeline.variant.params.hidden_size, requires_grad=True)
    x = pipeline.noise(0).requires_grad_()
    with pipeline.run(Add(sites="vec", value=direction), sigmas) as run:
        drawn = euler(pipeline.velocity("a red apple", run=run), x, sigmas)
    drawn.mean().backward()
    assert direction.grad.abs().max() > 0 and x.grad.abs().max() > 0


# Words ----------------------------------------------------------------------------------------------------


def test_words_are_those_tokens_of_the_text():
    pipeline = load_pipeline("flux-mini", "cpu")
    prompt = "a red apple, don't left-of\tthe  dog (face)"
    words = pipeline.words(prompt)
    assert [word for word, _ in words] == ["a", "red", "apple", ",", "don't", "left-of", "the", "dog", "(", "face", ")"]
    numbers = sorted(number for _, tokens in words for number in tokens)
    assert set(numbers) <= set(range(len(pipeline.t5.pieces(prompt)) - 1)) and len(numbers) >= len(words)
    alone = pipeline.t5.tokens([prompt])[0]
    for word, tokens in words:
        if word in ("red", "apple", "dog"):
            assert pipeline.t5.tokenizer.backend.decode(alone[list(tokens)].tolist()).strip() == word
    assert pipeline.words("") == []


def test_a_long_prompt_has_the_words_that_are_read():
    pipeline = load_pipeline("flux-mini", "cpu")
    words = pipeline.words("apple " * 500)
    assert words[-1][1][-1] == pipeline.t5.max_length - 2
