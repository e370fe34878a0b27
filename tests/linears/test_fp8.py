"""fp8: how far it rounds, what of a model it touches, and that a file, a stream and a picture agree on it."""

import json
import weakref
from dataclasses import replace
from functools import partial
from itertools import count

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from random_model import random_weights, small_variant
from safetensors.torch import load_file, save_file
from torch import nn
from torch._dynamo.testing import CompileCounter
from units import SHORTAGES, card_with

from flux_core import load_pipeline
from flux_core.checkpoint import (
    dequantized,
    load_flux,
    load_into,
    read,
    to_diffusers,
    with_files,
    write_safetensors,
)
from flux_core.checkpoint.header import read_header
from flux_core.commands.generate import generate
from flux_core.commands.save import save
from flux_core.device.choice import pick_dtype
from flux_core.errors import FileError, UsageError
from flux_core.images.metadata import read_request
from flux_core.linears import fp8
from flux_core.linears.formats import format_of, quantize
from flux_core.linears.fp8 import (
    BF16,
    E4M3,
    Fp8Linear,
    dequantize,
    has_fp8_units,
    quantize_rows,
    stays_bf16,
)
from flux_core.model import Flux
from flux_core.request.generation import GenerationRequest
from flux_core.variants import VARIANTS

CPU = torch.device("cpu")
DEV = small_variant("flux-dev")
QUANTIZED = {
    *(f"double_blocks.{i}.{s}_{x}" for i in (0, 1) for s in ("img", "txt") for x in ("attn.qkv", "attn.proj", "mlp.0")),
    *(f"double_blocks.{i}.{s}_mlp.2" for i in (0, 1) for s in ("img", "txt")),
    *(f"single_blocks.{i}.linear{n}" for i in (0, 1, 2) for n in (1, 2)),
}


def same(one, other):
    """Two state dicts, to the bit; e4m3 is compared as the numbers it stands for."""
    assert one.keys() == other.keys()
    for name, x in one.items():
        assert x.dtype == other[name].dtype and torch.equal(x.float(), other[name].float()), name


@pytest.fixture
def plain():
    """The tensors of a small FLUX.1-dev, fp32."""
    return random_weights(Flux(DEV.params)).state_dict()


@pytest.fixture
def load(tmp_path):
    """A loader of a transformer's file with these tensors."""
    names = count()

    def load(state, metadata=None, **options):
        path = tmp_path / f"{next(names)}.safetensors"
        write_safetensors(path, state, metadata)
        return load_flux(replace(DEV, files={"model": str(path)}), **options)

    return load


# The numbers


@pytest.mark.parametrize("spread", [0, 3])
def test_a_row_is_rounded_by_a_16th_at_most(spread):
    """Closed form: half of e4m3's last bit, 2^-4 of a number, and 2^-10 of the scale for what is subnormal."""
    draw = torch.Generator().manual_seed(spread)
    w = torch.randn(64, 256, generator=draw) * torch.exp(spread * torch.randn(64, 256, generator=draw))
    codes, scale = quantize_rows(w)
    assert codes.dtype == E4M3 and scale.dtype == torch.float32 and scale.shape == (64, 1)
    exact = codes.double() * scale.double()
    bound = torch.maximum(w.double().abs() * 2**-4, scale.double() * 2**-10)
    assert ((exact - w.double()).abs() <= bound * (1 + 1e-6)).all()
    assert torch.equal(codes.float().abs().amax(dim=1), torch.full((64,), 448.0))  # every row fills the grid


def test_rows_of_zeros_and_of_outliers():
    w = torch.randn(3, 16, generator=torch.Generator().manual_seed(0))
    w[0], w[1, 3] = 0, 1e4
    codes, scale = quantize_rows(w)
    assert torch.equal(codes[0].float(), torch.zeros(16)) and scale.isfinite().all()
    assert ((codes[2].float() * scale[2] - w[2]).norm() / w[2].norm()) < 0.04  # another row's outlier is not its own


def test_weight_only_is_a_linear_with_the_dequantized_weight_to_the_bit():
    linear = nn.Linear(48, 32).bfloat16()
    one, x = Fp8Linear.of(linear), torch.randn(2, 5, 48).bfloat16()
    assert one.scaled is has_fp8_units(CPU) is False
    assert torch.equal(one(x), F.linear(x, dequantize(one.weight, one.weight_scale, torch.bfloat16), linear.bias))
    assert (one(x) - linear(x)).norm() < 0.04 * linear(x).norm()


