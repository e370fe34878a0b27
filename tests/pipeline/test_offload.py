"""`--offload`: whoever computes is on the device, nobody else is, and the picture stays the same."""

import gc
from collections.abc import Iterator

import pytest
import torch
from PIL import Image
from tiny import tiny_pipeline
from torch import nn

import flux_core.pipeline
from flux_core.commands.generate import generate
from flux_core.errors import MemoryShortage
from flux_core.methods.stable_flow import Editing
from flux_core.model import MODULATION
from flux_core.pipeline import Pipeline, load_pipeline
from flux_core.request.generation import GenerationRequest

pytestmark = pytest.mark.usefixtures("one_thread")
DEVICE, CPU = torch.device("cpu", 0), torch.device("cpu")
"""the CPU by another name: tensors work there, and a move to it can be told from one back to "cpu" """
FAST = {"num_steps": 2, "width": 32, "height": 32, "force": True}
TEXT, MODEL, AE = ["t5", "clip"], ["model"], ["ae"]
INIT = Image.radial_gradient("L")


class Stage:
    """A pipeline's parts as the test watches them: who is on the device, and what happened there in which order."""

    def __init__(self, pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
        self.pipeline, self.present, self.events = pipeline, set(), []
        names = {getattr(pipeline, name): name for name in TEXT + AE}
        names[pipeline.model.img_in] = "model"  # it comes layer by layer, since its modulation stays
        sleepers = [one for name, one in pipeline.model.named_modules() if name.endswith(MODULATION)]
        move = nn.Module.to

        def to(module, *args, **kwargs):
            assert module not in sleepers or args[0] == CPU
            if module in names:
                self._moved(names[module], torch.device(args[0]))
            return move(module, *args, **kwargs)

        monkeypatch.setattr(nn.Module, "to", to)
        monkeypatch.setattr(
            "flux_core.pipeline.placement.empty_device_cache", lambda device: self.events.append(f"free {device}")
        )
        for part, name in names.items():
            for module in (part.encoder, part.decoder) if name == "ae" else (part,):
                module.register_forward_pre_hook(lambda *_, name=name: self._works(name))

    def _moved(self, name: str, device: torch.device) -> None:
        if device == DEVICE:
            self.present.add(name)
            self.events.append(f"+{name}")
        else:
            assert device == torch.device("cpu")
            self.present.discard(name)

    def _works(self, name: str) -> None:
        turn = TEXT if name in TEXT else [name]
        assert self.present == set(turn), f"{name} works while {self.present} are on the device"

    def turns(self) -> Iterator[str]:
        """Who came, after memory was given back."""
        for before, event in zip(["", *self.events], self.events, strict=False):
            if event.startswith("+"):
                assert before == f"free {DEVICE}" or event == "+clip", self.events
                yield event[1:]


@pytest.fixture
def stage(small, monkeypatch):
    pipeline = load_pipeline("flux-mini", "cpu", offload=True)
    pipeline.fallback.device = DEVICE
    return Stage(pipeline, monkeypatch)


def test_parts_take_turns_and_give_memory_back_between_them(stage):
    stage.pipeline.generate("a red apple", 1, num_images=2, **FAST)
    assert list(stage.turns()) == [*TEXT, *MODEL, *AE, *MODEL, *AE]


def test_an_init_image_and_pictures_of_steps_are_turns_too(stage):
    pipeline, seen = stage.pipeline, []
    request = GenerationRequest(prompt="x", seed=1, **FAST)

    def look(step):
        seen.append(pipeline.picture(step.x, request))

    pipeline.generate("x", 1, init_image=INIT, strength=1.0, on_step=look, **FAST)
    assert len(seen) == 2 and list(stage.turns()) == [*AE, *TEXT, *MODEL, *AE, *MODEL, *AE]


def test_prompts_are_encoded_in_one_turn(stage, monkeypatch, tmp_path):
    monkeypatch.setattr(flux_core.pipeline, "load_pipeline", lambda *_: stage.pipeline)
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(
        '"a red apple"\n{"prompt": "a car", "negative-prompt": "a pig", "cfg-scale": 2}\n"a green pig"\n'
    )
    size = {key: str(value) for key, value in FAST.items()} | {"force": True}
    generate(prompt_file=str(prompts), offload=True, seed=["1"], output_dir=str(tmp_path), **size)
    assert list(stage.turns()) == [*TEXT, *([*MODEL, *AE] * 3)]


def test_editing_takes_turns(stage):
    editing = Editing(stage.pipeline, GenerationRequest(prompt="a red apple", seed=1, **FAST), ["a car"], ["layer.0"])
    editing.picture(editing.of_photo(INIT.convert("RGB"))[1], 1)
    assert list(stage.turns())[-1] == "ae"


def test_after_a_move_that_failed_nobody_is_believed_to_be_there(stage, monkeypatch):
    pipeline, move = stage.pipeline, nn.Module.to
    pipeline.generate("a red apple", 1, **FAST)

    def too_large(module, *args):
        if module is pipeline.model.img_in and args[0] == DEVICE:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return move(module, *args)

    with monkeypatch.context() as patch:
        patch.setattr(nn.Module, "to", too_large)
        with pytest.raises(MemoryShortage):
            pipeline.generate("a red apple", 1, **FAST)
    pipeline.generate("a red apple", 1, init_image=INIT, **FAST)  # the stage looks on


@pytest.mark.parametrize("fields", [{}, {"init_image": INIT, "strength": 0.5}])
def test_the_pixels_are_the_same(small, fields):
    pictures = [
        load_pipeline("flux-mini", "cpu", offload=offload).generate("a red apple", 1, **FAST, **fields)[0]
        for offload in (False, True)
    ]
    assert pictures[0].tobytes() == pictures[1].tobytes()


def test_without_it_nothing_moves(monkeypatch):
    pipeline = tiny_pipeline()
    monkeypatch.setattr(nn.Module, "to", lambda *_: pytest.fail("moved"))
    pipeline.encode_ahead([GenerationRequest(prompt="x")])
    assert pipeline.t5.calls == 0
    pipeline.generate("x", 1, **FAST)


@pytest.mark.gpu
def test_on_cuda_it_needs_less_memory_for_the_same_pixels():
    peaks, pictures = [], []
    for offload in (False, True):
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        pipeline = load_pipeline("flux-mini", "cuda", "float32", offload)
        pictures.append(pipeline.generate("a red apple", 1, width=64, height=64, num_steps=2, force=True)[0])
        peaks.append(torch.cuda.max_memory_allocated())
        del pipeline
    assert peaks[1] < peaks[0]
    assert pictures[0].tobytes() == pictures[1].tobytes()
