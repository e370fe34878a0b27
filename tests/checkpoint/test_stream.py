"""What threads read ahead is what is mapped, to the bit, however it is cut; and what goes wrong is told, and ends."""

import json
import os
import threading
import time
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from random_model import random_weights, small_variant
from safetensors import safe_open

from flux_core.checkpoint import header, load_autoencoder, load_flux, read, stream, tensors, to_diffusers
from flux_core.checkpoint.files import text_files
from flux_core.checkpoint.source import Span, find_source
from flux_core.checkpoint.write import write_safetensors
from flux_core.errors import FileError
from flux_core.linears.formats import quantize
from flux_core.linears.fp8 import Fp8Linear
from flux_core.model import AutoEncoder, Flux
from flux_core.text import encoders

DEV = small_variant("flux-dev")
KINDS = list(tensors.DTYPES.values())


def readers():
    return [thread for thread in threading.enumerate() if thread.name.startswith("reader")]


def cut(monkeypatch, chunk, buffers=3, threads=4):
    monkeypatch.setattr(stream, "CHUNK", chunk)
    monkeypatch.setattr(stream, "BUFFERS", buffers)
    monkeypatch.setattr(stream, "THREADS", threads)


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Two files with every dtype: one large tensor, many small ones at odd places, a number, and empty ones."""
    folder, draw, where = tmp_path_factory.mktemp("shards"), torch.Generator().manual_seed(0), {}
    for part, file in enumerate(("a.safetensors", "b.safetensors")):
        sizes = [(20, 31), (), (0, 3), *((n,) for n in range(1, 12, 2))]
        state = {
            f"{part}.{i}.{j}": torch.randn(size, generator=draw).to(kind)
            for i, kind in enumerate(KINDS)
            for j, size in enumerate(sizes)
        }
        write_safetensors(folder / file, state)
        where |= dict.fromkeys(state, file)
    (folder / "x.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    return find_source(folder)


def mapped(source):
    state = {}
    for one in source.headers:
        with safe_open(one.path, framework="pt") as file:
            state |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return state


def streamed(source, names, device="cpu"):
    with tensors.streamed(source, device, names) as get:
        return {name: get(name) for name in names}


def same(found, expected):
    """In name, shape, dtype and every bit."""
    assert found.keys() == expected.keys()
    for name, x in expected.items():
        y = found[name].cpu()
        assert y.dtype == x.dtype and y.shape == x.shape
        assert torch.equal(y.reshape(-1).view(torch.uint8), x.reshape(-1).view(torch.uint8)), name


@pytest.mark.parametrize(("chunk", "buffers"), [(31, 3), (100, 1), (1000, 100), (2**20, 3)])
def test_every_bit_of_every_tensor_comes_through(shards, monkeypatch, chunk, buffers):
    """Chunks of a part of a tensor and of many; in the files' order, and in one that jumps between them."""
    cut(monkeypatch, chunk, buffers)
    expected = mapped(shards)
    in_place = sorted(expected, key=shards.spans.__getitem__)
    assert any(shards.spans[name].start % 2 for name in in_place)
    for names in (in_place, in_place[::-3], in_place[:1], []):
        same(streamed(shards, names), {name: expected[name] for name in names})
    assert not readers()


@pytest.mark.parametrize("positioned", [True, False])
def test_a_file_system_that_gives_less_than_was_asked_for(shards, monkeypatch, positioned):
    """And one without reads at a place of their own: Windows."""
    monkeypatch.setattr(header, "MOST", 7)
    if not positioned:
        monkeypatch.delattr(os, "preadv", raising=False)
    cut(monkeypatch, 1000)
    expected = mapped(shards)
    same(streamed(shards, list(expected)), expected)


def test_chunks_are_full_and_in_order(tmp_path, monkeypatch):
    monkeypatch.setattr(stream, "CHUNK", 10)
    spans = [Span(tmp_path, 3, 6), Span(tmp_path, 6, 6), Span(tmp_path, 100, 125), Span(tmp_path, 0, 1)]
    found = list(stream.chunks(spans))
    assert [sum(end - start for _, start, end in chunk) for chunk in found] == [10, 10, 9]
    flat = [(start, end) for chunk in found for _, start, end in chunk]
    assert flat == [(3, 6), (100, 107), (107, 117), (117, 125), (0, 1)]


