"""Out of memory, wherever it happens: one step down, told in one line, and the same picture (users.md 4c, row 27)."""

import gc
import resource
import subprocess
import sys
import weakref

import numpy as np
import pytest
import torch
from card import release
from PIL import Image

import flux_core.pipeline
from flux_core.commands.stepwise import Stepwise
from flux_core.device import choice as device
from flux_core.errors import MemoryShortage
from flux_core.main import main
from flux_core.methods.stable_flow import Editing
from flux_core.model import strips as tiles
from flux_core.pipeline import Pipeline, load_pipeline
from flux_core.request.generation import GenerationRequest

DEVICE = torch.device("cpu", 0)
"""the CPU by another name: parts can go away from it"""
FAST = {"width": 64, "height": 48, "num_steps": 3, "force": True}
INIT = Image.radial_gradient("L").convert("RGB")
CUDA = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 23.65 GiB of which …"


@pytest.fixture(scope="module", autouse=True)
def one_thread_throughout():
    """Also for the pictures that are drawn once for all tests: more threads may change last bits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Shortage:
    """Stands before a method of a part: some of its calls run out of memory, the others go through."""

    def __init__(self, owner, name: str, *failing: int, error: Exception | None = None) -> None:
        self.inner, self.failing, self.calls = getattr(owner, name), failing, 0
        self.error = error or torch.OutOfMemoryError(CUDA)
        setattr(owner, name, self)

    def __call__(self, *args, **kwargs):
        self.calls += 1
        if self.calls - 1 in self.failing:
            raise self.error
        return self.inner(*args, **kwargs)


@pytest.fixture(scope="module")
def loaded():
    return load_pipeline("flux-mini", "cpu", "float32")


@pytest.fixture
def pipeline(loaded):
    """On a device, with nothing known and nothing stepped down; what a test puts into its parts goes away again."""
    yield Pipeline(loaded.variant, loaded.components, DEVICE, torch.float32)
    for module in (loaded.model, loaded.ae, loaded.ae.encoder, loaded.ae.decoder, loaded.t5.ready(), loaded.clip.model):
        for name in ("forward", "encode", "decode"):
            vars(module).pop(name, None)


def draw(pipeline, **fields) -> Image.Image:
    return pipeline.generate("a red apple", 1, **{**FAST, **fields})[0]


@pytest.fixture(scope="module")
def pictures(loaded):
    """Without any shortage: from words, and from a picture."""
    return {"words": draw(loaded), "init": draw(loaded, init_image=INIT, strength=0.5)}


@pytest.mark.parametrize(
    ("part", "call"),
    [("t5", 0), ("clip", 0), ("model", 0), ("model", 2)],
    ids=["T5", "CLIP", "first step", "last step"],
)
def test_while_denoising_the_parts_take_turns_and_no_bit_changes(pipeline, pictures, capsys, part, call):
    module = getattr(pipeline, part)
    short = Shortage(getattr(module, "model", module), "forward", call)
    assert draw(pipeline).tobytes() == pictures["words"].tobytes()
    err = capsys.readouterr().err
    assert err == (
        "out of memory on cpu:0 while drawing 64x48 pixels: starting again, and from now on text encoders, "
        "transformer and autoencoder take turns there (--offload)\n"
    )
    assert (pipeline.fallback.offload, pipeline.fallback.vae_tiling) == (True, False)
    assert short.calls == call + 1 + (3 if part == "model" else 1)
    assert draw(pipeline).tobytes() == pictures["words"].tobytes() and capsys.readouterr().err == ""


def same(ours: Image.Image, theirs: Image.Image) -> bool:
    """But for pixels that lie halfway between two levels."""
    apart = np.abs(np.array(ours, int) - np.array(theirs, int))
    return apart.max() <= 1 and (apart > 0).mean() < 0.001


@pytest.mark.parametrize("way", ["encode", "decode"])
def test_the_autoencoder_goes_in_strips(pipeline, pictures, capsys, monkeypatch, way):
    monkeypatch.setattr(tiles, "ROWS", 2)
    short, steps = Shortage(getattr(pipeline.ae, f"{way}r"), "forward", 0), Shortage(pipeline.model, "forward")
    picture = draw(pipeline, init_image=INIT, strength=0.5)
    assert same(picture, pictures["init"])
    err = capsys.readouterr().err
    assert err.startswith(f"out of memory on cpu:0 while {way[:-1]}ing 64x48 pixels: ") and err.count("\n") == 1
    assert "--vae-tiling" in err and not pipeline.fallback.offload
    assert steps.calls == 2, "what was denoised is kept"
    again = draw(pipeline, init_image=INIT, strength=0.5)
    assert same(again, picture)  # whose init image was encoded whole, if memory ran out in decoding
    assert again.tobytes() == picture.tobytes() if way == "encode" else pipeline.fallback.vae_tiling
    assert draw(pipeline, init_image=INIT, strength=0.5).tobytes() == again.tobytes()
    assert short.calls == 1 and capsys.readouterr().err == ""


def test_where_strips_are_not_enough_the_others_leave(pipeline, pictures, capsys, monkeypatch):
    Shortage(pipeline.ae, "decode", 0)
    monkeypatch.setattr(tiles, "decode", tiles.decode)
    Shortage(tiles, "decode", 0)
    assert same(draw(pipeline), pictures["words"])
    first, second = capsys.readouterr().err.splitlines()
    assert "--vae-tiling" in first and "--offload" in second
    assert pipeline.fallback.offload and pipeline.fallback.vae_tiling


@pytest.mark.parametrize(("owner", "name", "while_"), [("model", "forward", "drawing"), ("ae", "decode", "decoding")])
def test_under_the_last_rung_is_exit_code_5(pipeline, monkeypatch, capsys, tmp_path, owner, name, while_):
    monkeypatch.setattr(flux_core.pipeline, "load_pipeline", lambda *_: pipeline)
    monkeypatch.setattr(tiles, "decode", lambda ae, z: ae.decode(z))
    short = Shortage(getattr(pipeline, owner), name, 0, 1, 2)
    flags = ["--width=64", "--height=48", "--steps=3", "--force"]
    assert main(["--prompt", "a red apple", *flags, "--output-dir", str(tmp_path)]) == 5
    *told, error = capsys.readouterr().err.splitlines()
    assert short.calls == len(told) + 1 == (2 if owner == "model" else 3)
    assert error == (
        f"error: out of memory on cpu:0 while {while_} 64x48 pixels: 2.00 GiB more were asked for. Next: choose a "
        "smaller --width and --height, a smaller --dtype (nf4, then int8 or fp8, then bfloat16, then float32), "
        "or another --device"
    )
    assert list(tmp_path.iterdir()) == []


def test_on_the_cpu_there_is_nowhere_to_go(loaded, pipeline):
    pipeline.fallback.device = torch.device("cpu")
    short = Shortage(pipeline.model, "forward", 0, 1)
    with pytest.raises(MemoryShortage):
        draw(pipeline)
    assert short.calls == 1


def test_other_errors_are_not_tried_again(pipeline):
    short = Shortage(pipeline.model, "forward", 0, error=RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    with pytest.raises(RuntimeError, match="mat1"):
        draw(pipeline)
    assert short.calls == 1


def test_steps_are_told_again_and_their_pictures_drawn_once(pipeline, pictures, tmp_path):
    seen, request = [], GenerationRequest(prompt="a red apple", seed=1, **FAST)
    stepwise = Stepwise(pipeline, request, tmp_path)
    Shortage(pipeline.model, "forward", 2)

    def on_step(step):
        seen.append(step.index)
        stepwise(step)

    assert pipeline.draw(request, None, on_step).tobytes() == pictures["words"].tobytes()
    assert seen == [0, 1, 0, 1, 2]
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"seed_1_step{i}of3.png" for i in (1, 2, 3)]


@pytest.mark.parametrize(("part", "name", "call"), [("model", "forward", 1), ("denoiser", "seen", 0)])
def test_editing_steps_down_too(pipeline, loaded, part, name, call):
    """Also while references are encoded."""
    request = GenerationRequest(prompt="a red apple", seed=1, **FAST)
    plain = Editing(loaded, request, ["a car"], ["layer.0"]).generated()
    job = Editing(pipeline, request, ["a car"], ["layer.0"])
    Shortage(getattr(pipeline, part), name, call)
    assert torch.equal(job.generated(), plain) and pipeline.fallback.offload


def test_a_model_that_does_not_fit_whole_is_loaded_to_the_cpu(monkeypatch, capsys, pictures):
    homes, load = [], flux_core.pipeline.components.load_flux

    def too_large(variant, home, *rest):
        homes.append(home)
        if home == DEVICE:
            raise torch.OutOfMemoryError(CUDA)
        return load(variant, home, *rest)

    monkeypatch.setattr("flux_core.pipeline.components.load_flux", too_large)
    monkeypatch.setattr("flux_core.pipeline.load.pick_device", lambda _: DEVICE)
    pipeline = load_pipeline("flux-mini", "cuda", "float32")
    assert homes == [DEVICE, torch.device("cpu")] and pipeline.fallback.offload
    assert "while loading flux-mini: " in capsys.readouterr().err
    assert draw(pipeline).tobytes() == pictures["words"].tobytes()


def test_a_pipeline_that_is_dropped_leaves_its_memory_at_once():
    pipeline = load_pipeline("flux-mini", "cpu", "float32")
    draw(pipeline)
    parts = [weakref.ref(x) for x in (pipeline.model, pipeline.ae, pipeline.t5.model, pipeline.clip.model)]
    gc.disable()
    try:
        del pipeline
        assert [part() is None for part in parts] == [True] * 4
    finally:
        gc.enable()


@pytest.mark.parametrize(
    "text",
    [
        CUDA,
        "CUDA error: out of memory",
        "MPS backend out of memory (MPS allocated: 8.00 GB)",
        "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "DefaultCPUAllocator: can't allocate memory: you tried to allocate 16 bytes",
        "DefaultCPUAllocator: not enough memory: you tried to allocate 16 bytes",
    ],
)
def test_the_texts_of_shortages(text):
    assert device.is_out_of_memory(RuntimeError(text))


def test_a_gpu_says_who_has_its_memory(monkeypatch):
    gib = 2**30
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (gib // 2, 24 * gib))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 22 * gib)
    sizes = "2.00 GiB more were asked for; of 24.0 GiB 22.0 are held here, 1.5 by .* other programs, 0.5 are free. Next"
    with pytest.raises(MemoryShortage, match=sizes), device.memory_errors("drawing", torch.device("cuda:0")):
        raise torch.OutOfMemoryError(CUDA)


PEAK = (
    "import re, sys; from flux_core.main import main; code = main(sys.argv[1:]); "
    "print(re.search(r'VmPeak:\\s+(\\d+)', open('/proc/self/status').read())[1]); sys.exit(code)"
)


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits of address space are Linux's")
def test_a_process_that_really_runs_out_while_decoding(tmp_path):
    """A limit between what the plain decoder and the strips take, at 1024x1024, and one below both."""

    def peak(*flags, limit=resource.RLIM_INFINITY, code=0):
        words = ["--prompt", "x", "--seed", "1", "--steps", "1", "-W", "1024", "-H", "1024", "--force", *flags]
        done = subprocess.run(
            [sys.executable, "-c", PEAK, *words, "--threads", "1", "--output-dir", str(tmp_path)],
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (limit, limit)),
            capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == code, done.stderr
        return 1024 * int(done.stdout.split()[-1]), done.stderr

    (plain, _), (strips, _) = peak(), peak("--vae-tiling")
    assert strips < 0.9 * plain
    _, told = peak(limit=(plain + strips) // 2)
    assert told.startswith("out of memory on cpu while decoding") and "strip by strip" in told
    _, told = peak(limit=int(0.9 * strips), code=5)
    assert "bytes more were asked for. Next: choose a smaller" in told
    whole, asked, forced = (np.array(Image.open(path), int) for path in sorted(tmp_path.glob("*.png")))
    assert (forced == asked).all()
    assert np.abs(forced - whole).mean() < 0.5  # so large, torch's own GroupNorm is off by 4e-4 on a CPU


def test_a_compiled_model_is_free_when_a_test_on_a_card_ends():
    """What `tests/card.py` is for: without its call such a model stays, and with it the memory of a card."""
    gc.disable()
    try:
        model = torch.nn.Linear(4, 4)
        model.compile(backend="eager")
        model(torch.ones(1, 4))
        weight = weakref.ref(model.weight)
        del model
        assert weight() is not None
        release()
        assert weight() is None
    finally:
        gc.enable()


@pytest.mark.gpu
def test_a_gpu_that_really_runs_out_while_decoding(capsys):
    """A limit between what the decoder takes whole and in strips, at 2048x2048. In bf16: cuDNN's workspace for fp32
    convolutions is as large as the card allows."""
    big = {"width": 2048, "height": 2048, "num_steps": 1, "force": True}
    card, peaks, drawn = torch.device("cuda:0"), [], []
    before = torch.cuda.memory_reserved(card)  # by what other tests' modules hold
    for vae_tiling in (False, True):
        pipeline = load_pipeline("flux-mini", card, "bfloat16", vae_tiling=vae_tiling)
        torch.cuda.reset_peak_memory_stats(card)
        drawn.append(draw(pipeline, **big))
        peaks.append(torch.cuda.max_memory_reserved(card) - before)
        del pipeline
        device.empty_device_cache(card)
        assert torch.cuda.memory_reserved(card) - before < 2**28, "a model that is dropped gives its memory back"
    assert peaks[1] < 0.8 * peaks[0], peaks
    pipeline = load_pipeline("flux-mini", card, "bfloat16")
    try:
        limit = before + sum(peaks) / 2
        torch.cuda.set_per_process_memory_fraction(limit / torch.cuda.mem_get_info(card)[1], card)
        assert np.abs(np.array(draw(pipeline, **big), int) - np.array(drawn[0], int)).mean() < 1
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, card)
    assert pipeline.fallback.vae_tiling and "while decoding 2048x2048" in capsys.readouterr().err
