"""Weights that bitsandbytes quantized, found by headers: what its own files say, and what is refused."""

import json
import random
import subprocess
import sys

import pytest
import torch
from golden_files import FOLDER, read
from safetensors.torch import save_file

from flux_core.checkpoint.bnb import MAX_STATE, find_bnb
from flux_core.checkpoint.source import find_source
from flux_core.errors import FileError
from flux_core.linears.codebooks import NF4

GOLDEN = FOLDER / "nf4"
BAD = json.loads((GOLDEN / "bad" / "cases.json").read_text())
NAMED = {  # the tensor that is at fault, behind the weight's name
    "no_absmax": ".absmax",
    "nested_no_map": ".nested_quant_map",
    "shape_wrong": "",
    "quant_map_15": ".quant_map",
}
WEIGHT, OTHER = "single_blocks.0.linear1.weight", "single_blocks.0.linear2.weight"
STATE = f"{WEIGHT}.quant_state.bitsandbytes__nf4"
PLAIN = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [48, 64]}
NESTED = PLAIN | {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.25}


def coded(state):
    """JSON, or text or bytes in its place, as the tensor that files have."""
    data = state if isinstance(state, bytes) else (state if isinstance(state, str) else json.dumps(state)).encode()
    return torch.tensor(list(data), dtype=torch.uint8)


def tensors(state=PLAIN):
    """A file with one weight [48, 64], in 48 blocks."""
    nested = "nested_offset" in state
    found = {
        WEIGHT: torch.arange(1536, dtype=torch.int64).to(torch.uint8)[:, None],
        f"{WEIGHT}.absmax": torch.ones(48, dtype=torch.uint8 if nested else torch.float32),
        f"{WEIGHT}.quant_map": torch.tensor(NF4),
        STATE: coded(state),
    }
    more = {f"{WEIGHT}.nested_absmax": torch.ones(1), f"{WEIGHT}.nested_quant_map": torch.linspace(-1, 1, 256)}
    return found | more if nested else found


@pytest.fixture
def find(tmp_path):
    """`find_bnb` of a file with these tensors."""

    def find(state, prefix=""):
        save_file(state, tmp_path / "model.safetensors")
        return find_bnb(find_source(tmp_path / "model.safetensors"), prefix)

    return find


def test_what_bitsandbytes_wrote_is_what_is_found():
    golden = read("nf4/tensors")
    found, beside = find_bnb(find_source(GOLDEN / "tensors.safetensors"), "file.")
    assert beside == {name for name in golden.tensors if name.startswith("file.")} - found.keys()
    cases = json.loads(golden.metadata["cases"])
    assert found.keys() == {f"file.{name}.weight" for name in cases}
    for name, case in cases.items():
        one, weight = found[f"file.{name}.weight"], f"file.{name}.weight"
        roles = ["absmax", "quant_map"] + ["nested_absmax", "nested_quant_map"] * case["double_quantization"]
        assert (one.format, one.shape) == ("nf4", tuple(case["shape"]))
        assert list(one.parts.items()) == [("weight", weight), *((role, f"{weight}.{role}") for role in roles)]
        details = {key: case[key] for key in ("quant_type", "blocksize", "dtype")}
        if case["double_quantization"]:
            details |= {"nested_blocksize": 256, "nested_offset": one.details["nested_offset"]}
        assert one.details == details


@pytest.mark.parametrize(
    ("path", "prefix"),
    [("bnb_nf4_v1", "model.diffusion_model."), ("bnb_nf4_v2", "model.diffusion_model."), ("diffusers_nf4", "")],
)
def test_which_weights_of_a_model_are_quantized(path, prefix):
    source = find_source(GOLDEN / path if not prefix else GOLDEN / f"{path}.safetensors")
    found, beside = find_bnb(source, prefix)
    expected = json.loads(read(f"nf4/{path}.expect").metadata["quantized"])
    assert found.keys() == {prefix + name for name in expected}
    plain = {name for name in source.shapes if name.startswith(prefix)} - found.keys() - beside
    assert {source.dtypes[name] for name in plain} <= {"BF16", "F16", "F32"}


@pytest.mark.parametrize("case", BAD)
def test_damaged_files_are_refused_by_the_name_of_the_tensor(case):
    source = find_source(GOLDEN / "bad" / BAD[case]["file"])
    (name,) = (name for name in source.shapes if name.endswith(".weight"))
    if case == "absmax_nan":  # data, which `verify` reads
        assert find_bnb(source)[0].keys() == {name}
        return
    with pytest.raises(FileError) as error:
        find_bnb(source)
    assert f"tensor '{name}{NAMED.get(case, '.quant_state.bitsandbytes__nf4')}'" in str(error.value)
    assert str(source.path) in str(error.value) and "Next: " in str(error.value)


