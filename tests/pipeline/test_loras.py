"""LoRAs in a pipeline: nothing that was computed before hides one, and none is left behind."""

import json

import pytest
import torch
from random_lora import PREFIX, factors, text_factors, write
from tiny import tiny_pipeline
from torch import nn
from torch._dynamo.testing import CompileCounter

from flux_core.errors import FileError, UsageError
from flux_core.hooks import Lora, Skip
from flux_core.lora import attach, attached
from flux_core.lora.merged import MergedLayer
from flux_core.lora.ranks import RankSchedule
from flux_core.model import ModulationTable
from flux_core.pipeline import load_pipeline
from flux_core.request import GenerationRequest
from flux_core.sampling import euler, flow_velocity, get_schedule, image_ids
from flux_core.training import PRESETS, adapt

FAST = {"num_steps": 3, "width": 48, "height": 32, "force": True}
PARAMS = tiny_pipeline().variant.params
MODULATION = ("_mod.lin", ".modulation.lin", ".adaLN_modulation.1")


@pytest.fixture
def pipeline():
    return tiny_pipeline()


@pytest.fixture
def files(tmp_path):
    """Two LoRAs, and one that trains modulation alone."""
    of_modulation = {
        key: x for key, x in factors(PARAMS, seed=2).items() if any(f"{end}." in key for end in MODULATION)
    }
    return {
        "a": write(tmp_path / "a.safetensors", factors(PARAMS, seed=0, alpha=2.0)),
        "b": write(tmp_path / "b.safetensors", factors(PARAMS, rank=3, seed=1)),
        "mod": write(tmp_path / "mod.safetensors", of_modulation),
    }


def pixels(pipeline, prompt="a red apple", seed=1, **fields):
    return pipeline.generate(prompt, seed, **{**FAST, **fields})[0].tobytes()


def entry(file, **values):
    return Lora(file=str(file), **values)


# What was computed before --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a", "mod"])
def test_attached_after_a_first_picture_it_changes_the_next(pipeline, files, name):
    before = pixels(pipeline)
    handle = pipeline.load_lora(files[name])
    changed = pixels(pipeline)
    fresh = tiny_pipeline()
    fresh.load_lora(files[name])
    assert changed == pixels(fresh) != before
    handle.scale = 0.0
    assert pixels(pipeline) == before
    handle.scale = 1.0
    assert pixels(pipeline) == changed
    handle.remove()
    assert pixels(pipeline) == before and not attached(pipeline.model)


@torch.no_grad()
@pytest.mark.parametrize("when", ["attached", "rescaled", "removed"])
def test_a_change_between_two_steps_reaches_the_modulation(pipeline, files, when):
    """The velocity object that was made before the change gives the velocity of the model as it is."""
    model = pipeline.model
    sigmas = get_schedule(4, 6)
    shapes = {"txt": (1, 4, PARAMS.context_in_dim), "vec": (1, PARAMS.vec_in_dim)}
    draw = torch.Generator().manual_seed(0)
    inputs = {name: torch.randn(shape, generator=draw) for name, shape in shapes.items()}
    inputs |= {"img_ids": image_ids(1, 2, 3), "txt_ids": torch.zeros(1, 4, 3), "guidance": 3.5}
    x = torch.randn(1, 6, 64, generator=draw)
    handle = None if when == "attached" else attach(model, files["mod"])
    tabled, plain = flow_velocity(model, **inputs, sigmas=sigmas[:-1]), flow_velocity(model, **inputs)
    before = tabled(x, sigmas[0])
    assert torch.equal(before, plain(x, sigmas[0]))
    if when == "attached":
        attach(model, files["mod"])
    elif when == "rescaled":
        handle.scale = 0.3
    else:
        handle.remove()
    for sigma in sigmas[1:-1]:
        assert torch.equal(tabled(x, sigma), plain(x, sigma))
    assert not torch.equal(tabled(x, sigmas[0]), before)


