"""What is wrong with a LoRA file is said in one line, and the model is as it was."""

import json
import random
import struct
from contextlib import suppress

import pytest
import torch
from random_lora import PREFIX, factors, text_factors, write
from tiny import tiny_variant

from flux_core.checkpoint.adapters import ENDINGS
from flux_core.errors import FileError, FluxError, NonFiniteError, UsageError
from flux_core.linears.branch import BranchedLinear
from flux_core.lora import attach, attached, read_lora
from flux_core.main import main
from flux_core.model import Flux

PARAMS = tiny_variant().params
QKV, PROJ = "double_blocks.0.img_attn.qkv", "double_blocks.0.img_attn.proj"
NORM = "double_blocks.0.img_attn.norm.query_norm"
LOHA = {"hada_w1_a": (4, 48), "hada_w1_b": (4, 16), "hada_w2_a": (4, 48), "hada_w2_b": (4, 16)}


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Flux(PARAMS).eval().requires_grad_(False)


@pytest.fixture
def lora(tmp_path):
    def make(change=lambda tensors: None, **metadata):
        tensors = factors(PARAMS, alpha=2.0)
        changed = change(tensors)
        return write(tmp_path / "style.safetensors", changed or tensors, **metadata)

    return make


def refused(model, path, error=FileError, **options):
    """The text of the error with which a file is refused; the model's layers and weights are the same."""
    before = {name: x.clone() for name, x in model.state_dict().items()}
    params = model.params
    with pytest.raises(error) as found:
        attach(model, path, **options)
    after = model.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[name], x) for name, x in before.items())
    assert model.params is params and str(path) in str(found.value)
    return str(found.value)


def put(name, value, *others):
    return lambda tensors: tensors.update({x: value.clone() for x in (name, *others)})


def drop(name):
    return lambda tensors: {key: x for key, x in tensors.items() if key != name}


def only(module=QKV, **shapes):
    """A file with these factors of one module, all ones."""
    return lambda tensors: {f"{PREFIX}{module}.{ending}": torch.ones(shape) for ending, shape in shapes.items()}


def glora(*shapes):
    return {f"{x}.weight": shape for x, shape in zip(("a1", "a2", "b1", "b2"), shapes, strict=True)}


