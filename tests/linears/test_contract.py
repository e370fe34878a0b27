"""What a layer in the place of a Linear promises, and when fused code may reach inside one."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.nn.modules.module import register_module_forward_hook

from flux_core.linears.branch import BranchedLinear, LowRank, Shift
from flux_core.linears.contract import (
    Leaf,
    QuantizedTokens,
    branches,
    dense,
    is_bare,
    is_leaf,
    multiply_columns,
    needs_grad,
    operands,
    takes_tokens,
    widening,
)
from flux_core.linears.fp8 import E4M3, Fp8Linear, dequantize, quantize_rows
from flux_core.model import ops


@pytest.fixture(autouse=True)
def same_numbers():
    torch.manual_seed(0)


def frozen(inputs=32, outputs=48, **options):
    return nn.Linear(inputs, outputs, **options).requires_grad_(False)


def scaled(inputs=32, outputs=48):
    """An Fp8Linear that multiplies in fp8, which the CPU does, too, slowly."""
    layer = Fp8Linear.of(frozen(inputs, outputs).bfloat16())
    layer.scaled = True
    return layer


class Louder(nn.Linear):
    pass


class LouderFp8(Fp8Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class Wrapper(nn.Module):
    """What somebody puts around a layer, with a branch of its own; all attributes but those are the layer's."""

    def __init__(self, base):
        super().__init__()
        self.base, self.branch = base, frozen(base.in_features, base.out_features)

    def forward(self, x):
        return self.base(x) + self.branch(x)

    def __getattr__(self, name):
        return super().__getattr__(name) if name in ("base", "branch") else getattr(self.base, name)


def hooked(layer):
    layer.register_forward_hook(lambda *_: None)


def hooked_before(layer):
    layer.register_forward_pre_hook(lambda *_: None)


def hooked_backward(layer):
    layer.register_full_backward_hook(lambda *_: None)


def hooked_before_backward(layer):
    layer.register_full_backward_pre_hook(lambda *_: None)


def patched(layer):
    layer.forward = lambda x: x


def patched_by_another_layer(layer):
    layer.forward = frozen().forward


def derived(layer):
    layer.__class__ = Louder


def other_parameters(layer):
    class Weight(nn.Parameter):
        pass

    layer.weight = Weight(layer.weight.detach(), requires_grad=False)


def trained(layer):
    layer.bias.requires_grad_()


def computed(layer):
    """As a hypernetwork leaves it: the bias is no parameter any more."""
    del layer.bias
    layer.bias = torch.zeros(layer.out_features, dtype=layer.weight.dtype, requires_grad=True)


