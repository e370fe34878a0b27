"""The parts of a pipeline: kept prompts, weights that move, conditions that are added, and what is recorded."""

import copy
import gc
import pickle
from dataclasses import replace

import pytest
import torch
from tiny import tiny_pipeline
from torch import nn

from flux_core.device.memory import CACHED_PROMPTS, prompt_cache
from flux_core.hooks import HookRun, Skip
from flux_core.images.metadata import differences, parse_request
from flux_core.model import MODULATION
from flux_core.pipeline import Pipeline
from flux_core.pipeline.conditions import compose
from flux_core.pipeline.environment import environment, is_replayed
from flux_core.pipeline.placement import move
from flux_core.request.generation import GenerationRequest
from flux_core.sampling import euler, flow_velocity, get_noise, get_schedule, pack
from flux_core.variants import VARIANTS

pytestmark = pytest.mark.usefixtures("one_thread")
FAST = {"width": 48, "height": 32, "num_steps": 2, "force": True}
SIZE = (48, 32)


@pytest.fixture
def pipeline():
    return tiny_pipeline()


def request(**fields) -> GenerationRequest:
    return GenerationRequest(**{"prompt": "a red apple", "seed": 3, **FAST, **fields})


# Prompts ---------------------------------------------------------------------------------------------


def test_the_prompt_used_longest_ago_is_forgotten_first(pipeline):
    names = [f"word{i}" for i in range(CACHED_PROMPTS)]
    for name in names:
        pipeline.prompts(name)
    pipeline.prompts(names[0])
    pipeline.prompts("one more")
    calls = pipeline.t5.calls
    pipeline.prompts(names[0])
    assert pipeline.t5.calls == calls
    pipeline.prompts(names[1])
    assert pipeline.t5.calls == calls + 1


def test_what_prompts_take_is_counted():
    variant = VARIANTS["flux-dev"]
    assert prompt_cache(variant) == CACHED_PROMPTS * 2 * (512 * 4096 + 768)
    assert prompt_cache(variant, 4) == 2 * prompt_cache(variant)


def test_no_part_points_back_to_the_pipeline(pipeline):
    pipeline.generate("a red apple", 3, **FAST)
    parts = (pipeline.components, pipeline.prompts, pipeline.codec, pipeline.denoiser, pipeline.placement)
    assert not any(pipeline in gc.get_referents(vars(part)) for part in parts)


@pytest.mark.parametrize("way", [copy.deepcopy, pickle.dumps], ids=["copied", "pickled"])
def test_a_pipeline_says_why_it_cannot_be(pipeline, way):
    with pytest.raises(TypeError, match=r"cannot be pickled or copied: .* Next: call load_pipeline in each process"):
        way(pipeline)


@pytest.mark.parametrize("offload", [False, True])
def test_encoders_may_be_plain_functions(pipeline, offload):
    t5, clip = (lambda prompts, encode=encode: encode(prompts) for encode in (pipeline.t5, pipeline.clip))
    components = replace(pipeline.components, t5=t5, clip=clip)
    other = Pipeline(pipeline.variant, components, pipeline.device, pipeline.dtype, offload=offload)
    pictures = [one.generate("a red apple", 3, **FAST)[0].tobytes() for one in (pipeline, other)]
    assert pictures[0] == pictures[1]


# Placement -------------------------------------------------------------------------------------------


class Adapter(nn.Module):
    """A side branch around a layer, as a LoRA has one."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Parameter(torch.zeros(2, base.in_features))
        self.register_buffer("scale", torch.ones(()))

    def forward(self, x):
        return self.base(x) + 0 * (x @ self.down.t()).sum(-1, keepdim=True) * self.scale


def test_the_parameters_of_a_wrapper_come_along(pipeline):
    block = pipeline.model.double_blocks[0]
    block.img_attn.qkv = Adapter(block.img_attn.qkv)
    block.img_mod.lin = Adapter(block.img_mod.lin)
    move(pipeline.model, torch.device("meta"))
    for name, x in [*pipeline.model.named_parameters(), *pipeline.model.named_buffers()]:
        stays = any(end in name for end in MODULATION)
        assert x.device.type == ("cpu" if stays else "meta"), name


def test_the_loop_takes_its_blocks_from_the_placement(pipeline, monkeypatch):
    plain, fetched = pipeline.generate("a red apple", 3, **FAST)[0], []

    def fetch(blocks):
        for block in blocks:
            fetched.append(block)
            yield block

    monkeypatch.setattr(pipeline.placement, "fetch", fetch)
    assert pipeline.generate("a red apple", 3, **FAST)[0].tobytes() == plain.tobytes()
    assert fetched == [*pipeline.model.double_blocks, *pipeline.model.single_blocks] * FAST["num_steps"]


# Conditions ------------------------------------------------------------------------------------------


class Reference:
    """As Kontext has it: the tokens of another picture, behind those that are drawn."""

    def __init__(self, tokens: torch.Tensor) -> None:
        self.tokens = tokens

    def apply(self, inputs, size):
        assert size == SIZE
        ids = inputs.img_ids.clone()
        ids[..., 0] = 1
        return replace(inputs, img_cond_seq=self.tokens, img_cond_seq_ids=ids)

    def run(self, inputs):
        return None


RAMP = torch.linspace(0, 1, 16)


class Residual:
    """As a ControlNet has it: something added behind every block."""

    needs_vec = False

    def apply(self, inputs, size):
        return inputs

    def run(self, inputs):
        return self

    def begin(self, sigma):
        self.sigma = sigma

    def value(self, name, x):
        return x

    def double_block(self, name, block, img, txt, mods, pe):
        img, txt = block(img, txt, *mods, pe)
        return img + self.sigma * RAMP, txt

    def single_block(self, name, block, x, txt_len, mods, pe):
        return block(x, *mods, pe) + self.sigma * RAMP


def by_hand(pipeline, **more):
    """The tokens of `request()` by the sampler's own functions."""
    noise = pack(get_noise(1, SIZE[1], SIZE[0], "cpu", torch.float32, 3))
    sigmas = get_schedule(2, noise.shape[1], shift=True)
    inputs = vars(pipeline.denoiser.inputs(["a red apple"], [3.5], SIZE))
    with torch.no_grad():
        return euler(flow_velocity(pipeline.model, **{**inputs, **more}), noise, sigmas)