@pytest.mark.parametrize(
    ("change", "finding"),
    [
        (drop(f"{PREFIX}{QKV}.lora_up.weight"), "half of a pair"),
        (drop(f"{PREFIX}{QKV}.lora_down.weight"), "half of a pair"),
        (put(f"{PREFIX}{QKV}.lora_up.weight", torch.zeros(40, 4)), "shape [40, 16], and the model has [48, 16]"),
        (put(f"{PREFIX}{QKV}.lora_down.weight", torch.zeros(4, 24)), "[48, 24], and the model has [48, 16]"),
        (put(f"{PREFIX}{QKV}.lora_down.weight", torch.zeros(3, 16)), "cannot be multiplied"),
        (put(f"{PREFIX}{QKV}.lora_down.weight", torch.zeros(0, 16)), "rank 0"),
        (put(f"{PREFIX}{QKV}.lora_down.weight", torch.zeros(4)), "is no matrix"),
        (put(f"{PREFIX}{QKV}.lora_down.weight", torch.zeros(4, 16, 3, 3)), "no convolutions"),
        (put(f"{PREFIX}{QKV}.lora_down.weight", torch.zeros(4, 16, dtype=torch.int8)), "is I8"),
        (put(f"{PREFIX}{QKV}.alpha", torch.tensor(float("nan"))), "alpha is a number"),
        (put(f"{PREFIX}{QKV}.alpha", torch.tensor(float("inf"))), "alpha is a number"),
        (put(f"{PREFIX}{QKV}.alpha", torch.zeros(3)), "alpha is a number"),
        (put(f"{PREFIX}{QKV}.dora_scale", torch.ones(7, 1)), "(magnitude)"),
        (put(f"{PREFIX}{PROJ}.diff_b", torch.ones(7)), "(diff_b)"),
        (put(f"{PREFIX}{QKV}.oft_blocks", torch.zeros(4, 4, 4)), "is OFT"),
        (only(lokr_w1=(4, 4)), "half of a pair"),
        (only(hada_w1_a=(4, 4)), "half of a pair"),
        (only(reshape_weight=(2,)), "half of a pair"),
        (only(reshape_weight=(2,), diff_b=(48,)), "half of a pair"),
        (put(f"{PREFIX}{QKV}.diff", torch.zeros(48, 16)), "factors of lora and diff at once"),
        (put(f"{PREFIX}{QKV}.lokr_w1", torch.zeros(4, 4)), "factors of lokr and lora at once"),
        (put(f"{PREFIX}{QKV}.lora_A.weight", torch.zeros(4, 16)), "are the same factor"),
        (put(f"{PREFIX}{NORM}.weight", torch.ones(8), f"{PREFIX}{NORM}.scale"), "are the same factor"),
        (put(f"{PREFIX}{NORM}.set_weight", torch.ones(8), f"{PREFIX}{NORM}.scale.diff"), "are the same factor"),
        (put(f"{PREFIX}{NORM}.w_norm", torch.ones(8), f"{PREFIX}{NORM}.scale.diff"), "are the same factor"),
        (only(lokr_w1=(4, 4), lokr_w2=(12, 4), lokr_w2_a=(12, 1), lokr_w2_b=(1, 4)), "are the same factor"),
        (only(**LOHA, hada_t1=(3, 4), hada_t2=(4, 4)), "cannot be multiplied"),
        (only(**LOHA, hada_t1=(4, 4), hada_t2=(4, 4, 3, 3)), "cannot be multiplied"),
        (only(lokr_w1=(4, 4), lokr_w2_a=(2, 12), lokr_w2_b=(3, 4), lokr_t2=(3, 2)), "cannot be multiplied"),
        (only(**glora((16, 4), (5, 16), (48, 4), (4, 16))), "cannot be multiplied"),
        (only(**glora((17, 4), (4, 16), (48, 4), (4, 16))), "cannot be multiplied"),
        (only(**glora((4, 16), (16, 5), (4, 16), (48, 4))), "cannot be multiplied"),
        (only("img_in", **{f"lokr_w{i}": shape for i, shape in ((1, (4, 4)), (2, (4, 32)))}), "the model has [16, 64]"),
        (put(f"{PREFIX}double_blocks.0.img_attn.norm.query_norm.scale", torch.ones(5)), "shape [5]"),
        (lambda tensors: text_factors(), "none of the transformer"),
        (lambda tensors: {"bundle_emb.x.t5_out": torch.zeros(2, 8)}, "no LoRA"),
        (lambda tensors: {f"{PREFIX}{QKV}.alpha": torch.tensor(1.0)}, "half of a pair"),
        (lambda tensors: {"a": torch.zeros(2)}, "is no LoRA"),
        (lambda tensors: {"img_in.weight": torch.zeros(16, 64)}, "and no LoRA"),
    ],
)
def test_a_file_that_does_not_fit(model, lora, change, finding):
    assert finding in refused(model, lora(change))


def test_numbers_that_are_none(model, lora):
    for value in (float("nan"), float("inf")):
        bad = torch.zeros(48, 4)
        bad[3, 1] = value
        text = refused(model, lora(put(f"{PREFIX}{QKV}.lora_up.weight", bad)), NonFiniteError)
        assert f"{PREFIX}{QKV}.lora_up.weight" in text


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), "much", None])
def test_a_scale_that_is_no_number(model, lora, scale):
    with pytest.raises(UsageError, match="a LoRA's scale is a number"):
        attach(model, lora(), scale)
    handle = attach(model, lora())
    with pytest.raises(UsageError):
        handle.scale = scale
    assert handle.scale == 1.0


