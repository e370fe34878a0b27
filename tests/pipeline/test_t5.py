"""T5 in a format and on a device of its own, freed after encoding, and its embeddings kept on the disk."""

import gc
import json
import re
import shutil
import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from flux_core.errors import UsageError
from flux_core.images.metadata import read_request
from flux_core.linears.frozen import Frozen
from flux_core.main import main
from flux_core.pipeline import Pipeline, load_pipeline
from flux_core.pipeline.denoiser import Denoiser

pytestmark = pytest.mark.usefixtures("one_thread", "small")
FAST = {"num_steps": 1, "width": 32, "height": 32, "force": True}
FLAGS = ["--prompt", "a red apple", "--steps", "1", "--width", "32", "--height", "32", "--force"]
DEVICE, CPU = torch.device("cpu", 0), torch.device("cpu")
"""the CPU by another name, as in `test_offload.py`"""


def draw(pipeline, prompt="a red apple", **fields):
    return pipeline.generate(prompt, 1, **FAST, **fields)[0].tobytes()


def drawn(capsys, *flags):
    """The files that a command drew."""
    assert main([*FLAGS, *flags]) == 0
    return [Path(line) for line in capsys.readouterr().out.splitlines() if line.endswith(".png")]


@pytest.mark.parametrize("format", ["fp8", "int8", "nf4"])
def test_t5_has_a_format_of_its_own(format):
    """Its embeddings, norms and `wo` stay, and the transformer's Linears are untouched."""
    pipeline = load_pipeline("flux-mini", "cpu", "float32", t5_dtype=format)
    frozen = {name for name, layer in pipeline.t5.model.named_modules() if isinstance(layer, Frozen)}
    linears = {name for name, layer in pipeline.t5.model.named_modules() if isinstance(layer, nn.Linear)}
    assert frozen and all(name.endswith(".wo") for name in linears) and linears
    assert not any(isinstance(layer, Frozen) for layer in pipeline.model.modules())
    assert (pipeline.precision, pipeline.t5_precision) == ("float32", format)
    whole = load_pipeline("flux-mini", "cpu", "float32")
    assert whole.t5_precision == "float32" and draw(whole) != draw(pipeline)


def test_a_request_records_it_and_is_drawn_with_it(capsys):
    (path,) = drawn(capsys, "--t5-dtype", "int8", "--seed", "1")
    assert read_request(path).t5_dtype == "int8" and read_request(path).dtype == "float32"
    assert main(["repeat", str(path), "--force"]) == 0
    assert "byte for byte" in capsys.readouterr().out
    with pytest.raises(UsageError, match="the request is for T5 in int8, but it is loaded in float32"):
        load_pipeline("flux-mini", "cpu").draw(read_request(path))


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--t5-dtype", "gguf"], "--t5-dtype gguf means as a GGUF file has it, and .*t5 is none"),
        (["--t5-dtype", "int3"], "--t5-dtype must be one of auto, bfloat16"),
        (["--t5-device", "cuda:7"], "--t5-device must be one of auto, cpu"),
    ],
)
def test_what_there_is_not_is_refused(capsys, flags, said):
    assert main([*FLAGS, *flags]) == 2
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 1 and re.search(said, err)


def test_on_the_cpu_it_never_leaves_it(monkeypatch):
    """Drawn the same, with and without taking turns; and the picture says where its prompt was encoded."""
    loaded = load_pipeline("flux-mini", "cpu", "float32")
    expected, moves, move = draw(loaded), [], nn.Module.to
    loaded.t5.home = CPU
    monkeypatch.setattr(nn.Module, "to", lambda module, *x, **y: (moves.append(module), move(module, *x, **y))[1])
    for offload in (False, True):
        pipeline = Pipeline(loaded.variant, loaded.components, DEVICE, torch.float32, offload=offload)
        assert draw(pipeline) == expected
    assert pipeline.clip in moves and pipeline.t5 not in moves