CHANGES = [
    hooked, hooked_before, hooked_backward, hooked_before_backward, patched, patched_by_another_layer, derived,
    other_parameters, trained,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_a_layer_that_has_to_be_called(change):
    layer, x = frozen(), torch.randn(1, 2, 32)
    assert is_bare(layer, nn.Linear, x) and dense(layer, x) == (layer.weight, layer.bias)
    change(layer)
    assert not is_bare(layer, nn.Linear, x) and dense(layer, x) is None


def test_a_computed_weight_takes_its_gradient_along():
    layer, units, x = frozen(), scaled(), torch.randn(1, 2, 32)
    for one in (layer, units):
        computed(one)
    assert dense(layer, x) is None and not takes_tokens(units)
    with torch.no_grad():
        assert dense(layer, x) == (layer.weight, layer.bias) and takes_tokens(units)


@pytest.mark.parametrize("kind", [nn.Linear, Fp8Linear])
def test_a_class_whose_forward_somebody_replaced_is_called(kind, monkeypatch):
    layer, x = frozen() if kind is nn.Linear else Fp8Linear.of(frozen()), torch.randn(1, 2, 32)
    assert dense(layer, x) is not None
    forward = kind.forward
    monkeypatch.setattr(kind, "forward", lambda self, x: 2 * forward(self, x))
    assert dense(layer, x) is None and not is_bare(layer, kind)


def test_under_autocast_a_layer_is_called():
    layer, x = frozen(), torch.randn(1, 2, 32)
    with torch.autocast("cpu", torch.bfloat16):
        assert dense(layer, x) is None
        assert multiply_columns(layer, x[..., :20], x[..., 20:]).dtype == torch.bfloat16


def test_hooks_on_every_module_count():
    layer = frozen()
    handle = register_module_forward_hook(lambda *_: None)
    try:
        assert not is_bare(layer, nn.Linear)
    finally:
        handle.remove()
    assert is_bare(layer, nn.Linear)


def test_a_wanted_gradient():
    layer, x = frozen(), torch.randn(1, 2, 32, requires_grad=True)
    assert needs_grad(x, None) and not needs_grad(x.detach(), None)
    assert not is_bare(layer, nn.Linear, x) and is_bare(layer, nn.Linear, x.detach())
    with torch.no_grad():
        trained(layer)
        assert is_bare(layer, nn.Linear, x) and not needs_grad(x)


def test_a_transform_wants_derivatives_that_no_tensor_tells_of():
    seen, x = [], torch.ones(2)

    def asked(x):
        seen.append(needs_grad(x))
        return x.sum()

    with torch.no_grad():
        torch.func.jvp(asked, (x,), (x,))
        torch.func.vmap(asked)(x[None])
    with torch.autograd.forward_ad.dual_level():
        asked(x)
    asked(x)
    assert seen == [True, True, True, False]


@pytest.mark.parametrize("change", [None, hooked, hooked_before, patched, trained])
def test_who_takes_quantized_tokens(change):
    layer = scaled()
    layers = nn.Sequential(layer, nn.GELU(), frozen())
    if change:
        change(layer)
    assert takes_tokens(layer) == takes_tokens(layers) == (change is None)
    if change is None:
        hooked(layers)
        assert not takes_tokens(layers)
        layer.scaled = False
        assert not takes_tokens(layer)


def test_who_does_not():
    derived = scaled()
    derived.__class__ = LouderFp8
    for other in (frozen(), derived, Wrapper(scaled()), nn.Sequential(), nn.Identity()):
        assert not takes_tokens(other) and not is_leaf(other)
        assert dense(other, torch.zeros(1, 1, 32)) is None or type(other) is nn.Linear


def test_dense_weights():
    x = torch.randn(1, 2, 32).bfloat16()
    layer = Fp8Linear.of(frozen().bfloat16())
    weight, bias = dense(layer, x)
    assert torch.equal(weight, dequantize(layer.weight, layer.weight_scale, torch.bfloat16)) and bias is layer.bias
    assert torch.equal(F.linear(x, weight, bias), layer(x))
    assert dense(layer, x.float())[0].dtype == torch.float32
    assert dense(scaled(), x) is None  # its product in fp8 is faster
    assert dense(frozen(bias=False), x.float()) is None  # the kernels take both


@pytest.mark.parametrize("bias", [True, False])
def test_columns_of_a_linear(bias):
    layer, x, y = frozen(32, 48, bias=bias), torch.randn(2, 3, 20), torch.randn(2, 3, 12)
    torch.testing.assert_close(multiply_columns(layer, x, y), layer(torch.cat((x, y), dim=-1)))


@pytest.mark.parametrize("made", [lambda: Fp8Linear.of(frozen().bfloat16()), scaled, lambda: Wrapper(frozen())])
def test_columns_of_others(made):
    layer = made()
    dtype = torch.bfloat16 if is_leaf(layer) else torch.float32
    x, y = torch.randn(2, 3, 20, dtype=dtype), torch.randn(2, 3, 12, dtype=dtype)
    torch.testing.assert_close(multiply_columns(layer, x, y), layer(torch.cat((x, y), dim=-1)), rtol=2e-2, atol=2e-2)


class Lora(Leaf):
    """As a file of its own would have it: a layer of any format, and a branch of low rank."""

    def __init__(self, base):
        super().__init__()
        self.base, self.joined = base, 0
        self.in_features, self.out_features = base.in_features, base.out_features
        self.down, self.up = (
            nn.Parameter(torch.randn(s), requires_grad=False) for s in ((4, base.in_features), (base.out_features, 4))
        )

    def forward(self, x):
        self.joined += 1
        return self.base(x) + x @ self.down.t() @ self.up.t()

    def multiply_columns(self, x, y):
        of_x, of_y = self.down.t().split([x.shape[-1], y.shape[-1]])
        return multiply_columns(self.base, x, y) + (x @ of_x + y @ of_y) @ self.up.t()


def test_a_new_format_brings_its_own_columns():
    layer, x, y = Lora(frozen()), torch.randn(2, 3, 20), torch.randn(2, 3, 12)
    found = multiply_columns(layer, x, y)
    assert layer.joined == 0
    torch.testing.assert_close(found, layer(torch.cat((x, y), dim=-1)))
    hooked(layer)
    torch.testing.assert_close(multiply_columns(layer, x, y), found)
    assert layer.joined == 2


# Low-rank branches beside a layer


def branched(base, dtype=torch.float32):
    layer = BranchedLinear(base)
    down, up = torch.randn(4, base.in_features, dtype=dtype), 0.1 * torch.randn(base.out_features, 4, dtype=dtype)
    layer.add("one", [LowRank(down, up, torch.full((4,), 0.5))])
    return layer


BASES = {
    "Linear": frozen,
    "without bias": lambda: frozen(bias=False),
    "fp8": lambda: Fp8Linear.of(frozen()),
    "wrapper": lambda: Wrapper(frozen()),
    "branches": lambda: branched(frozen()),
}


@pytest.mark.parametrize("made", BASES.values(), ids=BASES)
def test_branches_are_what_a_layer_adds_to_the_layer_behind_it(made):
    base = made()
    layer, x = branched(base), torch.randn(2, 3, 32)
    found = branches(layer, x)
    assert found.base is base and found.room == 0 and widening(layer) is None
    assert is_leaf(layer) and not takes_tokens(layer) and dense(layer, x) is None and operands(layer, x) is None
    expected = base(x) + F.linear(found.factor * F.linear(x, found.down), found.up)
    torch.testing.assert_close(layer(x), expected)
    torch.testing.assert_close(multiply_columns(layer, x[..., :20], x[..., 20:]), expected)
    layer.add("two", [Shift(torch.ones(48))])
    torch.testing.assert_close(layer(x), expected + 1)
    torch.testing.assert_close(multiply_columns(layer, x[..., :20], x[..., 20:]), expected + 1)
    assert layer.remove("one") and branches(layer, x) is None
    torch.testing.assert_close(layer(x), base(x) + 1)


@pytest.mark.parametrize("change", [hooked, hooked_before, patched, hooked_backward])
def test_branches_of_a_layer_that_has_to_be_called(change):
    layer, x = branched(frozen()), torch.randn(1, 2, 32)
    change(layer)
    assert branches(layer, x) is None and widening(layer) is None


def test_branches_that_are_trained_or_differentiated():
    layer, x = branched(frozen()), torch.randn(1, 2, 32)
    assert branches(layer, x.clone().requires_grad_()) is None
    layer.up.requires_grad_()
    assert branches(layer, x) is None
    multiply_columns(layer, x[..., :20], x[..., 20:]).sum().backward()
    assert layer.up.grad.abs().sum() > 0
    with torch.no_grad():
        assert branches(layer, x) is not None


def test_under_autocast_branches_are_called():
    layer, x = branched(frozen()), torch.randn(1, 2, 32)
    with torch.autocast("cpu", torch.bfloat16):
        assert branches(layer, x) is None and layer(x).dtype == torch.bfloat16


def test_a_branch_at_scale_0_is_the_layer_to_the_bit_and_tokens_are_not_its():
    base = scaled()
    layer, x = branched(base, torch.bfloat16), torch.randn(1, 2, 32).bfloat16()
    layer.factor.zero_()
    layer.refresh()
    assert torch.equal(layer(x), base(x)) and not takes_tokens(layer)


# Under torch.compile


class Block(nn.Module):
    """Asks before it does the work of its Linear."""

    def __init__(self):
        super().__init__()
        self.layer = frozen(16, 16)
        self.layers = nn.Sequential(scaled(16, 16), nn.GELU(), frozen(16, 16))

    def forward(self, x):
        found = dense(self.layer, x)
        y = self.layer(x) if found is None else F.linear(x, *found) + 1
        return y + 2 if takes_tokens(self.layers) else y


def test_the_question_breaks_no_graph_and_blocks_share_one():
    torch._dynamo.reset()
    blocks, counter, x = [Block() for _ in range(3)], CompileCounter(), torch.randn(1, 2, 16)
    expected = [block(x) for block in blocks]
    for block in blocks:
        block.compile(backend=counter, fullgraph=True)
    assert all(torch.equal(block(x), y) for block, y in zip(blocks, expected, strict=True))
    assert counter.frame_count == 1
    blocks[0].layer.forward = lambda x: 0 * x  # seen though it comes behind the compiler
    assert torch.equal(blocks[0](x), torch.full((1, 2, 16), 2.0)) and counter.frame_count == 2
    torch._dynamo.reset()


def test_a_hook_from_before_is_honoured_by_a_compiled_block():
    torch._dynamo.reset()
    block, x = Block(), torch.randn(1, 2, 16)
    block.layer.register_forward_hook(lambda layer, args, out: 0 * out)
    block.compile(backend="eager", fullgraph=True)
    assert torch.equal(block(x), torch.full((1, 2, 16), 2.0))
    torch._dynamo.reset()


# Gradients through frozen e4m3 weights


@pytest.mark.parametrize("units", [False, True])
@pytest.mark.parametrize("compiled", [False, True])
def test_a_gradient_is_that_of_the_dequantized_weight(units, compiled):
    layer = scaled()
    layer.scaled = units
    layer.bias.requires_grad_()
    x, grad = torch.randn(2, 3, 32).bfloat16().requires_grad_(), torch.randn(2, 3, 48).bfloat16()
    with torch.no_grad():
        expected = layer(x)
    torch._dynamo.reset()
    y = (torch.compile(layer, backend="aot_eager", fullgraph=True) if compiled else layer)(x)
    assert torch.equal(y, expected)
    y.backward(grad)
    weight = dequantize(layer.weight, layer.weight_scale, torch.bfloat16)
    torch.testing.assert_close(x.grad, grad @ weight, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(layer.bias.grad, grad.sum((0, 1)), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("units", [False, True])
def test_nothing_dense_waits_for_the_backward(units):
    layer, kept = scaled(), []
    layer.scaled = units
    with torch.autograd.graph.saved_tensors_hooks(lambda x: (kept.append(x), x)[1], lambda x: x):
        layer(torch.randn(2, 3, 32).bfloat16().requires_grad_())
    assert {x.dtype for x in kept if x.numel() >= layer.weight.numel()} == {E4M3}


def test_e4m3_weights_cannot_be_trained():
    layer = scaled()
    layer.weight.requires_grad_()
    y = layer(torch.randn(2, 3, 32).bfloat16())
    with pytest.raises(RuntimeError, match=r"weights in few bits cannot be trained. Next: freeze them"):
        y.sum().backward()


# Modulation


def test_a_wrappers_own_parameters_come_to_the_vector():
    wrapper, vec = Wrapper(frozen()), torch.zeros(2, 32, device="meta")
    assert ops.modulation(wrapper, vec).shape == (2, 48)
    assert ops.modulation(wrapper, vec[None].expand(3, -1, -1)).shape == (3, 2, 48)
    assert all(x.device.type == "cpu" for x in wrapper.parameters())


def test_so_do_the_buffers_of_a_layer_without_parameters():
    class Coded(nn.Module):
        def __init__(self, base):
            super().__init__()
            self.register_buffer("codes", base.weight.detach())
            self.register_buffer("shift", base.bias.detach())

        def forward(self, x):
            return F.linear(x, self.codes) + self.shift

    assert ops.modulation(Coded(frozen()), torch.zeros(2, 32, device="meta")).shape == (2, 48)


def test_tokens_that_are_quantized_already():
    layer, x = scaled(), torch.randn(2, 3, 32).bfloat16()
    tokens = quantize_rows(x)
    assert isinstance(tokens, QuantizedTokens) and torch.equal(layer(tokens), layer(x))
