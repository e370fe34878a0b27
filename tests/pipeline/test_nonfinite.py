"""NaN and infinity: errors name the step, the first block and the tensor, no picture is left, and a sampling without
them costs nothing more (users.md 4c, row 15).
"""

from shutil import copytree

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny import tiny_pipeline, tiny_variant
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.utils._python_dispatch import TorchDispatchMode

from flux_core.errors import NonFiniteError
from flux_core.hooks import Custom, FirstBlockCache, HookRun, Scale, Skip
from flux_core.hub import places
from flux_core.linears.formats import FORMATS
from flux_core.main import main
from flux_core.methods.stable_flow import Editing
from flux_core.pipeline import load_pipeline
from flux_core.pipeline.nonfinite import bad_tensors, listing
from flux_core.request.generation import GenerationRequest
from flux_core.sampling import euler, get_noise, get_schedule, pack

pytestmark = pytest.mark.usefixtures("one_thread")
FAST = {"width": 48, "height": 32, "num_steps": 2, "force": True}
NAN, INF = float("nan"), float("inf")
SEE_FILE = "non-finite numbers. Next: python cli.py verify FILE"
FINITE = "Every weight is finite. Next: leave the plan out, if there is one, or fetch the files again"
INIT = Image.radial_gradient("L")


@pytest.fixture
def spoil(small, small_root, tmp_path, monkeypatch):
    """Puts numbers that are none into a tensor of the model on the disk."""
    root = copytree(small_root, tmp_path / "weights")
    monkeypatch.setattr(places, "ROOTS", (root,))
    monkeypatch.chdir(tmp_path)

    def into(file: str, tensor: str, count: int = 1, value: float = NAN) -> None:
        path = root / "flux-mini" / file
        tensors = {name: x.clone() for name, x in load_file(path).items()}
        tensors[tensor].view(-1)[:count] = value
        path.unlink()
        save_file(tensors, path, {"format": "pt"})

    return into


@pytest.fixture
def told(tmp_path, capsys):
    """What the command says at last on stderr when it ends with exit code 7 and leaves no file."""

    def run(*flags: str) -> str:
        size = [f"--width={FAST['width']}", f"--height={FAST['height']}", "--steps=2", "--force"]
        assert main(["--prompt", "a red apple", "--seed=3", "--device=cpu", *size, *flags]) == 7
        assert list((tmp_path / "output").iterdir()) == []
        return capsys.readouterr().err.splitlines()[-1]

    return run


def fails(pipeline, **fields) -> str:
    with pytest.raises(NonFiniteError) as caught:
        pipeline.generate("a red apple", 3, **FAST | fields)
    return str(caught.value)


def put(module, tensor: str, value: float = NAN) -> None:
    module.get_parameter(tensor).data.view(-1)[0] = value


class Forwards:
    """Counts a model's."""

    def __init__(self, model) -> None:
        self.count = 0
        model.register_forward_pre_hook(self._more)

    def _more(self, *_) -> None:
        self.count += 1


@pytest.mark.parametrize("flags", [[], ["--offload"], ["--plan", "plan.json"]], ids=["", "offload", "plan"])
def test_a_weight_is_named_with_its_block(small, spoil, told, tmp_path, flags):
    spoil(small.flow_file, "single_blocks.1.linear2.weight", 5)
    (tmp_path / "plan.json").write_text('[{"kind": "scale", "sites": ["vec"], "value": 0.5}]')
    assert told("--dtype=bfloat16", *flags) == (
        "error: NaN or infinity after step 1 of 2 (sigma 1.000), first in single_blocks.1, in bfloat16; no picture is "
        f"written. single_blocks.1.linear2.weight holds 5 {SEE_FILE}"
    )


@pytest.mark.parametrize("format", FORMATS)
def test_a_weight_in_few_bits_is_named_by_the_numbers_it_stands_for(format):
    """Scales of GGUF's blocks are among the codes, which are whole numbers."""
    model = nn.Sequential(nn.Linear(64, 4), FORMATS[format].kind.of(nn.Linear(64, 4).requires_grad_(False)))
    assert bad_tensors(model) == {}
    if format == "gguf":
        model[1].weight.data[:2] = torch.tensor([NAN], dtype=torch.float16).view(torch.uint8)
    else:
        next(x for name, x in model[1].named_buffers() if name in ("weight_scale", "nested_absmax")).view(-1)[0] = NAN
    assert list(bad_tensors(model)) == ["1.weight"]


