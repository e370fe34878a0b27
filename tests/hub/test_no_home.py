"""A user id without a name and no HOME, as `docker run --user 12345`; and `~` in every path that a user gives."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from fake_hub import fake_hub, weights

from flux_core import load_pipeline
from flux_core.checkpoint import with_files
from flux_core.checkpoint.files import ae_path, flow_path
from flux_core.commands.save import save
from flux_core.errors import FileError, UsageError
from flux_core.hub import client as hub
from flux_core.hub.places import scorer_folder
from flux_core.main import main
from flux_core.variants import VARIANTS

ROOT = Path(__file__).parents[2]
REPO, CLIP, T5 = (getattr(VARIANTS["flux-schnell"], name) for name in ("repo", "clip", "t5"))
FILES = {
    REPO: {
        "flux1-schnell.safetensors": weights(b"f" * 900),
        "ae.safetensors": weights(b"a" * 500),
        "text_encoder_2/config.json": b"{}",
        "text_encoder_2/model.safetensors": weights(b"t" * 300),
        "tokenizer_2/spiece.model": b"s",
    },
    CLIP: {"config.json": b"{}", "model.safetensors": weights(b"c")},
    T5: {"config.json": b"{}", "spiece.model": b"s"},
}
NOBODY = """
import os, pwd, sys
sys.path.insert(0, sys.argv.pop(1))
if os.getuid() == 0:
    os.setreuid(12345, -1)  # files are still read as root, since Python itself may be in root's home
else:
    def unknown(uid):
        raise KeyError(uid)
    pwd.getpwuid = unknown
from pathlib import Path
try:
    sys.exit(f"there is a home: {Path.home()}")
except RuntimeError:
    pass
from flux_core.main import main
sys.exit(main())
"""


@pytest.fixture
def open_folder():
    """A folder that every user may write to; a test's own is closed to others."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o777)
        yield Path(folder)


@pytest.fixture
def nobody(open_folder):
    """The command of a user without a home, in an empty folder; its exit code, and what it says."""
    (open_folder / "here").mkdir()

    def run(*words, **env):
        kept = {name: os.environ[name] for name in ("PATH", "SYSTEMROOT") if name in os.environ}
        command = [sys.executable, "-c", NOBODY, str(ROOT), *words]
        settings = {"cwd": open_folder / "here", "env": kept | {"OMP_NUM_THREADS": "1"} | env}
        done = subprocess.run(command, **settings, capture_output=True, encoding="utf-8", check=False)
        assert not [path for path in open_folder.rglob("*") if "~" in path.name]
        return done.returncode, done.stdout + done.stderr

    return run


def test_without_a_home_the_cache_is_where_it_is_set(nobody, open_folder):
    with fake_hub(FILES) as running:
        address = {"HF_ENDPOINT": f"http://127.0.0.1:{running.port}"}
        code, told = nobody("download", "flux-schnell", HF_HUB_CACHE=str(open_folder / "cache"), **address)
        assert code == 0, told
        assert (open_folder / "cache" / f"models--{REPO.replace('/', '--')}").is_dir()
        code, told = nobody("download", "flux-schnell", HF_HOME=str(open_folder / "home"), **address)
        assert code == 0 and (open_folder / "home" / "hub").is_dir(), told


@pytest.mark.parametrize("words", [("download", "flux-schnell"), ("--name", "flux-schnell", "--prompt", "a")])
def test_without_either_a_line_names_hf_home(nobody, words):
    code, told = nobody(*words)
    (line,) = (line for line in told.splitlines() if line.startswith("error: "))
    assert code == 2 and "HOME is not set" in line and "Next: set HF_HOME to a folder" in line


def test_what_needs_no_cache_works_without_a_home(nobody):
    code, told = nobody("--prompt", "a", "--steps=1", "--width=128", "--height=128", "--device=cpu")
    assert code == 0, told


def test_a_tilde_without_a_home_is_a_line(nobody):
    code, told = nobody("--prompt", "a", "--model", "~/x.safetensors")
    assert code == 2 and "error: --model ~/x.safetensors: there is no such home folder. Next: " in told


# `~` -----------------------------------------------------------------------------------------------


@pytest.fixture
def home(small, small_root, tmp_path, monkeypatch):
    """A home folder with the small model in it, and an empty folder to be in."""
    home = tmp_path / "home"
    home.mkdir()
    (home / "model").symlink_to(small_root / "flux-mini")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("USERPROFILE", str(home))
    yield home
    assert not [path for path in tmp_path.rglob("*") if "~" in path.name]


def test_files_by_flag_and_by_variable(home, monkeypatch):
    assert with_files(None, model="~/model").name == "flux-mini"
    assert flow_path(with_files(None, model="~/model")) == home / "model" / "flux-mini.safetensors"
    monkeypatch.setenv("FLUX_MODEL", "~/model/flux-mini.safetensors")
    monkeypatch.setenv("FLUX_AE", "~/model/ae.safetensors")
    dev = VARIANTS["flux-dev"]
    assert (flow_path(dev), ae_path(dev)) == (
        home / "model" / "flux-mini.safetensors",
        home / "model" / "ae.safetensors",
    )
    assert load_pipeline(model="~/model", device="cpu").variant.name == "flux-mini"


def test_every_flag_of_a_file_or_folder(home, capsys, one_thread):
    files = {"model": "flux-mini", "ae": "ae", "t5xxl": "t5/model", "clip-l": "clip/model"}
    flags = [f"--{flag}=~/model/{name}.safetensors" for flag, name in files.items()]
    size = ["--width=32", "--height=32", "--steps=1", "--force", "--device=cpu"]
    assert main(["--prompt", "a", *flags, *size, "--output-dir=~/drawn"]) == 0
    assert [path.suffix for path in (home / "drawn").iterdir()] == [".png"]
    for command in ("info", "verify"):
        assert main([command, "~/model/ae.safetensors"]) == 0
    assert main(["explore", "--prompt=a", *size, "--output-dir=~/explored"]) == 0
    (session,) = (home / "explored").iterdir()
    assert main(["explore", f"--resume=~/explored/{session.name}"]) == 0
    assert main(["save", "--output=~/saved", "--format=official"]) == 0
    assert (home / "saved" / "flux-mini.safetensors").is_file()
    assert save("flux-mini", "official", "bf16", "~/again") == home / "again"


def test_the_hubs_folders_and_the_login(home, monkeypatch):
    for name in ("HF_HUB_CACHE", "XDG_CACHE_HOME", "HF_TOKEN_PATH", *hub.TOKENS):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", "~/hf")
    assert hub.cache_folder() == home / "hf" / "hub"
    (home / "my-token").write_text("hf_x")
    monkeypatch.setenv("HF_TOKEN_PATH", "~/my-token")
    assert hub.find_token().value == "hf_x"
    monkeypatch.setenv("HF_HUB_CACHE", "~/cache")
    assert hub.cache_folder() == home / "cache"
    monkeypatch.delenv("HF_HUB_CACHE")
    monkeypatch.delenv("HF_HOME")
    assert hub.cache_folder() == home / ".cache" / "huggingface" / "hub"


def test_a_scorers_folder(home):
    (home / "scorer").mkdir()
    assert scorer_folder("~/scorer") == home / "scorer"
    with pytest.raises(FileError, match="there is no scorer '~/other'"):
        scorer_folder("~/other")
    with pytest.raises(UsageError, match="~nobody-of-that-name/x: there is no such home folder"):
        scorer_folder("~nobody-of-that-name/x")