@torch.no_grad()
def test_each_row_of_the_table_has_its_own_steps_scale(pipeline, files):
    """Steps 0 and 1 with it, the others without: as without a table, and as two runs joined."""
    plan = [entry(files["a"], steps="0-1")]
    with_table = pipeline.generate("a red apple", 1, **{**FAST, "num_steps": 4}, plan=plan)[0]
    model, counted = pipeline.model, []

    class Without(ModulationTable):
        def __init__(self, *args):
            counted.append(args)
            super().__init__(*args)

    scales = []

    def on_step(step):
        scales.append(float(model.double_blocks[0].img_attn.qkv.factor[0]))

    pipeline.generate("a red apple", 1, **{**FAST, "num_steps": 4}, plan=plan, on_step=on_step)
    assert scales == [0.5, 0.5, 0.0, 0.0]  # alpha / rank is a half
    by_hand = by_hand_picture(files["a"], 4, lambda step: 1.0 if step < 2 else 0.0)
    assert with_table.tobytes() == by_hand


def by_hand_picture(file, steps, scale_of):
    """The picture of a pipeline whose handle is rescaled after each step, for the next."""
    pipeline = tiny_pipeline()
    handle = pipeline.load_lora(file, scale_of(0))

    def on_step(step):
        handle.scale = scale_of(step.index + 1)

    return pipeline.generate("a red apple", 1, **{**FAST, "num_steps": steps}, on_step=on_step)[0].tobytes()


def test_blocks_of_a_plan(pipeline, files):
    """One block alone is what a file with that block alone gives."""
    block = "single_blocks.0"
    some = {key: x for key, x in factors(PARAMS, seed=0, alpha=2.0).items() if key.startswith(PREFIX + block)}
    alone = write(files["a"].parent / "alone.safetensors", some)
    assert pixels(pipeline, plan=[entry(files["a"], blocks=block, scale=0.7)]) == pixels(
        tiny_pipeline(), plan=[entry(alone, scale=0.7)]
    )


def test_norms_have_the_scale_of_their_block(pipeline, files, tmp_path):
    """0.8 everywhere and 0.1 more for the single blocks: of differences to norms, too."""
    norms = ["single_blocks.0.norm.key_norm.scale", "double_blocks.0.img_attn.norm.key_norm.scale"]
    some = {key: x for key, x in factors(PARAMS, seed=0).items() if key.startswith(f"{PREFIX}single_blocks.0")}
    path = write(tmp_path / "norms.safetensors", some | {f"{PREFIX}{name}.w_norm": torch.ones(8) for name in norms})
    found = []

    def on_step(step):
        found.append([float(pipeline.model.get_parameter(name).mean()) for name in norms])

    plan = [entry(path, scale=0.8), entry(path, scale=0.1, blocks="single_blocks.*", steps="0")]
    pipeline.generate("a red apple", 1, **FAST, plan=plan, on_step=on_step)
    assert torch.allclose(torch.tensor(found), torch.tensor([[1.9, 1.8], [1.8, 1.8], [1.8, 1.8]]))
    pixels(pipeline)
    assert all((pipeline.model.get_parameter(name) == 1).all() for name in norms)


def test_scales_of_the_same_file_add_up_where_both_are_active(pipeline, files):
    twice = [entry(files["a"], scale=0.25, steps="0-1"), entry(files["a"], scale=0.5)]
    once = by_hand_picture(files["a"], 3, lambda step: 0.75 if step < 2 else 0.5)
    assert pixels(pipeline, plan=twice) == once
    assert len(attached(pipeline.model)) == 1


def test_a_request_without_them_draws_without_them(pipeline, files):
    before = pixels(pipeline)
    assert pixels(pipeline, plan=[entry(files["a"])]) != before
    assert pixels(pipeline) == before and not attached(pipeline.model)


def test_two_files_in_either_order_and_a_skip(pipeline, files):
    a, b = entry(files["a"], scale=0.5), entry(files["b"], scale=0.3)
    both = pixels(pipeline, plan=[a, b])
    assert both == pixels(pipeline, plan=[b, a]) != pixels(pipeline, plan=[a])
    assert pixels(pipeline, plan=[a, Skip(blocks="layer.1")]) != pixels(pipeline, plan=[a])


def test_what_was_drawn_before_changes_no_bit(pipeline, files):
    """The order in which files came to be attached is not the order in which they are added up."""
    a, b = entry(files["a"], scale=0.5), entry(files["b"], scale=0.3)
    for earlier in ([a], [b], [b, a]):
        pixels(pipeline, plan=earlier)
        assert pixels(pipeline, plan=[a, b]) == pixels(tiny_pipeline(), plan=[a, b])
        layer = pipeline.model.double_blocks[0].img_attn.qkv
        fresh = tiny_pipeline()
        pixels(fresh, plan=[a, b])
        assert torch.equal(layer.down, fresh.model.double_blocks[0].img_attn.qkv.down)


