"""Each algebra against its closed form, on one layer of a tiny transformer."""

import json

import pytest
import torch
from random_lora import PREFIX, write
from tiny import tiny_variant

from flux_core.lora import attach
from flux_core.model import Flux

PARAMS = tiny_variant().params
NAME, N, K = "double_blocks.0.img_mlp.0", 32, 16
NORM = "single_blocks.0.norm.query_norm"


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Flux(PARAMS).eval().requires_grad_(False)


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


@torch.no_grad()
def difference(model, name=NAME):
    """What the branches of a layer add to its weight, and to its bias."""
    layer = model.get_submodule(name)
    x = torch.eye(layer.in_features)
    bias = layer(0 * x)[0]
    return (layer(x) - bias).t() - layer.base.weight, bias - layer.base.bias


def attached(model, tmp_path, factors, scale=1.0, **metadata):
    tensors = {f"{PREFIX}{NAME}.{key}": x for key, x in factors.items()}
    return attach(model, write(tmp_path / "one.safetensors", tensors, **metadata), scale)


def weight(model):
    layer = model.get_submodule(NAME)
    return getattr(layer, "base", layer).weight


A, B = draw(3, K), draw(N, 3, seed=1)
W1A, W1B, W2A, W2B = draw(N, 2, seed=2), draw(2, K, seed=3), draw(N, 2, seed=4), draw(2, K, seed=5)
ALPHA = {"alpha": torch.tensor(6.0)}
GLORA = {"a1": draw(K, 2, seed=6), "a2": draw(2, K, seed=7), "b1": draw(N, 2, seed=8), "b2": draw(2, K, seed=9)}
OLD = {"a1": GLORA["a2"], "a2": GLORA["a1"], "b1": GLORA["b2"], "b2": GLORA["b1"]}
KRON1, KRON2 = draw(4, 2, seed=10), draw(8, 8, seed=11)
CORE = draw(2, 2, seed=12)


def glora(factors):
    return {f"{key}.weight": x for key, x in factors.items()}


CASES = {
    "lora": ({"lora_A.weight": A, "lora_B.weight": B, **ALPHA}, lambda w: 2 * B @ A),
    "PEFT's names": ({"lora_A.default.weight": A, "lora_B.default.weight": B}, lambda w: B @ A),
    "alpha of one number": ({"lora_down.weight": A, "lora_up.weight": B, "alpha": torch.tensor([[1.5]])},
                            lambda w: 0.5 * B @ A),
    "a Tucker core": ({"lora_down.weight": A[..., None, None], "lora_up.weight": B[..., None, None],
                       "lora_mid.weight": draw(3, 3)[..., None, None], **ALPHA}, lambda w: 2 * B @ draw(3, 3) @ A),
    "a rank above the width": ({"lora_down.weight": draw(40, K), "lora_up.weight": draw(N, 40), **ALPHA},
                               lambda w: 0.15 * draw(N, 40) @ draw(40, K)),
    "lokr, whole": ({"lokr_w1": KRON1, "lokr_w2": KRON2, "alpha": torch.tensor(1e10)},
                    lambda w: torch.kron(KRON1, KRON2)),
    "lokr, w1 of two": ({"lokr_w1_a": draw(4, 1), "lokr_w1_b": draw(1, 2), "lokr_w2": KRON2, **ALPHA},
                        lambda w: 6 * torch.kron(draw(4, 1) @ draw(1, 2), KRON2)),
    "lokr, w2 with a core": ({"lokr_w1": KRON1, "lokr_w2_a": draw(2, 8), "lokr_w2_b": draw(2, 8, seed=1),
                              "lokr_t2": CORE[..., None, None], **ALPHA},
                             lambda w: 3 * torch.kron(KRON1, draw(2, 8).t() @ CORE @ draw(2, 8, seed=1))),
    "loha": ({"hada_w1_a": W1A, "hada_w1_b": W1B, "hada_w2_a": W2A, "hada_w2_b": W2B, **ALPHA},
             lambda w: 3 * (W1A @ W1B) * (W2A @ W2B)),
    "glora": ({**glora(GLORA), **ALPHA},
              lambda w: 3 * (w @ GLORA["a1"] @ GLORA["a2"] + GLORA["b1"] @ GLORA["b2"])),
    "glora, older": ({**glora(OLD), **ALPHA},
                     lambda w: 3 * (w @ GLORA["a1"] @ GLORA["a2"] + GLORA["b1"] @ GLORA["b2"])),
    "full": ({"diff": draw(N, K)}, lambda w: draw(N, K)),
    "dora of rows": ({"lora_A.weight": A, "lora_B.weight": B, "magnitude": draw(N).abs()},
                     lambda w: draw(N).abs()[:, None] * (w + B @ A) / (w + B @ A).norm(dim=1, keepdim=True) - w),
    "dora of columns": ({"lora_A.weight": A, "lora_B.weight": B, "dora_scale": draw(1, K).abs(), **ALPHA},
                        lambda w: draw(1, K).abs() * (w + 2 * B @ A) / (w + 2 * B @ A).norm(dim=0) - w),
    "dora of lokr": ({"lokr_w1": KRON1, "lokr_w2": KRON2, "dora_scale": draw(N, 1).abs()},
                     lambda w: draw(N, 1).abs() * (w + torch.kron(KRON1, KRON2))
                     / (w + torch.kron(KRON1, KRON2)).norm(dim=1, keepdim=True) - w),
}  # fmt: skip


