"""Python from the shell: a user's functions in every command, recorded by name and hash, and run for nobody else."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image, PngImagePlugin
from safetensors.torch import save_file

from flux_core import load_pipeline
from flux_core.errors import UsageError
from flux_core.hooks import Custom, Python, Sampler, Skip, Wrap, load_capture
from flux_core.hooks.plan import read_plan
from flux_core.hooks.python import no_code
from flux_core.images.metadata import read_request
from flux_core.main import main

CODE = """
import torch
from flux_core.hooks import Custom, Skip

calls = []

def brighter(x, at):
    return x * 1.5

def look(at, x):
    calls.append((at.name, at.step))

def plan(params):
    seen = []
    def once(x, at):
        assert at.step == len(seen)
        seen.append(at.step)
        return x * 0.5
    return [Skip(blocks="layer.1"), Custom(sites="vec", fn=once)]

def skipping(params):
    return Skip(blocks=f"layer.{params.depth}")

def away(velocity, sampling):
    worse = sampling.of([Skip(blocks="layer.0")])
    return lambda x, sigma: 2 * velocity(x, sigma) - worse(x, sigma)

def ahead(velocity, x, sigmas, on_step):
    return x + (sigmas[-1] - sigmas[0]) * velocity(x, sigmas[0])

def nothing(params):
    return 3

number = 3
"""
DRAW = ["--prompt", "a red apple", "--width=32", "--height=32", "--force", "--num-steps=3", "--seed=1"]
MARK = """
from pathlib import Path

Path("was_run").write_text("")

def brighter(x, at):
    return x

def plan(params):
    return []