def test_no_more_is_read_ahead_than_there_are_buffers(shards, monkeypatch):
    cut(monkeypatch, chunk=100, buffers=3)
    count, real = [0], header.read_into

    def counted(memory, *where):
        count[0] += len(memory)
        real(memory, *where)

    monkeypatch.setattr(stream, "read_into", counted)
    names = sorted(shards.spans, key=shards.spans.__getitem__)
    taken = 0
    with tensors.streamed(shards, "cpu", names) as get:
        for name in names[:8]:
            taken += get(name).nbytes
            time.sleep(0.01)
            assert taken <= count[0] <= taken + 300


def test_the_memory_for_it_is_well_below_a_gibibyte():
    assert stream.CHUNK * stream.BUFFERS <= 2**29


def test_tensors_come_in_their_turn(shards):
    one, other = list(shards.spans)[:2]
    with tensors.streamed(shards, "cpu", [one, other]) as get, pytest.raises(RuntimeError, match="was asked for when"):
        get(other)
    with tensors.streamed(shards, "cpu", [one]) as get, pytest.raises(RuntimeError, match="None was next"):
        get(one), get(one)


# What goes wrong


def test_a_file_that_becomes_shorter(tmp_path, monkeypatch):
    """The same words as of the reader that takes a mapping's place; what was there before comes through."""
    path, x = tmp_path / "x.safetensors", torch.arange(4096.0)
    write_safetensors(path, {"a": x, "b": x + 1})
    source = find_source(path)
    with path.open("r+b") as file:
        file.truncate(source.headers[0].tensors["b"].start + 100)
    words = "x.safetensors became shorter while it was read. Next: wait until it is all there, and try again."
    monkeypatch.setattr(tensors, "safe_open", lambda *_, **__: (_ for _ in ()).throw(OSError(19, "No such device")))
    cut(monkeypatch, 1024)
    for way in (tensors.opened, tensors.streamed):
        with way(source, "cpu", ["a", "b"]) as get:
            assert torch.equal(get("a"), x)
            with pytest.raises(FileError, match=words):
                get("b")
    assert not readers()


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="no file is at hand that cannot be read")
@pytest.mark.parametrize("positioned", [True, False])
def test_a_disk_that_fails(monkeypatch, positioned):
    """A process has nothing at its address 0, and says so as a broken disk does."""
    if not positioned:
        monkeypatch.delattr(os, "preadv", raising=False)
    path = Path("/proc/self/mem")
    with path.open("rb") as file, pytest.raises(FileError, match="mem could not be read: Input/output error"):
        header.read_into(memoryview(bytearray(1)), file, path, 0)


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_whatever_ends_the_block_ends_the_readers(shards, monkeypatch, error):
    cut(monkeypatch, 64)
    names = list(shards.spans)
    with pytest.raises(error), tensors.streamed(shards, "cpu", names) as get:
        get(names[0])
        assert readers()
        raise error
    assert not readers()


# Whole networks


def states(variant):
    models = load_flux(variant, dtype=torch.float32), load_flux(variant, format="fp8"), load_autoencoder(variant)
    return [model.state_dict() for model in models]


def as_official(flux, ae):
    return {"model": flux, "ae": ae}


def as_diffusers(flux, ae):
    return {"model": to_diffusers(flux, DEV.params), "ae": to_diffusers(ae, DEV.ae_params)}


def all_in_one(flux, ae):
    whole = {f"model.diffusion_model.{name}": x for name, x in flux.items()}
    return {"model": whole | {f"vae.{name}": x for name, x in ae.items()}}


def with_newer_norms(flux, ae):
    """As ComfyUI saves since February 2026."""
    return {"model": {name.replace("_norm.scale", "_norm.weight"): x for name, x in flux.items()}, "ae": ae}


