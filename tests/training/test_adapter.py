"""The layers that learn, read back by our loader and by diffusers, and optimizers that go on to the bit."""

import json
import math
import sys
from dataclasses import replace

import pytest
import torch
from golden_files import distance
from random_model import random_weights, small_variant
from safetensors.torch import load_file, safe_open

from flux_core.errors import FileError, UsageError
from flux_core.linears.formats import FORMATS, quantize
from flux_core.linears.frozen import Frozen
from flux_core.lora import attach
from flux_core.model import Flux
from flux_core.params import FluxParams
from flux_core.training.adapter import PRESETS, DoraFactors, adapt, matching, patterns_of, weight_of
from flux_core.training.optimizers import OPTIMIZERS, Ema, restore, state_of

PARAMS = replace(small_variant("flux-dev").params, mlp_ratio=4.0)
WIDE = replace(PARAMS, mlp_ratio=3.0)
"""whose MLP is wider in diffusers"""
PATTERNS = (*PRESETS["blocks"], "norm_out.linear", "x_embedder")
KINDS = {
    "lora": {},
    "rslora": {"rslora": True},
    "dora": {"dora": True},
}


@pytest.fixture(params=KINDS)
def kind(request):
    return KINDS[request.param]


def model_of(params=PARAMS, std=0.1):
    return random_weights(Flux(params), std=std)


def adapter_of(kind, params=PARAMS, patterns=PATTERNS, model=None, moved=True):
    """Rank 4 and alpha 3, whose numbers are moved to where all of them matter."""
    draw = torch.Generator().manual_seed(7)
    adapter = adapt(model or model_of(params), patterns, 4, 3.0, draw, **kind)
    with torch.no_grad():
        for x in adapter.parameters() if moved else ():
            noise = torch.randn(x.shape, generator=draw)
            x.copy_(x * (1 + 0.2 * noise) if x.ndim == 1 else x + 0.05 * noise)
    return adapter


def velocity(model, params=PARAMS):
    draw = torch.Generator().manual_seed(1)
    img, txt, y = (
        torch.randn(1, *shape, generator=draw) for shape in ((6, 64), (4, params.context_in_dim), (params.vec_in_dim,))
    )
    t, g = torch.tensor([0.5]), torch.tensor([3.5])
    if isinstance(model, Flux):
        return model(img, torch.zeros(1, 6, 3), txt, torch.zeros(1, 4, 3), t, y, g)
    return model(
        hidden_states=img, encoder_hidden_states=txt, pooled_projections=y, timestep=t, guidance=g,
        img_ids=torch.zeros(6, 3), txt_ids=torch.zeros(4, 3), return_dict=False,
    )[0]  # fmt: skip


# What the layers compute -------------------------------------------------------------------------------


def test_before_the_first_step_the_model_is_as_it_was_to_the_bit(kind):
    model = model_of()
    before = velocity(model)
    adapter = adapter_of(kind, model=model, moved=False)
    assert torch.equal(velocity(model), before)
    adapter_of(KINDS["lora"], model=(other := model_of())).remove()
    assert torch.equal(velocity(other), before)
    assert adapter.changes()[0][1] == 0


@pytest.mark.parametrize("rank", [1, 4, 16])
def test_the_scale(rank):
    """Of LoRA alpha / rank, of rsLoRA alpha / sqrt(rank)."""
    for rslora, scale in ((False, 3 / rank), (True, 3 / math.sqrt(rank))):
        adapter = adapt(model_of(), ["proj_mlp"], rank, 3.0, rslora=rslora)
        assert {one.scale for one in adapter.factors.values()} == {scale}


@torch.no_grad()
@pytest.mark.parametrize("format", [None, *FORMATS])
def test_dora_is_a_magnitude_and_a_direction(format):
    """Rows of m V / |V| with V = W + s B A, beside weights in any format."""
    model = random_weights(Flux(replace(PARAMS, hidden_size=256, axes_dim=(32, 48, 48))), std=0.05)
    if format:
        quantize(model, format)
    adapter = adapter_of(KINDS["dora"], model=model, patterns=["single_transformer_blocks.0.*"])
    layer = model.single_blocks[0].linear1
    assert isinstance(layer.base, Frozen) == (format is not None)
    x = torch.randn(3, 256, generator=torch.Generator().manual_seed(2))
    expected = layer.base(x)
    for one in layer.factors:
        own = one.rows_of(weight_of(layer.base, torch.float32))
        trained = own + one.scale * one.up @ one.down
        change = one.magnitude[:, None] * trained / trained.norm(dim=1, keepdim=True) - own
        assert distance(one.change(own), change) <= 1e-5
        expected[:, one.target.start : one.target.stop] += x @ change.t()
    assert len(layer.factors) == 4 and distance(layer(x), expected) <= 1e-5
    assert len(adapter.parameters()) == 3 * len(adapter.factors)