def test_nothing_is_quantized(find):
    assert find({"img_in.weight": torch.ones(4, 4)}) == ({}, frozenset())
    assert find(tensors(), "model.") == ({}, frozenset())


def test_a_prefix_leaves_other_networks_alone(find):
    ours = {f"model.{name}": x for name, x in tensors().items()}
    found, beside = find(ours | {f"text.{name}": x for name, x in tensors(NESTED).items()}, "model.")
    assert found.keys() == {f"model.{WEIGHT}"} and beside == ours.keys() - found.keys()


def test_packed_codes_may_have_any_dtype(find):
    state = tensors()
    for dtype in (torch.bfloat16, torch.float32, torch.int8):
        codes = state[WEIGHT].flatten().view(dtype)[:, None]
        assert find(state | {WEIGHT: codes})[0][WEIGHT].shape == (48, 64)


def test_parts_of_a_weight_may_lie_in_several_files(tmp_path):
    state, names = tensors(NESTED), ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    save_file({WEIGHT: state.pop(WEIGHT), STATE: state.pop(STATE)}, tmp_path / names[0])
    save_file(state, tmp_path / names[1])
    found, beside = find_bnb(find_source(tmp_path))
    assert found[WEIGHT].details["nested_offset"] == 0.25 and beside == {STATE, *state}


STATES = {
    "blocksize 0": PLAIN | {"blocksize": 0},
    "blocksize negative": PLAIN | {"blocksize": -64},
    "blocksize no power of two": PLAIN | {"blocksize": 48},
    "blocksize of one": PLAIN | {"blocksize": 1},
    "blocksize true": PLAIN | {"blocksize": True},
    "blocksize 64.0": PLAIN | {"blocksize": 64.0},
    "blocksize a list": PLAIN | {"blocksize": [64]},
    "blocksize huge": PLAIN | {"blocksize": 1 << 2000},
    "a type that is a table": PLAIN | {"quant_type": {}},
    "the other type": PLAIN | {"quant_type": "fp4"},
    "dtype of a torch function": PLAIN | {"dtype": "load"},
    "dtype null": PLAIN | {"dtype": None},
    "shape null": PLAIN | {"shape": None},
    "shape empty": PLAIN | {"shape": []},
    "shape with 0": PLAIN | {"shape": [0, 64]},
    "shape of texts": PLAIN | {"shape": ["48", "64"]},
    "shape of fractions": PLAIN | {"shape": [48.0, 64.0]},
    "shape of truth": PLAIN | {"shape": [True, 3072]},
    "shape of huge sizes": PLAIN | {"shape": [10**4000] * 8},
    "shape of many sizes": PLAIN | {"shape": [1] * 20 + [48, 64]},
    "a key is missing": {key: PLAIN[key] for key in ("quant_type", "blocksize", "shape")},
    "a key more": PLAIN | {"zero_point": 1},
    "half nested": PLAIN | {"nested_blocksize": 256},
    "a list": [PLAIN],
    "null": "null",
    "empty": b"",
    "no UTF-8": b'{"quant_type": "\xff"}',
    "UTF-16": json.dumps(PLAIN).encode("utf-16"),
    "cut off": json.dumps(PLAIN)[:-1],
    "deep": '{"a":' * 12000,
    "deep and whole": PLAIN | {"dtype": json.loads("[" * 900 + "]" * 900)},
    "a number of many digits": json.dumps(PLAIN).replace("64", "6" * 6000),
    "long": PLAIN | {"dtype": "x" * MAX_STATE},
}
OFFSETS = ["NaN", "Infinity", "-Infinity", "1e999", "1e39", "1" + "0" * 4000, "null", '"0.25"', "true", "[]"]


@pytest.mark.parametrize("state", STATES.values(), ids=STATES)
def test_a_quant_state_that_none_has(find, state):
    with pytest.raises(
        FileError, match=rf"tensor '{STATE}' (is no quant_state|says quant_type fp4|has 65,\d\d\d bytes)"
    ):
        find(tensors() | {STATE: coded(state)})


@pytest.mark.parametrize("offset", OFFSETS)
def test_an_offset_that_is_no_number(find, offset):
    text = json.dumps(NESTED).replace("0.25", offset)
    with pytest.raises(FileError, match=rf"tensor '{STATE}' is no quant_state that is known here: nested_offset"):
        find(tensors(NESTED) | {STATE: coded(text)})


@pytest.mark.parametrize("change", [{"nested_blocksize": 0}, {"nested_blocksize": "256"}, {"nested_dtype": "bfloat16"}])
def test_double_quantization_in_a_way_that_is_not_known(find, change):
    with pytest.raises(FileError, match=rf"tensor '{STATE}' is no quant_state that is known here: nested_"):
        find(tensors(NESTED) | {STATE: coded(NESTED | change)})


def without(name):
    return lambda state: {key: x for key, x in state.items() if key != name}


def put(name, x):
    return lambda state: state | {name: x}


