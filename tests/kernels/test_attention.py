"""Which attention the blocks call: that of `--attention`, or one of PyTorch's kernels, each of which attends."""

from contextlib import nullcontext
from importlib.util import find_spec

import pytest
import torch
from golden_files import distance
from tiny import tiny_pipeline

from flux_core import load_pipeline
from flux_core.errors import UsageError
from flux_core.kernels import attention
from flux_core.kernels.attention import (
    AUTO,
    BACKENDS,
    EIGHT,
    attention_for,
    choice,
    fastest,
    milliseconds,
    pick_attention,
)
from flux_core.kernels.eight_bits import FORMS
from flux_core.model import ops
from flux_core.request.fields import ATTENTION


@pytest.mark.parametrize(
    ("ms", "name"),
    [
        ({"own": 0.40, "cudnn": 0.40, "flash": 0.79}, "own"),
        ({"own": 0.40, "cudnn": 0.37}, "own"),  # too near: next time it may be the other way round
        ({"own": 0.79, "cudnn": 0.40, "efficient": 1.5}, "cudnn"),
        ({"own": 0.79, "cudnn": 0.60, "flash": 0.50}, "flash"),
        ({"own": 0.79}, "own"),
    ],
)
def test_another_kernel_only_where_it_wins_clearly(ms, name):
    assert choice(ms) == name


def test_nothing_is_tried_on_a_cpu():
    model = tiny_pipeline().model
    assert attention_for(model.bfloat16(), torch.device("cpu")) is ops.attend


CARD, CPU, BF16 = torch.device("cuda"), torch.device("cpu"), torch.bfloat16


@pytest.fixture
def card(monkeypatch):
    """Makes every card one of that compute capability."""
    return lambda *found: monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: found)


def test_one_table_of_names():
    assert set(EIGHT) == set(FORMS) == set(ATTENTION.choices) - {"auto", "exact"}


def test_by_itself_attention_is_exact_but_where_the_table_says_otherwise(card, monkeypatch):
    card(9, 0)
    assert {pick_attention(asked, "fp8", CARD, BF16, 128) for asked in (None, "auto", "exact")} == {"exact"}
    monkeypatch.setitem(AUTO, ("fp8", 9), "int8")
    assert pick_attention("auto", "fp8", CARD, BF16, 128) == "int8"
    assert pick_attention("exact", "fp8", CARD, BF16, 128) == "exact"
    assert pick_attention("auto", "bfloat16", CARD, BF16, 128) == "exact"
    assert pick_attention("auto", "fp8", CPU, BF16, 128) == "exact"
    assert pick_attention("auto", "fp8", CARD, BF16, 96) == "exact"  # no error where nobody asked


@pytest.mark.parametrize(
    ("capability", "name", "dtype", "head_dim", "words"),
    [
        ((8, 6), "int8", BF16, 128, "int8: the card has compute capability 8.6, it needs 8.9. Next: another card"),
        ((8, 9), "fp8", BF16, 128, "compute capability 8.9, it needs 9.0"),
        ((9, 0), "int8", torch.float32, 128, "models that compute in bf16. Next: --dtype bf16"),
        ((9, 0), "int8", BF16, 96, "no kernels for heads of 96 features"),
        ((9, 0), "fp8", BF16, 128, "not installed. Next: pip install nvidia-cudnn-frontend, or leave --attention out"),
    ],
)
def test_what_a_machine_lacks_for_eight_bits_is_said(card, monkeypatch, capability, name, dtype, head_dim, words):
    card(*capability)
    monkeypatch.setattr(attention, "find_spec", lambda package: None if package == "cudnn" else find_spec(package))
    with pytest.raises(UsageError) as found:
        pick_attention(name, "bfloat16", CARD, dtype, head_dim)
    assert words in str(found.value)


def test_a_cpu_says_so_before_anything_is_loaded():
    with pytest.raises(UsageError, match="--attention int8: cpu has no kernels for it"):
        load_pipeline("flux-mini", "cpu", attention="int8")
    with pytest.raises(UsageError, match="--attention must be one of auto, exact, int8, fp8"):
        load_pipeline("flux-mini", "cpu", attention="sage")


class Mark:
    """A CUDA event of a machine without CUDA."""

    def __init__(self, enable_timing):
        pass

    def record(self):
        pass

    def synchronize(self):
        pass

    def elapsed_time(self, other):
        return 1.0


def refuse(text):
    def attend(q, k, v):
        raise RuntimeError(text)

    return attend


def test_a_kernel_that_takes_no_such_tensors_is_left_out_and_a_shortage_is_raised(monkeypatch):
    monkeypatch.setattr(torch.cuda, "Event", Mark)
    q = torch.ones(1, 2, 3, 4)
    assert milliseconds(ops.attend, q, q, q) == 1.0
    assert milliseconds(refuse("No available kernel. Aborting execution."), q, q, q) is None
    with pytest.raises(RuntimeError, match="ALLOC_FAILED"):
        milliseconds(refuse("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), q, q, q)


def test_a_shortage_during_the_trial_is_forgotten(monkeypatch):
    """The next model is tried again, and gets the kernel that is the fastest."""
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "Event", Mark)
    monkeypatch.setattr(attention, "TOKENS", 8)
    monkeypatch.setitem(BACKENDS, "own", refuse("CUDA out of memory. Tried to allocate 28.00 MiB"))
    cpu = torch.device("cpu")
    fastest.cache_clear()
    with pytest.raises(RuntimeError, match="out of memory"):
        fastest(cpu, torch.float32, 2, 16)
    monkeypatch.undo()
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "Event", Mark)
    monkeypatch.setattr(attention, "TOKENS", 8)
    assert fastest(cpu, torch.float32, 2, 16) is ops.attend
    fastest.cache_clear()


@pytest.mark.gpu
def test_every_way_attends_forward_and_backward():
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 700, 3, 128, device="cuda", dtype=torch.bfloat16).transpose(1, 2) for _ in range(3))
    q.requires_grad_()
    exact = ops.attend(q.float(), k.float(), v.float())
    (truth,) = torch.autograd.grad(exact.square().sum(), q)
    ran = []
    for name, way in BACKENDS.items():
        if milliseconds(way, q.detach(), k, v) is None:
            continue
        found = way(q, k, v)
        assert found.shape == exact.shape and found.dtype == torch.bfloat16
        assert distance(found, exact) < 0.01
        assert distance(torch.autograd.grad(found.square().sum(), q)[0], truth) < 0.03
        ran.append(name)
    assert "own" in ran and len(ran) > 1
    assert fastest(torch.device("cuda"), torch.bfloat16, 24, 128) in BACKENDS.values()
