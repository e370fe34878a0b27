"""Steps from a CUDA graph: the same bits, and never where Python waits inside a forward."""

from dataclasses import dataclass

import pytest
import torch
from golden_files import flux_of, read
from tiny import tiny_pipeline

from flux_core import load_pipeline
from flux_core.hooks import Capture
from flux_core.kernels.attention import in_eight_bits
from flux_core.model.ops import PLAIN
from flux_core.sampling import flow as sampling
from flux_core.sampling import graph as replay
from flux_core.sampling.graph import has_user_code, is_worth_it

SMALL = {"width": 64, "height": 48, "num_steps": 5, "force": True}


def hooked(model):
    model.single_blocks[0].linear1.register_forward_hook(lambda *_: None)


def hooked_before(model):
    model.txt_in.register_forward_pre_hook(lambda *_: None)


def patched(model):
    model.double_blocks[0].forward = model.double_blocks[0].forward


def other_function(model):
    model.double_blocks[0].ops = PLAIN._replace(attend=lambda q, k, v: PLAIN.attend(q, k, v))


def other_module(model):
    class Louder(torch.nn.Linear):
        pass

    model.img_in = Louder(4, 4)


def other_method(model):
    model.final_layer.modulation = lambda vec: type(model.final_layer).modulation(model.final_layer, vec)


CHANGES = [hooked, hooked_before, patched, other_function, other_module, other_method]


@pytest.mark.parametrize("change", CHANGES)
def test_what_somebody_put_into_a_model_is_found(change):
    model = tiny_pipeline().model
    assert not has_user_code(model)
    change(model)
    assert has_user_code(model)


def test_a_class_that_somebody_patched_is_found(monkeypatch):
    forward = torch.nn.Linear.forward
    monkeypatch.setattr(torch.nn.Linear, "forward", lambda self, x: forward(self, x))
    assert has_user_code(tiny_pipeline().model)


def test_a_graph_is_for_some_steps_of_few_tokens_on_cuda():
    model, most, few = tiny_pipeline().model, replay.TOKENS, replay.STEPS
    cuda = torch.device("cuda")
    assert is_worth_it(model, cuda, most, few)
    assert not is_worth_it(model, cuda, most + 1, few) and not is_worth_it(model, cuda, most, few - 1)
    assert not is_worth_it(model, torch.device("cpu"), most, few)
    kept = model.double_blocks[0].ops
    model.double_blocks[0].ops = in_eight_bits(kept, "int8")
    assert is_worth_it(model, cuda, replay.MORE_LAUNCHES, few) and not is_worth_it(model, cuda, most, few - 1)
    model.double_blocks[0].ops = kept
    hooked(model)
    assert not is_worth_it(model, cuda, most, few)


class ByHand(replay.Graph):
    """Where there is no CUDA: the recorded forward once more, on the tensors that it was recorded with."""

    def __init__(self, forward, x, sigma, mods):
        self.x, self.mods, self.sigma = x.clone(), mods.map(replay._copy), sigma
        self.graph, self.forward = self, forward

    def replay(self, x=None):
        if x is not None:
            return super().replay(x)
        self.velocity = self.forward(self.x, 0.0, self.mods)  # whatever sigma: its modulation counts


@torch.no_grad()
@pytest.mark.parametrize("order", [(1.0, 0.8, 0.6, 0.3, 0.1), (1.0, 0.8, 0.8, 0.3, 1.0, 0.5)])
def test_every_sigma_meets_its_modulation(monkeypatch, order):
    """Along the schedule (1, 0.8, 0.6, 0.3, 0.1), and out of its order, twice, and beside it."""
    golden = read("transformer_dev")
    model, inputs = flux_of(golden), golden.group("in.")
    conditions = [inputs[name] for name in ("img_ids", "txt", "txt_ids", "y", "guidance")]
    monkeypatch.setattr(sampling, "is_worth_it", lambda *_: True)
    monkeypatch.setattr(replay, "Graph", ByHand)
    plain = sampling.flow_velocity(model, *conditions)
    replayed = sampling.flow_velocity(model, *conditions, sigmas=(1.0, 0.8, 0.6, 0.3, 0.1), replay=True)
    for sigma in order:
        x = sigma * inputs["img"]
        assert torch.equal(replayed(x, sigma), plain(x, sigma))


@dataclass
class Draws:
    """Pictures of flux-mini on a card, and the forwards that Python made for the last of them."""

    pipeline: object
    forwards: int = 0

    def __call__(self, **fields):
        self.forwards = 0
        embed = type(self.pipeline.model)._blocks

        def counted(*args):
            self.forwards += 1
            return embed(*args)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(type(self.pipeline.model), "_blocks", counted)
            return self.pipeline.generate("a red apple", 3, **{**SMALL, **fields})[0].tobytes()


@pytest.fixture(scope="module", params=["bfloat16", "fp8"])
def draws(request):
    return Draws(load_pipeline("flux-mini", "cuda", request.param))


@pytest.mark.gpu
def test_a_replayed_picture_is_the_same_to_the_bit(draws, monkeypatch):
    replayed, again, made = draws(), draws(), draws.forwards
    monkeypatch.setattr(replay, "TOKENS", 0)
    assert draws() == replayed == again
    assert (made, draws.forwards) == (2, 5)  # the first step, and the recorded one


@pytest.mark.gpu
@pytest.mark.parametrize("steering", [{"cfg_zero": 1}, {"mimic_scale": 1.5}])
@pytest.mark.parametrize("one_batch", [True, False])
def test_so_is_a_steered_one(draws, monkeypatch, steering, one_batch):
    monkeypatch.setattr(draws.pipeline.denoiser, "one_batch", one_batch)
    fields = {"negative_prompt": "a blue car", "true_cfg_scale": 3.0, **steering}
    replayed = draws(**fields)
    monkeypatch.setattr(replay, "TOKENS", 0)
    assert draws(**fields) == replayed


@pytest.mark.gpu
def test_who_looks_inside_sees_every_step(draws):
    plain, seen, calls = draws(), {}, []
    assert draws(plan=[Capture(sites="double_blocks.0.img.out", into=seen)]) == plain
    assert len(seen) == 5
    handle = draws.pipeline.model.single_blocks[0].register_forward_hook(lambda *_: calls.append(1))
    try:
        assert draws() == plain and len(calls) == 5
    finally:
        handle.remove()


@pytest.mark.gpu
def test_what_cannot_be_recorded_is_drawn_step_by_step(draws, monkeypatch, capsys):
    plain = draws()

    def refuse(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(torch.cuda, "graph", refuse)
    assert draws() == plain and draws.forwards == 5
    assert "could not be recorded as a CUDA graph (CUDA out of memory" in capsys.readouterr().err


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
@pytest.mark.parametrize("dtype", ["bfloat16", "fp8"])
def test_a_second_gpu_draws_the_same(dtype):
    pipelines = [load_pipeline("flux-mini", f"cuda:{i}", dtype) for i in (1, 0)]
    first, second = (Draws(one) for one in pipelines)
    assert first() == second() and first.forwards == second.forwards == 2
    large = {"width": 1024, "height": 1024, "num_steps": 2}
    assert first(**large) == second(**large)


@pytest.mark.gpu
def test_compiled_blocks_are_recorded_too():
    torch._dynamo.reset()
    draws = Draws(load_pipeline("flux-mini", "cuda", "bfloat16", compile=True))
    first, second = draws(), draws()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(replay, "TOKENS", 0)
        assert draws() == first == second
    torch._dynamo.reset()