PARTS = {
    "no weight": (WEIGHT, without(WEIGHT)),
    "a byte more": (WEIGHT, put(WEIGHT, torch.zeros(1537, 1, dtype=torch.uint8))),
    "codes not packed": (WEIGHT, put(WEIGHT, torch.zeros(48, 64, dtype=torch.uint8))),
    "codes of 16 bits": (WEIGHT, put(WEIGHT, torch.zeros(768, 1, dtype=torch.int16))),
    "no quant_map": (f"{WEIGHT}.quant_map", without(f"{WEIGHT}.quant_map")),
    "another table": (f"{WEIGHT}.quant_map", put(f"{WEIGHT}.quant_map", torch.linspace(-1, 1, 16))),
    "a table of NaN": (f"{WEIGHT}.quant_map", put(f"{WEIGHT}.quant_map", torch.full((16,), float("nan")))),
    "a table in bf16": (f"{WEIGHT}.quant_map", put(f"{WEIGHT}.quant_map", torch.tensor(NF4).bfloat16())),
    "a table in rows": (f"{WEIGHT}.quant_map", put(f"{WEIGHT}.quant_map", torch.tensor(NF4)[:, None])),
    "a block less": (f"{WEIGHT}.absmax", put(f"{WEIGHT}.absmax", torch.ones(47))),
    "a block more": (f"{WEIGHT}.absmax", put(f"{WEIGHT}.absmax", torch.ones(49))),
    "absmax in fp16": (f"{WEIGHT}.absmax", put(f"{WEIGHT}.absmax", torch.ones(48).half())),
    "absmax in codes": (f"{WEIGHT}.absmax", put(f"{WEIGHT}.absmax", torch.ones(48, dtype=torch.uint8))),
    "nested absmax": (f"{WEIGHT}.nested_absmax", put(f"{WEIGHT}.nested_absmax", torch.ones(1))),
    "the state in floats": (STATE, lambda state: state | {STATE: state[STATE].float()}),
    "another format": (
        f"{WEIGHT}.quant_state.bitsandbytes__int8",
        lambda state: state | {f"{WEIGHT}.quant_state.bitsandbytes__int8": state[STATE].clone()},
    ),
    "absmax of nothing": (f"{OTHER}.absmax", put(f"{OTHER}.absmax", torch.ones(1))),
    "a weight of a part": (f"{WEIGHT}.absmax", lambda state: state | as_weight(f"{WEIGHT}.absmax")),
}


def as_weight(name):
    """The same 192 bytes as a weight of their own."""
    state = coded(PLAIN | {"shape": [6, 64]})
    parts = {f"{name}.absmax": torch.ones(6), f"{name}.quant_map": torch.tensor(NF4)}
    return parts | {f"{name}.quant_state.bitsandbytes__nf4": state}


@pytest.mark.parametrize(("name", "change"), PARTS.values(), ids=PARTS)
def test_a_part_that_does_not_fit(find, name, change):
    with pytest.raises(FileError, match=rf"tensor '{name}' "):
        find(change(tensors()))


@pytest.mark.parametrize(
    ("role", "x"),
    [
        ("absmax", torch.ones(48)),
        ("nested_absmax", torch.ones(2)),
        ("nested_absmax", torch.ones(1).half()),
        ("nested_quant_map", torch.ones(255)),
        ("nested_quant_map", torch.ones(256).double()),
    ],
)
def test_a_part_of_double_quantization_that_does_not_fit(find, role, x):
    with pytest.raises(FileError, match=rf"tensor '{WEIGHT}.{role}' is F"):
        find(tensors(NESTED) | {f"{WEIGHT}.{role}": x})


def test_whatever_bytes_a_quant_state_has_it_is_read_or_refused(find):
    draw, text = random.Random(0), json.dumps(NESTED).encode()
    refused = 0
    for _ in range(300):
        data = bytearray(text)
        for _ in range(draw.randint(1, 3)):
            data[draw.randrange(len(data))] = draw.choice(b'{}[]",:0123456789-.eEnulfatrsx \xff\0')
        try:
            one = find(tensors(NESTED) | {STATE: coded(bytes(data))})[0][WEIGHT]
            assert one.shape[0] * one.shape[1] in (3071, 3072) and -3.4e38 <= one.details["nested_offset"] <= 3.4e38
        except FileError as error:
            assert WEIGHT in str(error)
            refused += 1
    assert 200 < refused < 300


def test_headers_are_checked_without_torch():
    path = GOLDEN / "bnb_nf4_v1.safetensors"
    code = (
        "import sys\nfrom pathlib import Path\nfrom flux_core.checkpoint.bnb import find_bnb\n"
        "from flux_core.checkpoint.source import find_source\n"
        f"assert len(find_bnb(find_source(Path({str(path)!r})))[0]) == 26\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=FOLDER.parents[1])