# Compiled and recorded -----------------------------------------------------------------------------------------


def test_a_scale_compiles_nothing(files, monkeypatch):
    torch._dynamo.reset()
    counter, compile = CompileCounter(), nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda self, **options: compile(self, backend=counter, **options))
    pipeline = tiny_pipeline(compile=True)
    handle = pipeline.load_lora(files["a"])
    pictures = {pixels(pipeline)}
    graphs = counter.frame_count
    for scale in (0.5, 0.0, -1.0):
        handle.scale = scale
        pictures.add(pixels(pipeline))
    pictures.add(pixels(pipeline, plan=[entry(files["b"], steps="1")]))
    more = counter.frame_count
    pictures.add(pixels(pipeline, plan=[entry(files["b"], steps="0", scale=0.2)]))
    assert len(pictures) == 6 and graphs == 2 and counter.frame_count == more
    torch._dynamo.reset()


# Text encoders -------------------------------------------------------------------------------------------------


def factors_for(pipeline):
    """A layer's of both of its text encoders."""
    q = pipeline.t5.model.encoder.block[0].layer[0].SelfAttention.q
    return text_factors(pipeline.clip.model.final_layer_norm.normalized_shape[0], q.in_features, q.out_features)


def test_text_encoders_are_changed_and_prompts_are_encoded_again(small, tmp_path):
    pipeline = load_pipeline("flux-mini", "cpu")
    text = factors_for(pipeline)
    of_flux = {key: x for key, x in factors(pipeline.variant.params, strength=0.1).items() if "img_in" in key}
    path = write(tmp_path / "text.safetensors", text | of_flux)
    before = [encoder(["a red apple"]) for encoder in (pipeline.t5, pipeline.clip)]
    first = pipeline.prompts("a red apple")
    with pipeline.load_lora(path) as handle:
        assert "1 of CLIP" in handle.summary and "1 of T5" in handle.summary and "left out" not in handle.summary
        assert not any(torch.equal(x, y) for x, y in zip(first, pipeline.prompts("a red apple"), strict=True))
        handle.scale = 0.0
        assert all(torch.equal(x, y) for x, y in zip(first, pipeline.prompts("a red apple"), strict=True))
        handle.scale = 0.5
        half = pipeline.prompts("a red apple")
        assert not any(torch.equal(x, y) for x, y in zip(first, half, strict=True))
    after = [encoder(["a red apple"]) for encoder in (pipeline.t5, pipeline.clip)]
    assert all(torch.equal(x, y) for x, y in zip(before, after, strict=True))
    assert all(torch.equal(x, y) for x, y in zip(first, pipeline.prompts("a red apple"), strict=True))


def test_prompts_are_encoded_again_whoever_changed_the_encoders(small, tmp_path):
    pipeline = load_pipeline("flux-mini", "cpu")
    text = factors_for(pipeline)
    of_flux = {key: x for key, x in factors(pipeline.variant.params, strength=0.1).items() if "img_in" in key}
    path = write(tmp_path / "text.safetensors", text | of_flux)
    first = pipeline.prompts("a red apple")
    handle = attach(pipeline.model, path, text={"clip": pipeline.clip.model, "t5": pipeline.t5.model})
    assert not any(torch.equal(x, y) for x, y in zip(first, pipeline.prompts("a red apple"), strict=True))
    handle.remove()
    assert all(torch.equal(x, y) for x, y in zip(first, pipeline.prompts("a red apple"), strict=True))


def test_offloaded_it_draws_the_same(small, tmp_path):
    path = write(tmp_path / "a.safetensors", factors(small.params, strength=0.1))
    pictures = [
        load_pipeline("flux-mini", "cpu", offload=offload).generate("a red apple", 1, plan=[entry(path)], **FAST)[0]
        for offload in (False, True)
    ]
    assert pictures[0].tobytes() == pictures[1].tobytes()


# Merged --------------------------------------------------------------------------------------------------------


