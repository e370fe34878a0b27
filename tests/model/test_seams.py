"""The five seams: what stands at one changes what it should, and nothing else."""

import pytest
import torch
from einops import rearrange
from golden_files import distance, flux_of, read
from torch import nn

from flux_core.sampling import denoise, euler, flow_velocity

GOLDEN = read("transformer_dev")
SIGMAS = [1.0, 0.75, 0.4, 0.0]


@pytest.fixture
def model():
    return flux_of(GOLDEN)


@pytest.fixture
def inputs():
    return GOLDEN.group("in.")


class Through:
    """A run that passes everything on."""

    def __init__(self, skip=()):
        self.skip, self.values = skip, []

    def value(self, name, x):
        self.values.append(name)
        return x

    def double_block(self, name, block, img, txt, mods, pe):
        return (img, txt) if name in self.skip else block(img, txt, *mods, pe)

    def single_block(self, name, block, x, txt_len, mods, pe):
        return x if name in self.skip else block(x, *mods, pe)


def test_a_run_that_passes_everything_on_changes_no_bit(model, inputs):
    assert torch.equal(model(**inputs, run=Through()), model(**inputs))


def test_a_run_sees_every_modulation_by_name(model, inputs):
    run = Through()
    model(**inputs, run=run)
    blocks = [f"double_blocks.{i}" for i in range(2)] + [f"single_blocks.{i}" for i in range(3)]
    assert run.values == ["txt_in", "img_in", "pe", "y", "vec", *(f"{block}.mod" for block in blocks), "velocity"]


@pytest.mark.parametrize(("kind", "index"), [("double_blocks", 0), ("double_blocks", 1), ("single_blocks", 2)])
def test_skipping_a_block_is_a_model_without_it(model, inputs, kind, index):
    skipped = model(**inputs, run=Through(skip=(f"{kind}.{index}",)))
    blocks = getattr(model, kind)
    setattr(model, kind, nn.ModuleList(block for i, block in enumerate(blocks) if i != index))
    assert torch.equal(skipped, model(**inputs))


def test_a_value_of_a_run_takes_the_place_of_the_models(model, inputs):
    class NoText(Through):
        def value(self, name, x):
            return model.embed_vec(inputs["timesteps"], torch.zeros_like(inputs["y"]), inputs["guidance"])

    class OnlyVec(NoText):
        def value(self, name, x):
            return super().value(name, x) if name == "vec" else x

    expected = model(**inputs | {"y": torch.zeros_like(inputs["y"])})
    assert torch.equal(model(**inputs, run=OnlyVec()), expected)


def softmax_attention(q, k, v):
    weights = torch.softmax(q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5, dim=-1)
    return rearrange(weights @ v, "B H L D -> B L (H D)")


def test_attention_can_be_replaced(model, inputs):
    plain = model(**inputs)
    for block in [*model.double_blocks, *model.single_blocks]:
        block.ops = block.ops._replace(attend=softmax_attention)
    assert distance(model(**inputs), plain) <= 1e-6


def test_replacing_an_operation_of_one_block_leaves_the_others(model, inputs):
    plain = model(**inputs)
    block = model.single_blocks[1]
    block.ops = block.ops._replace(attend=lambda q, k, v: torch.zeros_like(rearrange(v, "B H L D -> B L (H D)")))
    assert model.single_blocks[0].ops.attend is not block.ops.attend
    assert distance(model(**inputs), plain) > 1e-3


def test_a_step_sees_what_was_computed():
    seen = []
    start = torch.ones(2, 3)
    end = euler(lambda x, sigma: x * sigma, start, SIGMAS, on_step=seen.append)
    assert [(step.index, step.sigma, step.sigma_next) for step in seen] == [
        (0, 1.0, 0.75),
        (1, 0.75, 0.4),
        (2, 0.4, 0.0),
    ]
    assert torch.equal(seen[0].velocity, start)
    assert torch.equal(seen[0].x, start - 0.25 * start)
    assert torch.equal(seen[-1].x, end)


def test_a_step_can_put_other_latents_in_place():
    def reset(step):
        return torch.zeros_like(step.x) if step.index == 1 else None

    end = euler(lambda x, sigma: torch.ones_like(x), torch.ones(2, 3), SIGMAS, on_step=reset)
    assert torch.equal(end, torch.full((2, 3), -0.4))


def fixed(inputs, **changes):
    names = {"img_ids": "img_ids", "txt": "txt", "txt_ids": "txt_ids", "y": "vec", "guidance": "guidance"}
    return {ours: inputs[name] for name, ours in names.items()} | changes


def test_guidance_of_any_kind_wraps_the_velocity(model, inputs):
    """True classifier-free guidance in two calls; at scale 1 it is the conditional velocity."""
    conditional = flow_velocity(model, **fixed(inputs))
    without = flow_velocity(model, **fixed(inputs, txt=torch.zeros_like(inputs["txt"])))

    def guided(scale):
        return lambda x, sigma: without(x, sigma) + scale * (conditional(x, sigma) - without(x, sigma))

    plain = denoise(model, inputs["img"], **fixed(inputs), timesteps=SIGMAS)
    assert torch.equal(euler(conditional, inputs["img"], SIGMAS), plain)
    assert distance(euler(guided(1.0), inputs["img"], SIGMAS), plain) <= 1e-6
    assert distance(euler(guided(4.0), inputs["img"], SIGMAS), plain) > 1e-2


@pytest.mark.parametrize("name", ["img_mlp.0", "img_attn.qkv", "img_mod.lin"])
def test_a_leaf_is_whatever_stands_in_a_linears_place(model, inputs, name):
    class Doubled(nn.Module):
        def __init__(self, linear):
            super().__init__()
            self.linear = linear

        def forward(self, x):
            return 2 * self.linear(x)

    block = model.double_blocks[0]
    linear = block.get_submodule(name)
    parent, _, leaf = name.rpartition(".")
    setattr(block.get_submodule(parent), leaf, Doubled(linear))
    wrapped = model(**inputs)
    setattr(block.get_submodule(parent), leaf, linear)
    linear.weight.mul_(2), linear.bias.mul_(2)
    assert torch.equal(wrapped, model(**inputs))
