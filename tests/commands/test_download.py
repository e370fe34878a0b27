"""`download`, `doctor`, tokens and the hub's answers, against a real client and a hub on 127.0.0.1 (users.md 4c, rows
41 to 45 and 55). The canary is the token of every test here, and no output may show it.
"""

import errno
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from fake_hub import digest, fake_hub, weights

from flux_core.commands.download import download
from flux_core.errors import DiskError, FileError

ROOT = Path(__file__).parents[2]
CANARY = "hf_Canary0123456789Canary0123456789"
REPO, CLIP, T5 = "black-forest-labs/FLUX.1-schnell", "openai/clip-vit-large-patch14", "google/t5-v1_1-xxl"
FLOW = "flux1-schnell.safetensors"
FILES = {
    REPO: {
        FLOW: weights(bytes(range(256)) * 120_000),  # 31 MB: the client writes every 10 MB
        "ae.safetensors": weights(b"a" * 500),
        "text_encoder_2/config.json": b"{}",
        "text_encoder_2/model.safetensors": weights(b"t" * 300),
        "tokenizer_2/spiece.model": b"s",
        "transformer/diffusion_pytorch_model.safetensors": b"the other layout",
        "text_encoder/model.safetensors": b"the other layout",
    },
    CLIP: {"config.json": b"{}", "model.safetensors": weights(b"c"), "pytorch_model.bin": b"pickle"},
    T5: {"config.json": b"{}", "spiece.model": b"s", "pytorch_model.bin": b"pickle"},
}


@pytest.fixture
def hub():
    with fake_hub(FILES) as running:
        yield running


@pytest.fixture
def cli(tmp_path):
    """The command in an empty folder, in an environment without any settings but those given."""

    def start(*words, **env):
        kept = {name: os.environ[name] for name in ("PATH", "SYSTEMROOT") if name in os.environ}
        kept |= {"HOME": str(tmp_path), "OMP_NUM_THREADS": "1", "HF_HOME": str(tmp_path / "hf"), **env}
        command = [sys.executable, str(ROOT / "cli.py"), *words]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "encoding": "utf-8"}
        return subprocess.Popen(command, cwd=tmp_path, env=kept, **pipes)

    def run(*words, code=0, **env):
        with start(*words, **env) as done:
            stdout, run.err = done.communicate(timeout=60)
        assert CANARY not in stdout + run.err
        assert done.returncode == code, run.err
        return stdout if code == 0 else run.err

    run.folder, run.start = tmp_path, start
    return run


def address(hub, end=""):
    return f"http://127.0.0.1:{hub.port}{end}"


def names(hub):
    return {path.split("/resolve/")[1].partition("/")[2] for _, path, *_ in hub.seen if "/resolve/" in path}


def ranges(hub):
    return [asked for *_, asked in hub.seen if asked]


def part(folder, name=FLOW):
    """Where that file grows."""
    home = folder / "hf" / "hub" / f"models--{REPO.replace('/', '--')}"
    return home / "blobs" / f"{digest(FILES[REPO][name])}.part"


def begun(folder, size=1000, name=FLOW):
    """That part, as an earlier run left it."""
    place = part(folder, name)
    place.parent.mkdir(parents=True)
    place.write_bytes(FILES[REPO][name].ljust(size)[:size])
    return place


def whole(path, name=FLOW):
    """Whether the file is, and none of it is left beside it."""
    cache = Path(path).parents[3 if name == FLOW else 4]
    return digest(Path(path).read_bytes()) == digest(FILES[REPO][name]) and not list(cache.rglob("*.part"))