def test_the_scaled_product_is_what_fp8_units_compute():
    """On the CPU in slow motion; tests marked gpu hold the units to the same."""
    draw = torch.Generator().manual_seed(0)
    linear, x = nn.Linear(64, 48).bfloat16(), torch.randn(2, 5, 64, generator=draw).bfloat16()
    one = Fp8Linear.of(linear)
    try:
        y = one(quantize_rows(x))
    except (RuntimeError, NotImplementedError) as error:
        pytest.skip(f"this build has no _scaled_mm on the CPU: {error}")
    codes, scale = quantize_rows(x)
    exact = (codes.double() * scale) @ dequantize(
        one.weight, one.weight_scale, torch.float64
    ).t() + linear.bias.double()
    assert y.shape == (2, 5, 48) and y.dtype == torch.bfloat16
    assert (y - exact).norm() < 2**-8 * exact.norm()  # bf16's rounding of the result, and no more
    assert (y - one(x)).norm() < 0.04 * one(x).norm()


def test_a_cast_of_the_model_leaves_codes_and_scales():
    one = Fp8Linear.of(nn.Linear(32, 16).bfloat16())
    before = {name: x.clone() for name, x in one.state_dict().items()}
    after = one.to(torch.float32).state_dict()
    assert after.pop("bias").dtype == torch.float32
    before.pop("bias")
    same(before, after)
    assert one(torch.ones(1, 32)).dtype == torch.float32


# Which layers


def test_the_layers_that_stay_are_those_of_the_list():
    model = Flux(DEV.params)
    linears = {name for name, one in model.named_modules() if isinstance(one, nn.Linear)}
    assert quantize(model) == QUANTIZED == {name for name in linears if not stays_bf16(name)}
    assert {name for name, one in model.named_modules() if isinstance(one, Fp8Linear)} == QUANTIZED
    stay = {name for name, one in model.named_modules() if isinstance(one, nn.Linear)}
    assert stay == linears - QUANTIZED
    unused = [pattern for pattern in BF16 if not any(stays_bf16(name) for name in stay)]
    assert not unused and all(BF16.values())


@pytest.mark.parametrize("name", ["flux-dev", "flux-schnell"])
def test_at_full_size_every_token_linear_of_the_blocks_is_quantized(name):
    with torch.device("meta"):
        model = Flux(VARIANTS[name].params).bfloat16()
    whole = sum(x.numel() for x in model.parameters())
    assert len(quantize(model)) == 19 * 8 + 38 * 2
    size = sum(x.nbytes for x in model.state_dict().values())
    coded = sum(x.numel() for x in model.parameters() if x.dtype == E4M3)
    assert coded / whole > 0.72 and size < 15.4e9  # the rest is modulation, for the most part


def test_compiled_blocks_share_two_graphs():
    torch._dynamo.reset()
    model, counter = random_weights(Flux(DEV.params)).bfloat16(), CompileCounter()
    quantize(model)
    shapes = {"img": (1, 4, 64), "txt": (1, 3, 24), "y": (1, 16), "timesteps": (1,), "guidance": (1,)}
    inputs = {name: torch.rand(shape).bfloat16() for name, shape in shapes.items()}
    inputs |= {"img_ids": torch.zeros(1, 4, 3), "txt_ids": torch.zeros(1, 3, 3)}
    expected = model(**inputs)
    for block in (*model.double_blocks, *model.single_blocks):
        block.compile(backend=counter, fullgraph=True)
    assert torch.equal(model(**inputs), expected)
    for one in model.modules():  # and so does the path of the units
        if isinstance(one, Fp8Linear):
            one.scaled = True
    try:
        found = model(**inputs)
    except (RuntimeError, NotImplementedError):
        found = None  # no _scaled_mm on this CPU
    if found is not None:
        assert counter.frame_count == 4
        assert (found - expected).norm() < 0.2 * expected.norm()
    torch._dynamo.reset()


# Files


