"""Our reader of headers: as strict as the library at least, in words, at once, and with little memory."""

import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from flux_core.checkpoint import tensors as tensors_module
from flux_core.checkpoint.header import BITS, MAX_TENSORS, read_header
from flux_core.checkpoint.source import find_source
from flux_core.checkpoint.tensors import opened
from flux_core.errors import FileError

ROOT = Path(__file__).parents[2]
TWO = {"a": torch.arange(6, dtype=torch.float32).reshape(2, 3), "b": torch.ones(4, dtype=torch.bfloat16)}


@pytest.fixture
def good(tmp_path):
    path = tmp_path / "good.safetensors"
    save_file(TWO, path, {"format": "pt"})
    return path


def assemble(header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def told(path):
    with pytest.raises(FileError) as caught:
        read_header(path)
    assert caught.value.exit_code == 4 and str(path) in str(caught.value)
    return str(caught.value)


def test_a_sound_header_is_read_as_the_library_reads_it(good):
    header = read_header(good)
    with safe_open(good, "pt") as file:
        assert set(header.tensors) == set(file.keys()) and header.metadata == file.metadata()
        for name, found in header.tensors.items():
            part = file.get_slice(name)
            assert (found.dtype, list(found.shape)) == (part.get_dtype(), part.get_shape())
    data = good.read_bytes()
    a = header.tensors["a"]
    assert data[a.start : a.end] == TWO["a"].numpy().tobytes()


# Rows of the table of faults -----------------------------------------------------------------------


@pytest.mark.parametrize("content", [b"", b"1234567"])
def test_row_1_empty_or_truncated(tmp_path, content):
    (tmp_path / "x").write_bytes(content)
    assert f"is empty or truncated ({len(content)} bytes)" in told(tmp_path / "x")


def test_row_2_truncated_in_the_header(good):
    data = good.read_bytes()
    length = int.from_bytes(data[:8], "little")
    good.write_bytes(data[:60])
    assert f"its header takes {length:,} bytes, the file has 60" in told(good)


def test_row_3_truncated_in_the_data(good):
    data = good.read_bytes()
    good.write_bytes(data[:-5])
    assert f"should have {len(data):,} bytes and has {len(data) - 5:,}. Next: fetch it again" in told(good)


@pytest.mark.parametrize("length", [2**63, 2**64 - 1, 10**9])
def test_row_4_a_header_that_lies_about_its_length(tmp_path, reads, length):
    (tmp_path / "x").write_bytes(assemble({"a": entry()}, bytes(8), length))
    assert "first bytes are damaged" in told(tmp_path / "x")
    assert reads and max(asked for asked, _ in reads) < 2**20  # no memory is asked for by the file's own word


@pytest.mark.parametrize("off", [-5, -1, 1, 5])
def test_row_5_a_header_length_that_is_a_little_off(tmp_path, off):
    text = json.dumps({"a": entry()}).encode()
    (tmp_path / "x").write_bytes(assemble(text, bytes(8), len(text) + off))
    told(tmp_path / "x")


def test_row_6_trailing_junk(good):
    good.write_bytes(good.read_bytes() + b"junk")
    assert "has 4 bytes more than its header knows of" in told(good)


@pytest.mark.parametrize(
    ("tensors", "finding"),
    [
        ({"a": entry(), "b": entry(offsets=(4, 12))}, "tensor 'b' overlaps another or leaves a hole"),
        ({"a": entry(), "b": entry(offsets=(12, 20))}, "tensor 'b' overlaps another or leaves a hole"),
        ({"a": entry(offsets=(-8, 0))}, "-8 is no size"),
        ({"a": entry(offsets=(8, 0))}, "tensor 'a' takes -8 bytes"),
        ({"a": entry(shape=(3,))}, "tensor 'a' takes 8 bytes, [3] of F32 would take another number"),
        ({"a": entry(shape=(2**40, 2**40))}, "tensor 'a' takes 8 bytes"),
        ({"a": entry(shape=(2**64,))}, "no sizes or places that are whole numbers"),
        ({"a": entry(shape=(2.0,))}, "2.0 is no whole number"),
        ({"a": {**entry(), "shape": None}}, "no sizes or places"),
        ({"a": {**entry(), "more": 1}}, "is not described by dtype, shape and data_offsets"),
        ({"a": [1]}, "is not described by"),
        ({"__metadata__": {"a": 1}}, "__metadata__ is no table of texts"),
    ],
)
def test_row_7_sizes_and_places_that_do_not_fit(tmp_path, tensors, finding):
    (tmp_path / "x").write_bytes(assemble(tensors, bytes(20)))
    assert finding in told(tmp_path / "x")


def test_row_8_a_name_that_comes_twice(tmp_path):
    one = json.dumps(entry())
    (tmp_path / "x").write_bytes(assemble(f'{{"a": {one}, "a": {one}}}'.encode(), bytes(8)))
    assert "'a' comes twice" in told(tmp_path / "x")


def test_row_9_an_unknown_dtype(tmp_path):
    (tmp_path / "x").write_bytes(assemble({"a": entry("F99")}, bytes(8)))
    assert "tensor 'a' has the unknown dtype 'F99'" in told(tmp_path / "x")


@pytest.mark.parametrize(
    ("content", "finding"),
    [
        (b"<!DOCTYPE html><html>403", "is an HTML page"),
        (b"\n  <html>no model here</html>", "is an HTML page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "is a Git LFS pointer"),
        (b'{"error": "Access to model is restricted"}', "is JSON text"),
        (b"PK\x03\x04" + bytes(60), "is a zip, likely a PyTorch pickle, which is never opened"),
        (b"\x80\x02}q\x00." + bytes(60), "is a pickle, which is never opened"),
        (b"GGUF\x03" + bytes(60), "holds no tensors"),
        (b"\xff" * 64, "is no safetensors file"),
    ],
)
def test_row_16_other_files_under_that_name(tmp_path, content, finding):
    (tmp_path / "x").write_bytes(content)
    assert finding in told(tmp_path / "x")


def test_row_17_paths_that_are_no_files(tmp_path):
    assert "is a folder" in told(tmp_path)
    assert "does not exist" in told(tmp_path / "none")
    (tmp_path / "link").symlink_to(tmp_path / "none")
    assert "is a link to something that does not exist" in told(tmp_path / "link")
    assert "is no regular file" in told(Path("/dev/null"))
    os.mkfifo(tmp_path / "pipe")
    assert "is no regular file" in told(tmp_path / "pipe")
    assert "could not be read" in told(Path("a\0b"))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_row_17_a_file_that_may_not_be_read(good):
    good.chmod(0)
    assert "could not be read: Permission denied" in told(good)


@pytest.mark.parametrize("error", [OSError(19, "No such device (os error 19)"), OSError(12, "Cannot allocate memory")])
def test_row_18_where_nothing_can_be_mapped_the_file_is_read(good, monkeypatch, capsys, error):
    def forbidden(*_, **__):
        raise error

    monkeypatch.setattr(tensors_module, "safe_open", forbidden)
    with opened(find_source(good), "cpu", TWO) as get:
        for name, x in TWO.items():
            assert torch.equal(get(name), x) and get(name).dtype == x.dtype
    assert "good.safetensors cannot be mapped into memory here" in capsys.readouterr().err


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64])
def test_whole_numbers_are_read_as_well_as_mapped(tmp_path, monkeypatch, dtype):
    x = torch.arange(77).to(dtype)  # as CLIP's positions, which lie in its file
    save_file({"position_ids": x}, tmp_path / "clip.safetensors")

    def forbidden(*_, **__):
        raise OSError(19, "No such device")

    for way in (safe_open, forbidden):
        monkeypatch.setattr(tensors_module, "safe_open", way)
        with opened(find_source(tmp_path / "clip.safetensors"), "cpu", ["position_ids"]) as get:
            assert torch.equal(get("position_ids"), x) and get("position_ids").dtype == dtype


