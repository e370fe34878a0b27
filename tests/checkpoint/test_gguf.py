"""Our reader of GGUF headers: as strict as ggml, in words, at once, and with little memory; and the writer."""

import json
import math
import shutil
import struct
import subprocess
import sys
import tracemalloc
from pathlib import Path

import pytest
import torch
from golden_files import FOLDER, read
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flux_core.checkpoint import dequantized, tensors
from flux_core.checkpoint.gguf import MAX_ITEMS, read_gguf, write_gguf
from flux_core.checkpoint.names import LLAMA_T5, renamed
from flux_core.errors import DiskError, FileError
from flux_core.linears.gguf_types import NAMES, TYPES, size_of

GOLDEN = FOLDER / "gguf"
CASES = json.loads((GOLDEN / "bad" / "cases.json").read_text())
LATER = {"bad_architecture_llama", "bad_architecture_flux2", "bad_nan_scale", "bad_t5_as_flux"}
"""sound containers of the wrong thing"""
REFUSED = {
    "bad_magic": "is no GGUF file",
    "bad_version1": "is GGUF version 1, and 2 and 3 are read",
    "bad_version4": "is GGUF version 4",
    "bad_big_endian": "is big-endian",
    "bad_four_bytes": "is cut off or damaged: the start of the file should reach to byte 8, the file has 4",
    "bad_trunc_header": "key 2 of 2 should reach to byte 76, the file has 70",
    "bad_trunc_data": "tensor 'img_in.weight' should reach to byte 320, the file has 312",
    "bad_tensor_beyond_end": "tensor 'img_in.bias' should reach to byte 1,048,784, the file has 352",
    "bad_offset_unaligned": "tensor 'img_in.bias' is at byte 130, no multiple of the alignment 32",
    "bad_tensor_count": "lists more than 20,000 tensors",
    "bad_kv_count": "lists more than 40,000 key-value pairs",
    "bad_key_len": "key 1 of 1 should reach to byte 2^63",
    "bad_array_len": "key 'tokenizer.ggml.tokens' should reach to byte 2^61",
    "bad_nested_arrays": "key 'general.tags' has arrays nested more than 8 deep",
    "bad_dims_overflow": "tensor 'img_in.weight' has the shape [8589934592, 8589934592]",
    "bad_dims_5": "tensor 'img_in.weight' has 5 dimensions",
    "bad_dims_negative": "tensor 'img_in.weight' has the shape [4, -8]",
    "bad_unknown_type": "tensor 'img_in.weight' is of the unknown type 99",
    "bad_removed_type_q4_2": "proj.weight' is Q4_2 (removed)",
    "bad_unsupported_iq1_m": "proj.weight' is IQ1_M; the types that are read are F32, F16, BF16, Q4_0,",
    "bad_int_weight": "tensor 'img_in.weight' is I32",
    "bad_kv_type_in_array": "key 'x.y' has elements of the unknown type 77",
    "bad_block_row_k": "[4, 128], whose rows are no whole blocks of Q4_K (256 values)",
    "bad_alignment_3": "key 'general.alignment' is 3, which is no power of two",
    "bad_alignment_type": "key 'general.alignment' is no u32",
    "bad_duplicate_key": "key 'general.architecture' comes twice",
    "bad_name_long": "has a name of 307 bytes, where 127 are the most: 'xxxx",
    "bad_orig_shape_negative": "orig_shape.img_in.weight' is [-16, -16], and dimensions are positive",
    "bad_no_tensors": "holds no tensors",
    "bad_lfs_pointer": "is a Git LFS pointer",
}


def told(path):
    with pytest.raises(FileError) as caught:
        read_gguf(path)
    text = str(caught.value)
    assert caught.value.exit_code == 4 and text.startswith(str(path)) and "Next: " in text and len(text) < 500
    return text


@pytest.mark.parametrize("name", REFUSED)
def test_a_malformed_file_is_told(name):
    assert REFUSED[name] in told(GOLDEN / "bad" / CASES[name]["file"])


def test_every_case_is_one_of_the_three():
    good = {name for name in CASES if name.startswith("good_")}
    assert CASES.keys() == REFUSED.keys() | LATER | good
    for name in LATER | good:
        assert read_gguf(GOLDEN / "bad" / CASES[name]["file"]).tensors