def test_on_the_fly_saved_and_loaded_are_the_same(small, tmp_path):
    row = with_files("flux-mini")
    on_the_fly = load_flux(row, format="fp8").state_dict()
    saved = save("flux-mini", dtype="fp8", output=tmp_path / "fp8")
    header = read_header(saved / small.flow_file)
    assert header.metadata["quantization"] == "float8_e4m3fn, fp32 weight_scale for each row"
    kinds = {name: header.tensors[name].dtype for name in header.tensors}
    assert kinds.pop("single_blocks.0.linear1.weight_scale") == "F32"
    assert header.shapes["single_blocks.0.linear1.weight_scale"] == (192,)
    assert all((kinds[f"{name}.weight"], kinds[f"{name}.bias"]) == ("F8_E4M3", "BF16") for name in QUANTIZED)
    assert kinds["img_in.weight"] == kinds["single_blocks.0.norm.key_norm.scale"] == "BF16"
    assert {one.dtype for one in read_header(saved / small.ae_file).tensors.values()} == {"BF16"}
    again = with_files(model=saved)
    same(load_flux(again, format="fp8").state_dict(), on_the_fly)
    twice = save("flux-mini", "official", "fp8", tmp_path / "twice", model=saved)  # from fp8 to fp8
    same(load_file(twice / small.flow_file), load_file(saved / small.flow_file))

    quantized = Flux(small.params)
    quantize(quantized)
    quantized.load_state_dict(on_the_fly, assign=True)
    in_bf16 = load_flux(again).state_dict()  # the same file, asked for in bf16
    for name, one in quantized.named_modules():
        if isinstance(one, Fp8Linear):
            assert torch.equal(in_bf16[f"{name}.weight"], dequantize(one.weight, one.weight_scale, torch.bfloat16))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_files_of_any_dtype_and_layout_are_quantized_from_bf16(plain, load, dtype):
    state = {name: x.to(dtype) for name, x in plain.items()}
    model = Flux(DEV.params)
    model.load_state_dict({name: x.bfloat16() for name, x in state.items()}, assign=True)
    quantize(model)
    for layout in (state, to_diffusers(state, DEV.params), {f"model.diffusion_model.{x}": state[x] for x in state}):
        same(load(layout, format="fp8").state_dict(), model.state_dict())


def test_a_plain_cast_keeps_its_codes(plain, load, capsys):
    cast = {name: x.to(E4M3) for name, x in plain.items()}
    model = load(cast, format="fp8")
    assert capsys.readouterr().err == ""
    for name, x in model.state_dict().items():
        if name.endswith("weight_scale"):
            assert torch.equal(x, torch.ones_like(x))
        elif name.removesuffix(".weight") in QUANTIZED:
            assert torch.equal(x.float(), cast[name].float())
        else:
            assert torch.equal(x, cast[name].bfloat16())


def comfy(plain, how, newer):
    """A file as ComfyUI keeps it: weights of the blocks in fp8, and what they are multiplied with."""
    state, kind = {}, torch.float8_e5m2 if how == "e5m2" else E4M3
    weight, given = ("weight_scale", "input_scale") if newer else ("scale_weight", "scale_input")
    for name, x in plain.items():
        stem = name.removesuffix(".weight")
        if stem not in QUANTIZED or stem == name:
            state[name] = x.bfloat16()
            continue
        if how == "blocks":
            scale = x.reshape(len(x), 2, -1).abs().amax(dim=2, keepdim=True) / 448
            codes = (x.reshape(len(x), 2, -1) / scale).reshape(x.shape)
        else:
            scale = (x.abs().amax() / 448).reshape(() if newer else 1)
            scale = x.abs().amax(dim=1, keepdim=True) / 448 if how == "rows" else scale
            codes = x / scale
        state |= {name: codes.to(kind), f"{stem}.{weight}": scale, f"{stem}.{given}": torch.tensor(1.5)}
        if newer:
            text = json.dumps({"format": "float8_e4m3fn"}).encode()
            state[f"{stem}.comfy_quant"] = torch.tensor(list(text), dtype=torch.uint8)
    return state if newer else state | {"scaled_fp8": torch.empty(2, dtype=E4M3)}


