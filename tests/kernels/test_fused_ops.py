"""Which functions the blocks call, and that changing them keeps two graphs. Needs no Triton."""

import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec

import pytest
import torch
from golden_files import distance, flux_of, read
from torch._dynamo.testing import CompileCounter

from flux_core import kernels
from flux_core.kernels import can_fuse, compiles, describe, fused_ops, install, install_decode, put, put_decode
from flux_core.kernels.attention import BACKENDS
from flux_core.model import AutoEncoder, ae_ops, ops
from flux_core.variants import VARIANTS

GOLDEN = read("transformer_dev")


@pytest.mark.parametrize("device", ["cpu", "mps", "meta"])
def test_a_device_without_triton_keeps_the_plain_functions(device):
    assert not can_fuse(device)
    assert fused_ops(device) is ops.PLAIN
    assert fused_ops(torch.device(device)) is ops.PLAIN


def test_a_card_is_asked_what_it_can_do(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(kernels, "find_spec", lambda name: object())
    for capability, able in (((7, 5), False), ((8, 0), True), ((9, 0), True), ((12, 0), True)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        assert can_fuse("cuda:0") is able
    monkeypatch.setattr(kernels, "find_spec", lambda name: None)
    assert not can_fuse("cuda:0")


def test_nothing_asks_for_triton_where_it_is_not_used():
    code = (
        "import sys; sys.modules['triton'] = None; from flux_core.kernels import fused_ops; "
        "from flux_core.model.ops import PLAIN; assert fused_ops('cpu') is PLAIN; "
        "assert 'flux_core.kernels.fused' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.fixture
def trial(monkeypatch):
    """What the trial of Triton's compiler raises; with nothing it compiles."""
    raises = []

    def modulate(*args):
        if raises:
            raise raises[0]
        return ops.modulate(*args)

    monkeypatch.setattr(kernels, "_triton", lambda: ops.PLAIN._replace(modulate=modulate))
    compiles.cache_clear()
    yield raises
    compiles.cache_clear()


def test_a_shortage_during_the_trial_of_triton_is_raised_and_forgotten(trial, capsys):
    trial.append(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB"))
    with pytest.raises(torch.OutOfMemoryError):
        compiles("cpu")
    trial.clear()
    assert compiles("cpu") and capsys.readouterr().err == ""


def test_a_compiler_that_is_missing_is_told_once(trial, capsys):
    trial.append(RuntimeError("Failed to find C compiler.\nSecond line"))
    assert not compiles("cpu") and not compiles("cpu")
    err = capsys.readouterr().err
    assert err.count("Triton does not compile here (RuntimeError: Failed to find C compiler.): plain functions") == 1


def test_the_trial_draws_no_random_numbers(trial):
    before = torch.get_rng_state()
    assert compiles("cpu") and torch.equal(torch.get_rng_state(), before)


def test_what_computes_has_names():
    model = flux_of(GOLDEN)
    install(model, "cpu")
    assert describe(model) == {"attention": "own", "kernels": "plain"}
    put(model, ops.PLAIN._replace(attend=BACKENDS["flash"], modulate=other_modulate))
    assert describe(model) == {"attention": "flash", "kernels": "other"}
    put(model, ops.PLAIN._replace(attend=lambda q, k, v: ops.attend(q, k, v)))
    assert describe(model) == {"attention": "other", "kernels": "plain"}


def test_a_block_in_another_module_leaves_the_names_as_they_are():
    class Around(torch.nn.Module):
        def __init__(self, block):
            super().__init__()
            self.block, self.ops = block, ["somebody else's"]

    model = flux_of(GOLDEN)
    model.double_blocks[0] = Around(model.double_blocks[0])
    put(model, ops.PLAIN._replace(modulate=other_modulate))
    assert describe(model) == {"attention": "own", "kernels": "other"}
    assert model.double_blocks[0].ops == ["somebody else's"]


def other_modulate(x, shift, scale, consumer):
    return ops.modulate(x, shift, scale)


def other_norm_rope(q, k, q_scale, k_scale, pe):
    return ops.norm_rope(q, k, q_scale, k_scale, pe)


def test_all_blocks_share_two_graphs_for_each_tuple_of_functions():
    model, inputs, counter = flux_of(GOLDEN), GOLDEN.group("in."), CompileCounter()
    plainly = model(**inputs)
    torch._dynamo.reset()
    for block in (*model.double_blocks, *model.single_blocks):
        block.compile(backend=counter, fullgraph=True)
    other = ops.PLAIN._replace(modulate=other_modulate, norm_rope=other_norm_rope)
    for standing, graphs in ((install(model, "cpu"), 2), (other, 4), (ops.PLAIN, 4), (other, 4)):
        put(model, standing)
        assert torch.equal(model(**inputs), plainly)
        assert counter.frame_count == graphs
    torch._dynamo.reset()


def test_every_block_and_the_last_layer_hold_them():
    model = flux_of(GOLDEN)
    other = ops.PLAIN._replace(modulate=other_modulate)
    put(model, other)
    parts = [part for part in model.modules() if hasattr(part, "ops")]
    doubles, singles = len(model.double_blocks), len(model.single_blocks)
    assert len(parts) == 3 * doubles + 2 * singles + 1  # with their modulations
    assert all(part.ops is other for part in parts)
    assert flux_of(GOLDEN).final_layer.ops is ops.PLAIN


def test_the_autoencoder_keeps_the_plain_functions_and_its_layout_where_nothing_is_faster():
    ae = AutoEncoder(replace(VARIANTS["flux-dev"].ae_params, ch=32, ch_mult=(1, 1), num_res_blocks=1))
    assert install_decode(ae, "cpu") is ae_ops.PLAIN
    assert ae.decoder.ops is ae_ops.PLAIN and ae.decoder.conv_in.weight.is_contiguous()


def other_conv_add(conv, x, residual):
    return ae_ops.conv_add(conv, x, residual)


def test_every_part_of_an_autoencoder_holds_them_and_its_weights_keep_their_layout_when_they_move():
    ae = AutoEncoder(replace(VARIANTS["flux-dev"].ae_params, ch=32, ch_mult=(1, 1), num_res_blocks=1))
    z = torch.randn(1, 16, 4, 6)
    with torch.no_grad():
        plainly = ae.decode(z)
        other = ae_ops.PLAIN._replace(conv_add=other_conv_add)
        put_decode(ae, other)
        ae.to(torch.float64).to(torch.float32)
        assert distance(ae.decode(z), plainly) < 1e-6
    for part in ae.modules():
        assert getattr(part, "ops", other) is other
        if isinstance(part, torch.nn.Conv2d):
            assert part.weight.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.gpu
@pytest.mark.skipif(find_spec("triton") is None, reason="no Triton")
def test_a_card_gets_the_fused_functions():
    found = fused_ops("cuda")
    assert found is not ops.PLAIN and found is fused_ops("cuda:0")
    assert found.attend is ops.attend