def test_merged_it_is_in_the_weights_and_out_again(pipeline, files):
    before = {name: x.clone() for name, x in pipeline.model.state_dict().items()}
    base = pixels(pipeline)
    handle = pipeline.load_lora(files["a"], 0.5, merge=True)
    other = pipeline.load_lora(files["b"], 0.3, merge=True)
    assert list(pipeline.model.state_dict()) == list(before)
    merged = pipeline.generate("a red apple", 1, **FAST)[0]
    beside = tiny_pipeline()
    beside.load_lora(files["a"], 0.5), beside.load_lora(files["b"], 0.3)
    branch = beside.generate("a red apple", 1, **FAST)[0]
    apart = torch.tensor(bytearray(merged.tobytes())).int() - torch.tensor(bytearray(branch.tobytes())).int()
    assert apart.abs().max() <= 1 and merged.tobytes() != base
    handle.remove()
    assert pixels(pipeline) != base
    other.remove()
    after = pipeline.model.state_dict()
    assert pixels(pipeline) == base and all(torch.equal(after[name], x) for name, x in before.items())


def test_fp8_is_not_merged_and_says_so(small, tmp_path):
    path = write(tmp_path / "a.safetensors", factors(small.params, strength=0.1))
    pipeline = load_pipeline("flux-mini", "cpu", "fp8")
    with pytest.raises(UsageError, match="bf16 or fp32 weights"):
        pipeline.load_lora(path, merge=True)
    assert not attached(pipeline.model)
    pipeline.load_lora(path)


def test_a_merged_one_is_for_every_step():
    with pytest.raises(UsageError, match="at every step and in every block"):
        tiny_pipeline().generate("x", 1, **FAST, plan=[Lora(file="a.safetensors", merge=True, steps="0")])


# The record ----------------------------------------------------------------------------------------------------


def test_a_picture_records_what_was_on_the_model(pipeline, files):
    pipeline.load_lora(files["b"], 0.3)
    info = pipeline.generate("a red apple", 1, **FAST, plan=[entry(files["a"], scale=0.8)])[0].info
    recorded = json.loads(info["flux_core"])["plan"]
    assert [(x["kind"], x["file"], x["scale"]) for x in recorded] == [
        ("lora", "a.safetensors", 0.8), ("lora", "b.safetensors", 0.3),
    ]  # fmt: skip
    assert "<lora:a:0.8><lora:b:0.3>" in info["parameters"]
    hashes = ", ".join(f"{x['file'][0]}: {x['autov3']}" for x in recorded)
    assert f'Lora hashes: "{hashes}"' in info["parameters"]
    assert str(files["a"].parent) not in info["flux_core"] + info["parameters"]


def test_a_record_is_found_by_its_hash_alone(pipeline, tmp_path):
    path = write(tmp_path / "only.safetensors", factors(PARAMS, seed=77))  # no other test's file has this hash
    image = pipeline.generate("a red apple", 1, **FAST, plan=[entry(path)])[0]
    recorded = json.loads(image.info["flux_core"])["plan"]
    assert pixels(pipeline, plan=recorded) == image.tobytes()
    path.rename(tmp_path / "elsewhere.safetensors")
    fresh = tiny_pipeline()
    with pytest.raises(FileError, match=r"only\.safetensors, SHA-256 [0-9a-f]{16}.*--lora FILE"):
        pixels(fresh, plan=recorded)


@pytest.mark.parametrize("way", ["load", "attach"])
def test_what_the_user_attached_is_repeated_from_its_record(pipeline, tmp_path, way):
    """By the pipeline or not, and with what it took to attach it."""
    more = {f"{PREFIX}nothing.lora_{x}.weight": torch.ones(4, 4) for x in ("up", "down")}
    path = write(tmp_path / "partial.safetensors", factors(PARAMS, seed=8) | more)
    if way == "load":
        pipeline.load_lora(path, 0.5, allow_partial=True)
    else:
        attach(pipeline.model, path, 0.5, allow_partial=True)
    image = pipeline.generate("a red apple", 1, **FAST)[0]
    (recorded,) = json.loads(image.info["flux_core"])["plan"]
    assert recorded["file"] == "partial.safetensors" and recorded["scale"] == 0.5 and recorded["partial"]
    assert pixels(tiny_pipeline(), plan=[recorded]) == image.tobytes()


