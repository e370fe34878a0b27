"""A wrapped, patched, hooked, frozen and trained layer in every position: fused functions against the plain ones."""

import pytest
import torch
from golden_files import distance
from random_model import random_weights
from torch import nn
from torch.autograd import forward_ad
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from triton_device import CUDA, DEVICE  # skips where there is no Triton

from flux_core import kernels
from flux_core.kernels import describe, install, put
from flux_core.linears import fp8
from flux_core.linears.contract import Leaf
from flux_core.linears.formats import quantize
from flux_core.linears.fp8 import Fp8Linear
from flux_core.model import Flux, FluxParams, ops

PARAMS = FluxParams(
    in_channels=16, out_channels=16, vec_in_dim=16, context_in_dim=16, hidden_size=32, mlp_ratio=2.0, num_heads=2,
    depth=1, depth_single_blocks=1, axes_dim=(4, 6, 6), theta=10_000, qkv_bias=True, guidance_embed=False,
)  # fmt: skip
IN_DOUBLE = ("attn.qkv", "attn.proj", "mlp.0", "mlp.2", "mod.lin")
LINEARS = (
    *(f"double_blocks.0.{stream}_{name}" for stream in ("img", "txt") for name in IN_DOUBLE),
    *(f"single_blocks.0.{name}" for name in ("linear1", "linear2", "modulation.lin")),
    *("final_layer.linear", "final_layer.adaLN_modulation.1", "img_in", "txt_in", "time_in.in_layer"),
)
MODS = [name for name in LINEARS if "mod" in name]
OTHERS = ("double_blocks.0.img_mlp", "double_blocks.0.txt_mlp.1")
"""a whole MLP, and the GELU of one: the fused functions compute it elsewhere"""
FORMATS = pytest.mark.parametrize("form", ["dense", "fp8"])


@pytest.fixture(autouse=True)
def on_any_device(monkeypatch):
    """The kernels and fp8 products of a card, where there is none: interpreted, and as slow as the CPU has them."""
    torch.manual_seed(0)
    monkeypatch.setattr(kernels, "can_fuse", lambda device: True)
    monkeypatch.setattr(fp8, "has_fp8_units", lambda device: True)
    kernels.compiles.cache_clear()


def made(form):
    """The same model each time; dense: in fp32, since the interpreter has no bf16 products."""
    model = random_weights(Flux(PARAMS), std=0.1).to(DEVICE)
    if form == "fp8":
        quantize(model.bfloat16())
    return model


def fuse(model):
    found = install(model, DEVICE)
    fp8_model = any(isinstance(part, Fp8Linear) for part in model.modules())
    assert describe(model)["kernels"] == ("triton fp8" if fp8_model else "triton")
    if not CUDA and fp8_model:
        put(model, found._replace(modulation=ops.modulation))  # a bf16 product, too
    return model


def inputs(form):
    draw = torch.Generator().manual_seed(1)
    shapes = {"img": (1, 2, 16), "txt": (1, 1, 16), "y": (1, 16), "timesteps": (1,)}
    dtype = torch.float32 if form == "dense" else torch.bfloat16
    found = {name: torch.rand(shape, generator=draw).to(DEVICE, dtype) for name, shape in shapes.items()}
    return found | {"img_ids": torch.zeros(1, 2, 3, device=DEVICE), "txt_ids": torch.zeros(1, 1, 3, device=DEVICE)}


class Branch(nn.Module):
    """As a LoRA: a layer, and a product of two small ones beside it."""

    def __init__(self, base, seen):
        super().__init__()
        self.base, self.seen = base, seen
        self.in_features, self.out_features = base.in_features, base.out_features
        draw = torch.Generator().manual_seed(2)
        down, up = (torch.randn(size, generator=draw) / 6 for size in ((4, self.in_features), (self.out_features, 4)))
        self.down, self.up = (nn.Parameter(x.to(DEVICE, base.bias.dtype), requires_grad=False) for x in (down, up))

    def forward(self, x):
        self.seen.append(1)
        return self.base(x) + x @ self.down.t() @ self.up.t()


def wrap(model, name, seen):
    model.set_submodule(name, Branch(model.get_submodule(name), seen))


def patch(model, name, seen):
    layer = model.get_submodule(name)
    forward = layer.forward
    layer.forward = lambda x: (seen.append(1), 1.25 * forward(x))[1]


