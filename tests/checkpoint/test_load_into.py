"""Files of weights in few bits, end to end: each fills a model, keeps its codes, and is told when it cannot."""

import json
import shutil
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
from golden_files import FOLDER, read
from random_model import random_weights, small_variant
from safetensors.torch import load_file, save_file

from flux_core.checkpoint import dequantized, load_flux, load_into, to_diffusers
from flux_core.checkpoint.check import fits
from flux_core.checkpoint.layouts import file_state, write_gguf_model
from flux_core.checkpoint.scales import METADATA_KEY
from flux_core.commands.info import info
from flux_core.commands.save import save
from flux_core.errors import FileError
from flux_core.linears.formats import FORMATS, format_of, quantize
from flux_core.linears.frozen import Frozen
from flux_core.main import main
from flux_core.model import Flux, FluxParams

MODELS = {
    **{f"gguf/{path.stem}": path for path in sorted((FOLDER / "gguf").glob("flux_*.gguf"))},
    **{f"nf4/{name}.expect": FOLDER / "nf4" / f"{name}.safetensors" for name in ("bnb_nf4_v1", "bnb_nf4_v2")},
    "nf4/diffusers_nf4.expect": FOLDER / "nf4" / "diffusers_nf4",
}
BAD = [
    pytest.param(FOLDER / kind / "bad" / case["file"], case["expect"], id=f"{kind} {name}")
    for kind in ("gguf", "nf4")
    for name, case in json.loads((FOLDER / kind / "bad" / "cases.json").read_text()).items()
]
DEV = small_variant("flux-dev")


def empty(golden):
    return Flux(FluxParams(**json.loads(golden.metadata["params"])))


@pytest.mark.parametrize("name", MODELS)
def test_a_golden_model_has_the_official_velocity(name):
    golden = read(name)
    model = empty(golden)
    load_into(model, MODELS[name])
    with torch.no_grad():
        found = model(**golden.group("in."))
    torch.testing.assert_close(found, golden.tensors["out.velocity"], rtol=0, atol=1e-5)
    assert format_of(model) == name.split("/")[0]
    assert not any(p.requires_grad for p in model.parameters()) and not model.training


@pytest.mark.parametrize("name", MODELS)
def test_what_is_dequantized_is_what_the_layers_widen_to(name):
    golden = read(name)
    model = empty(golden)
    load_into(model, MODELS[name])
    found = dict(dequantized(MODELS[name]))
    assert all(x.dtype == torch.float32 for x in found.values())
    for key, rows in golden.group("rows.").items():
        layer = model.get_submodule(key.removesuffix(".weight"))
        weight = layer.widen(torch.float32) if isinstance(layer, Frozen) else layer.weight
        assert torch.equal(weight[[0, -1]], rows), key
        if key in found:  # not by diffusers' names
            assert torch.equal(found[key], weight)


def test_a_model_of_other_sizes_is_refused_and_stays_as_it_was():
    model = random_weights(Flux(DEV.params))
    before = {name: x.clone() for name, x in model.state_dict().items()}
    with pytest.raises(FileError, match="does not hold the tensors of this model"):
        load_into(model, MODELS["gguf/flux_q8_0"])
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())


@pytest.mark.parametrize(("path", "expect"), BAD)
def test_row_22_a_bad_file_is_refused_at_once_and_a_good_one_read(path, expect):
    start = time.perf_counter()
    if expect.startswith("valid:"):
        assert all(x.isfinite().all() for _, x in dequantized(path))
    elif expect.startswith("refuse as FLUX") or "FLUX.2" in expect:  # sound containers of other models
        with pytest.raises(FileError) as told:
            load_into(Flux(DEV.params), path)
        assert path.name in str(told.value)
    else:
        with pytest.raises(FileError) as told:
            list(dequantized(path))
        assert path.name in str(told.value) and "\x00" not in str(told.value)
    assert time.perf_counter() - start < 1


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("bad/bad_architecture_llama", "architecture 'llama'"),
        ("bad/bad_architecture_flux2", "FLUX.2"),
        ("t5_q8_0", "T5 text encoder"),
    ],
)
def test_another_model_in_a_gguf_file_is_named(name, says, capsys):
    path = FOLDER / "gguf" / f"{name}.gguf"
    assert main(["--model", str(path), "--prompt", "x"]) == 4
    assert says in capsys.readouterr().err


@pytest.mark.parametrize("bad", ["gguf/bad/bad_nan_scale.gguf", "nf4/bad/absmax_nan.safetensors"])
def test_verify_names_the_tensor_with_a_scale_that_is_no_number(bad, capsys):
    assert main(["verify", str(FOLDER / bad)]) == 4
    err = capsys.readouterr().err
    assert "1 tensor(s) hold NaN or infinity (" in err and ".weight)" in err