@pytest.mark.parametrize("flags", [[], ["--offload"]], ids=["", "offload"])
def test_the_autoencoders_too(small, spoil, told, flags):
    spoil(small.ae_file, "decoder.mid.block_1.conv1.weight", 2, INF)
    assert told(*flags) == (
        "error: NaN or infinity in the decoded picture, in float32; no picture is written. "
        f"decoder.mid.block_1.conv1.weight holds 2 {SEE_FILE}"
    )


@pytest.mark.parametrize("flags", [[], ["--offload"]], ids=["", "offload"])
@pytest.mark.parametrize(
    ("folder", "name", "tensor"),
    [
        ("t5", "T5", "encoder.block.1.layer.1.DenseReluDense.wo.weight"),
        ("clip", "CLIP", "encoder.layers.1.mlp.fc2.weight"),
    ],
)
def test_text_encoders_too_before_any_step(spoil, told, folder, name, tensor, flags):
    spoil(f"{folder}/model.safetensors", tensor, 3)
    assert told(*flags) == (
        f"error: NaN or infinity in {name}'s embedding of the prompt, in float32; no picture is written. "
        f"{tensor} holds 3 {SEE_FILE}"
    )


def test_text_is_told_before_the_model_works(spoil):
    spoil("t5/model.safetensors", "encoder.final_layer_norm.weight")
    pipeline = load_pipeline("flux-mini", "cpu", offload=True)
    forwards = Forwards(pipeline.model)
    assert "encoder.final_layer_norm.weight holds 1 non-finite number." in fails(pipeline)
    assert forwards.count == 0


@pytest.mark.parametrize(
    ("tensor", "site"),
    [
        ("img_in.bias", "img_in"),
        ("txt_in.weight", "txt_in"),
        ("time_in.out_layer.bias", "vec"),
        ("double_blocks.0.txt_mlp.2.bias", "double_blocks.0"),
        ("single_blocks.0.modulation.lin.bias", "single_blocks.0"),
        ("final_layer.linear.bias", "velocity"),
    ],
)
@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_the_first_place_is_named(tensor, site, value):
    pipeline = tiny_pipeline()
    put(pipeline.model, tensor, value)
    found = fails(pipeline)
    assert f"step 1 of 2 (sigma 1.000), first in {site}, in float32" in found
    assert found.endswith(f"{tensor} holds 1 non-finite number. Next: python cli.py verify FILE")


def far_too_large(site: str, **fields):
    """The product leaves every dtype; no single number of a plan may be infinite."""
    return [Scale(sites=site, value=1e38, **fields), Scale(sites=site, value=1e38, follow=True, **fields)]


@pytest.mark.parametrize(("dtype", "end"), [("float32", f". {FINITE}"), ("bfloat16", ". Next: try --dtype float32")])
def test_what_only_grew_too_large_is_no_weights_fault(dtype, end):
    pipeline = tiny_pipeline(dtype=dtype)
    found = fails(pipeline, plan=far_too_large("single_blocks.0.mod.gate", steps=[1]), num_steps=3)
    sigma = get_schedule(3, 6)[1]
    assert found == (
        f"NaN or infinity after step 2 of 3 (sigma {sigma:.3f}), first in single_blocks.0, in {dtype}; "
        f"no picture is written{end}"
    )


def test_a_block_that_is_skipped_is_not_the_first():
    pipeline = tiny_pipeline()
    put(pipeline.model, "double_blocks.0.img_mod.lin.bias")
    plan = [Skip(blocks="double_blocks.0"), *far_too_large("single_blocks.0.img.out"), FirstBlockCache(follow=True)]
    assert "first in single_blocks.0" in fails(pipeline, plan=plan)


def test_readers_are_not_asked_again_and_a_function_that_cannot_be_costs_the_place_only():
    pipeline, seen, factors = tiny_pipeline(), [], iter([NAN])
    plan = [
        Custom(sites="vec", fn=lambda at, x: seen.append(at.step), reads=True),
        Custom(sites="single_blocks.0.img.out", fn=lambda x, at: x * next(factors)),
    ]
    forwards = Forwards(pipeline.model)
    assert "after step 1 of 2 (sigma 1.000), in float32" in fails(pipeline, plan=plan)
    assert seen == [0] and forwards.count == 2