@pytest.mark.parametrize("newer", [False, True])
@pytest.mark.parametrize("how", ["tensor", "rows", "blocks", "e5m2"])
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_comfyuis_two_layouts(plain, load, newer, how, prefix, capsys):
    state = comfy(plain, how, newer)
    files = {prefix + name: x for name, x in state.items()}
    in_bf16, in_fp8 = load(files).state_dict(), load(files, format="fp8").state_dict()
    told = capsys.readouterr().err
    assert told.count("; it is read as ") == (1 if how in ("tensor", "rows") else 2)  # fp8 in bf16, not fp8 in fp8
    assert ("rounded a second time" in told) == (how not in ("tensor", "rows"))
    for stem in QUANTIZED:
        codes, scale = state[f"{stem}.weight"], state[f"{stem}.{'weight_scale' if newer else 'scale_weight'}"]
        if how == "blocks":
            exact = (codes.float().reshape(len(codes), 2, -1) * scale).reshape(codes.shape)
        else:
            exact = codes.float() * scale
        assert torch.equal(in_bf16[f"{stem}.weight"], exact.bfloat16())
        assert ((exact - plain[f"{stem}.weight"]).norm() / exact.norm()) < (0.08 if how == "e5m2" else 0.04)
        if how in ("tensor", "rows"):  # the codes stay, the scales become one for each row
            assert torch.equal(in_fp8[f"{stem}.weight"].float(), codes.float())
            assert torch.equal(in_fp8[f"{stem}.weight_scale"], scale.reshape(-1).expand(len(codes)))
        else:
            again, rows = quantize_rows(exact.bfloat16())
            assert torch.equal(in_fp8[f"{stem}.weight"].float(), again.float())
            assert torch.equal(in_fp8[f"{stem}.weight_scale"], rows.flatten())
    assert not any("input" in name or "comfy" in name or "scaled" in name for name in in_fp8)


@pytest.mark.parametrize("how", ["rows", "blocks", "e5m2"])
def test_what_a_layer_cannot_have_is_filled_in_as_it_is(plain, how, tmp_path):
    """`load_into` quantizes nothing: codes in e5m2, or with scales of blocks, become what they stand for."""
    prefix, model = "model.diffusion_model.", Flux(DEV.params)
    files = {prefix + name: x for name, x in comfy(plain, how, newer=False).items()}
    save_file({name: x.contiguous() for name, x in files.items()}, tmp_path / "x.safetensors")
    load_into(model, tmp_path / "x.safetensors")
    numbers = dict(dequantized(tmp_path / "x.safetensors"))
    assert numbers.keys() == plain.keys()  # without the marker `scaled_fp8`
    for stem in QUANTIZED:
        layer = model.get_submodule(stem)
        assert isinstance(layer, Fp8Linear) == (how == "rows")
        weight = layer.widen(torch.float32) if how == "rows" else layer.weight
        assert torch.equal(weight, numbers[f"{stem}.weight"])


def test_what_no_fp8_file_has_is_told(plain, load):
    stem = "double_blocks.0.img_attn.qkv"
    state = comfy(plain, "tensor", newer=True)
    wrong = {
        f"{stem}.weight_scale": torch.ones(96, 2).to(E4M3),  # nvfp4 has such scales, and packed weights
        f"{stem}.weight": torch.ones(96, 16, dtype=torch.uint8),
    }
    with pytest.raises(FileError, match=r"is quantized in a way that is not known here: .*qkv.weight is U8 \[96, 16\]"):
        load(state | wrong)
    with pytest.raises(FileError, match=r"weight_scale F32 \[5\]. Next: take the bf16 file"):
        load(state | {f"{stem}.weight_scale": torch.ones(5)}, format="fp8")
    with pytest.raises(FileError, match=r"1 unexpected \(nowhere.weight_scale\)"):
        load(state | {"nowhere.weight_scale": torch.ones(1)})