def test_modules_that_name_nothing_are_named_or_left_out(model, lora):
    others = [f"{PREFIX}double_blocks.{i}.img_attn.qkv" for i in range(7, 14)]
    change = {f"{x}.{end}.weight": torch.ones(48, 4)[: 48 if end == "lora_up" else 4, :4] for x in others
              for end in ("lora_up", "lora_down")}  # fmt: skip
    path = lora(lambda tensors: tensors.update(change))
    text = refused(model, path)
    others = sorted(others)  # as in the file
    assert "7 of" in text and all(x in text for x in others[:5]) and others[5] not in text
    assert "--lora-allow-partial" in text
    assert others[0] in attach(model, path, allow_partial=True).summary


def test_nothing_that_matches_is_an_error_even_for_a_part(model, lora):
    path = lora(lambda tensors: {"lora_unet_nothing.lora_up.weight": torch.zeros(4, 4),
                                 "lora_unet_nothing.lora_down.weight": torch.zeros(4, 4)})  # fmt: skip
    assert "none of its 1 modules" in refused(model, path, allow_partial=True)


@pytest.mark.parametrize(
    ("said", "name"),
    [
        ({"modelspec.architecture": "flux-2-klein/lora"}, "FLUX.2"),
        ({"ss_base_model_version": "sdxl_base_v1-0"}, "SDXL"),
        ({"modelspec.architecture": "qwen-image/lora"}, "Qwen-Image"),
    ],
)
def test_a_header_that_names_another_model(model, lora, said, name):
    assert f"is a LoRA for {name}" in refused(model, lora(**said))


@pytest.mark.parametrize(
    ("key", "name"),
    [
        ("diffusion_model.double_stream_modulation_img.lin", "FLUX.2"),
        ("transformer.single_transformer_blocks.0.attn.to_qkv_mlp_proj", "FLUX.2"),
        ("lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q", "SDXL"),
        ("transformer.transformer_blocks.0.img_mod.1", "Qwen-Image"),
        ("diffusion_model.blocks.0.self_attn.q", "Wan"),
        ("lora_unet_joint_blocks_0_x_block_attn_qkv", "Stable Diffusion 3"),
    ],
)
def test_keys_of_another_model_refuse_the_whole_file(model, lora, key, name):
    change = {f"{key}.lora_A.weight": torch.zeros(4, 16), f"{key}.lora_B.weight": torch.zeros(16, 4)}
    text = refused(model, lora(lambda tensors: tensors.update(change)), allow_partial=True)
    assert "is a LoRA for" in text and name in text


def test_peft_metadata_that_is_none(model, lora):
    assert "no JSON object" in refused(model, lora(lora_adapter_metadata="[1"))


@pytest.mark.parametrize("patterns", [{"(.*)*x": 2}, {"((a|a)*)*z": 2}, {QKV: "much"}, [1], "a"])
def test_patterns_in_a_header_are_names(model, lora, patterns):
    """An expression could keep a search busy for ever."""
    text = json.dumps({"transformer.lora_alpha": 4, "transformer.alpha_pattern": patterns})
    assert "alpha_pattern no name" in refused(model, lora(lora_adapter_metadata=text))


@pytest.mark.parametrize("merge", [False, True], ids=["beside", "merged"])
def test_features_that_only_a_wider_mlp_has(model, lora, merge):
    """Which only the numbers tell: layers before it had their branches already."""
    name = "transformer.single_transformer_blocks.0.proj_mlp"
    wide = {f"{name}.lora_A.weight": torch.ones(4, 16), f"{name}.lora_B.weight": torch.ones(64, 4)}
    with pytest.raises(FileError, match="features that only"):
        attach(model, lora(lambda tensors: tensors.update(wide)), merge=merge)
    assert not attached(model) and not any(isinstance(x, BranchedLinear) for x in model.modules())


# Damaged files: rows 1 to 9, 16 and 21 of the table of faults ---------------------------------------------------


def header_of(data):
    length = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def with_header(header, rest):
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + rest


def changed_entry(data, **values):
    header, rest = header_of(data)
    next(value for key, value in header.items() if key != "__metadata__").update(values)
    return with_header(header, rest)


