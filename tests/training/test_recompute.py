"""What is computed again for gradients: they are those without, and less is kept."""

from dataclasses import replace
from itertools import product

import pytest
import torch
from functorch.compile import nop
from small import PARAMS
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.partitioners import min_cut_rematerialization_partition

from flux_core.linears.fp8 import Fp8Linear
from flux_core.linears.int8 import Int8Linear
from flux_core.linears.nf4 import Nf4Linear
from flux_core.model import Flux
from flux_core.model.layers import ModulationOut
from flux_core.sampling import image_ids
from flux_core.training import PRESETS, adapt
from flux_core.training.recompute import WAYS, differentiable, fetch_for, multiply_rows

SIZES = replace(PARAMS, depth=2, depth_single_blocks=2, mlp_ratio=4.0)
KINDS = [None, Int8Linear, Fp8Linear, Nf4Linear]


@pytest.fixture(autouse=True)
def same_numbers():
    torch.manual_seed(0)


def adapted(targets="attention", kind=None, **options):
    """A small model with factors that are not zero, its blocks' Linears in that format."""
    model = Flux(SIZES)
    for block in (*model.double_blocks, *model.single_blocks) if kind else ():
        for name, layer in list(block.named_modules()):
            if isinstance(layer, nn.Linear):
                block.set_submodule(name, kind.of(layer.requires_grad_(False)))
    adapter = adapt(model, PRESETS.get(targets, targets), 2, 4, **options)
    with torch.no_grad():
        for x in adapter.parameters():
            x.add_(0.1 * torch.randn_like(x))
    return adapter


def velocity(model, way):
    draw = torch.Generator().manual_seed(1)
    img, txt, y = (torch.randn(shape, generator=draw) for shape in ((1, 6, 64), (1, 4, 16), (1, 8)))
    ids = image_ids(1, 2, 3, torch.device("cpu")), torch.zeros(1, 4, 3)
    level, guidance = torch.tensor([0.5]), torch.tensor([3.5])
    return model(img, ids[0], txt, ids[1], level, y, guidance, fetch=fetch_for(way))


def gradients(adapter, way):
    with differentiable(adapter.model, way):
        velocity(adapter.model, way).square().sum().backward()
    found = adapter.grads()
    for x in adapter.parameters():
        x.grad = None
    return found


def kept_by(model, call):
    """Bytes of the tensors that wait for the backward of a call, without the model's own."""
    own = {x.untyped_storage().data_ptr() for x in (*model.parameters(), *model.buffers())}
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: (kept.append(x), x)[1], lambda x: x):
        assert call().requires_grad
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in kept}
    return sum(size for place, size in storages.items() if place not in own)


def error(found, exact):
    return float((found.detach().double() - exact.detach().double()).norm() / exact.detach().double().norm())


# Gradients ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset, kind", [("attention", None), *(("blocks", kind) for kind in KINDS)])
def test_gradients_are_those_of_what_is_kept(preset, kind):
    """Of whole blocks to the bit; of MLPs, whose rows are multiplied alone, but for the order of sums."""
    adapter = adapted(preset, kind)
    exact = gradients(adapter, "none")
    assert all(x.norm() > 0 for x in exact.values())
    for way in WAYS:
        for name, x in gradients(adapter, way).items():
            assert torch.equal(x, exact[name]) if way != "mlp" else error(x, exact[name]) < 2e-6, (way, name)


@pytest.mark.parametrize("targets", [("to_q", "proj_mlp"), ("to_k", "to_v", "proj_out")])
def test_a_direction_and_a_magnitude_of_some_rows(targets):
    """DoRA reads the whole layer's weight and bias for its rows."""
    adapter = adapted(targets, dora=True)
    exact = gradients(adapter, "none")
    assert all(error(x, exact[name]) < 2e-6 for name, x in gradients(adapter, "mlp").items())


@pytest.mark.parametrize("kind", [nn.Linear, *KINDS[1:]])
def test_rows_of_a_layer_that_may_only_be_called(kind):
    """One with a hook is called, and what is kept of its output are the rows."""
    linear = nn.Linear(64, 48).requires_grad_(False)
    layer, x = linear if kind is nn.Linear else kind.of(linear), torch.randn(2, 64)
    assert error(multiply_rows(layer, x, 16, 48), layer(x)[..., 16:]) < 1e-6
    layer.register_forward_hook(lambda layer, args, y: 2 * y)
    rows = multiply_rows(layer, x, 16, 48)
    assert torch.equal(rows, layer(x)[..., 16:]) and rows.untyped_storage().nbytes() == rows.nbytes