def test_a_text_encoder_with_scales(small, small_root, tmp_path):
    """As t5xxl_fp8_e4m3fn_scaled.safetensors is: the encoder that is read is the one that the codes stand for."""
    from flux_core.text.encoders import load_encoder

    state = load_file(small_root / "flux-mini" / "t5" / "model.safetensors")
    scaled, name = {}, "encoder.block.0.layer.0.SelfAttention.q.weight"
    for key, x in state.items():
        linear = ".SelfAttention." in key and key.endswith(("q.weight", "k.weight", "v.weight", "o.weight"))
        scale = x.abs().amax() / 448
        scaled |= {key: (x / scale).to(E4M3), f"{key[:-6]}scale_weight": scale} if linear else {key: x}
    path = tmp_path / "t5.safetensors"
    write_safetensors(path, scaled | {"scaled_fp8": torch.empty(0, dtype=E4M3)})
    found = load_encoder("t5", path, with_files("flux-mini", t5xxl=path), "cpu", torch.float32)
    expected = scaled[name].float() * scaled[f"{name[:-6]}scale_weight"]
    assert torch.equal(found.state_dict()[name], expected)
    saved = save("flux-mini", "official", "fp32", tmp_path / "out", t5xxl=path)
    assert torch.equal(load_file(saved / "t5" / "model.safetensors")[name], expected)


@pytest.mark.parametrize("layout", ["official", "diffusers"])
def test_no_more_than_one_linear_is_there_unquantized(plain, load, layout, monkeypatch):
    """Counted as tensors come out of the file: those of big Linears that are still alive."""
    alive, most, real = set(), 0, read.opened
    size = min(x.numel() for name, x in plain.items() if name.removesuffix(".weight") in QUANTIZED and x.ndim == 2)

    def watched(*args):
        manager = real(*args)

        class Watch:
            def __enter__(self):
                get = manager.__enter__()

                def take(name):
                    nonlocal most
                    x = get(name)
                    coded = x.ndim == 2 and x.numel() >= size // 4 and "blocks" in name and "norm" not in name
                    if coded and "mod" not in name:
                        number = len(alive) + 1000 * id(x)
                        alive.add(number)
                        weakref.finalize(x, alive.discard, number)
                        most = max(most, len(alive))
                    return x

                return take

            def __exit__(self, *error):
                return manager.__exit__(*error)

        return Watch()

    monkeypatch.setattr(read, "opened", watched)
    state = {name: x.bfloat16() for name, x in plain.items()}  # a cast would make others of them
    load(state if layout == "official" else to_diffusers(state, DEV.params), format="fp8")
    assert most == (1 if layout == "official" else 4)  # there q, k, v and the MLP's rows make one Linear
    assert not alive


# Pictures


def psnr(one, other):
    a, b = (np.asarray(x, dtype=float) for x in (one, other))
    return 10 * np.log10(255**2 / ((a - b) ** 2).mean())


def test_a_picture_drawn_in_fp8_says_so_and_repeats(small, tmp_path, monkeypatch, capsys):
    options = {"width": 32, "height": 32, "num_steps": 2, "device": "cpu", "force": True}  # bf16 is slow on many CPUs
    monkeypatch.chdir(tmp_path)
    first = generate(prompt="a red apple", seed=["3"], dtype="fp8", **options)[0]
    err = capsys.readouterr()
    assert err.err.count("cpu has no fp8 units: weights stay in fp8, dequantized for each product") == 1
    assert "fp8 on cpu" in err.out
    assert read_request(first).dtype == "fp8"
    again = generate(from_image=str(first), device="cpu", force=True)[0]
    assert read_request(again).dtype == "fp8" and again.read_bytes() == first.read_bytes()
    saved = save("flux-mini", dtype="fp8", output="saved")
    from_file = generate(prompt="a red apple", seed=["3"], dtype="fp8", model=str(saved), **options)[0]
    pixels = [np.asarray(load_picture(path)) for path in (first, from_file)]
    assert (pixels[0] == pixels[1]).all()
    in_bf16 = generate(prompt="a red apple", seed=["3"], dtype="bf16", model=str(saved), **options)[0]
    assert (np.asarray(load_picture(in_bf16)) == pixels[0]).all()  # weight-only fp8 is just that


def load_picture(path):
    from PIL import Image

    return Image.open(path)


def test_a_pipeline_knows_its_precision(small):
    pipeline = load_pipeline("flux-mini", "cpu", "fp8")
    assert pipeline.precision == "fp8" and pipeline.dtype == torch.bfloat16 and format_of(pipeline.model) == "fp8"
    request = GenerationRequest(prompt="a red apple", width=128, height=128)
    assert pipeline.complete(request).dtype == "fp8"
    with pytest.raises(UsageError, match="the request is for bfloat16, but the model is loaded in fp8"):
        pipeline.complete(request.model_copy(update={"dtype": "bfloat16"}))
    other = load_pipeline("flux-mini", "cpu", "bf16")
    with pytest.raises(UsageError, match="the request is for fp8, but the model is loaded in bfloat16"):
        other.complete(GenerationRequest(prompt="a red apple", dtype="fp8"))


