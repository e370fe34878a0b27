"""GPTQ: what it aims at, that it reaches it, and that a calibrated file is the same however it was made."""

from itertools import chain

import pytest
import torch
from safetensors.torch import load_file

from flux_core import load_pipeline
from flux_core.checkpoint.header import read_header
from flux_core.commands.save import save
from flux_core.errors import FileError, MemoryShortage, NonFiniteError, UsageError
from flux_core.linears.fp8 import E4M3, dequantize, quantize_rows
from flux_core.linears.gptq import DAMPING, factor, gptq
from flux_core.main import main
from flux_core.methods import calibration
from flux_core.methods.calibration import calibrated, in_turns, second_moments, trajectories
from flux_core.methods.importance import PROMPTS, default_prompts, read_prompts
from flux_core.request.generation import GenerationRequest
from flux_core.request.prompt_lines import read_lines


def randn(*size, seed=0):
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


def correlated(features, seed=1):
    """Second moments of inputs whose features go together, some of them much stronger than others."""
    x = randn(512, 12, seed=seed) @ randn(12, features, seed=seed + 1) + 0.1 * randn(512, features, seed=seed + 2)
    return (x * torch.linspace(0.1, 3, features)).t() @ (x * torch.linspace(0.1, 3, features))


def loss(weight, rows, moment):
    """trace((W - Q) H (W - Q)^T)"""
    error = weight.double() - rows.codes.double() * rows.scale.double()
    return float(((error @ moment.double()) * error).sum())


def damped(moment):
    return moment.double() + DAMPING * moment.double().diagonal().mean() * torch.eye(len(moment))


# The numbers


@pytest.mark.parametrize(
    "moment",
    [torch.eye(80), randn(80).square().diag(), torch.zeros(80, 80), torch.full((80, 80), torch.nan)],
    ids=["identity", "diagonal", "nothing seen", "not finite"],
)
def test_without_anything_that_goes_together_it_is_plain_rounding(moment):
    weight = randn(24, 80).bfloat16()
    codes, scale = gptq(weight, moment)
    plain = quantize_rows(weight)
    assert torch.equal(codes.float(), plain.codes.float()) and torch.equal(scale, plain.scale)


def test_the_output_is_nearer_than_by_plain_rounding():
    weight, moment = randn(48, 160).bfloat16(), correlated(160)
    found, plain = gptq(weight, moment), quantize_rows(weight)
    assert found.codes.dtype == E4M3 and torch.equal(found.scale, plain.scale)
    assert loss(weight, found, damped(moment)) < 0.8 * loss(weight, plain, damped(moment))
    assert loss(weight, found, moment) < 0.5 * loss(weight, plain, moment)
    steps = (found.codes.float() - plain.codes.float()).abs() / plain.codes.float().abs().clamp(min=2**-6)
    assert 0 < (steps > 0).float().mean() < 1 and found.codes.float().isfinite().all()


def test_the_last_column_is_the_best_of_all_codes():
    """Of two columns the weaker is rounded last: by trying all 254 codes nothing better is found."""
    weight, moment = randn(32, 2), torch.tensor([[4.0, 1.7], [1.7, 1.0]])
    codes, scale = gptq(weight, moment)
    every = torch.arange(256, dtype=torch.uint8).view(E4M3).float()
    every = every[every.isfinite()]
    residues = weight[:, :, None] - every * scale[:, :, None]  # [N, 2, codes]
    first = residues[:, 0].gather(1, (every == codes.float()[:, :1]).float().argmax(1, keepdim=True))
    h = damped(moment).float()
    losses = h[0, 0] * first**2 + 2 * h[0, 1] * first * residues[:, 1] + h[1, 1] * residues[:, 1] ** 2
    assert torch.equal(codes.float()[:, 0], quantize_rows(weight).codes.float()[:, 0])
    assert torch.equal(every[losses.argmin(1)], codes.float()[:, 1])


def test_what_an_update_pushes_beyond_448_stays_there():
    """Column 0 is 15 above its code; column 1, which sees a tenth of it, should be far above 448 for that."""
    weight, moment = torch.zeros(1, 64), torch.eye(64)
    weight[0, :2] = torch.tensor([431.0, 448.0])
    moment[:2, :2] = torch.tensor([[100.0, 10.0], [10.0, 1.0]])
    assert gptq(weight, moment).codes.float()[0, :3].tolist() == [416, 448, 0]


@pytest.mark.parametrize("block", [1, 7, 160])
def test_blocks_of_columns_are_columns_one_by_one(block):
    weight, moment = randn(48, 160).bfloat16(), correlated(160)
    one, other = gptq(weight, moment, block), gptq(weight, moment, 32)
    assert (one.codes.float() == other.codes.float()).float().mean() > 0.999  # ties may fall to either side
    assert loss(weight, one, moment) == pytest.approx(loss(weight, other, moment), rel=1e-2)