def test_the_blocks_have_their_own_functions_again_afterwards():
    model = adapted().model
    before = [block.ops for block in (*model.double_blocks, *model.single_blocks)]
    with pytest.raises(KeyError), differentiable(model, "mlp"):
        assert model.single_blocks[0].ops.linear1 is not before[-1].linear1
        raise KeyError
    assert [block.ops for block in (*model.double_blocks, *model.single_blocks)] == before


# What is kept ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("preset", PRESETS)
def test_the_ways_keep_less_and_less(preset, kind):
    model, kept = adapted(preset, kind).model, {}
    for way in WAYS:
        with differentiable(model, way):
            kept[way] = kept_by(model, lambda way=way: velocity(model, way))
    assert kept["mlp"] < 0.8 * kept["none"] and kept["blocks"] < kept["second"] < kept["none"]


def inputs_of(kind, tokens=10):
    """The tensors that a block of that kind takes."""
    stream, pe = (1, tokens, SIZES.hidden_size), torch.eye(2).expand(1, 1, tokens, SIZES.head_dim // 2, 2, 2)
    mods = [ModulationOut(*torch.randn(3, 1, 1, SIZES.hidden_size)) for _ in range(4)]
    x = torch.randn(stream, requires_grad=True)
    if kind == "single_blocks":
        return x, mods[0], pe
    img, txt = (x[:, some].detach().requires_grad_() for some in (slice(4, None), slice(4)))
    return img, txt, *mods, pe


# The compiler ------------------------------------------------------------------------------------------


QUICK = ("mlp", "single_blocks", Int8Linear)
COMPILED = [
    pytest.param(*one, marks=() if one == QUICK else pytest.mark.slow)
    for one in product(WAYS, ("double_blocks", "single_blocks"), (None, Int8Linear, Nf4Linear))
]


@pytest.mark.parametrize("kind", [pytest.param("double_blocks", marks=pytest.mark.slow), "single_blocks"])
@pytest.mark.parametrize("way", [name for name, one in WAYS.items() if one.attention])
def test_what_a_compiled_block_keeps_is_what_its_way_says(way, kind):
    """By the graphs that the compiler makes: of whole streams nothing but inputs, heads and attention's output."""
    adapter, args, kept = adapted("attention", Int8Linear), inputs_of(kind), []
    streams = inputs_of("single_blocks")[0].nbytes  # a double block's two are its rows

    def noting(joint, inputs, *, num_fwd_outputs, **others):
        graphs = min_cut_rematerialization_partition(joint, inputs, num_fwd_outputs=num_fwd_outputs, **others)
        made = next(iter(reversed(graphs[0].graph.nodes))).args[0][num_fwd_outputs:]
        values = [node.meta.get("val") for node in made if node.op != "placeholder"]
        kept.append(sum(x.nbytes for x in values if isinstance(x, torch.Tensor)))
        return graphs

    torch._dynamo.reset()
    backend = aot_autograd(fw_compiler=nop, bw_compiler=nop, partition_fn=noting)
    with differentiable(adapter.model, way):
        y = torch.compile(adapter.model.get_submodule(kind)[1], backend=backend, fullgraph=True)(*args)
        sum(x.square().sum() for x in (y if isinstance(y, tuple) else (y,))).backward()
    torch._dynamo.reset()
    beside = kept[0] / streams - (WAYS[way].sizes - 1)
    assert 0 <= beside < 0.35  # numbers of a token or of a head: attention's sums, the factors' few features


@pytest.mark.parametrize("way, kind, base", COMPILED)
def test_compiled_blocks_have_the_same_gradients(way, kind, base):
    adapter, args = adapted("blocks", base), inputs_of(kind)
    block = adapter.model.get_submodule(kind)[1]
    learned = [x for x in (*args, *block.parameters()) if isinstance(x, torch.Tensor) and x.requires_grad]
    torch._dynamo.reset()
    compiled, found = torch.compile(block, backend="aot_eager_decomp_partition", fullgraph=True), []
    with differentiable(adapter.model, way):
        for call in (block, compiled):
            _, second = fetch_for(way)([call, call])
            y = second(*args)
            total = sum(x.square().sum() for x in (y if isinstance(y, tuple) else (y,)))
            found.append(torch.autograd.grad(total, learned, allow_unused=True))  # modulation is outside of a block
    torch._dynamo.reset()
    for ours, theirs in zip(*found, strict=True):
        assert (ours is None) == (theirs is None) and (ours is None or error(ours, theirs) < 1e-5)