def in_fp8(flux, ae):
    """ComfyUI's older scales behind the weights of blocks."""
    coded = {}
    for name, x in flux.items():
        if "blocks" in name and name.endswith("weight"):
            coded |= {name: x.to(torch.float8_e4m3fn), f"{name[:-6]}scale_weight": torch.tensor(0.5)}
        else:
            coded[name] = x
    return {"model": coded, "ae": ae}


@pytest.mark.parametrize("layout", [as_official, as_diffusers, all_in_one, with_newer_norms, in_fp8])
def test_every_layout_gives_the_same_network_either_way(tmp_path, monkeypatch, layout):
    flux, ae = random_weights(Flux(DEV.params)).state_dict(), random_weights(AutoEncoder(DEV.ae_params)).state_dict()
    files = {}
    for part, state in layout(flux, ae).items():
        files[part] = str(tmp_path / f"{part}.safetensors")
        write_safetensors(tmp_path / f"{part}.safetensors", state)
    variant = replace(DEV, files=files | {"ae": files.get("ae", files["model"])})
    by_mapping = states(variant)
    monkeypatch.setattr(read, "opened", tensors.streamed)
    cut(monkeypatch, 10_000)
    for found, expected in zip(states(variant), by_mapping, strict=True):
        same(found, expected)


@pytest.mark.parametrize("part", ["t5", "clip"])
def test_text_encoders_are_the_same_either_way(small, part, monkeypatch):
    path = getattr(text_files(small), part)
    load = partial(encoders.load_encoder, part, path, small, "cpu", torch.bfloat16)
    by_mapping = load().state_dict()
    monkeypatch.setattr(encoders, "opened", tensors.streamed)
    cut(monkeypatch, 10_000)
    same(load().state_dict(), by_mapping)
    in_file = mapped(find_source(path))
    assert sum(torch.equal(by_mapping[name], in_file[name].bfloat16()) for name in in_file if name in by_mapping) > 10


def test_a_file_is_read_from_its_start_to_its_end(tmp_path, monkeypatch):
    path, order = tmp_path / "model.safetensors", []
    write_safetensors(path, dict(sorted(random_weights(Flux(DEV.params)).state_dict().items())))

    def watched(source, device, names):
        order.extend(source.spans[name].start for name in names)
        return tensors.streamed(source, device, names)

    monkeypatch.setattr(read, "opened", watched)
    load_flux(replace(DEV, files={"model": str(path)}))
    assert order == sorted(span.start for span in find_source(path).spans.values())


def drawn(path, change=lambda state: state):
    """A small FLUX.1-dev's row with random weights, in bf16, in a file."""
    state = random_weights(Flux(DEV.params)).bfloat16().state_dict()
    write_safetensors(path, change(dict(state)))
    return replace(DEV, files={"model": str(path)})


def test_reading_begins_before_there_is_a_network(tmp_path, monkeypatch):
    row = drawn(tmp_path / "model.safetensors")
    monkeypatch.setattr(read, "opened", tensors.streamed)
    cut(monkeypatch, 1000)
    seen = []

    def late(params):
        seen.append(len(readers()))
        return Flux(params)

    monkeypatch.setattr(read, "Flux", late)
    load_flux(row)
    assert seen == [4] and not readers()


@pytest.mark.parametrize(
    "change",
    [
        lambda state: {name: x for name, x in state.items() if "txt_in" not in name},
        lambda state: state | {"extra": torch.ones(2), "txt_in.weight": torch.ones(3, 4)},
        lambda state: state | {"txt_in.bias": state["txt_in.bias"].to(torch.int32)},
        lambda state: {
            name: x for name, x in to_diffusers(state, DEV.params).items() if "context_embedder" not in name
        },
        lambda state: dict(random_weights(AutoEncoder(DEV.ae_params)).state_dict()),
        lambda state: {"something": torch.ones(1)},
    ],
)
def test_a_wrong_file_is_told_in_the_same_words_and_hardly_read(tmp_path, monkeypatch, change):
    row, count, real = drawn(tmp_path / "model.safetensors", change), [0], header.read_into
    with pytest.raises(FileError) as by_mapping:
        load_flux(row)

    def counted(memory, *where):
        count[0] += len(memory)
        real(memory, *where)

    monkeypatch.setattr(read, "opened", tensors.streamed)
    monkeypatch.setattr(stream, "read_into", counted)
    cut(monkeypatch, 1000)
    with pytest.raises(FileError) as by_reading:
        load_flux(row)
    assert str(by_reading.value) == str(by_mapping.value)
    assert count[0] <= 3 * 1000 and not readers()