def test_features_that_never_occur_are_rounded_plainly():
    weight, moment = randn(16, 40), correlated(40)
    moment[7], moment[:, 7] = 0, 0
    codes = gptq(weight, moment).codes.float()
    assert torch.equal(codes[:, 7], quantize_rows(weight).codes.float()[:, 7])
    assert not torch.equal(codes, quantize_rows(weight).codes.float())


def test_the_factor():
    moment = correlated(50)
    u = factor(moment).double()
    assert torch.equal(u, u.triu())
    torch.testing.assert_close(u.t() @ u @ damped(moment), torch.eye(50, dtype=torch.float64), atol=1e-5, rtol=0)
    indefinite = moment - 2 * moment.diagonal().mean() * torch.eye(50)  # as no rounding makes it
    indefinite.diagonal().abs_()
    assert factor(indefinite).isfinite().all()


@pytest.mark.gpu
def test_a_card_rounds_as_the_cpu_does():
    weight, x = randn(64, 320).bfloat16(), (randn(4096, 24) @ randn(24, 320, seed=1)).bfloat16()
    moment = torch.zeros(320, 320, device="cuda")
    calibration._add(moment, torch.nn.Identity(), (x.cuda(),))
    exact = x.double().t() @ x.double()
    assert (moment.cpu().double() - exact).norm() < 1e-5 * exact.norm()  # by TF32, but from bf16
    found, here = gptq(weight.cuda(), moment), gptq(weight, moment.cpu())
    assert torch.equal(found.scale.cpu(), here.scale)
    assert (found.codes.cpu().float() == here.codes.float()).float().mean() > 0.99
    assert torch.get_float32_matmul_precision() == "highest"


# The calibration


def requests_of(*fields):
    return [GenerationRequest(name="flux-mini", width=128, height=128, seed=i, **one) for i, one in enumerate(fields)]


def test_what_is_kept_of_a_trajectory_and_what_is_seen_from_there(small, one_thread):
    pipeline = load_pipeline("flux-mini", "cpu")
    asked = requests_of(
        {"prompt": "a red apple", "num_steps": 5},
        {"prompt": "a moon", "num_steps": 5, "true_cfg_scale": 2, "negative_prompt": "a tree"},
        {"prompt": "a tree", "num_steps": 1},
    )
    befores, seen = [], []
    for request in asked:
        steps = []
        pipeline.draw(request, on_step=lambda step, steps=steps: steps.append((step.sigma, step.before)))
        befores.append(steps)
    paths = trajectories(pipeline, asked)
    for path, steps, kept in zip(paths, befores, ([0, 3], [1, 4], [0]), strict=True):
        assert list(path.latents) == [steps[i][0] for i in kept]
        assert all(torch.equal(path.latents[steps[i][0]], steps[i][1]) for i in kept)

    linears = {
        name: pipeline.model.get_submodule(name) for name in ("double_blocks.1.txt_mlp.2", "single_blocks.0.linear2")
    }
    for one in linears.values():
        one.register_forward_pre_hook(lambda layer, args: seen.append((layer, args[0].flatten(0, -2).double())))
    with calibration._bar(5, "", "") as bar:
        found = second_moments(pipeline, paths, linears, bar)
    assert len(seen) == 2 * 5
    for name, one in linears.items():
        assert len(one._forward_pre_hooks) == 1  # the test's own
        x = torch.cat([x for layer, x in seen if layer is one])
        torch.testing.assert_close(found[name].double(), x.t() @ x, rtol=1e-4, atol=1e-4)


def test_as_many_layers_at_a_time_as_the_budget_allows():
    layers = {str(i): torch.nn.Linear(k, 1) for i, k in enumerate((10, 10, 20, 10, 30))}  # 400, 400, 1600, 400, 3600
    assert [list(turn) for turn in in_turns(layers, 2000)] == [["0", "1"], ["2", "3"], ["4"]]
    assert [list(turn) for turn in in_turns(layers, 1)] == [["0"], ["1"], ["2"], ["3"], ["4"]]
    assert [list(turn) for turn in in_turns(layers, 10**6)] == [["0", "1", "2", "3", "4"]]


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.csv"
    path.write_text("prompt,steps,seed,width,height\na red apple,3,,128,128\na moon,2,7,128,128\n")
    return str(path)