def hook(model, name, seen):
    model.get_submodule(name).register_forward_hook(lambda layer, args, out: (seen.append(1), 1.25 * out)[1])


def hook_before(model, name, seen):
    model.get_submodule(name).register_forward_pre_hook(lambda layer, args: (seen.append(1), (1.25 * args[0],))[1])


def derive(model, name, seen):
    layer, kind = model.get_submodule(name), type(model.get_submodule(name))
    forward = lambda self, x: (seen.append(1), 1.25 * kind.forward(self, x))[1]  # noqa: E731
    layer.__class__ = type("Louder", (kind,), {"forward": forward})


def close(found, plain, form, within=1.0):
    """dense: up to the GELU, which the CPU's epilogue has in another form. fp8: interpreted, e4m3 is rounded worse."""
    return distance(found, plain) < within * (0.06 if form == "fp8" else 2e-3)


@torch.no_grad()
@FORMATS
@pytest.mark.parametrize("name", [*LINEARS, *OTHERS])
@pytest.mark.parametrize("change", [wrap, hook], ids=lambda change: change.__name__)
def test_what_somebody_puts_around_a_layer_is_called(form, name, change):
    if change is wrap and name in OTHERS:
        change = derive
    models, calls = (made(form), fuse(made(form))), ([], [])
    for model, seen in zip(models, calls, strict=True):
        change(model, name, seen)
    plain, found = (model(**inputs(form)) for model in models)
    assert calls == ([1], [1])
    assert close(found, plain, form)


@torch.no_grad()
@FORMATS
@pytest.mark.parametrize("change", [wrap, patch, hook_before, derive], ids=lambda change: change.__name__)
def test_around_all_layers_at_once(form, change):
    model, calls = fuse(made(form)), {name: [] for name in LINEARS}
    for name, seen in calls.items():
        change(model, name, seen)
    found = model(**inputs(form))
    assert all(seen == [1] for seen in calls.values())
    put(model, ops.PLAIN)
    assert close(found, model(**inputs(form)), form, within=2)


@torch.no_grad()
@FORMATS
def test_models_that_nobody_touched_agree(form):
    assert close(fuse(made(form))(**inputs(form)), made(form)(**inputs(form)), form)


def gradients(model, form, parameters, of_img=True):
    """Of a loss, for those parameters and perhaps the picture's tokens, which are below all layers but a few."""
    given = inputs(form)
    wanted = [given["img"].requires_grad_(), *parameters] if of_img else parameters
    return torch.autograd.grad(model(**given).float().square().mean(), wanted)


def same_direction(found, plain, form):
    """fp8: of small gradients in bf16, whose last bits weigh."""
    for ours, theirs in zip(found, plain, strict=True):
        assert theirs.norm() > 0 and close(ours, theirs, form, within=4)


@FORMATS
@pytest.mark.parametrize("name", LINEARS)
def test_a_trained_layer_learns(form, name):
    """Of an Fp8Linear the bias, since its codes are frozen."""
    found = []
    for model in (made(form), fuse(made(form))):
        layer = model.get_submodule(name)
        parameters = [p.requires_grad_() for p in layer.parameters() if p.dtype != fp8.E4M3]
        found.append(gradients(model, form, parameters))
    same_direction(*found, form)


@FORMATS
@pytest.mark.parametrize("name", LINEARS)
def test_a_branch_around_a_frozen_layer_learns(form, name):
    """And where nothing below it does, kernels compute up to it."""
    found = []
    for model in (made(form), fuse(made(form))):
        wrap(model, name, [])
        branch = model.get_submodule(name)
        found.append(gradients(model, form, [branch.down.requires_grad_(), branch.up.requires_grad_()], of_img=False))
    same_direction(*found, form)


@FORMATS
def test_gradients_pass_a_frozen_model(form):
    same_direction(*(gradients(model, form, []) for model in (made(form), fuse(made(form)))), form)


@pytest.mark.parametrize("name", ["double_blocks.0.txt_mlp.0", "single_blocks.0.linear1", "final_layer.linear", *MODS])
def test_a_branch_of_a_format_learns_through_its_dense_weight(name):
    """The weight that a layer of another file gives away may be computed of what is trained."""

    class Merged(Leaf):
        def __init__(self, base):
            super().__init__()
            self.base, self.gain = base, nn.ParameterList([nn.Parameter(torch.full((1, 1), 1.5, device=DEVICE))])

        def dense(self, dtype):
            return self.base.weight * self.gain[0], self.base.bias

        def forward(self, x):
            return nn.functional.linear(x, *self.dense(x.dtype))

    found = []
    for model in (made("dense"), fuse(made("dense"))):
        model.set_submodule(name, Merged(model.get_submodule(name)))
        found.append(gradients(model, "dense", [model.get_submodule(name).gain[0]], of_img=False))
    same_direction(*found, "dense")