@pytest.mark.parametrize("name", ["n", "\\u006e"])
def test_row_19_a_million_tensors(tmp_path, name):
    one = '{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'
    if name != "n":
        one = one.replace("dtype", "dt\\u0079pe")  # so that counting the word does not help
    text = "{" + ",".join(f'"{name}{i}":{one}' for i in range(1_000_000)) + "}"
    (tmp_path / "x").write_bytes(assemble(text.encode()))
    code = (
        "import resource, sys; from flux_core.checkpoint.header import read_header\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "try: read_header(sys.argv[1])\n"
        "except Exception as error: print(error)\n"
        "print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "x")], capture_output=True, text=True, check=True, cwd=ROOT
    )
    finding, mib = done.stdout.splitlines()
    assert f"lists more than {MAX_TENSORS:,} tensors" in finding
    assert int(mib) < 3 * len(text) / 2**20 + 40


def test_reading_a_header_costs_no_torch(good):
    code = f"import sys; from flux_core.checkpoint.header import read_header; read_header({str(good)!r}); "
    subprocess.run([sys.executable, "-c", code + "assert 'torch' not in sys.modules"], check=True, cwd=ROOT)


# Against the library -------------------------------------------------------------------------------

SHAPES = st.lists(st.integers(0, 5), max_size=3).map(tuple)
KINDS = (torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool, torch.float8_e4m3fn)
NAMES = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12).filter(lambda x: x != "__metadata__")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("files")


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.dictionaries(NAMES, st.tuples(SHAPES, st.sampled_from(KINDS)), min_size=1, max_size=5),
    st.dictionaries(NAMES, NAMES),
)
def test_valid_files_are_the_same_to_us_and_to_the_library(folder, tensors, metadata):
    path = folder / "valid"
    save_file({name: torch.zeros(shape, dtype=dtype) for name, (shape, dtype) in tensors.items()}, path, metadata)
    header = read_header(path)
    with safe_open(path, "pt") as file:
        theirs = {name: (file.get_slice(name).get_dtype(), tuple(file.get_slice(name).get_shape())) for name in tensors}
        assert dict(header.metadata) == (file.metadata() or {})
    assert {name: (one.dtype, one.shape) for name, one in header.tensors.items()} == theirs


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_we_are_never_more_lenient_than_the_library(folder, data):
    path = folder / "mutated"
    save_file(TWO, path, {"format": "pt"})
    content = bytearray(path.read_bytes())
    length = int.from_bytes(content[:8], "little")
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, 8 + length - 1))
        match data.draw(st.sampled_from(["change", "drop", "insert", "token"])):
            case "change":
                content[place] = data.draw(st.integers(0, 255))
            case "drop":
                del content[place]
            case "insert":
                content.insert(place, data.draw(st.sampled_from(b' 0-1.e"{}[],:\\uNn')))
            case "token":
                token = data.draw(st.sampled_from([b"-0", b"1.0", b"NaN", b"null", b'"\\ud800"', b"1e1", b"[]", b"\t"]))
                content[place : place + 1] = token
    if data.draw(st.booleans()):  # so that the header's end is where it was said to be
        content[:8] = struct.pack("<Q", len(content) - (4 * 6 + 2 * 4) - 8)
    path.write_bytes(content)
    try:
        ours = read_header(path)
    except FileError:
        return
    try:
        with safe_open(path, "pt") as file:
            assert set(ours.tensors) == set(file.keys())
    except SafetensorError as error:
        raise AssertionError(f"the library refuses what we take: {error}\n{bytes(content)!r}") from None


def test_all_dtypes_of_the_library_have_their_size():
    for dtype, bits in BITS.items():
        header = assemble({"a": entry(dtype, (8,), (0, bits))}, bytes(bits))
        assert len(safe_bytes(header)) == 1


def safe_bytes(content):
    from safetensors import deserialize

    return deserialize(content)