def test_a_calibrated_file(small, small_root, prompts, tmp_path, monkeypatch, capsys, one_thread):
    out = tmp_path / "out"
    assert main(["save", "--dtype", "fp8", "--calibrate", prompts, "--output", str(out)]) == 0
    file = out / small.flow_file
    found, plain = (
        load_file(file),
        load_file(save("flux-mini", dtype="fp8", output=tmp_path / "plain") / small.flow_file),
    )
    assert read_header(file).metadata["rounding"] == "GPTQ (arXiv 2210.17323) on 2 pictures"
    assert "rounding" not in read_header(tmp_path / "plain" / small.flow_file).metadata
    names = {name for name, x in found.items() if x.dtype == E4M3}
    assert found.keys() == plain.keys() and len(names) == 2 * 8 + 3 * 2
    for name, x in found.items():
        assert x.dtype == plain[name].dtype and x.shape == plain[name].shape
        assert torch.equal(x.float(), plain[name].float()) == (name not in names), name

    # in several passes, and once more: the same file
    monkeypatch.setattr(calibration, "BUDGET", 40_000)
    assert save("flux-mini", dtype="fp8", output=tmp_path / "b", calibrate=prompts)
    assert (tmp_path / "b" / small.flow_file).read_bytes() == file.read_bytes()

    # nearer in what it was made for
    pipeline = load_pipeline("flux-mini", "cpu")
    linears = {name.removesuffix(".weight"): pipeline.model.get_parameter(name) for name in names}
    modules = {name: pipeline.model.get_submodule(name) for name in linears}
    paths = trajectories(pipeline, requests_of({"prompt": "a red apple", "num_steps": 4}))
    with calibration._bar(0, "", "") as bar:
        moments = second_moments(pipeline, paths, modules, bar)
    for name, weight in linears.items():
        old, new = (
            weight - dequantize(state[f"{name}.weight"], state[f"{name}.weight_scale"], torch.float32)
            for state in (plain, found)
        )
        assert ((new @ moments[name]) * new).sum() < ((old @ moments[name]) * old).sum(), name

    capsys.readouterr()
    assert main(["info", str(file)]) == 0
    assert "rounding: GPTQ" in capsys.readouterr().out
    flags = {"--prompt": "a moon", "--steps": "1", "--width": "128", "--height": "128", "--dtype": "fp8"}
    flags |= {"--model": str(file), "--output-dir": str(tmp_path / "pictures")}
    assert main([*chain(*flags.items())]) == 0
    assert len(list((tmp_path / "pictures").iterdir())) == 1


def test_what_cannot_be_calibrated(small, prompts, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(UsageError, match=r"--calibrate says how fp8 is rounded. Next: add --dtype fp8"):
        save("flux-mini", output=out, calibrate=prompts)
    with pytest.raises(FileError, match="prompts could not be read"):
        save("flux-mini", dtype="fp8", output=out, calibrate=str(tmp_path / "none.txt"))
    (tmp_path / "empty.txt").write_text("# nothing\n")
    with pytest.raises(FileError, match="holds no prompt"):
        save("flux-mini", dtype="fp8", output=out, calibrate=str(tmp_path / "empty.txt"))
    (tmp_path / "wrong.csv").write_text("prompt,steps\na red apple,0\n")
    with pytest.raises(UsageError, match=r"wrong.csv, line 2: .*steps"):
        save("flux-mini", dtype="fp8", output=out, calibrate=str(tmp_path / "wrong.csv"))
    fp8 = save("flux-mini", dtype="fp8", output=tmp_path / "fp8")
    with pytest.raises(UsageError, match=r"is in fp8 already, .* Next: give the bf16 file"):
        save(dtype="fp8", output=out, calibrate=prompts, model=fp8)
    assert not out.exists()


def test_inputs_that_are_not_finite_are_told_by_their_layer(small):
    """A text token of the last block, which no pixel depends on."""
    pipeline = load_pipeline("flux-mini", "cpu")

    def overflow(layer, args):
        args[0][:, 0] = torch.inf

    pipeline.model.single_blocks[2].linear2.register_forward_pre_hook(overflow)
    with pytest.raises(NonFiniteError, match=r"inputs of single_blocks.2.linear2; no file is written"):
        calibrated(pipeline, requests_of({"prompt": "a moon", "num_steps": 1}))


def test_too_little_memory_is_told_with_what_helps(small, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB")

    monkeypatch.setattr(calibration, "second_moments", full)
    with pytest.raises(MemoryShortage, match=r"while calibrating: 1.00 GiB .* Next: .* or leave --calibrate out"):
        calibrated(load_pipeline("flux-mini", "cpu"), requests_of({"prompt": "a moon", "num_steps": 1}))


def test_the_prompts_that_ship_are_not_those_of_the_benchmark():
    mine = [line.fields for line in read_lines(str(PROMPTS / "calibration.txt"))]
    assert len({one["prompt"] for one in mine}) == len(mine) == 32
    assert not {one["prompt"] for one in mine} & {one.prompt for one in read_prompts(default_prompts("flux-mini"))}