def test_every_kind_of_value_is_read():
    header = read_gguf(GOLDEN / "bad" / "good_array_kinds.gguf")
    assert header.metadata == {
        "general.architecture": "flux", "a.i8": "-1", "a.u16": "513", "a.i16": "-1", "a.u8": "7", "a.f64": "0.5",
        "a.u64": str(2**63), "a.i64": "-1",
    }  # fmt: skip
    assert header.shapes == {"img_in.weight": (4, 8), "img_in.bias": (4,)}


WHOLE = [path.stem for path in sorted(GOLDEN.glob("*_*.gguf"))]


@pytest.mark.parametrize("name", WHOLE)
def test_types_and_shapes_are_those_that_the_writer_had(name):
    header, golden = read_gguf(GOLDEN / f"{name}.gguf"), read(f"gguf/{name}")
    prefix = golden.metadata.get("prefix", "")
    types = json.loads(golden.metadata["types"])
    assert {key: entry.dtype for key, entry in header.tensors.items()} == {prefix + key: x for key, x in types.items()}
    assert header.metadata.get("general.architecture", "") == golden.metadata["architecture"]
    assert {entry.start % 32 for entry in header.tensors.values()} == {0}
    rows = golden.group("rows.")
    names = renamed([key.removeprefix(prefix) for key in header.tensors], "t5" if "t5" in name else "transformer")
    for ours, theirs in names.items():
        if (row := rows.get(ours)) is not None:
            assert header.tensors[prefix + theirs].shape[-1] == row.shape[-1], ours


def test_names_of_t5_are_those_of_transformers():
    rows = read("gguf/t5_q8_0").group("rows.")
    names = renamed(read_gguf(GOLDEN / "t5_q8_0.gguf").tensors, "t5")
    assert rows.keys() <= names.keys() and all(name.startswith(("shared.", "encoder.")) for name in names)
    assert "encoder.block.1.layer.1.DenseReluDense.wo.weight" in names
    of_itself = read_gguf(GOLDEN / "t5_sdcpp_q4_0.gguf").tensors
    assert all(ours == theirs for ours, theirs in renamed(of_itself, "t5").items())
    assert len(set(LLAMA_T5.values())) == len(LLAMA_T5)
    assert [*renamed(["enc.blk.12.attn_o.weight"], "t5")] == ["encoder.block.12.layer.0.SelfAttention.o.weight"]
    for other in ("enc.blk.1.attn_rel.weight", "dec.blk.1.attn_o.weight", "enc.blk.x.attn_o.weight", "token_embd"):
        assert renamed([other], "t5") == {other: other}


def test_numbers_and_names_of_types_are_unique():
    assert len(NAMES) == len(set(NAMES.values())) and all(NAMES[x.number] == name for name, x in TYPES.items())


# Files made here -----------------------------------------------------------------------------------------


def string(text):
    data = text if isinstance(text, bytes) else text.encode()
    return struct.pack("<Q", len(data)) + data


def info(name="x", dims=(4,), kind=0, place=0):
    return string(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, place)


def pair(key, kind, value):
    return string(key) + struct.pack("<I", kind) + value


@pytest.fixture
def make(tmp_path):
    def make(*parts, pairs=0, tensors=1, data=16):
        head = b"GGUF" + struct.pack("<IQQ", 3, tensors, pairs) + b"".join(parts)
        path = tmp_path / "made.gguf"
        path.write_bytes(head + bytes(-len(head) % 32 + data))
        return path

    return make