def test_latents_that_came_so_are_no_blocks_fault():
    pipeline = tiny_pipeline()
    found = fails(pipeline, on_step=lambda step: step.x * NAN)
    assert "after step 2 of 2" in found and "first in the start latents" in found
    put(pipeline.ae, "encoder.conv_in.bias")
    found = fails(pipeline, init_image=INIT, strength=0.5)
    assert "after step 1 of 1" in found and "encoder.conv_in.bias holds 1 " in found


def test_rows_of_a_batch_and_edits_are_told_alike():
    pipeline = tiny_pipeline()
    put(pipeline.model, "double_blocks.0.img_attn.proj.weight")
    request = GenerationRequest(prompt="a red apple", seed=1, **FAST)
    editing = Editing(pipeline, request, ["a car"], ["layer.1"])
    for draw in (editing.generated, lambda: pipeline.draw_rows([request, request])):
        with pytest.raises(
            NonFiniteError, match=r"step 1 of 2 .*first in double_blocks\.0, .*img_attn\.proj\.weight holds 1"
        ):
            draw()


def test_three_tensors_are_named_and_the_others_counted():
    pipeline = tiny_pipeline()
    names = [name for name, _ in pipeline.ae.named_parameters()][:5]
    for name in names:
        put(pipeline.ae, name)
    assert bad_tensors(pipeline.model, pipeline.ae) == dict.fromkeys(names, 1)
    assert listing(bad_tensors(pipeline.ae)) == f"{', '.join(names[:3])} and 2 more hold 5 non-finite numbers"


class Operators(TorchDispatchMode):
    """The names of all operators, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def test_a_picture_that_is_drawn_pays_for_one_look_at_each_step():
    """The operators are those of the sampling by hand, with `isfinite` behind every step."""
    pipeline = tiny_pipeline()
    request = GenerationRequest(prompt="a red apple", seed=3, **FAST)
    pipeline.prompts(request.prompt)
    forwards = Forwards(pipeline.model)

    def look(step):
        assert torch.isfinite(step.x).all()

    with torch.no_grad(), Operators() as by_hand:
        x = pack(torch.cat([get_noise(1, 32, 48, "cpu", torch.float32, 3)]))
        sigmas = get_schedule(2, x.shape[1])
        velocity = pipeline.denoiser.velocity([request.prompt], [request.guidance], (48, 32), sigmas=sigmas[:-1])
        x = euler(velocity, x, sigmas, look)
        pipeline.picture(x, request)
    with Operators() as drawn:
        pipeline.draw(request)
    assert drawn.names == by_hand.names and forwards.count == 2 + 2


@pytest.mark.gpu
@pytest.mark.parametrize("step", [0, 2, 3])
def test_on_a_card_it_is_found_a_step_later_and_told_alike(step):
    """Also in the last step, behind which there is none."""
    pipeline = load_pipeline("flux-mini", "cuda")
    spoil = Custom(sites="single_blocks.0.img.out", fn=lambda x, at: x * (NAN if at.step == step else 1))
    with pytest.raises(NonFiniteError, match=rf"after step {step + 1} of 4 .*first in single_blocks\.0"):
        pipeline.generate("a red apple", 3, **FAST | {"num_steps": 4}, plan=[spoil])


def test_the_search_compiles_nothing():
    torch._dynamo.reset()
    pipeline, counter = tiny_pipeline(), CompileCounter()
    put(pipeline.model, "single_blocks.0.linear2.bias")
    for block in (*pipeline.model.double_blocks, *pipeline.model.single_blocks):
        block.compile(backend=counter, fullgraph=True)
    forwards = Forwards(pipeline.model)
    assert "first in single_blocks.0" in fails(pipeline)
    assert counter.frame_count == 2 and forwards.count == 2
    torch._dynamo.reset()


def test_a_run_again_has_the_steps_of_the_first():
    skip, read, watch = Skip(blocks="layer.0"), *(Custom(sites=name, fn=print, reads=True) for name in ("vec", "pe"))
    run = HookRun([skip, read], tiny_variant().params, [1.0, 0.5, 0.0], ("source", "edit"))
    again = run.again(watch)
    assert again.plan == (skip, watch) and (again.sigmas, again.branches) == (run.sigmas, run.branches)