def test_a_row_of_zeros_stays_finite():
    model = model_of()
    with torch.no_grad():
        model.img_in.weight[3] = 0
    adapter = adapter_of(KINDS["dora"], model=model, moved=False)
    velocity(model).square().sum().backward()
    assert all(x.isfinite().all() for x in (velocity(model), *adapter.grads().values()))


def test_changes_are_those_of_the_weights(kind):
    model, dense = model_of(), model_of()
    adapter = adapter_of(kind, model=model)
    found = dict(adapter.changes())
    one = adapter.factors["transformer_blocks.1.attn.to_v"]
    rows = one.rows_of(dense.double_blocks[1].img_attn.qkv.weight)
    trained = (rows + one.scale * one.up @ one.down).detach()
    if isinstance(one, DoraFactors):
        trained = one.magnitude.detach()[:, None] * trained / trained.norm(dim=1, keepdim=True)
    assert found["transformer_blocks.1.attn.to_v"] == pytest.approx(float((trained - rows).norm() / rows.norm()), 1e-5)
    assert list(found.values()) == sorted(found.values(), reverse=True) and found.keys() == adapter.factors.keys()


# Files -------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("params", [PARAMS, WIDE], ids=["", "wide"])
def test_our_loader_reads_what_was_trained(kind, params, tmp_path):
    patterns = PATTERNS if params is PARAMS else ("attn.to_q", "ff.net.2", "proj_out")
    adapter = adapter_of(kind, params, patterns)
    trained, saved, plain = velocity(adapter.model, params), adapter.save(tmp_path), model_of(params)
    assert distance(trained, velocity(plain, params)) > 1e-2
    attach(plain, saved)
    assert distance(velocity(plain, params), trained) <= 1e-5


@torch.no_grad()
@pytest.mark.parametrize("format", FORMATS)
def test_our_loader_reads_what_was_trained_beside_codes(format, tmp_path):
    params = replace(PARAMS, hidden_size=256, axes_dim=(32, 48, 48), depth=1, depth_single_blocks=1)
    model, plain = (random_weights(Flux(params), std=0.03) for _ in range(2))
    for one in (model, plain):
        quantize(one, format)
    adapter = adapter_of({"rslora": True, "dora": True}, params, PRESETS["attention"], model)
    attach(plain, adapter.save(tmp_path))
    assert distance(velocity(plain, params), velocity(model, params)) <= 1e-5


def test_the_header_says_what_the_tensors_do_not(kind, tmp_path):
    with safe_open(adapter_of(kind).save(tmp_path), "pt") as file:
        header, names = json.loads(file.metadata()["lora_adapter_metadata"]), list(file.keys())
    assert header["transformer.lora_alpha"] == 3.0 and header["transformer.r"] == 4
    assert header["transformer.use_rslora"] == kind.get("rslora", False)
    assert header["transformer.use_dora"] == kind.get("dora", False) == any("magnitude" in x for x in names)


def test_the_same_numbers_again(kind, tmp_path):
    for params, patterns in ((PARAMS, PATTERNS), (WIDE, ("ff.net.2", "norm_out.linear"))):
        adapter, other = (adapter_of(kind, params, patterns, moved=moved) for moved in (True, False))
        other.load(load_file(adapter.save(tmp_path)))
        assert all(torch.equal(x, other.named_parameters()[name]) for name, x in adapter.named_parameters().items())


def test_dora_that_diffusers_could_not_compute_is_refused():
    with pytest.raises(UsageError, match=r"ff\.net\.0\.proj has more rows in diffusers.*Next: leave DoRA out"):
        adapt(model_of(WIDE), ["ff.net.0.proj"], 4, 4, dora=True)
    assert adapt(model_of(WIDE), ["ff.net.0.proj"], 4, 4).factors


def test_dora_beside_a_lora_that_is_attached_is_refused(tmp_path):
    path, model = adapter_of({}, patterns=["to_q"]).save(tmp_path), model_of()
    attach(model, path)
    with pytest.raises(UsageError, match=r"BranchedLinear does not tell its weight.*Next: take off"):
        adapt(model, ["to_q"], 4, 4, dora=True)


# diffusers ---------------------------------------------------------------------------------------------