def test_what_no_golden_file_has(make, tmp_path):
    assert "overlaps another" in told(make(info("a", (8,)), info("b", (16,)), tensors=2, data=64))
    assert "comes twice" in told(make(info("a"), info("a", place=32), tensors=2, data=48))
    assert "has the shape [0]" in told(make(info(dims=(0,))))
    assert "has a name that is no text" in told(make(info(b"\xff")))
    assert "has a value of the unknown type 13" in told(make(pair("k", 13, b""), info(), pairs=1))
    shape = pair("comfy.gguf.orig_shape.x", 9, struct.pack("<IQ3i", 5, 3, 1, 2, 3))
    assert "is stored as [4] and comfy.gguf.orig_shape.… says [1, 2, 3]" in told(make(shape, info(), pairs=1))
    shape = pair("comfy.gguf.orig_shape.x", 9, struct.pack("<IQ3i", 5, 3, 2, 2, 1))
    assert read_gguf(make(shape, info(), pairs=1)).shapes == {"x": (2, 2, 1)}
    assert "is no array of i32" in told(make(pair("comfy.gguf.orig_shape.x", 4, bytes(4)), info(), pairs=1))
    (tmp_path / "x.gguf").write_bytes(struct.pack("<Q", 40) + b"{" + bytes(60))
    assert "is a safetensors file" in told(tmp_path / "x.gguf")
    assert read_gguf(make(info(dims=()), data=4)).shapes == {"x": ()}


def test_another_alignment(make):
    one = make(pair("general.alignment", 4, struct.pack("<I", 8)), info("a", (2,)), info("b", (2,), 0, 8), pairs=1,
               tensors=2, data=32)  # fmt: skip
    a, b = read_gguf(one).tensors.values()
    assert (b.start - a.start, a.start % 8) == (8, 0)


def test_what_is_counted_is_bounded(make):
    strings = struct.pack("<IQ", 8, MAX_ITEMS) + bytes(8 * MAX_ITEMS)
    assert read_gguf(make(pair("k", 9, strings), info(), pairs=1)).tensors
    more = struct.pack("<IQ", 8, MAX_ITEMS + 1) + bytes(8 * MAX_ITEMS + 8)
    assert f"key 'k' has more than {MAX_ITEMS:,} strings" in told(make(pair("k", 9, more), info(), pairs=1))


def test_a_large_file_takes_no_memory(make):
    """A gigabyte of zeros, which the disk need not have, behind counts that name it."""
    cases = {
        "where no header reaches": pair("k", 9, struct.pack("<IQ", 0, 2**29)),
        "strings: this is no file": pair("k", 9, struct.pack("<IQ", 8, 2**23)),
        "behind 100,000,000 bytes": pair("k", 8, struct.pack("<Q", 2**29)),
    }
    for finding, part in cases.items():
        path = make(part, pairs=1)
        with path.open("r+b") as file:
            file.truncate(2**30)
        tracemalloc.start()
        assert finding in told(path)
        assert tracemalloc.get_traced_memory()[1] < 2**20
        tracemalloc.stop()


SOUND = [GOLDEN / "types.gguf", GOLDEN / "t5_q8_0.gguf", *sorted((GOLDEN / "bad").glob("good_*.gguf"))]