@pytest.fixture
def here(monkeypatch, tmp_path, hub):
    """The study in this process: its paths."""
    for name in [*os.environ]:
        if name.startswith(("HF_", "HUGGINGFACE_", "FLUX_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("HF_ENDPOINT", address(hub))
    monkeypatch.chdir(tmp_path)
    return download


def wait_for(condition, seconds=30):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_only_what_is_loaded_is_fetched_and_then_found_offline(cli, hub):
    """From a mirror with a slash behind it; then without any network, by HF_HUB_OFFLINE."""
    out = cli("download", "flux-schnell", HF_ENDPOINT=address(hub, "/ "), HF_TOKEN=CANARY)
    paths = out.splitlines()
    assert len(paths) == 5 and all(Path(path).exists() for path in paths)
    assert cli.err.startswith("licence of flux-schnell: Apache-2.0\n") and " GB  to download; " in cli.err
    text = {"text_encoder_2/config.json", "text_encoder_2/model.safetensors", "tokenizer_2/spiece.model"}
    assert names(hub) == {FLOW, "ae.safetensors", "config.json", "model.safetensors", "spiece.model", *text}
    assert hub.tokens() <= {f"Bearer {CANARY}", None}
    hub.seen.clear()
    assert cli("download", "flux-schnell", HF_ENDPOINT=address(hub), HF_HUB_OFFLINE="1") == out
    assert cli("download", "flux-schnell", HF_ENDPOINT=address(hub), HF_TOKEN=CANARY) == out
    assert hub.seen == []
    assert cli("download", "flux-schnell", HF_ENDPOINT="http://127.0.0.1:9") == out
    assert "all files are on this disk already, nothing is downloaded" in cli.err
    told = cli("doctor", HF_HUB_OFFLINE="1", FLUX_AE="/nowhere.safetensors")
    assert "flux-schnell  transformer in the cache" in told and "T5 in the cache, CLIP in the cache" in told
    assert "autoencoder FLUX_AE=/nowhere.safetensors, which does not exist" in told


def test_a_cache_that_lacks_something_is_completed(cli, hub):
    """The rest is in the cache, so that the client alone would be content with it."""
    paths = cli("download", "flux-schnell", HF_ENDPOINT=address(hub)).splitlines()
    (lost,) = (Path(path) / "model.safetensors" for path in paths if path.endswith("text_encoder_2"))
    lost.unlink()
    told = cli("download", "flux-schnell", code=4, HF_ENDPOINT="http://127.0.0.1:9")
    assert "already" not in told and "could not be reached" in told
    hub.seen.clear()
    cli("download", "flux-schnell", HF_ENDPOINT=address(hub))
    assert lost.read_bytes() == FILES[REPO]["text_encoder_2/model.safetensors"]
    assert not {FLOW, "ae.safetensors"} & {path.split("/")[-1] for method, path, *_ in hub.seen if method == "GET"}


def test_a_flag_names_the_mirror_and_the_files_may_lie_elsewhere_without_the_token(cli, hub):
    with fake_hub(FILES) as store:
        hub.moved_to = f"http://localhost:{store.port}"
        words = ("download", "flux-schnell", "--endpoint", address(hub))
        begun(cli.folder)
        out = cli(*words, HF_TOKEN=CANARY, HF_ENDPOINT="http://127.0.0.1:9")
        assert Path(out.splitlines()[0]).read_bytes() == FILES[REPO][FLOW]
        assert ranges(store) == ["bytes=1000-"]
        assert f"Bearer {CANARY}" in hub.tokens() and store.tokens() == {None}


def test_an_env_files_endpoint_never_sees_the_users_token(cli, hub):
    (cli.folder / ".env").write_text(f"HF_ENDPOINT={address(hub)}\n")
    told = cli("download", "flux-schnell", code=3, HUGGING_FACE_HUB_TOKEN=CANARY)
    assert f"HF_ENDPOINT={address(hub)} comes from .env, and the token from HUGGING_FACE_HUB_TOKEN in the" in told
    assert hub.seen == []
    cli("download", "flux-schnell", "--endpoint", address(hub), HUGGING_FACE_HUB_TOKEN=CANARY)
    assert f"Bearer {CANARY}" in hub.tokens()
    (cli.folder / ".env").write_text(f"HF_ENDPOINT={address(hub)}\nHF_TOKEN={CANARY}\n")
    shutil.rmtree(cli.folder / "hf")
    hub.seen.clear()
    cli("download", "flux-schnell")
    assert f"Bearer {CANARY}" in hub.tokens()


def test_a_cut_connection_is_taken_up_at_the_byte_where_it_broke(cli, hub):
    hub.cut, hub.reset = FLOW, False
    out = cli("download", "flux-schnell", HF_ENDPOINT=address(hub))
    assert ranges(hub) == [f"bytes={10 * 2**20}-"]
    assert digest(Path(out.splitlines()[0]).read_bytes()) == digest(FILES[REPO][FLOW])


def test_a_run_that_was_cut_goes_on_in_the_next(cli, hub):
    hub.cut = FLOW
    told = cli("download", "flux-schnell", code=4, HF_ENDPOINT=address(hub))
    assert f"was cut while {FLOW} of {REPO} was downloaded. Next: run this again" in told
    hub.cut = None
    out = cli("download", "flux-schnell", HF_ENDPOINT=address(hub))
    assert ranges(hub) == [f"bytes={10 * 2**20}-"] and whole(out.splitlines()[0])
    assert f"    0.031 GB  {REPO}/{FLOW}  0.010 GB on this disk\n" in cli.err
    assert "    0.020 GB  to download" in cli.err


def test_a_run_that_was_killed_goes_on_in_the_next_whatever_asked_for_the_file(cli, here, hub, tmp_path):
    """Here the drawing of a picture, which is the first to miss it."""
    hub.silent = FLOW
    words = ("--name", "flux-schnell", "--prompt", "a red apple", "--device", "cpu")
    with cli.start(*words, HF_ENDPOINT=address(hub)) as run:
        wait_for(lambda: part(tmp_path).exists() and part(tmp_path).stat().st_size)
        run.kill()
    hub.silent = None
    start = part(tmp_path).stat().st_size
    assert 0 < start < len(FILES[REPO][FLOW])
    assert whole(here("flux-schnell")[0]) and ranges(hub) == [f"bytes={start}-"]


def test_a_text_encoder_goes_on_whatever_asks_for_it(here, hub, tmp_path):
    from flux_core.hub.places import hub_folder

    name = "text_encoder_2/model.safetensors"
    begun(tmp_path, 100, name)
    assert whole(hub_folder(REPO, ["text_encoder_2/*", "tokenizer_2/*"]) / name, name)
    assert ranges(hub) == ["bytes=100-"]
    hub.seen.clear()
    hub_folder(REPO, ["text_encoder_2/*", "tokenizer_2/*"])
    assert len(hub.seen) == 1  # what is there costs the client's one question


def test_a_server_that_knows_no_ranges_begins_anew(here, hub, tmp_path):
    begun(tmp_path)
    hub.ranges = False
    assert whole(here("flux-schnell")[0]) and ranges(hub) == ["bytes=1000-"]


def test_a_part_that_is_too_long_is_none(here, hub, tmp_path, capsys):
    begun(tmp_path, len(FILES[REPO][FLOW]) + 1)
    assert whole(here("flux-schnell")[0]) and ranges(hub) == []
    assert f"    0.031 GB  {REPO}/{FLOW}\n" in capsys.readouterr().err


def test_a_part_with_other_bytes_is_deleted_and_told(here, hub, tmp_path):
    begun(tmp_path).write_bytes(b"x" * 1000)
    with pytest.raises(FileError, match=f"{FLOW} of {REPO} came with another sum"):
        here("flux-schnell")
    assert not part(tmp_path).exists()
    assert whole(here("flux-schnell")[0])


def test_a_disk_that_fills_up_keeps_the_part(here, monkeypatch, tmp_path):
    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DiskError, match=f"{FLOW} of {REPO} could not be stored in .*No space left.*HF_HOME"):
        here("flux-schnell")
    assert part(tmp_path).stat().st_size == len(FILES[REPO][FLOW])


def test_a_cache_without_links_has_the_file_once(cli, hub):
    """As on Windows: there the client would copy what it finds among its blobs."""
    blobs = begun(cli.folder).parent
    path = Path(cli("download", "flux-schnell", HF_ENDPOINT=address(hub), HF_HUB_DISABLE_SYMLINKS="1").splitlines()[0])
    assert ranges(hub) == ["bytes=1000-"] and whole(path)
    assert not path.is_symlink() and not any(blobs.iterdir())


def test_what_another_repository_has_is_not_fetched_again(here, hub):
    """The T5 of dev and of schnell is one file."""
    here("flux-schnell")
    hub.files = {**FILES, "black-forest-labs/FLUX.1-dev": {**FILES[REPO], "flux1-dev.safetensors": weights(b"d")}}
    hub.seen.clear()
    t5 = here("flux-dev")[2]
    assert (t5 / "model.safetensors").read_bytes() == FILES[REPO]["text_encoder_2/model.safetensors"]
    assert {path.split("/")[-1] for method, path, *_ in hub.seen if method == "GET" and "/resolve/" in path} == {
        "flux1-dev.safetensors"
    }


def test_a_file_with_another_sum_is_told_and_gone(cli, hub):
    hub.spoiled = FLOW
    told = cli("download", "flux-schnell", code=4, HF_ENDPOINT=address(hub))
    assert f"{FLOW} of {REPO} came with another sum (SHA-256) than the hub has of it: it was deleted. Next:" in told
    hub.spoiled = None
    out = cli("download", "flux-schnell", HF_ENDPOINT=address(hub))
    assert digest(Path(out.splitlines()[0]).read_bytes()) == digest(FILES[REPO][FLOW])


@pytest.mark.parametrize(
    ("fail", "token", "code", "words"),
    [
        ((401, "GatedRepo", "", "resolve"), "", 3, f"{REPO} is gated, and there is no token. Next: log in, accept"),
        ((401, "", "Invalid credentials in Authorization header", "api"), CANARY, 3, "does not know the token from"),
        ((403, "GatedRepo", "", "resolve"), CANARY, 3, "may not read it. Next: with that token's account accept"),
        ((404, "RepoNotFound", "", "api"), CANARY, 3, f"{REPO} does not exist at http://127.0.0.1"),
        ((404, "EntryNotFound", "", "resolve"), "", 4, f"{REPO} has no {FLOW}"),
        ((429, "", "", "api"), "", 4, "answered 429"),
        ((503, "", "", "api"), "", 4, "the hub answered 503"),
    ],
    ids=lambda value: str(value[:2]) if isinstance(value, tuple) else None,
)
def test_the_hubs_refusals_are_told_apart(cli, hub, fail, token, code, words):
    hub.fail = fail
    told = cli("download", "flux-schnell", code=code, HF_ENDPOINT=address(hub), HF_TOKEN=token, NO_COLOR="1")
    assert words in told.splitlines()[-1] and "Next: " in told and "Traceback" not in told


def test_unreachable_and_offline_without_a_cache(cli):
    told = cli("download", "flux-schnell", code=4, HF_ENDPOINT="http://127.0.0.1:9")
    assert "could not be reached (ConnectError" in told
    told = cli("download", "flux-schnell", code=4, HF_HUB_OFFLINE="1")
    assert "could not be reached (HF_HUB_OFFLINE is set). Next: unset" in told


def test_a_home_that_cannot_be_written(cli, hub):
    (cli.folder / "file").touch()
    told = cli("download", "flux-schnell", code=6, HF_ENDPOINT=address(hub), HF_HOME=str(cli.folder / "file"))
    assert f"{cli.folder / 'file' / 'hub'} cannot be written to" in told and "set HF_HOME" in told
    assert hub.seen == []


def test_what_ships_needs_no_hub(cli):
    assert "ships with the package, nothing is to be downloaded" in cli("download", "flux-mini", HF_ENDPOINT="nonsense")


def test_a_full_disk_is_told_before_anything_is_fetched(monkeypatch, hub, tmp_path, capsys):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(2**28, 0, 2**28))
    with pytest.raises(DiskError, match=r"0\.0 GB do not fit into .*HF_HUB_CACHE"):
        download("flux-schnell", address(hub))
    assert names(hub) == set() and "0.031 GB  to download; 0.3 GB free" in capsys.readouterr().err


def test_doctor_has_a_word_for_everything_that_is_wrong(cli):
    (cli.folder / "file").touch()
    told = cli("doctor", HF_ENDPOINT="no address", HF_HOME=str(cli.folder / "file"), HUGGING_FACE_HUB_TOKEN=CANARY)
    for words in (
        "torch 2.",
        "cpu: bfloat16, float32",
        "from HUGGING_FACE_HUB_TOKEN in the environment",
        "is no address",
    ):
        assert words in told
    assert "cannot be written to" in told and "flux-mini     ships with the package" in told
    for name in ("flux-dev     ", "flux-dev-krea", "flux-schnell "):
        (row,) = (line for line in told.splitlines() if line.startswith(f"              {name} 9.8 + 23.8 + 0.2 ="))
        assert "= 33.7 GB: " in row and ("cpu fits whole" in row or "cpu does not fit" in row or "may just" in row)