def theirs(params=PARAMS):
    """diffusers' transformer with the same weights."""
    diffusers = pytest.importorskip("diffusers")
    pytest.importorskip("peft")
    from flux_core.checkpoint import to_diffusers
    from flux_core.checkpoint.layouts import transformer_config

    with torch.device("meta"):
        model = diffusers.FluxTransformer2DModel.from_config(transformer_config(params))
    model.load_state_dict(to_diffusers(model_of(params).state_dict(), params), assign=True)
    return model.eval().requires_grad_(False)


def with_theirs(model):
    """A pipeline of diffusers around a transformer, and nothing else."""
    from diffusers import FluxPipeline

    nothing = dict.fromkeys(("scheduler", "vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    return FluxPipeline(transformer=model, **nothing)


@torch.no_grad()
@pytest.mark.parametrize("params", [PARAMS, WIDE], ids=["", "wide"])
def test_diffusers_reads_what_was_trained(kind, params, tmp_path):
    patterns = PATTERNS if params is PARAMS else ("attn.to_q", "ff.net.2", "proj_out")
    other, adapter = theirs(params), adapter_of(kind, params, patterns)
    adapter.save(tmp_path)
    with_theirs(other).load_lora_weights(tmp_path)
    assert distance(velocity(other, params), velocity(adapter.model, params)) <= 1e-5


def test_gradients_and_files_of_diffusers_are_ours(kind, tmp_path):
    """What PEFT computes, and what diffusers writes, from random numbers that it drew."""
    other = theirs()
    from diffusers import FluxPipeline
    from diffusers.training_utils import _collate_lora_metadata
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    other.add_adapter(
        LoraConfig(
            r=4, lora_alpha=3, target_modules=list(PRESETS["attention"]), init_lora_weights=False,
            use_rslora=kind.get("rslora", False), use_dora=kind.get("dora", False),
        )
    )  # fmt: skip
    learns = {name: x for name, x in other.named_parameters() if "lora_" in name}
    draw = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, x in learns.items():
            noise = torch.randn(x.shape, generator=draw)
            x.copy_(x * (1 + 0.2 * noise) if "magnitude" in name else 0.1 * noise)
    layers = get_peft_model_state_dict(other)
    FluxPipeline.save_lora_weights(tmp_path, layers, **_collate_lora_metadata({"transformer": other}))
    written = load_file(tmp_path / "pytorch_lora_weights.safetensors")

    adapter = adapt(model_of(), PRESETS["attention"], 4, 3.0, **kind)
    adapter.load(written)
    assert adapter.state().keys() == written.keys()
    assert all(torch.equal(x, written[name]) for name, x in adapter.state().items())
    mine, its = velocity(adapter.model), velocity(other)
    assert distance(mine.detach(), its.detach()) <= 1e-5
    for y in (mine, its):
        y.square().sum().backward()
    grads = {name.replace(".default", ""): x.grad for name, x in learns.items()}
    for name, x in adapter.grads().items():
        short = name.removeprefix("transformer.")
        assert distance(x, grads[short if short in grads else f"{short}.weight"]) <= 1e-4, name


# Targets -----------------------------------------------------------------------------------------------


def test_targets_as_text(tmp_path):
    assert patterns_of("attention", "flux-dev", PARAMS) == list(PRESETS["attention"])
    assert patterns_of("norm_out.linear, attention,ff.net.2", "flux-dev", PARAMS) == [
        "norm_out.linear", *PRESETS["attention"], "ff.net.2",
    ]  # fmt: skip
    path = tmp_path / "vital.json"
    path.write_text(json.dumps({"model": "flux-dev", "layers": ["double_blocks.1", "single_blocks.0", "layer.4"]}))
    found = matching(PARAMS, patterns_of(f"vital:{path}", "flux-dev", PARAMS))
    blocks = {"transformer_blocks.1": 14, "single_transformer_blocks.0": 6, "single_transformer_blocks.2": 6}
    assert {block: sum(name.startswith(f"{block}.") for name in found) for block in blocks} == blocks
    assert len(found) == sum(blocks.values())


def test_the_vital_blocks_of_flux_dev():
    """As layers that this row of the table has in Stable Flow: 4 double and 5 single blocks."""
    params = FluxParams(**{**vars(PARAMS), "depth": 19, "depth_single_blocks": 38})  # names alone: no weights are made
    assert len(matching(params, patterns_of("vital", "flux-dev", params))) == 4 * 14 + 5 * 6
    whole = matching(params, patterns_of("blocks", "flux-dev", params))
    assert len(whole) == 19 * 14 + 38 * 6
    assert whole == matching(params, ["*transformer_blocks.*"])


@pytest.mark.parametrize(
    ("text", "kind", "said"),
    [
        ("atention", UsageError, "Did you mean attention?"),
        ("", UsageError, "no Linear of the transformer is named ''"),
        ("vital:none.json", FileError, "none.json: the layers could not be read"),
        ("vital:layer.77", UsageError, "no block is called 'layer.77'"),
    ],
)
def test_targets_that_are_none(text, kind, said):
    with pytest.raises(kind, match=said.replace("?", r"\?")):
        matching(PARAMS, patterns_of(text, "flux-dev", PARAMS))


def test_a_study_of_another_model_is_refused(tmp_path):
    path = tmp_path / "vital.json"
    path.write_text(json.dumps({"model": "flux-mini", "layers": ["layer.0"]}))
    with pytest.raises(UsageError, match="holds the layers of 'flux-mini', but flux-dev is loaded"):
        patterns_of(f"vital:{path}", "flux-dev", PARAMS)


# Optimizers --------------------------------------------------------------------------------------------


class Bowl:
    """Two tensors, one large enough for 8 bits, on the way down a bowl; what it sees hangs on the step alone."""

    def __init__(self, name):
        draw = torch.Generator().manual_seed(0)
        self.named = {
            f"{module}.down": torch.nn.Parameter(torch.randn(*shape, generator=draw))
            for module, shape in (("large", (96, 64)), ("small", (4, 8)))
        }
        self.optimizer = OPTIMIZERS[name](list(self.named.values()), 1e-2, 0.1)

    def run(self, steps):
        for step in steps:
            draw = torch.Generator().manual_seed(step)
            for x in self.named.values():
                x.grad = x.detach() + torch.randn(x.shape, generator=draw)
            self.optimizer.step()
        return self

    def checkpoint(self):
        """Its numbers, through bytes as in a file."""
        numbers = {**self.named, **state_of(self.optimizer, self.named)}
        return {name: x.detach().clone() for name, x in numbers.items()}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("stop", [0, 1, 5])
def test_an_optimizer_goes_on_to_the_bit(name, stop):
    if name == "adamw8bit":
        pytest.importorskip("bitsandbytes")
    whole, first, second = (Bowl(name) for _ in range(3))
    held = first.run(range(stop)).checkpoint()
    with torch.no_grad():
        for key, x in second.named.items():
            x.copy_(held[key])
    restore(second.optimizer, second.named, held | Ema(first.named, 0.9).state())
    ended, expected = second.run(range(stop, 12)).checkpoint(), whole.run(range(12)).checkpoint()
    assert ended.keys() == expected.keys()
    for key, x in expected.items():
        assert x.dtype == ended[key].dtype and torch.equal(x, ended[key]), key


def test_moments_of_large_tensors_are_in_8_bits():
    pytest.importorskip("bitsandbytes")
    bowl = Bowl("adamw8bit").run(range(40))
    state, plain = state_of(bowl.optimizer, bowl.named), Bowl("adamw").run(range(40))
    assert state["large.down.state1"].dtype == torch.uint8 and state["small.down.state1"].dtype == torch.float32
    large, small = (distance(bowl.named[x].detach(), plain.named[x].detach()) for x in ("large.down", "small.down"))
    assert 0 < large < 0.05 and small < 1e-5


def test_without_bitsandbytes(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(UsageError, match="pip install bitsandbytes"):
        Bowl("adamw8bit")


def test_the_moving_average():
    """In closed form, of a number that is the step's; it goes on from its state, and gives the numbers back."""
    x = torch.nn.Parameter(torch.zeros(2))
    ema, expected = Ema({"x": x}, 0.5), 0.0
    for n in range(20):
        with torch.no_grad():
            x.fill_(n + 1.0)
        decay = min(0.5, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * (n + 1)
        ema.update()
        again = Ema({"x": x}, 0.5)
        again.load(ema.state())
        ema = again
    assert ema.updates == 20 and ema.state()["ema.x"].tolist() == pytest.approx([expected] * 2, 1e-6)
    with pytest.raises(KeyboardInterrupt), ema.averaged():
        assert x.tolist() == pytest.approx([expected] * 2, 1e-6)
        raise KeyboardInterrupt
    assert x.tolist() == [20, 20] and x.requires_grad
    with pytest.raises(UsageError, match="at least 0 and less than 1, not 1"):
        Ema({"x": x}, 1)