def test_a_scale_that_cannot_be_recorded_is_refused_before_anything_is_drawn(pipeline, files):
    with pytest.raises(UsageError, match="from -1000 to 1000"):
        pipeline.load_lora(files["a"], 2000)
    handle = pipeline.load_lora(files["a"])
    with pytest.raises(UsageError, match="from -1000 to 1000"):
        handle.scale = -1001


def test_a_file_that_is_gone_is_said_before_anything_is_drawn(pipeline, files):
    attach(pipeline.model, files["a"])
    files["a"].unlink()
    with pytest.raises(FileError, match="could not be read"):
        pipeline.generate("a red apple", 1, **FAST, on_step=lambda step: pytest.fail("drawn"))


def test_a_file_that_cannot_be_hashed_is_not_attached(pipeline, files, monkeypatch):
    def fail(path):
        raise FileError("could not be read")

    monkeypatch.setattr("flux_core.pipeline.loras.remember", fail)
    with pytest.raises(FileError):
        pipeline.load_lora(files["a"])
    assert not attached(pipeline.model)


def test_replay_is_recorded_for_the_request_and_not_for_the_one_before(pipeline, files, monkeypatch):
    """Pictures of many tokens are replayed in fp8 alone, with branches alone."""
    monkeypatch.setattr("flux_core.sampling.graph.format_of", lambda model: "fp8")
    size = {"width": 1024, "height": 1024, "force": True}
    request = GenerationRequest(name=pipeline.variant.name, prompt="x", num_steps=4, **size)
    plan = [entry(files["a"])]
    pixels(pipeline, plan=plan)  # whose branches stay until the next
    monkeypatch.setattr(pipeline.fallback, "device", torch.device("cuda"))
    monkeypatch.setattr("flux_core.pipeline.environment.device_name", lambda device: "a card")

    def replay(plan=()):
        return pipeline.complete(request.model_copy(update={"plan": tuple(plan)})).environment["replay"]

    assert replay() == "none" and replay(plan) == "graph"
    assert replay([entry(files["a"], merge=True)]) == "none"
    attach(pipeline.model, files["b"])
    assert replay() == "graph"


def test_a_merged_one_is_summed_once(pipeline, files, monkeypatch):
    summed, sum_up = [], MergedLayer._summed
    monkeypatch.setattr(MergedLayer, "_summed", lambda layer, weight: summed.append(1) or sum_up(layer, weight))
    pixels(pipeline, plan=[entry(files["a"], scale=0.3, merge=True)])
    assert len(summed) == 23
    pipeline.load_lora(files["b"], 0.3, merge=True)
    assert len(summed) == 46


def test_a_control_lora_is_not_drawn_with(pipeline, tmp_path):
    wide = factors(PARAMS)
    wide[f"{PREFIX}img_in.lora_down.weight"] = torch.zeros(4, 128)
    path = write(tmp_path / "control.safetensors", wide)
    with pytest.raises(FileError, match="control picture"):
        pipeline.load_lora(path)
    model = pipeline.model
    with attach(model, path):
        assert model.img_in.in_features == model.in_channels == model.params.in_channels == 128
    assert model.img_in.in_features == model.in_channels == 64 and type(model.img_in) is nn.Linear


def test_euler_knows_no_lora():
    """The seam is the velocity's: a sampler of somebody else's gets the scales of the steps, too."""
    assert "adapt" not in euler.__code__.co_varnames