"""


@pytest.fixture(autouse=True)
def work(small, one_thread, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("my.py").write_text(CODE)
    return tmp_path


def drawn(*flags):
    """The picture that the command draws with these flags."""
    before = set(Path("output").glob("*.png"))
    assert main([*DRAW, *flags]) == 0
    (new,) = set(Path("output").glob("*.png")) - before
    return new


def pixels(path):
    return Image.open(path).tobytes()


def module():
    entry = read_plan("my.py:plan")[0]
    return entry.function.__globals__


def loaded():
    return load_pipeline("flux-mini", "cpu")


def generated(pipeline, *plan):
    sizes = {"width": 32, "height": 32, "force": True}
    return pipeline.generate("a red apple", 1, num_steps=3, plan=plan, **sizes)[0].tobytes()


def test_functions_do_what_they_do_in_python():
    own, hook, pipeline = module(), ["--hook", "my.py:brighter", "--at"], loaded()
    brighter = {"sites": "single_blocks.*.img.q", "fn": own["brighter"]}
    for flags, plan in (
        (["--plan", "my.py"], [Python(fn=own["plan"])]),
        (["--plan", "my.py:skipping"], [Skip(blocks="layer.2")]),
        ([*hook, "single_blocks.*.img.q"], [Custom(**brighter)]),
        ([*hook, "single_blocks.*.img.q", "--steps", "0-1"], [Custom(**brighter, steps="0-1")]),
        ([*hook, "single_blocks.*.img.q@0,2"], [Custom(**brighter, steps="0,2")]),
        (["--wrap", "my.py:away"], [Wrap(fn=own["away"])]),
        (["--sampler", "my.py:ahead", "--skip", "layer.0"], [Skip(blocks="layer.0"), Sampler(fn=own["ahead"])]),
    ):  # fmt: skip
        assert pixels(drawn(*flags)) == generated(pipeline, *plan), flags


def test_a_function_whose_first_argument_is_at_reads():
    plain = drawn()
    own = module()
    own["calls"].clear()
    read = drawn("--hook", "my.py:look", "--at", "vec@1", "--hook", "my.py:look", "--at", "img_in@2")
    assert own["calls"] == [("vec", 1), ("img_in", 2)] and pixels(read) == pixels(plain)
    assert read_request(read).plan == () == read_request(read).functions


def test_a_picture_records_name_and_hash_and_repeating_asks_for_them(capsys):
    sha256 = hashlib.sha256(CODE.encode()).hexdigest()
    path = drawn("--hook", "my.py:brighter", "--at", "img_in@0-1", "--plan", "my.py")
    whole, hook = read_request(path).plan
    assert (whole.kind, whole.fn, whole.sha256) == ("python", "my.py:plan", sha256)
    assert (hook.kind, hook.fn, hook.sha256, hook.steps) == ("custom", "my.py:brighter", sha256, (0, 1))
    assert "plan: my.py:plan, my.py:brighter" in capsys.readouterr().out
    from flux_core.hooks import python

    python._LOADED.clear()  # as in another process
    for words in (["repeat", str(path), "--force"], ["--from-image", str(path), "--force"]):
        assert main(words) == 2
        error = capsys.readouterr().err
        assert f"my.py:plan, code that a file cannot bring along (SHA-256 {sha256[:12]}…)" in error
        assert "Next: --hook my.py" in error
    Path("other").mkdir()
    Path("other/my.py").write_text(CODE + "\n")
    assert main(["repeat", str(path), "--force", "--hook", "other/my.py"]) == 2
    assert "and the my.py given has " in capsys.readouterr().err
    Path("kept").mkdir()
    shutil.move("my.py", "kept/any.py")
    assert main(["repeat", str(path), "--force", "--plan", "kept/any.py"]) == 0
    assert "the same picture, byte for byte" in capsys.readouterr().out
    assert main(["--from-image", str(path), "--force", "--skip", "layer.0"]) == 0


def test_files_of_a_plan_lie_beside_it():
    Path("plans").mkdir()
    shutil.move("my.py", "plans/my.py")
    save_file({"smile": torch.ones(1)}, "plans/d.safetensors")
    entries = [
        {"kind": "custom", "fn": "my.py:brighter", "sites": ["vec"]},
        {"kind": "add", "sites": ["img_in"], "value": {"file": "d.safetensors", "tensor": "smile", "times": 0.5}},
        {"kind": "capture", "sites": ["vec"], "to": "seen.safetensors"},
    ]
    Path("plans/plan.json").write_text(json.dumps(entries))
    path = drawn("--plan", "plans/plan.json")
    assert read_request(path).functions == ("add a tensor at img_in",)
    assert [entry.fn for entry in read_request(path).plan] == ["my.py:brighter"]
    assert load_capture("seen.safetensors")["vec"].shape[0] == 3


# Nobody else ----------------------------------------------------------------------------------------------


def forged(path, plan):
    """A copy of a picture whose metadata have that plan."""
    image = Image.open(path)
    fields = json.loads(image.info["flux_core"]) | {"plan": plan}
    info = PngImagePlugin.PngInfo()
    info.add_text("flux_core", json.dumps(fields))
    image.save("forged.png", pnginfo=info)
    return "forged.png"


EVIL = [
    {"kind": "python", "fn": "evil.py"}, {"kind": "python", "fn": "evil.py:plan"},
    {"kind": "python", "fn": "evil.py:plan", "sha256": hashlib.sha256(MARK.encode()).hexdigest()},
    {"kind": "python", "fn": "./evil.py:plan", "sha256": hashlib.sha256(MARK.encode()).hexdigest()},
    {"kind": "custom", "fn": "evil.py:brighter", "sites": ["vec"]},
    {"kind": "wrap", "fn": "evil.py:brighter"}, {"kind": "sampler", "fn": "evil.py:brighter"},
    {"kind": "sampler", "fn": "evil.py:brighter", "sha256": hashlib.sha256(MARK.encode()).hexdigest()},
]  # fmt: skip


def test_no_picture_causes_code_to_run():
    Path("evil.py").write_text(MARK)
    picture = drawn()
    for entry in EVIL:
        path = forged(picture, [entry])
        for words in (["repeat", path], ["--from-image", path], ["info", path], ["repeat", path, "--hook", "my.py"]):
            code = main(words)
            assert not Path("was_run").exists() and (code in (2, 4) or words[0] == "info"), (entry, words)


@pytest.mark.parametrize("job", [
    {"plan": "evil.py"}, {"plan": "evil.py:plan"}, {"hook": "evil.py:brighter", "at": "vec"}, {"plan": "code.json"},
    {"wrap": "evil.py:brighter"}, {"sampler": "evil.py:brighter"}, {"plan": "writes.json"}, {"plan": "reads.json"},
    {"command": "explore", "plan": "evil.py"}, {"command": "edit", "plan": "evil.py"},
    {"command": "importance", "plan": "evil.py"},
])  # fmt: skip
def test_no_job_causes_code_to_run_or_files_to_be_read_or_written(job, capsys):
    Path("evil.py").write_text(MARK)
    Path("code.json").write_text(json.dumps([{"kind": "custom", "fn": "evil.py:brighter", "sites": "vec"}]))
    Path("writes.json").write_text(json.dumps([{"kind": "capture", "to": "seen.safetensors", "sites": "vec"}]))
    value = {"file": "d.safetensors", "tensor": "a"}
    Path("reads.json").write_text(json.dumps([{"kind": "add", "value": value, "sites": "vec"}]))
    rest = {} if "command" in job else {"prompt": "a", "seed": 1}
    Path("job.json").write_text(json.dumps(rest | job))
    assert main(["run", "job.json"]) == 2
    assert "command line" in capsys.readouterr().err
    assert not Path("was_run").exists() and not Path("seen.safetensors").exists() and not Path("output").exists()


def test_a_job_may_have_a_plan_of_data():
    Path("plan.json").write_text(json.dumps([{"kind": "skip", "blocks": "layer.0"}]))
    job = {"prompt": "a", "seed": 1, "num_steps": 1, "width": 32, "height": 32, "force": True, "plan": "plan.json"}
    Path("job.json").write_text(json.dumps(job))
    assert main(["run", "job.json"]) == 0


def test_no_code():
    with no_code("a letter"), pytest.raises(UsageError, match=r"a letter cannot make us run my\.py"):
        read_plan("my.py")
    assert read_plan("my.py")


# Errors ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("words, code, said", [
    (["--hook", "my.py:brighter"], 2, "--hook needs a place"),
    (["--hook", "my.py", "--at", "vec"], 2, "'my.py' names no function of a Python file"),
    (["--hook", "my.py:brigter", "--at", "vec"], 2, "my.py has no function 'brigter'. Did you mean brighter?"),
    (["--hook", "my.py:number", "--at", "vec"], 2, "my.py has no function 'number'"),
    (["--hook", "no.py:brighter", "--at", "vec"], 4, "no.py: the Python file could not be read: No such file"),
    (["--hook", "my.py:brighter", "--at", "vek"], 2, "no site is called 'vek'"),
    (["--hook", "my.py:brighter", "--at", "vec@"], 2, "--at vec@: no steps behind the @"),
    (["--hook", "my.py:brighter", "--at", "vec@3"], 2, "there is no step 3, the last is 2"),
    (["--at", "vec"], 2, "--at does nothing without --hook"),
    (["--hook-steps", "0-1"], 2, "--hook-steps does nothing without --hook"),
    (["--plan", "wrong.py"], 2, "wrong.py, line 2: SyntaxError"),
    (["--plan", "leaves.py"], 2, "leaves.py, line 1: SystemExit"),
    (["--plan", "raises.py"], 2, "raises.py, line 3: ZeroDivisionError: division by zero"),
    (["--plan", "my.py:nothing"], 2, "my.py:nothing: a plan is a list of interventions, not int"),
    (["--plan", "my.py:number"], 2, "has no function 'number'"),
    (["--plan", "my.py:Skip"], 2, "has no function 'Skip'"),
    (["--wrap", "my.py:brighter"], 2, "my.py:brighter"),
    (["--sampler", "my.py:ahead", "--plan", "samples.json"], 2, "are two samplers"),
])  # fmt: skip
def test_what_is_wrong_is_told(words, code, said, capsys):
    Path("wrong.py").write_text("x = 1\ndef plan(:\n")
    Path("leaves.py").write_text("raise SystemExit\n")
    Path("raises.py").write_text("x = 1\ndef f():\n    return 1 / 0\ny = f()\n")
    Path("samples.json").write_text(json.dumps([{"kind": "sampler", "fn": "my.py:ahead"}]))
    assert main([*DRAW, *words]) == code
    assert said in capsys.readouterr().err and not list(Path("output").glob("*.png"))


# In other commands ----------------------------------------------------------------------------------------


def test_explore_draws_with_a_plan_and_goes_on_only_with_it(capsys):
    from flux_core.hooks import python

    small = ["--width=32", "--height=32", "--force", "--steps", "3", "--skip", "layer.0"]
    Path("plan.json").write_text(json.dumps([{"kind": "capture", "sites": ["vec"], "to": "seen.safetensors"}]))
    words = ["explore", "--prompt", "a red apple", "--seeds", "1,2", *small]
    assert main([*words, "--plan", "my.py", "--hook", "my.py:look", "--at", "vec"]) == 0
    (folder,) = Path("output").iterdir()
    one = folder / "exploration_images" / "seed_1.png"
    assert pixels(one) == generated(loaded(), Python(fn=module()["plan"]), Skip(blocks="layer.0"))
    (folder / "exploration_images" / "seed_2.png").unlink()
    python._LOADED.clear()
    assert main(["explore", "--resume", str(folder)]) == 2
    assert "the session was made with my.py:plan" in capsys.readouterr().err
    assert main(["explore", "--resume", str(folder), "--hook", "my.py"]) == 0
    assert (folder / "exploration_images" / "seed_2.png").exists()
    python._LOADED.clear()
    assert main(["repeat", str(folder / "metadata.csv"), "--row", "1", "--force", "--plan", "my.py"]) == 0
    assert "the same picture, byte for byte" in capsys.readouterr().out
    shutil.rmtree("output")
    assert main([*words, "--plan", "plan.json"]) == 0
    assert {path.name for path in Path().glob("seen*")} == {"seen.safetensors", "seen_1.safetensors"}
    (folder,) = Path("output").iterdir()
    assert main(["explore", "--resume", str(folder)]) == 2
    assert "Next: give the same --plan" in capsys.readouterr().err
    assert main(["explore", "--resume", str(folder), "--plan", "plan.json"]) == 0


def test_edit_draws_with_functions():
    flags = ["edit", "--source", "a pig", "--edit", "a green pig", "--width=32", "--height=32", "--force", "--seed=1"]
    assert main([*flags, "--steps", "2"]) == 0
    plain = {path.name: pixels(path) for path in Path("output").glob("*.png")}
    shutil.rmtree("output")
    assert main([*flags, "--num-steps", "2", "--hook", "my.py:brighter", "--at", "vec", "--steps", "1"]) == 0
    hooked = {path.name: pixels(path) for path in Path("output").glob("*.png")}
    assert plain.keys() == hooked.keys() and all(plain[name] != hooked[name] for name in plain)
    assert "my.py:brighter" in Image.open(next(Path("output").glob("*edit1.png"))).info["flux_core"]


def test_a_study_of_a_plan_that_skips(tmp_path_factory):
    from random_model import write_scorer

    Path("prompts.json").write_text(json.dumps([{"prompt": "a pig", "seed": 1}]))
    flags = ["importance", "--prompts=prompts.json", "--width=32", "--height=32", "--force", "--batch=1"]
    flags += ["--scorer", str(write_scorer(tmp_path_factory.mktemp("scorer"))), "--output-dir=study", "--num-steps=1"]
    assert main([*flags, "--skip", "layer.1"]) == 0


def test_numbers_of_pictures_reach_functions():
    own = module()
    own["calls"].clear()
    Path("my.py").write_text(CODE.replace("(at.name, at.step)", "(at.name, at.image)"))
    assert main([*DRAW, "--num-images", "3", "--hook", "my.py:look", "--at", "vec@0"]) == 0
    assert module()["calls"] == [("vec", 0), ("vec", 1), ("vec", 2)]


def test_a_look_at_a_repeated_picture_keeps_its_plan(capsys):
    path = drawn("--skip", "layer.0")
    Path("plan.json").write_text(json.dumps([{"kind": "capture", "sites": ["vec"], "to": "seen.safetensors"}]))
    assert pixels(path) == pixels(drawn("--from-image", str(path), "--plan", "plan.json"))
    assert main(["repeat", str(path), "--force", "--plan", "plan.json"]) == 0
    assert "byte for byte" in capsys.readouterr().out and Path("seen_1.safetensors").exists()
    Path("plan.json").write_text(json.dumps([{"kind": "skip", "blocks": "layer.1"}]))
    assert main(["repeat", str(path), "--force", "--plan", "plan.json"]) == 2


def test_a_study_is_drawn_with_a_plan_and_remembers_it(tmp_path_factory, capsys):
    from random_model import write_scorer

    Path("prompts.json").write_text(json.dumps([{"prompt": "a pig", "seed": 1}]))
    flags = ["importance", "--prompts=prompts.json", "--width=32", "--height=32", "--force", "--batch=1"]
    flags += ["--scorer", str(write_scorer(tmp_path_factory.mktemp("scorer"))), "--output-dir=study", "--num-steps=1"]
    assert main([*flags, "--hook", "my.py:brighter", "--at", "vec"]) == 0
    pipeline = load_pipeline("flux-mini", "cpu")
    plan = Custom(sites="vec", fn=module()["brighter"])
    image = pipeline.generate("a pig", 1, num_steps=1, width=32, height=32, force=True, plan=plan)[0]
    assert pixels(Path("study/images/000_seed1/reference.png")) == image.tobytes()
    assert main(flags) == 2 and "plan" in capsys.readouterr().err