def test_it_is_freed_before_the_first_step(monkeypatch, capsys):
    """By a command, which knows of all its texts. Somebody else's pipeline keeps it until `free_t5`."""
    loaded, seen = [], []

    def load(*args, **fields):
        pipeline = load_pipeline(*args, **fields)
        loaded.append(weakref.ref(pipeline.t5.model))
        return pipeline

    velocity = Denoiser.velocity
    monkeypatch.setattr("flux_core.pipeline.load_pipeline", load)
    monkeypatch.setattr(Denoiser, "velocity", lambda *x, **y: (seen.append(loaded[0]()), velocity(*x, **y))[1])
    gc.disable()
    try:
        (path,) = drawn(capsys, "--seed", "1")
    finally:
        gc.enable()
    assert seen == [None]
    monkeypatch.undo()
    pipeline = load_pipeline("flux-mini", "cpu")
    first = draw(pipeline)
    assert pipeline.t5.model is not None
    pipeline.free_t5()
    assert pipeline.t5.model is None and draw(pipeline) == first  # the prompt is remembered
    assert pipeline.t5.model is None
    assert draw(pipeline, "a pig") != first and pipeline.t5.model is not None
    assert path.is_file()


def kept_in(folder):
    return sorted(folder.glob("*.safetensors"))


def test_embeddings_are_kept_and_draw_the_same_without_t5(tmp_path, capsys):
    folder, plain = tmp_path / "kept", load_pipeline("flux-mini", "cpu")
    expected = {prompt: draw(plain, prompt) for prompt in ("a red apple", "a pig")}
    first = load_pipeline("flux-mini", "cpu", keep_embeddings=folder)
    assert {prompt: draw(first, prompt) for prompt in expected} == expected
    files = kept_in(folder)
    assert len(files) == 2 and "apple" not in "".join(map(str, files))
    second = load_pipeline("flux-mini", "cpu", keep_embeddings=folder)
    assert {prompt: draw(second, prompt) for prompt in expected} == expected
    assert second.t5.model is None and kept_in(folder) == files
    (path,) = drawn(capsys, "--seed", "1", "--keep-embeddings", str(folder))
    assert kept_in(folder) == files and path.is_file()


def test_what_an_embedding_depends_on_names_its_file(tmp_path, small_root):
    """Precision, T5's format, a byte of the tokenizer, a LoRA: each encodes anew."""

    def number(**fields):
        draw(load_pipeline("flux-mini", "cpu", keep_embeddings=tmp_path, **fields))
        return len(kept_in(tmp_path))

    assert number() == number() == 1
    assert number(t5_dtype="int8") == number(t5_dtype="int8") == 2
    assert number(dtype="bfloat16") == 3
    torch.set_num_threads(2)
    try:
        assert number() == 4
    finally:
        torch.set_num_threads(1)


def test_other_bytes_of_an_encoder_are_another_file(tmp_path, small_root):
    model = tmp_path / "own"
    shutil.copytree(small_root / "flux-mini", model)
    kept = tmp_path / "kept"
    files = {"model": model / "flux-mini.safetensors", "t5xxl": model / "t5", "clip_l": model / "clip"}
    draw(load_pipeline("flux-mini", "cpu", keep_embeddings=kept, **files))
    tokenizer = next((model / "t5").glob("tokenizer.json"))
    found = json.loads(tokenizer.read_text())
    tokenizer.write_text(json.dumps(found, indent=1))
    draw(load_pipeline("flux-mini", "cpu", keep_embeddings=kept, **files))
    assert len(kept_in(kept)) == 2


def test_a_damaged_file_is_written_again(tmp_path, capsys):
    first = draw(load_pipeline("flux-mini", "cpu", keep_embeddings=tmp_path))
    (path,) = kept_in(tmp_path)
    whole = path.read_bytes()
    for damaged in (b"", whole[:100], whole[:-1] + bytes([whole[-1] ^ 1])):
        path.write_bytes(damaged)
        assert draw(load_pipeline("flux-mini", "cpu", keep_embeddings=tmp_path)) == first
        assert f"{path} is damaged" in capsys.readouterr().err
        assert load_file(path).keys() == {"txt", "vec", "sha256"} and path.read_bytes() == whole


def test_a_folder_that_cannot_be_written_is_said_before_anything_loads(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main([*FLAGS, "--keep-embeddings", str(tmp_path / "file")]) == 6
    assert (
        capsys.readouterr().err
        == f"error: cannot write {tmp_path / 'file'}: a file is in the way: choose another folder\n"
    )