@settings(
    max_examples=400, derandomize=True, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_whatever_bytes_change_the_file_is_refused_or_sound(tmp_path, data):
    source = data.draw(st.sampled_from(SOUND))
    raw = bytearray(source.read_bytes())
    for _ in range(data.draw(st.integers(0, 4))):
        at = data.draw(st.integers(0, min(len(raw), 3000) - 1))
        raw[at] = data.draw(st.sampled_from([0, 1, 0x7F, 0x80, 0xFF, raw[at] ^ 1, raw[at] ^ 0x20]))
    path = tmp_path / "changed.gguf"
    path.write_bytes(raw[: data.draw(st.one_of(st.just(len(raw)), st.integers(0, len(raw))))])
    try:
        header = read_gguf(path)
    except FileError as error:
        assert str(path) in str(error) and "Next: " in str(error)
        return
    end = 0
    for entry in sorted(header.tensors.values(), key=lambda entry: entry.start):
        assert end <= entry.start and entry.end <= header.size
        assert entry.end - entry.start == math.prod(entry.shape) // TYPES[entry.dtype].block * TYPES[entry.dtype].size
        end = entry.end


@pytest.mark.parametrize("alignment", [1, 2, 8])
def test_numbers_may_lie_anywhere_in_a_mapped_file(tmp_path, monkeypatch, alignment):
    """ggml takes any power of two; torch views no fp32 at an odd byte."""
    monkeypatch.setattr(tensors, "SMALL", 0)
    start = b"GGUF" + struct.pack("<IQQ", 3, 1, 1)
    pair = struct.pack("<Q", 17) + b"general.alignment" + struct.pack("<II", 4, alignment)
    entry = struct.pack("<Q", 1) + b"x" + struct.pack("<IQIQ", 1, 3, 0, 0)
    header = start + pair + entry
    path = tmp_path / "x.gguf"
    path.write_bytes(header + bytes(-len(header) % alignment) + struct.pack("<3f", 1, 2, 3))
    assert [x.tolist() for _, x in dequantized(path)] == [[1, 2, 3]]


# Writing -------------------------------------------------------------------------------------------------


def contents(path):
    """What `write_gguf` takes, of a file."""
    header, raw = read_gguf(path), path.read_bytes()
    metadata = {key: int(value) if value.isdigit() else value for key, value in header.metadata.items()}
    return {key: (x.dtype, x.shape, raw[x.start : x.end]) for key, x in header.tensors.items()}, metadata


@pytest.mark.parametrize("name", ["types", "flux_q8_0", "flux_q4_k_m", "flux_sdcpp_q5_1"])
def test_the_bytes_are_those_that_gguf_py_writes(name, tmp_path):
    path = GOLDEN / f"{name}.gguf"
    write_gguf(tmp_path / "again.gguf", *contents(path))
    assert (tmp_path / "again.gguf").read_bytes() == path.read_bytes()


def test_tensors_numbers_and_shapes_come_back(tmp_path):
    path, x = tmp_path / "x.gguf", torch.randn(3, 8)
    tensors = {
        "f32": ("F32", (3, 8), x),
        "f16": ("F16", (24,), lambda: x.half()),
        "bf16": ("BF16", (3, 8), x),
        "q4_k": ("Q4_K", (1, 256), torch.arange(144, dtype=torch.uint8)),
    }
    metadata = {
        "general.architecture": "flux", "general.file_type": 7, "a": -3, "b": 2**40, "c": True, "d": 0.5,
        "comfy.gguf.orig_shape.q4_k": (4, 64), "general.alignment": 64,
    }  # fmt: skip
    write_gguf(path, tensors, metadata)
    header, raw = read_gguf(path), path.read_bytes()
    assert header.metadata == {
        "general.architecture": "flux", "general.file_type": "7", "a": "-3", "b": str(2**40), "c": "true", "d": "0.5",
    }  # fmt: skip
    assert header.shapes == {"f32": (3, 8), "f16": (24,), "bf16": (3, 8), "q4_k": (4, 64)}
    bytes_of = {name: raw[entry.start : entry.end] for name, entry in header.tensors.items()}
    assert bytes_of["f32"] == x.numpy().tobytes() and bytes_of["f16"] == x.half().numpy().tobytes()
    assert bytes_of["bf16"] == x.bfloat16().view(torch.uint8).numpy().tobytes()
    assert bytes_of["q4_k"] == bytes(range(144)) and size_of("Q4_K", (4, 64)) == 144


def test_a_file_that_cannot_be_written_is_none(tmp_path):
    path = tmp_path / "x.gguf"
    one = {"x": ("F32", (4,), bytes(16))}
    with pytest.raises(DiskError, match="cannot write"):
        write_gguf(tmp_path / "nowhere" / "x.gguf", one, {})
    for name, kind, shape, size in [
        ("x", "F32", (4,), 12), ("x", "Q8_0", (4, 48), 204), ("x" * 128, "F32", (4,), 16), ("x", "F32", (1,) * 5, 4),
    ]:  # fmt: skip
        with pytest.raises(ValueError):
            write_gguf(path, {name: (kind, shape, bytes(size))}, {})
    assert not list(tmp_path.iterdir())
    write_gguf(path, one, {})
    shutil.copy(path, tmp_path / "kept")
    with pytest.raises(RuntimeError):
        write_gguf(path, {"x": ("F32", (4,), broken)}, {})
    assert path.read_bytes() == (tmp_path / "kept").read_bytes() and len(list(tmp_path.iterdir())) == 2


def broken():
    raise RuntimeError


def test_reading_costs_no_torch():
    code = "import sys, flux_core.checkpoint.gguf, flux_core.linears.gguf_types; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])