def of_tokens(model, form):
    given = inputs(form)
    return lambda img: model(**given | {"img": img}).float()


def forward_derivative(model, form):
    img = inputs(form)["img"]
    return torch.func.jvp(of_tokens(model, form), (img,), (torch.ones_like(img),))[1]


def dual(model, form):
    img = inputs(form)["img"]
    with forward_ad.dual_level():
        found = of_tokens(model, form)(forward_ad.make_dual(img, torch.ones_like(img)))
        return forward_ad.unpack_dual(found).tangent


def functional_gradient(model, form):
    return torch.func.grad(lambda img: of_tokens(model, form)(img).square().mean())(inputs(form)["img"])


def of_a_bias(model, form):
    biases = {f"{name}.bias": model.get_submodule(name).bias.detach() for name in LINEARS[:3]}
    loss = lambda biases: functional_call(model, biases, (), inputs(form)).float().square().mean()  # noqa: E731
    return torch.cat(list(torch.func.grad(loss)(biases).values()))


def mapped(model, form):
    img = inputs(form)["img"]
    return torch.func.vmap(of_tokens(model, form))(torch.stack((img, 2 * img)))


TRANSFORMS = [forward_derivative, dual, functional_gradient, of_a_bias, mapped]


@torch.no_grad()
@FORMATS
@pytest.mark.parametrize("transform", TRANSFORMS, ids=lambda transform: transform.__name__)
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_transforms_of_torch_func_find_plain_functions(form, transform):
    with sdpa_kernel(SDPBackend.MATH):  # the others have no forward derivative
        plain, found = transform(made(form), form), transform(fuse(made(form)), form)
    same_direction([found], [plain], form)


@torch.no_grad()
@FORMATS
def test_autocast(form):
    with torch.autocast(DEVICE, torch.bfloat16):
        plain, found = made(form)(**inputs(form)), fuse(made(form))(**inputs(form))
    assert plain.dtype == found.dtype == torch.bfloat16 and close(found, plain, "fp8")


class Coded(Leaf):
    """As a format of another file: no dense parameter but the bias, its weight by numbers of a table."""

    def __init__(self, base):
        super().__init__()
        self.out_features, self.in_features = base.weight.shape
        self.bias, self.called = base.bias, 0
        self.register_buffer("table", torch.linspace(-0.5, 0.5, 16, device=DEVICE))
        self.register_buffer("codes", (base.weight[..., None] - self.table).abs().argmin(-1).to(torch.uint8))

    def dense(self, dtype):
        return self.table[self.codes.int()].to(dtype), self.bias

    def forward(self, x):
        self.called += 1
        return nn.functional.linear(x, *self.dense(x.dtype))


@torch.no_grad()
def test_a_format_of_another_file_goes_through_the_kernels():
    """It is called only where a block calls its Linears itself."""
    models = made("dense"), fuse(made("dense"))
    for model in models:
        for name in LINEARS:
            model.set_submodule(name, Coded(model.get_submodule(name)))
    plain, found = (model(**inputs("dense")) for model in models)
    assert close(found, plain, "dense")
    called = {name for name in LINEARS if models[1].get_submodule(name).called}
    in_kernels = ("mlp.0", "linear1", "linear2", "mod.lin", "modulation.lin", "adaLN_modulation.1")
    assert called == {name for name in LINEARS if not name.endswith(in_kernels)}


@torch.no_grad()
@pytest.mark.parametrize("stays", ["img_mlp.0", "txt_mlp.2", "img_attn.qkv", "linear1", "linear2"])
def test_a_model_of_two_formats(stays):
    """fp8 but for one layer, which may be of a size that the units do not take."""
    models = made("fp8"), made("fp8")
    for model in models:
        for name in LINEARS:
            if name.endswith(stays):
                model.get_submodule(name).scaled = False
    fuse(models[1])
    plain, found = (model(**inputs("fp8")) for model in models)
    assert close(found, plain, "fp8")