def test_memory_is_bounded_by_the_file_and_not_by_what_it_says():
    """All bad files in one process that may not have more than a little memory beside torch's."""
    code = (
        "import sys, resource\n"
        "from pathlib import Path\n"
        "from flux_core.checkpoint import dequantized\n"
        "from flux_core.errors import FluxError\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "for path in Path(sys.argv[1]).rglob('bad/*'):\n"
        "    try: list(dequantized(path))\n"
        "    except FluxError: pass\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    found = subprocess.run([sys.executable, "-c", code, str(FOLDER)], capture_output=True, text=True, check=True)
    assert int(found.stdout) < 200_000  # kilobytes


# Formats that are written here


@pytest.fixture(scope="module")
def wide():
    """A model whose sizes all formats take."""
    params = replace(DEV.params, hidden_size=256, num_heads=4, mlp_ratio=4.0, axes_dim=(16, 24, 24))
    return random_weights(Flux(params), std=0.02)


def written(model, format, path):
    """A file with the model's Linears in that format, and the model itself so."""
    coded = Flux(model.params)
    coded.load_state_dict(model.state_dict())
    quantize(coded.eval().requires_grad_(False), format)
    save_file({name: x.contiguous() for name, x in file_state(coded).items()}, path)
    return coded


def same_bytes(one, other):
    return torch.equal(*(x.reshape(-1).view(torch.uint8) for x in (one, other)))


@pytest.mark.parametrize("format", ["fp8", "int8", "nf4"])
def test_a_file_of_ours_comes_back_to_the_bit(wide, tmp_path, format):
    coded, found = written(wide, format, tmp_path / "x.safetensors"), Flux(wide.params)
    load_into(found, tmp_path / "x.safetensors")
    ours, theirs = coded.state_dict(), found.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(same_bytes(ours[name], theirs[name]) for name in ours)
    numbers = dict(dequantized(tmp_path / "x.safetensors"))
    assert numbers.keys() == wide.state_dict().keys()
    for name, layer in coded.named_modules():
        if isinstance(layer, FORMATS[format].kind):
            assert torch.equal(numbers[f"{name}.weight"], layer.widen(torch.float32))


@pytest.mark.parametrize("format", ["fp8", "int8", "nf4"])
def test_diffusers_parts_are_joined_with_their_codes(wide, tmp_path, format):
    """q, k, v and the MLP of a single block are layers of their own there; each row's codes do not change."""
    state, file = to_diffusers(wide.state_dict(), wide.params), tmp_path / "diffusion_pytorch_model.safetensors"
    linears = {name.removesuffix(".weight"): x for name, x in state.items() if x.ndim == 2 and "blocks" in name}
    coded = {}
    for name, weight in linears.items():
        linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        linear.weight = torch.nn.Parameter(weight, requires_grad=False)
        layer = FORMATS[format].kind.of(linear)
        coded |= {f"{name}.{ending}": x.contiguous() for ending, x in layer.tensors().items()}
    save_file(coded | {name: x.contiguous() for name, x in state.items() if name not in coded}, file)
    found, numbers = Flux(wide.params), dict(dequantized(file))
    load_into(found, file)
    prefix = "transformer_blocks.0.attn.to_"
    joined = torch.cat([numbers[f"{prefix}{part}.weight"] for part in "qkv"])
    layer = found.double_blocks[0].img_attn.qkv
    assert isinstance(layer, FORMATS[format].kind) and torch.equal(layer.widen(torch.float32), joined)
    assert isinstance(found.single_blocks[1].linear1, FORMATS[format].kind)


def test_int8_files_have_the_codes_of_the_formula(wide, tmp_path):
    """Of bf16 weights; rotated by a product with R in fp32."""
    base = {name: x.bfloat16().float() for name, x in wide.state_dict().items()}
    model = Flux(wide.params)
    model.load_state_dict(base)
    written(model, "int8", tmp_path / "x.safetensors")
    state = load_file(tmp_path / "x.safetensors")
    quarter = torch.tensor([[1, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]]).float() / 2
    rotation = torch.kron(torch.kron(quarter, quarter), torch.kron(quarter, quarter))
    for name in (name for name, x in state.items() if x.dtype == torch.int8):
        rows = (base[name].unflatten(1, (-1, 256)) @ rotation).flatten(1)
        scale = rows.abs().amax(1, keepdim=True) / 127
        exact = rows / scale
        tied = ((exact - exact.floor()) - 0.5).abs() < 1e-4  # which of two a sum's last bit decides
        assert torch.equal(state[name].float()[~tied], exact.round()[~tied]) and tied.float().mean() < 0.001
        assert (state[name].float() - exact).abs().max() < 0.501
        torch.testing.assert_close(state[f"{name}_scale"], scale, rtol=1e-6, atol=0)
        says = json.loads(bytes(state[name.removesuffix("weight") + "comfy_quant"].tolist()))
        assert says == {"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": 256}


@pytest.mark.parametrize(
    ("says", "what"),
    [
        ({"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": 100}, "int8_tensorwise"),
        ({"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": "256"}, "int8_tensorwise"),
        ({"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": 1024}, "int8_tensorwise"),
        ({"format": "nvfp4"}, "nvfp4"),
        ("{", "comfy_quant is damaged"),
        ("[" * 60_000, "comfy_quant is damaged"),
    ],
)
def test_what_no_int8_file_says_is_told(wide, tmp_path, says, what):
    written(wide, "int8", tmp_path / "x.safetensors")
    state, name = load_file(tmp_path / "x.safetensors"), "double_blocks.0.img_attn.qkv"
    text = says if isinstance(says, str) else json.dumps(says)
    save_file(
        state | {f"{name}.comfy_quant": torch.tensor(list(text.encode()), dtype=torch.uint8)},
        tmp_path / "bad.safetensors",
    )
    with pytest.raises(FileError, match=what) as told:
        list(dequantized(tmp_path / "bad.safetensors"))
    assert name in str(told.value) and "Next:" in str(told.value)


@pytest.mark.parametrize("format", ["int8", "nf4"])
def test_every_bf16_file_of_a_model_gives_the_same_codes(wide, tmp_path, format):
    row = replace(DEV, params=wide.params)
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        rounded = {key: x.bfloat16().to(dtype) for key, x in wide.state_dict().items()}
        save_file(rounded, tmp_path / f"{name}.safetensors")
    found = [
        load_flux(replace(row, files={"model": str(tmp_path / f"{name}.safetensors")}), format=format).state_dict()
        for name in ("fp32", "bf16")
    ]
    assert all(same_bytes(found[0][name], found[1][name]) for name in found[0])


def test_a_second_rounding_is_said(wide, tmp_path, capsys):
    written(wide, "nf4", tmp_path / "x.safetensors")
    row = replace(DEV, params=wide.params, files={"model": str(tmp_path / "x.safetensors")})
    assert format_of(load_flux(row, format="fp8")) == "fp8"
    assert "what was nf4 is rounded a second time" in capsys.readouterr().err
    assert format_of(load_flux(row)) is None
    assert "x.safetensors holds F32 and nf4; it is read as bfloat16" in capsys.readouterr().err


def test_a_second_rounding_by_save_is_said(small, tmp_path, capsys):
    plain = save("flux-mini", dtype="q8_0", output=tmp_path / "plain")
    assert "rounded" not in capsys.readouterr().err
    save("flux-mini", dtype="q4_0", output=tmp_path / "twice", model=plain / "flux-mini.gguf")
    assert "it is read as Q4_0, and what was Q8_0 is rounded a second time" in capsys.readouterr().err


@pytest.mark.parametrize("dtype", ["q8_0", "q4_k"])
def test_a_weight_that_is_not_finite_is_not_quantized_by_save(wide, tmp_path, dtype):
    state = dict(wide.state_dict())
    name = "double_blocks.0.img_attn.qkv.weight"
    state[name] = state[name].index_put((torch.tensor([3]), torch.tensor([5])), torch.tensor(torch.inf))
    save_file(state, tmp_path / "x.safetensors")
    row = replace(DEV, params=wide.params, files={"model": str(tmp_path / "x.safetensors")})
    with pytest.raises(FileError, match=rf"x.safetensors: {name} holds NaN or infinity. Next: "):
        write_gguf_model(tmp_path, row, None, torch.bfloat16, dtype.upper())
    assert [x.name for x in tmp_path.iterdir()] == ["x.safetensors"]


def test_the_ending_of_a_name_may_be_in_capitals(tmp_path):
    shutil.copy(MODELS["gguf/flux_q8_0"], tmp_path / "FLUX.GGUF")
    assert "part: transformer" in info(str(tmp_path / "FLUX.GGUF"))
    assert "part: transformer" in info(str(tmp_path))


@pytest.mark.parametrize("kind", [torch.int8, torch.float8_e4m3fn])
def test_a_weight_without_rows_is_refused(tmp_path, kind):
    says = torch.tensor(list(b'{"format":"int8_tensorwise"}'), dtype=torch.uint8)
    state = {"x.weight": torch.zeros(0, 16, dtype=kind), "x.weight_scale": torch.zeros(0)}
    save_file(state | ({"x.comfy_quant": says} if kind == torch.int8 else {}), tmp_path / "x.safetensors")
    with pytest.raises(FileError, match=r"not known here: x.weight is \w+ \[0, 16\]"):
        list(dequantized(tmp_path / "x.safetensors"))


@pytest.mark.parametrize("layers", ["[1]", "3", '"x"'])
def test_damaged_words_in_the_metadata_are_refused(tmp_path, layers):
    save_file({"x.weight": torch.zeros(2, 2)}, tmp_path / "x.safetensors", {METADATA_KEY: f'{{"layers": {layers}}}'})
    with pytest.raises(FileError, match=f"{METADATA_KEY} is damaged: its layers are no table. Next: "):
        list(dequantized(tmp_path / "x.safetensors"))


def test_fp16_in_fp32_loses_nothing_and_is_not_told(wide, tmp_path, capsys):
    save_file({name: x.half() for name, x in wide.state_dict().items()}, tmp_path / "x.safetensors")
    row = replace(DEV, params=wide.params, files={"model": str(tmp_path / "x.safetensors")})
    load_flux(row, dtype=torch.float32)
    assert capsys.readouterr().err == ""
    load_flux(row)
    assert capsys.readouterr().err == "x.safetensors holds F16; it is read as bfloat16\n"


def test_info_of_every_golden_model(capsys):
    for path in MODELS.values():
        assert "fits no model" in fits(path)  # they are tiny