def test_a_condition_changes_the_inputs(pipeline):
    tokens = torch.randn(1, 6, 64, generator=torch.Generator().manual_seed(1))
    ids = pipeline.denoiser.inputs(["x"], [3.5], SIZE).img_ids.clone()
    ids[..., 0] = 1
    x = by_hand(pipeline, img_cond_seq=tokens, img_cond_seq_ids=ids)
    drawn = pipeline.draw(request(), conditions=[Reference(tokens)])
    assert drawn.tobytes() == pipeline.picture(x, request()).tobytes()
    assert drawn.tobytes() != pipeline.draw(request()).tobytes()


@pytest.mark.parametrize("plan", [(), (Skip(blocks="layer.0"),)], ids=["alone", "with a plan"])
def test_a_condition_works_inside_a_forward_beside_the_plan(pipeline, plan):
    sigmas = get_schedule(2, 6, shift=True)
    hooks = HookRun(plan, pipeline.variant.params, sigmas)
    x = by_hand(pipeline, run=compose([hooks, Residual()]))
    drawn = pipeline.draw(request(plan=plan), conditions=[Residual()])
    assert drawn.tobytes() == pipeline.picture(x, request()).tobytes()
    assert drawn.tobytes() != pipeline.draw(request(plan=plan)).tobytes()


def test_runs_around_each_other_are_the_sum_of_what_they_add(pipeline):
    """Where the block is skipped, what is left are the residuals: sigma from each of two runs."""
    plan = [Skip(blocks="layer.0-1")]
    run = compose([HookRun(plan, pipeline.variant.params), Residual(), Residual()])
    run.begin(0.5)
    block, pe = pipeline.model.double_blocks[0], torch.zeros(1, 1, 3, 4, 2, 2)
    img, txt = run.double_block("double_blocks.0", block, torch.ones(1, 2, 16), torch.ones(1, 1, 16), (), pe)
    assert torch.allclose(img, (1 + RAMP).expand(1, 2, 16)) and torch.equal(txt, torch.ones(1, 1, 16))
    x = run.single_block("single_blocks.0", pipeline.model.single_blocks[0], torch.ones(1, 3, 16), 1, (), pe)
    assert torch.allclose(x, (1 + RAMP).expand(1, 3, 16))


def test_one_run_stays_itself():
    run = Residual()
    assert compose([None, run]) is run and compose([None]) is None


# Environment -----------------------------------------------------------------------------------------


def test_a_picture_records_what_its_last_bits_depend_on(pipeline):
    image = pipeline.generate("a red apple", 3, **FAST)[0]
    recorded = parse_request(image.info["flux_core"], "the picture").environment
    assert recorded == environment(pipeline.placement, request())
    assert recorded["torch"] == torch.__version__ and recorded["device"] == "cpu, 1 thread(s)"
    assert {"attention", "kernels", "replay"} <= recorded.keys()


def test_what_differs_is_named(pipeline):
    then = pipeline.complete(request())
    assert differences(then, pipeline.complete(request())) == []
    changed = then.model_copy(update={"environment": {**then.environment, "attention": "cudnn"}})
    assert differences(changed, then) == [f"attention was cudnn, now it is {then.environment['attention']}"]
    assert differences(then.model_copy(update={"environment": None}), then) == []


def test_small_pictures_without_a_plan_are_replayed_on_a_card(pipeline, monkeypatch):
    monkeypatch.setattr(pipeline.fallback, "device", torch.device("cuda"))
    assert is_replayed(pipeline.placement, request(num_steps=4))
    assert not is_replayed(pipeline.placement, request(num_steps=2))
    assert not is_replayed(pipeline.placement, request(num_steps=4, plan=(Skip(blocks="layer.0"),)))
    assert not is_replayed(pipeline.placement, request(num_steps=4, width=1024, height=1024))
    pipeline.fallback.offload = True
    assert not is_replayed(pipeline.placement, request(num_steps=4))


def test_init_images_count_the_steps_that_are_left(pipeline, monkeypatch):
    monkeypatch.setattr(pipeline.fallback, "device", torch.device("cuda"))
    origin = {"file": "a.png", "sha256": "0"}
    assert not is_replayed(pipeline.placement, request(num_steps=4, init_image=origin, strength=0.5))