@pytest.mark.parametrize("scale", [1.0, 0.6, -0.5, 0.0])
@pytest.mark.parametrize("name", CASES)
def test_the_difference_is_its_closed_form(model, tmp_path, name, scale):
    factors, formula = CASES[name]
    handle = attached(model, tmp_path, factors, scale)
    expected = scale * formula(weight(model))
    assert torch.allclose(difference(model)[0], expected, atol=2e-6 * max(1.0, float(expected.abs().max())))
    assert not difference(model)[1].any()
    handle.remove()


@pytest.mark.parametrize("name", [name for name in CASES if name != "a rank above the width"])
def test_merged_it_is_the_same(model, tmp_path, name):
    factors, formula = CASES[name]
    before = weight(model).clone()
    tensors = {f"{PREFIX}{NAME}.{key}": x for key, x in factors.items()}
    with attach(model, write(tmp_path / "one.safetensors", tensors), 0.5, merge=True):
        assert torch.allclose(weight(model), before + 0.5 * formula(before), atol=1e-5)
    assert torch.equal(weight(model), before)


def test_biases_add_up_at_their_scales(model, tmp_path):
    """A bias of the factor up is scaled with the product, one of its own is not."""
    factors = {"lora_A.weight": A, "lora_B.weight": B, "lora_B.bias": draw(N), **ALPHA}
    with attached(model, tmp_path, factors, 0.5):
        assert torch.allclose(difference(model)[1], draw(N), atol=1e-6)  # 0.5 x 6 / 3
    with attached(model, tmp_path, {"diff_b": draw(N), "alpha": torch.tensor(6)}, 0.5):  # which is of no product
        assert torch.allclose(difference(model)[1], 0.5 * draw(N), atol=1e-6)


def test_norms_are_replaced_or_added_to(model, tmp_path):
    size = PARAMS.head_dim
    path = write(tmp_path / "set.safetensors", {f"{PREFIX}{NORM}.set_weight": torch.full((size,), 3.0)})
    other = write(tmp_path / "add.safetensors", {f"{PREFIX}{NORM}.scale.w_norm": torch.ones(size)})
    scale = model.get_submodule(NORM).scale
    first, second = attach(model, path, 0.5), attach(model, other, 0.5)
    assert torch.equal(scale, torch.full((size,), 3.5))  # what replaces is not scaled
    first.remove()
    assert torch.equal(scale, torch.full((size,), 1.5))
    second.remove()
    assert torch.equal(scale, torch.ones(size))


def test_peft_patterns_of_a_folder(model, tmp_path):
    """adapter_config.json beside the file: a pattern is a module's name or a dotted end of it."""
    tensors = {
        f"base_model.model.{name}.{key}.weight": x.clone()
        for name in ("transformer_blocks.0.ff.net.0.proj", "transformer_blocks.0.ff_context.net.0.proj")
        for key, x in (("lora_A", A), ("lora_B", torch.cat((B, torch.zeros(32, 3)))))  # diffusers' MLP is wider
    }
    write(tmp_path / "adapter_model.safetensors", tensors)
    config = {"lora_alpha": 6, "r": 3, "alpha_pattern": {"ff.net.0.proj": 1.5}, "use_rslora": False}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with attach(model, tmp_path):
        assert torch.allclose(difference(model)[0], 0.5 * B @ A, atol=1e-6)
        assert torch.allclose(difference(model, "double_blocks.0.txt_mlp.0")[0], 2 * B @ A, atol=1e-6)


def test_lora_and_difference_on_one_module_and_two_dialects_in_one_file(model, tmp_path):
    tensors = {
        f"{PREFIX}{NAME}.lora_down.weight": A,
        f"{PREFIX}{NAME}.lora_up.weight": B,
        "lora_unet_double_blocks_0_txt_mlp_0.diff": draw(N, K),
        "transformer.single_transformer_blocks.0.attn.to_k.lora_A.weight": A.half(),
        "transformer.single_transformer_blocks.0.attn.to_k.lora_B.weight": B[:16].bfloat16(),
    }
    with attach(model, write(tmp_path / "mixed.safetensors", tensors)):
        assert torch.allclose(difference(model)[0], B @ A, atol=1e-6)
        assert torch.allclose(difference(model, "double_blocks.0.txt_mlp.0")[0], draw(N, K), atol=1e-6)
        found = difference(model, "single_blocks.0.linear1")[0]
        assert torch.allclose(found[16:32], B[:16].bfloat16().float() @ A.half().float(), atol=1e-6)
        assert not found[:16].any() and not found[32:].any()


@pytest.mark.parametrize("kind", [torch.int64, torch.int8, torch.float64])
def test_an_alpha_may_be_a_whole_number(model, tmp_path, kind):
    with attached(model, tmp_path, {"lora_A.weight": A, "lora_B.weight": B, "alpha": torch.tensor(6).to(kind)}):
        assert torch.allclose(difference(model)[0], 2 * B @ A, atol=1e-5)


@pytest.mark.parametrize(
    "pattern", [r"ff\.net\.0\.proj", "other|ff.net.0.proj", "^transformer_blocks.0.ff.net.0.proj$"]
)
def test_a_pattern_is_one_name_or_several(model, tmp_path, pattern):
    name = "transformer.transformer_blocks.0.ff.net.0.proj"
    tensors = {f"{name}.lora_A.weight": A, f"{name}.lora_B.weight": torch.cat((B, torch.zeros(32, 3)))}
    config = {"transformer.lora_alpha": 3, "transformer.alpha_pattern": {"net.0": 9, "^ff.net.0.proj": 9, pattern: 6}}
    with attach(model, write(tmp_path / "one.safetensors", tensors, lora_adapter_metadata=json.dumps(config))):
        assert torch.allclose(difference(model)[0], 2 * B @ A, atol=1e-5)


def test_what_is_dense_is_said(model, tmp_path):
    assert "1 computed dense" in attached(model, tmp_path, {"diff": draw(N, K)}).summary