def coarse(x):
    """A token as the units see it."""
    codes, scale = quantize_rows(x)
    return codes.float() * scale


def test_flux_mini_draws_the_same_picture_in_fp8(one_thread, monkeypatch):
    """All else in fp32, so that nothing but e4m3 stands between them: in the weights, then in the tokens, too."""
    pipeline = load_pipeline("flux-mini", "cpu", "float32")
    draw = partial(pipeline.generate, "a red apple", num_steps=4)
    exact, other = draw(seed=0)[0], draw(seed=1)[0]
    pipeline.model.load_state_dict(load_flux(VARIANTS["flux-mini"]).state_dict())
    quantize(pipeline.model)
    weights = psnr(draw(seed=0)[0], exact)
    plain = Fp8Linear.forward
    monkeypatch.setattr(Fp8Linear, "forward", lambda self, x: plain(self, coarse(x)))
    both = psnr(draw(seed=0)[0], exact)
    assert weights > 33 and both > 33 and psnr(other, exact) < 25, (weights, both, psnr(other, exact))


# Errors


def test_errors(tmp_path, small):
    with pytest.raises(UsageError, match=r"--format diffusers has no fp8 as it is here. Next: use --format"):
        save("flux-mini", "diffusers", "fp8", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(UsageError, match="--dtype must be one of auto, bfloat16, bf16, float32, fp32, fp8"):
        GenerationRequest(prompt="x", dtype="fp4")
    with pytest.raises(UsageError, match=r"--dtype fp8: meta9 has no fp8 numbers. Next: use --dtype bfloat16"):
        pick_dtype("fp8", Strange())


class Strange:
    """A device that has never heard of e4m3, as MPS."""

    type = "meta9"

    def __str__(self):
        return "meta9"


# The units


@pytest.fixture
def card(monkeypatch):
    return card_with(monkeypatch, (9, 0))


@pytest.mark.parametrize("shortage", SHORTAGES, ids=["torch", "cublas"])
def test_a_shortage_during_the_trial_of_the_units_is_raised_and_forgotten(monkeypatch, card, shortage):
    real, answers = fp8.scaled_product, [shortage]

    def product(*args):
        if answers:
            raise answers.pop()
        return real(*args)

    monkeypatch.setattr(fp8, "scaled_product", product)
    with pytest.raises(RuntimeError) as found:
        has_fp8_units(card)
    assert found.value is shortage
    assert has_fp8_units(card)


def test_a_device_without_units_is_asked_once(monkeypatch, card):
    asked = []

    def refuse(*args):
        asked.append(1)
        raise RuntimeError("torch._scaled_mm is only supported on CUDA devices with compute capability >= 9.0")

    monkeypatch.setattr(fp8, "scaled_product", refuse)
    assert not has_fp8_units(card) and not has_fp8_units(card)
    assert len(asked) == 1


@pytest.mark.gpu
def test_the_units_and_weight_only_agree():
    """Only the rounding of the tokens stands between them: 2.5 % of a product, below 4."""
    device = torch.device("cuda:0")
    if not has_fp8_units(device):
        pytest.skip("this card has no fp8 units")
    with torch.device(device):
        linear = nn.Linear(3072, 9216).bfloat16()
        x = torch.randn(1, 512, 3072).bfloat16()
    one = Fp8Linear.of(linear)
    assert one.scaled
    fast, one.scaled = one(x), False
    slow = one(x)
    assert 0.005 < (fast - slow).norm() / slow.norm() < 0.04
    assert (fast - linear(x)).norm() / linear(x).norm() < 0.05
    one.scaled = True
    same(Fp8Linear.of(linear.cpu()).state_dict(), {name: x.cpu() for name, x in one.state_dict().items()})
    compiled = torch.compile(one, fullgraph=True)
    assert (compiled(x) - fast).norm() < 0.02 * fast.norm()
    assert one.cpu().scaled is False and one.to(device).scaled is True