DAMAGED = {
    "empty": lambda data: b"",
    "seven bytes": lambda data: data[:7],
    "cut in the header": lambda data: data[:100],
    "cut in the data": lambda data: data[:-10],
    "a huge header": lambda data: struct.pack("<Q", 2**63) + data[8:],
    "a header too long": lambda data: struct.pack("<Q", struct.unpack("<Q", data[:8])[0] + 5) + data[8:],
    "junk behind": lambda data: data + b"junk",
    "overlap": lambda data: changed_entry(data, data_offsets=[4, 68]),
    "unknown dtype": lambda data: changed_entry(data, dtype="F99"),
    "a product that is wrong": lambda data: changed_entry(data, shape=[2**40, 2**40]),
    "HTML": lambda data: b"<!DOCTYPE html><html></html>",
    "a pointer": lambda data: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
    "a zip": lambda data: b"PK\x03\x04" + data,
    "a pickle": lambda data: b"\x80\x04cposix\nsystem\n",
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_file(model, lora, name):
    path = lora()
    path.write_bytes(DAMAGED[name](path.read_bytes()))
    refused(model, path)


def test_a_key_that_comes_twice(model, lora):
    path = lora()
    header, rest = header_of(path.read_bytes())
    text = json.dumps(header)
    first = next(key for key in header if key != "__metadata__")
    again = f'"{first}": {json.dumps(header[first])}, '
    text = text.replace("{", "{" + again, 1).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + rest)
    assert "comes twice" in refused(model, path)


def test_what_is_no_file(model, tmp_path):
    for path in (tmp_path / "none.safetensors", tmp_path):
        refused(model, path)


@pytest.mark.parametrize("scale", ["inf", "nan", "much", "0.8@", "0.8@x", "1e9"])
def test_scales_on_the_command_line(lora, scale, capsys):
    assert main(["--prompt", "a red apple", "--lora", str(lora()), scale]) == 2
    assert "a scale is a number" in capsys.readouterr().err


def test_the_command_line_says_it_before_a_model_is_loaded(lora, capsys, monkeypatch):
    monkeypatch.setattr("flux_core.pipeline.load_pipeline", lambda *_, **__: pytest.fail("loaded"))
    assert main(["--prompt", "a red apple", "--lora", str(lora())]) == 4  # it is for another size
    assert "Next:" in capsys.readouterr().err
    assert main(["--prompt", "a red apple", "--lora-scale", "0.5"]) == 2
    assert "--lora-scale does nothing without --lora" in capsys.readouterr().err


def test_every_error_is_one_of_ours(model, lora):
    """A file with random bytes in its header's place, a thousand times, is refused or read."""
    path = lora()
    data = bytearray(path.read_bytes())
    length = struct.unpack("<Q", data[:8])[0]
    draw = torch.Generator().manual_seed(0)
    for _ in range(300):
        at = int(torch.randint(8, 8 + length, (), generator=draw))
        broken = bytearray(data)
        broken[at] = int(torch.randint(32, 127, (), generator=draw))
        path.write_bytes(broken)
        try:
            read_lora(path, PARAMS)
        except FluxError:
            continue


def test_any_mixture_of_factors_leaves_no_trace(model, tmp_path):
    """Random endings, shapes and dtypes, on Linears, the input and a norm: applied and removed, or an error of ours."""
    draw = random.Random(0)
    before = {name: x.clone() for name, x in model.state_dict().items()}
    modules = (QKV, "single_blocks.0.linear1", "img_in", "single_blocks.0.norm.query_norm")
    kinds = (torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn)
    for _ in range(500):
        names = [
            f"{module}{ending}"
            for module in draw.sample(modules, draw.choice((1, 2)))
            for ending in draw.sample(list(ENDINGS), draw.choice((1, 1, 3)))
        ]
        tensors = {}
        for name in names:
            shape = [draw.choice((0, 1, 2, 8, 16, 48)) for _ in range(draw.choice((0, 1, 1, 2, 2, 4)))]
            tensors[PREFIX + name] = torch.ones(shape).to(draw.choice(kinds))
        with suppress(FluxError):
            attach(model, write(tmp_path / "mixed.safetensors", tensors), allow_partial=draw.random() < 0.5).remove()
        after = model.state_dict()
        assert list(after) == list(before) and all(torch.equal(after[name], x) for name, x in before.items())