@pytest.mark.gpu
@torch.no_grad()
@pytest.mark.parametrize("ranked", [False, True])
@pytest.mark.parametrize("dtype", ["bf16", "fp8"])
def test_a_recorded_step_has_the_scales_of_its_step(tmp_path, dtype, ranked, monkeypatch):
    """Scales by step, and changed by hand between two steps: replayed or not, the same bits, from one recording.

    ranked: so are the ranks of a T-LoRA.
    """
    from random_model import small_variant

    from flux_core.kernels import install
    from flux_core.linears.formats import quantize
    from flux_core.model import Flux
    from flux_core.pipeline.loras import LoraSteps
    from flux_core.sampling import graph

    params = small_variant().params
    torch.manual_seed(0)
    model = Flux(params).cuda().bfloat16().eval().requires_grad_(False)
    if dtype == "fp8":
        quantize(model)
    install(model, "cuda")
    header = {"lycoris_config": '{"algo": "tlora"}'} if ranked else {}
    steps, by_hand = (
        attach(model, write(tmp_path / f"{i}.safetensors", factors(params, seed=i, strength=0.3), **header))
        for i in range(2)
    )
    sigmas = get_schedule(6, 12)
    adapt = LoraSteps([(steps, [Lora(file="x", scale=0.8, steps="0-2"), Lora(file="x", scale=0.2)])], sigmas)
    draw = torch.Generator("cuda").manual_seed(0)
    shapes = {"txt": (1, 4, params.context_in_dim), "vec": (1, params.vec_in_dim)}
    inputs = {name: torch.randn(x, generator=draw, device="cuda").bfloat16() for name, x in shapes.items()}
    inputs |= {"img_ids": image_ids(1, 3, 4, "cuda"), "txt_ids": torch.zeros(1, 4, 3, device="cuda"), "guidance": 3.5}
    x = torch.randn(1, 12, 64, generator=draw, device="cuda").bfloat16()
    recorded = []
    record = graph.GraphedVelocity._record
    monkeypatch.setattr(graph.GraphedVelocity, "_record", lambda *args: recorded.append(1) or record(*args))

    def sample(replay):
        by_hand.scale = 0.5
        velocity = flow_velocity(model, **inputs, sigmas=sigmas[:-1], replay=replay, adapt=adapt)

        def change(step):
            if step.index == 3:
                by_hand.scale = -0.5

        return euler(velocity, x, sigmas, change)

    assert torch.equal(sample(True), sample(False)) and len(recorded) == 1


# T-LoRA --------------------------------------------------------------------------------------------------------


def t_lora(model, least=1):
    """An adapter that learned in the blocks and in modulation, whose ranks count by the noise level."""
    draw = torch.Generator().manual_seed(0)
    targets = (*PRESETS["blocks"], "norm_out.linear")
    adapter = adapt(model, targets, 3, 6.0, draw, schedule=RankSchedule(least))
    for one in adapter.factors.values():
        torch.nn.init.normal_(one.up, std=0.1, generator=draw)
    return adapter


def array(image):
    return torch.tensor(list(image.tobytes()), dtype=torch.int16)


@torch.no_grad()
def test_a_t_lora_is_drawn_as_it_was_trained_however_it_is_attached(pipeline, tmp_path):
    """Asked for, loaded, and in the form that learns; at each step with its own ranks, and so as no plain LoRA is."""
    before = pixels(pipeline)
    learning = tiny_pipeline()
    adapter = t_lora(learning.model)
    learning.loras.also = [adapter]
    drawn = array(learning.generate("a red apple", 1, **FAST)[0])
    path = adapter.save(tmp_path)

    asked = pixels(pipeline, plan=[entry(path)])
    assert pixels(pipeline) == before
    with pipeline.load_lora(path) as handle:
        assert pixels(pipeline) == asked
        handle.scale = 0.0
        assert pixels(pipeline) == before
    assert (torch.frombuffer(bytearray(asked), dtype=torch.uint8).short() - drawn).abs().max() <= 1

    constant = t_lora(tiny_pipeline().model, least=3).save(tmp_path / "constant")
    assert pixels(pipeline, plan=[entry(constant)]) != asked


@torch.no_grad()
def test_two_files_beside_each_other_have_their_own_ranks(pipeline, files, tmp_path):
    """A T-LoRA and a plain one: at pure noise, and at the end, each has what it has alone."""
    path = t_lora(tiny_pipeline().model).save(tmp_path)
    steps = pipeline.loras.prepare([entry(path), entry(files["a"])], (1.0, 0.5, 0.0))
    by_name = {handle.file.name: handle for handle in attached(pipeline.model)}
    ranked, plain = by_name[path.name], by_name["a.safetensors"]

    def counted(handle):
        layer = pipeline.model.double_blocks[0].img_attn.proj
        ((place, _),) = layer.scales_of(handle.owner)
        return int(place.count_nonzero()), place.numel()

    for sigma, count in ((1.0, 1), (0.5, 2), (0.0, 3), (1.0, 1)):
        steps.set(sigma)
        assert counted(ranked) == (count, 3) and len(set(counted(plain))) == 1
    assert len({steps.group(sigma) for sigma in (1.0, 0.9, 0.5, 0.4, 0.0)}) == 3
