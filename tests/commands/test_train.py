"""`train` from its flags to the adapter: stages that go on, plans, and every way in which a run can end before its end
(users.md 4c, rows 24, 46, 48 to 50)."""

import csv
import hashlib
import os
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path
from random import Random

import pytest
from PIL import Image

from flux_core import load_pipeline
from flux_core.main import main, parse
from flux_core.request.training import CHECKPOINTING, OPTIMIZERS, RULES, SETTINGS, TIMESTEPS, WEIGHTINGS
from flux_core.training.objective import MAPS
from flux_core.training.objective import WEIGHTINGS as KNOWN_WEIGHTINGS
from flux_core.training.optimizers import OPTIMIZERS as KNOWN_OPTIMIZERS
from flux_core.training.recompute import WAYS
from flux_core.training.settings import Settings, example_file, read_settings
from flux_core.training.sizes import RULES as KNOWN_RULES

ROOT = Path(__file__).parents[2]
ADAPTER = "pytorch_lora_weights.safetensors"
pytestmark = pytest.mark.usefixtures("one_thread")


def pictures(folder, count=12, size=(40, 32)):
    """Pictures of one colour each, with captions."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        Image.new("RGB", size, (20 * i, 255 - 20 * i, 99)).save(folder / f"{i:02}.png")
        (folder / f"{i:02}.txt").write_text(f"a red apple, two green pigs, thing {i}")
    return folder


@pytest.fixture
def work(tmp_path, monkeypatch):
    pictures(tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    return tmp_path


FEW = ["--data=data", "--resolution=32x32", "--rank=2", "--steps=4", "--seed=1", "--output_dir=out", "--lr=0.01"]
MORE = [*FEW, "--trigger=noto", "--shuffles=2", "--caption-dropout=0.3", "--flip", "--crop=random", "--crops=2",
        "--sample-prompts", "a red apple", "the moon", "--sample-steps=1", "--save-every=2", "--ema=0.5"]  # fmt: skip


def train(*flags):
    return main(["train", *flags])


def digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def losses(folder):
    with (folder / "loss.csv").open(newline="") as file:
        return [(row["step"], row["loss"]) for row in csv.DictReader(file)]


def test_names_in_the_table_are_those_of_the_code():
    assert set(TIMESTEPS) == set(MAPS) and tuple(KNOWN_WEIGHTINGS) == WEIGHTINGS and tuple(WAYS) == CHECKPOINTING
    assert tuple(KNOWN_OPTIMIZERS) == OPTIMIZERS and set(RULES) == set(KNOWN_RULES)
    assert len({field.name for field in SETTINGS}) == len(SETTINGS)


def test_from_pictures_to_an_adapter(small, work, capsys):
    assert train(*MORE) == 0
    said = capsys.readouterr().out
    assert "pictures: 11 to learn from (11 of 32x32), 1 held out, 0 left out" in said
    assert said.splitlines()[-1] == f"out/{ADAPTER}"
    there = {path.name for path in Path("out").iterdir()}
    assert there >= {ADAPTER, "README.md", "ab.png", "samples.png", "changes.png", "loss.png", "loss.csv", "texts",
                     "latents", "checkpoints", "samples"}  # fmt: skip
    assert [step for step, _ in losses(Path("out"))] == ["1", "2", "3", "4"]
    assert sorted(path.name for path in Path("out/checkpoints").iterdir()) == [
        "step-0000002.safetensors",
        "step-0000004.safetensors",
    ]
    assert str(work) not in Path("out/README.md").read_text()
    for picture in (*Path("out/samples").iterdir(), Path("out/ab.png"), Path("out/samples.png")):
        with Image.open(picture) as image:  # the mark of pictures that a model made; no request draws them again
            assert "xmp" in image.info and "flux_core" not in image.info, picture
    pipeline = load_pipeline("flux-mini")
    how = {"width": 32, "height": 32, "num_steps": 1, "force": True}
    plain = pipeline.generate("a red apple", 1, **how)[0].tobytes()
    with pipeline.load_lora("out") as handle:
        assert pipeline.generate("a red apple", 1, **how)[0].tobytes() != plain
        handle.scale = 0.0
        assert pipeline.generate("a red apple", 1, **how)[0].tobytes() == plain


def test_equal_runs_are_equal_bytes_and_a_finished_one_says_so(small, work, capsys):
    assert train(*MORE) == 0
    assert train(*MORE, "--output_dir=other") == 0
    for name in (ADAPTER, "loss.csv", "loss.png", "changes.png", "README.md"):
        assert digest(Path("out") / name) == digest(Path("other") / name), name
    before = {path: path.stat().st_mtime_ns for path in Path("out").rglob("*")}
    capsys.readouterr()
    assert train(*MORE) == 0
    assert capsys.readouterr().out == f"finished: out/{ADAPTER}\n"
    assert {path: path.stat().st_mtime_ns for path in Path("out").rglob("*")} == before


@pytest.mark.slow
def test_a_run_that_was_stopped_goes_on_to_the_bit(small, work, monkeypatch):
    """Ctrl-C finishes the step and saves; caches are not made again."""
    from flux_core.training import run as module

    assert train(*MORE) == 0
    look, encoded = module.Run.look, []

    def stopping(self, step):
        look(self, step)
        if step == 3:
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(module.Run, "look", stopping)
        assert train(*MORE, "--output_dir=other") == 130
    assert Path("other/checkpoints/step-0000003.safetensors").is_file() and not Path("other", ADAPTER).exists()
    add = module.LatentCache.add
    monkeypatch.setattr(module.LatentCache, "add", lambda *args: encoded.append(args) or add(*args))
    assert train(*MORE, "--output_dir=other") == 0
    assert digest(Path("out", ADAPTER)) == digest(Path("other", ADAPTER)) and not encoded
    assert losses(Path("out")) == losses(Path("other"))


def test_another_run_is_refused_and_what_differs_is_named(small, work, capsys):
    assert train(*MORE, "--steps=2") == 0
    kept = digest(Path("out", ADAPTER))
    changes = {
        "--rank=3": "with lora_alpha 2.0, not 3.0", "--lr=0.02": "with lr 0.01, not 0.02",
        "--seed=2": "with seed 1, not 2", "--caption-dropout=0.5": "with caption_dropout 0.3, not 0.5",
        "--trigger=zwx": 'with trigger "noto", not "zwx"', "--held-out=2": "without held_out, not with 2",
        "--t5-dtype=bf16": 'without t5_dtype, not with "bfloat16"', "--threads=3": "without threads, not with 3",
    }  # fmt: skip
    for change, said in changes.items():
        capsys.readouterr()
        assert train(*MORE, "--steps=3", change) == 2, change
        assert f"was trained {said}. Next: go on with what it was" in capsys.readouterr().err, change
        assert digest(Path("out", ADAPTER)) == kept, change
    Path("data/01.txt").write_text("another caption")  # of one that is not held out
    assert train(*MORE, "--steps=3") == 2
    said = "was trained with other pictures or captions in the same folders, or other encoders, versions, devices or"
    assert f"{said} threads. Next" in capsys.readouterr().err


def test_a_run_that_kept_its_class_by_pictures_says_so(small, work, capsys):
    pictures(work / "class", 2, (32, 40))
    assert train(*FEW, "--regularization=class", "--preserve=regularization", "--steps=1") == 0
    assert train(*FEW, "--regularization=class") == 2
    assert 'was trained with preserve "regularization", not ""' in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("flags", [
    ["--rank-min=1", "--ranks=to_k=1", "--rates=to_v=0.001", "--lora-plus=4", "--optimizer=adamw_schedulefree"],
    ["--lokr=4", "--optimizer=prodigy"],
])  # fmt: skip
def test_other_forms_and_optimizers_go_on_to_the_bit(small, work, flags):
    """Samples, validation and the end included; the adapter draws here by its folder."""
    more = [flag for flag in MORE if not flag.startswith(("--ema", "--output_dir", "--lr"))]
    assert train(*more, *flags, "--output_dir=whole") == 0
    assert train(*more, *flags, "--output_dir=out", "--steps=2") == 0
    assert train(*more, *flags, "--output_dir=out") == 0
    assert digest(Path("whole", ADAPTER)) == digest(Path("out", ADAPTER))
    assert main(["--prompt=x", "--lora", "out", "--num_steps=2", "--width=32", "--height=32", "--force"]) == 0


def test_a_plan_writes_nothing(small, work, capsys):
    assert train(*MORE, "--dry-run") == 0
    said = capsys.readouterr().out
    for line in ("captions: ", "are longer than T5's 20 tokens", "steps: 4, 1 pictures each: 0.4 epochs", "time: at",
                 "disk: "):  # fmt: skip
        assert line in said
    assert not Path("out").exists()


@pytest.mark.parametrize("module, flags", [
    ("pyarrow", []), ("bitsandbytes", ["--optimizer=adamw8bit"]), ("prodigyopt", ["--optimizer=prodigy"]),
])  # fmt: skip
def test_a_library_that_is_missing_is_said_before_anything_is_loaded(small, work, capsys, monkeypatch, module, flags):
    """Row 46."""
    monkeypatch.setitem(sys.modules, module, None)
    assert train(*FEW, *flags) == 2
    assert f"Next: pip install {module}" in capsys.readouterr().err and not Path("out").exists()


def test_settings_come_from_a_file_and_flags_win(work):
    Path("c.toml").write_text('data = "x"\nrank = 8\n[training]\nlr = 1e-3\nsteps = 7\nflip = true\n')
    found = read_settings("c.toml", None, {"rank": "3"})
    assert (found.data, found.rank, found.lr, found.steps, found.flip, found.alpha) == ("x", 3, 1e-3, 7, True, 3.0)


@pytest.mark.parametrize("text, said", [
    ("rnak = 3", "there is no setting 'rnak'. Did you mean rank? Next: leave it out"),
    ("rank = 'x'", "c.toml: rank must be a whole number from 1 to 1024, not 'x'"),
    ("flip = 1", "c.toml: flip must be true or false, not 1"),
    ("rank = 3\n[a]\nrank = 4", "rank is set twice"),
    ("rank = ", "c.toml is no TOML"),
    ("weighting = 'snr'", "weighting must be one of none, sigma_sqrt, cosmap, not 'snr'"),
    ("sample_prompts = 'x'", "sample_prompts must be a list of texts"),
])  # fmt: skip
def test_a_wrong_file_is_said(work, capsys, text, said):
    Path("c.toml").write_text(text)
    assert train("c.toml") in (2, 4) and said in capsys.readouterr().err


@pytest.mark.parametrize("flags, said", [
    ([], "there is no --data"),
    (["--data=nowhere"], "nowhere is no folder"),
    (["--data=data", "--targets=to_x"], "--targets: no Linear of the transformer is named 'to_x'"),
    (["--data=data", "--ranks=nowhere=4"], "--ranks: no Linear of the transformer is named 'nowhere'"),
    (["--data=data", "--resolution=33x32"], "is not one size in multiples of 16"),
    (["--data=data", "--trigger-only=0.5"], "there is no trigger word"),
    (["--data=data", "--crops=3"], "--crops goes with --crop random"),
    (["--data=data", "--keep-tags=1"], "--keep-tags goes with --shuffles"),
    (["--data=data", "--timestep-shift=3"], "--timestep-shift goes with --timesteps shift"),
    (["--data=data", "--held-out=12", "--resolution=32x32"], "leaves nothing to train on"),
    (["--data=data", "--memory=8GB"], "--memory streams blocks to a card"),
    (["--data=data", "--rank=4", "--rank-min=5"], "T-LoRA's least rank is 5, more than the rank 4"),
    (["--data=data", "--rank-curve=2"], "--rank-curve goes with --rank-min"),
    (["--data=data", "--lokr=4", "--dora"], "DoRA and LoKr do not go together"),
    (["--data=data", "--ranks=to_q"], "'to_q' has no value. Next: NAME=VALUE"),
    (["--data=data", "--ranks=to_q=x"], "--ranks must be a whole number from 1 to 1024, not 'x'"),
    (["--data=data", "--rates=ff.net.2=1e-5"], "nothing that learns is named ff.net.2"),
    (["--data=data", "--optimizer=prodigy", "--lora-plus=2"], "prodigy finds one rate for all"),
    (["--data=data", "--optimizer=adamw_schedulefree", "--ema=0.9"], "keeps a mean of its own"),
    (["--data=data", "--optimizer=adamw_schedulefree", "--schedule=cosine"], "Next: the schedule constant"),
    (["--data=data", "--example=style"], ""),
    (["c.toml", "--example=noto"], "are two ways to begin"),
    (["--data=data", "--resolution=64x64"], "it has 40x32 pixels, fewer than 64x64"),
])  # fmt: skip
def test_wrong_flags_are_said_before_anything_is_written(small, work, capsys, flags, said):
    code = train(*flags, "--output_dir=out")
    assert code == (0 if not said else 2) and said in capsys.readouterr().err and not Path("out").exists()


def test_a_dry_run_says_which_package_is_missing(small, work, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "prodigyopt", None)
    assert train(*FEW, "--optimizer=prodigy", "--dry-run") == 0
    said = "the optimizer prodigy needs prodigyopt. Next: pip install prodigyopt"
    assert said in capsys.readouterr().err
    assert train(*FEW, "--optimizer=prodigy") == 2 and said in capsys.readouterr().err


def test_pictures_that_cannot_be_used_are_listed(small, work, capsys):
    """Row 48."""
    Path("data/bad.png").write_bytes(b"no picture")
    Image.new("RGB", (20, 20)).save("data/little.png")
    Path("data/little.txt").write_text("x")
    Path("data/03.txt").write_bytes(b"caf\xe9")
    assert train(*FEW, "--dry-run") == 0
    said = capsys.readouterr()
    for line in ("bad.png: left out: ", "little.png: left out: it has 20x20 pixels", "its caption 03.txt is no text"):
        assert line in said.err
    assert "3 left out" in said.out
    assert train(*FEW, "--strict") == 2 and "3 pictures cannot be used" in capsys.readouterr().err


def test_stale_and_damaged_caches_are_made_again_and_told(small, work, capsys):
    """Row 49."""
    assert train(*FEW) == 0
    part, latents = next(Path("out/texts").glob("*.parquet")), next(Path("out/latents").iterdir())
    part.write_bytes(part.read_bytes()[:-40])
    latents.write_bytes(latents.read_bytes()[:-4])
    kept = digest(Path("out", ADAPTER))
    Path("out", ADAPTER).unlink()
    assert train(*FEW) == 0
    said = capsys.readouterr().err
    assert "texts-00000.parquet is damaged" in said and "is encoded again" in said
    assert digest(Path("out", ADAPTER)) == kept


@pytest.mark.slow
def test_a_full_disk_loses_nothing(small_root, work):
    """Row 24: at the caches, at checkpoints, at the end; then the same command goes on."""
    code = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]),) * 2);"
        "sys.path.insert(0, sys.argv[2]); import trainer; sys.exit(trainer.main(sys.argv[3], sys.argv[4:]))"
    )
    for most in (1_000, 30_000, 41_000):
        done = subprocess.run(
            [sys.executable, "-c", code, str(most), str(Path(__file__).parent), str(small_root), *FEW],
            capture_output=True, text=True, env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        )  # fmt: skip
        assert done.returncode == 6, (most, done.stderr[-2000:])
        assert "Traceback" not in done.stderr
        assert not [path for path in work.rglob("*") if path.suffix in (".part", ".tmp")]
    whole = [sys.executable, "-c", code, "-1", str(Path(__file__).parent), str(small_root), *FEW]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    assert subprocess.run(whole, env=env).returncode == 0
    assert subprocess.run([*whole, "--output_dir=other"], env=env).returncode == 0
    assert digest(Path("out", ADAPTER)) == digest(Path("other", ADAPTER))


def reached(folder):
    """How far a run is: files of captions, of latents, and steps of the newest checkpoint."""
    saved = [int(path.stem.rpartition("-")[2]) for path in folder.glob("checkpoints/step-*.safetensors")]
    return len([*folder.glob("texts/*.parquet")]), len([*folder.glob("latents/*")]), max(saved, default=0)


@pytest.mark.slow
def test_a_command_that_is_killed_goes_on_to_the_bit(small_root, work):
    """Row 50: kill -9 in every stage."""
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    command = [sys.executable, "-c", "import sys, trainer; sys.exit(trainer.main(sys.argv[1], sys.argv[2:]))"]
    flags, random = [str(small_root), *MORE, "--steps=60", "--sample-every=20"], Random(0)
    assert subprocess.run([*command, *flags], env=env).returncode == 0
    for place in [(1, 0, 0), (2, 3, 0), (2, 9, 0), (2, 12, 2), (2, 12, 20), (2, 12, 40)]:
        with subprocess.Popen([*command, *flags, "--output_dir=other"], env=env, stderr=subprocess.DEVNULL) as process:
            while reached(Path("other")) < place and process.poll() is None:
                time.sleep(0.002)
            time.sleep(random.random() / 20)
            assert process.poll() is None, "it was faster than the kill"
            process.kill()
    assert subprocess.run([*command, *flags, "--output_dir=other"], env=env).returncode == 0
    assert digest(Path("out", ADAPTER)) == digest(Path("other", ADAPTER))
    assert losses(Path("out")) == losses(Path("other"))


def test_the_example_is_a_file_that_is_read(small, work, capsys):
    assert train("--example=style") == 0
    text = capsys.readouterr().out
    assert tomllib.loads(text)["targets" if "\ntargets" in text else "rank"] == 16
    assert text.count("# the notebook's: ") >= 5 and example_file("style").split() == text.split()
    for field in SETTINGS:
        assert f"\n{field.name} = " in text or f"\n# {field.name} = " in text
    Path("style.toml").write_text(text)
    found = read_settings("style.toml", None, {})
    assert isinstance(found, Settings) and found.schedule == "cosine" and found.sample_prompts


@pytest.mark.slow
@pytest.mark.parametrize("more", [[], ["--shard", "--checkpointing=blocks", "--dtype=int8"]], ids=["whole", "spread"])
def test_two_processes_make_the_run_of_one(small, small_root, work, more):
    """From pictures to an adapter: the same files with the same losses, and one of them speaks."""
    flags = [*MORE, "--batch=2", "--validate-every=2", *more]
    assert train(*(flag for flag in flags if flag != "--shard")) == 0
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    done = subprocess.run(
        [*torchrun, Path(__file__).parent / "trainer.py", small_root, *flags, "--output_dir=both"], text=True,
        capture_output=True, env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("pictures: 11 to learn from") == 1 and done.stdout.splitlines()[-1] == f"both/{ADAPTER}"
    made = [{path.relative_to(folder) for path in Path(folder).rglob("*")} for folder in ("out", "both")]
    assert made[0] == made[1]
    for one, other in zip(rows("out"), rows("both"), strict=True):
        assert other == pytest.approx(one, rel=1e-4)


def rows(folder):
    """The table of losses as numbers."""
    with Path(folder, "loss.csv").open(newline="") as file:
        return [{key: float(x) for key, x in row.items() if x} for row in csv.DictReader(file)]


def test_uses_of_sample_prompts_add_up():
    _, flags = parse(["train", "--data=x", "--sample-prompts", "a pig", "a dog", "--sample-prompts", "a cat"])
    assert read_settings(None, None, flags).sample_prompts == ["a pig", "a dog", "a cat"]