@pytest.mark.parametrize("fp8", [False, True])
def test_what_was_read_is_what_the_network_holds(tmp_path, monkeypatch, fp8):
    """The tensor itself where nothing had to be computed; all of it frozen, in evaluation, and each for itself."""
    row, taken = drawn(tmp_path / "model.safetensors"), {}

    @contextmanager
    def watched(*args):
        with tensors.streamed(*args) as get:
            yield lambda name: taken.setdefault(name, get(name))

    monkeypatch.setattr(read, "opened", watched)
    monkeypatch.setattr(Fp8Linear, "scales_on", lambda self, device: device.type == "cpu")
    model = load_flux(row, format="fp8" if fp8 else None)
    state = model.state_dict()
    kept = [name for name in taken if state[name].dtype == torch.bfloat16]
    assert len(kept) == len(taken) - fp8 * sum(isinstance(one, Fp8Linear) for one in model.modules())
    assert all(state[name].data_ptr() == taken[name].data_ptr() for name in kept)
    assert len({x.data_ptr() for x in state.values()}) == len(state)
    assert not any(x.requires_grad or x.is_meta for x in state.values())
    assert not any(x.requires_grad for x in model.parameters()) and len(list(model.parameters())) == len(taken)
    assert not any(one.training for one in model.modules())
    assert all(one.scaled for one in model.modules() if isinstance(one, Fp8Linear))  # not as it was on meta
    if fp8:
        plain = load_flux(row)
        quantize(plain)
        same(state, plain.state_dict())


# Memory on the device


def test_a_block_that_there_is_no_room_for_is_no_error(monkeypatch):
    asked = []

    def full(size, **options):
        asked.append(size)
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch, "empty", full)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 700)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 100)
    tensors.reserve("cuda", [1, 512, 513])
    assert asked == [4 * 512 - 600]
    tensors.reserve("cpu", [1])
    assert len(asked) == 1


def test_the_block_is_as_large_as_the_network(tmp_path, monkeypatch):
    row, asked = drawn(tmp_path / "model.safetensors"), []
    monkeypatch.setattr(read, "reserve", lambda device, sizes: asked.append(sum(sizes)))
    state = load_flux(row).state_dict()
    assert asked.pop() == sum(x.nbytes for x in state.values())
    state = load_flux(row, format="fp8").state_dict()
    coded = [x for x in state.values() if x.dtype == torch.float8_e4m3fn]
    scales = sum(x.nbytes for name, x in state.items() if name.endswith("weight_scale"))  # small: from elsewhere
    assert asked.pop() == sum(x.nbytes for x in state.values()) - scales + 8 * max(x.numel() for x in coded)


@pytest.mark.gpu
def test_the_block_is_cut_into_the_tensors():
    sizes = [n << 20 for n in (3, 30, 7, 64, 5)]
    torch.cuda.empty_cache()
    tensors.reserve("cuda", sizes)
    held = torch.cuda.memory_reserved()
    kept = [torch.empty(size, dtype=torch.uint8, device="cuda") for size in sizes]
    assert torch.cuda.memory_reserved() == held >= sum(x.nbytes for x in kept)
    tensors.reserve("cuda", [2**50])  # a petabyte


@pytest.mark.gpu
def test_a_buffer_is_not_filled_anew_before_its_copy_is_done(shards, monkeypatch):
    """The device sleeps before each copy, so a reader that did not wait for it would be first."""
    cut(monkeypatch, 1000, buffers=2)
    expected = mapped(shards)
    names = sorted(expected, key=shards.spans.__getitem__)
    found = {}
    with tensors.streamed(shards, "cuda", names) as get:
        for name in names:
            torch.cuda._sleep(2_000_000)
            found[name] = get(name)
    same(found, expected)
