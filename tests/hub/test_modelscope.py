"""`download --source modelscope`, against a server on 127.0.0.1 that answers as ModelScope does, over real HTTP."""

import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from fake_hub import fake_hub, weights

from flux_core.commands.download import download
from flux_core.errors import FluxError, UsageError
from flux_core.hub import modelscope

ROOT = Path(__file__).parents[2]
CANARY = "hf_Canary0123456789Canary0123456789"
REPO, FLOW = "black-forest-labs/FLUX.1-Krea-dev", "flux1-krea-dev.safetensors"
LOADED = {
    FLOW: weights(bytes(range(256)) * 8_000),
    "ae.safetensors": weights(b"a" * 500),
    "text_encoder/config.json": b"{}",
    "text_encoder/model.safetensors": weights(b"c" * 90),
    "text_encoder_2/config.json": b"{}",
    "text_encoder_2/model-00001-of-00002.safetensors": weights(b"t" * 300),
    "text_encoder_2/model-00002-of-00002.safetensors": weights(b"5" * 30, "y"),
    "text_encoder_2/model.safetensors.index.json": (
        b'{"weight_map": {"x": "model-00001-of-00002.safetensors", "y": "model-00002-of-00002.safetensors"}}'
    ),
    "tokenizer/vocab.json": b"{}",
    "tokenizer/merges.txt": b"a b",
    "tokenizer_2/spiece.model": b"s",
    "tokenizer_2/special_tokens_map.json": b"",
}
OTHERS = {
    "README.md": b"#",
    "configuration.json": b"{}",
    "model_index.json": b"{}",
    "text_encoder/pytorch_model.bin": b"pickle",
    "text_encoder/old/config.json": b"{}",
    "transformer/config.json": b"{}",
    "transformer/diffusion_pytorch_model.safetensors": b"the other layout",
    "vae/diffusion_pytorch_model.safetensors": b"the other layout",
}


@pytest.fixture
def server():
    with fake_hub({REPO: {**OTHERS, **LOADED}}) as running:
        yield running


@pytest.fixture(autouse=True)
def bare(monkeypatch, tmp_path):
    """No settings but a token, which nobody here may see."""
    ours = ("HF_", "HUGGINGFACE_", "FLUX_")
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(ours) and not name.lower().endswith("_proxy")
    }
    monkeypatch.setattr(os, "environ", {**kept, "HF_HOME": str(tmp_path / "hf"), "HF_TOKEN": CANARY})
    monkeypatch.setattr(modelscope, "PAUSE", 0.0)


@pytest.fixture
def fetch(server, tmp_path, capsys):
    """The command's study; gives what it told, on stdout and on stderr."""

    def run(folder=tmp_path / "krea", code=0, endpoint=None):
        try:
            download("flux-dev-krea", endpoint or f"http://127.0.0.1:{server.port}", "modelscope", str(folder))
        except FluxError as error:
            assert error.exit_code == code
            return str(error)
        assert code == 0
        return capsys.readouterr()

    run.folder = tmp_path / "krea"
    return run


def files_in(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def asked(server):
    """(file, range) of what was fetched, in order."""
    return [(path.split("/resolve/master/")[1], part) for _, path, _, part in server.seen if "/resolve/" in path]


def test_what_is_loaded_comes_and_nothing_else(server, fetch):
    out, err = fetch()
    assert files_in(fetch.folder) == LOADED
    assert out == f"FLUX_MODEL={fetch.folder}\n"
    assert err.startswith("licence of flux-dev-krea: FLUX.1 [dev] Non-Commercial License\nfrom http://127.0.0.1")
    assert f"    0.002 GB  {REPO}/{FLOW}\n" in err and "    0.002 GB  to download; " in err
    assert {name for name, _ in asked(server)} == LOADED.keys() - {"tokenizer_2/special_tokens_map.json"}  # is empty
    assert server.seen[0][1] == f"/api/v1/models/{REPO}/repo/files"
    assert server.tokens() == {None}


def test_the_folder_is_what_flux_model_takes(fetch, monkeypatch):
    from flux_core.checkpoint.files import resolve, text_files
    from flux_core.commands.doctor import doctor
    from flux_core.variants import get_variant

    name, _, value = fetch()[0].strip().partition("=")
    monkeypatch.setitem(os.environ, name, value)
    row = get_variant("flux-dev-krea")
    assert resolve(row) == (fetch.folder / FLOW, fetch.folder / "ae.safetensors")
    assert [path.name for path in text_files(row)] == ["text_encoder_2", "tokenizer_2", "text_encoder", "tokenizer"]
    told = "\n".join(doctor())
    assert f"flux-dev-krea transformer FLUX_MODEL={value}\n              autoencoder {value}/ae.safetensors\n" in told
    assert f"T5 {value}/text_encoder_2, CLIP {value}/text_encoder\n" in told


def test_nothing_is_fetched_twice_and_what_is_lost_comes_again(server, fetch):
    fetch()
    server.seen.clear()
    out, err = fetch()
    assert "all files are on this disk already, nothing is downloaded" in err and out.startswith("FLUX_MODEL=")
    assert asked(server) == []
    (fetch.folder / "tokenizer" / "merges.txt").unlink()
    fetch()
    assert asked(server) == [("tokenizer/merges.txt", None)]


def test_without_a_network_a_whole_folder_is_enough(fetch, monkeypatch):
    told = fetch(code=4, endpoint="http://127.0.0.1:9")
    assert told.startswith(f"http://127.0.0.1:9 could not be reached for the list of files of {REPO} (")
    fetch()
    assert "all files are on this disk already" in fetch(endpoint="http://127.0.0.1:9").err
    monkeypatch.setitem(os.environ, "HF_HUB_OFFLINE", "1")
    assert "all files are on this disk already" in fetch().err
    (fetch.folder / "text_encoder_2" / "model-00002-of-00002.safetensors").unlink()
    assert "(HF_HUB_OFFLINE is set). Next: unset HF_HUB_OFFLINE" in fetch(code=4)


def test_a_cut_connection_is_taken_up_at_once(server, fetch):
    server.cut, server.reset = FLOW, False
    fetch()
    size = len(LOADED[FLOW])
    assert [part for name, part in asked(server) if name == FLOW] == [None, f"bytes={size * 2 // 5}-"]
    assert files_in(fetch.folder) == LOADED


def test_a_run_that_was_cut_goes_on_in_the_next(server, fetch, monkeypatch):
    monkeypatch.setattr(modelscope, "TRIES", 2)
    server.cut = FLOW
    told = fetch(code=4)
    assert f"was cut while {FLOW} of {REPO} was downloaded. Next: run this again; it goes on at the byte" in told
    part = fetch.folder / f"{FLOW}.part"
    start = part.stat().st_size
    assert 0 < start < len(LOADED[FLOW]) and not (fetch.folder / FLOW).exists()
    server.cut = None
    server.seen.clear()
    err = fetch().err
    assert f"{(len(LOADED[FLOW]) - start) / 1e9:8.3f} GB  to download" in err
    assert asked(server) == [(FLOW, f"bytes={start}-")]
    assert files_in(fetch.folder) == LOADED


def test_a_long_download_may_be_cut_more_often(server, fetch, monkeypatch):
    """As long as each try brings something."""
    monkeypatch.setattr(modelscope, "TRIES", 1)
    monkeypatch.setattr(modelscope, "MUCH", 200_000)
    server.cut = FLOW
    fetch(code=4)
    assert len([name for name, _ in asked(server) if name == FLOW]) > 3


def test_a_server_that_knows_no_ranges_begins_anew(server, fetch):
    server.cut, server.reset, server.ranges = FLOW, False, False
    fetch()
    assert files_in(fetch.folder) == LOADED


def test_a_part_that_is_too_long_is_none(server, fetch):
    fetch.folder.mkdir()
    (fetch.folder / f"{FLOW}.part").write_bytes(b"x" * (len(LOADED[FLOW]) + 1))
    fetch()
    assert files_in(fetch.folder) == LOADED


def test_a_content_network_may_have_the_bytes(server, fetch):
    with fake_hub({REPO: LOADED}) as store:
        server.moved_to = f"http://localhost:{store.port}"
        store.cut, store.reset = FLOW, False
        fetch()
        assert len([part for name, part in asked(store) if name == FLOW and part]) == 1
        assert server.tokens() == store.tokens() == {None}
    assert files_in(fetch.folder) == LOADED


def test_a_wrong_sum_is_deleted_and_told(server, fetch):
    server.listed = [{"Path": "ae.safetensors", "Sha256": "ab" * 32}]
    told = fetch(code=4)
    assert f"ae.safetensors of {REPO} came with the sum " in told
    assert "the list has abababababababab…: it was deleted. Next: run this again" in told
    assert "ae.safetensors" not in {name.removesuffix(".part") for name in files_in(fetch.folder)}
    server.listed = [{"Path": "ae.safetensors", "Sha256": None}]  # of some files no sum is listed
    fetch()
    assert files_in(fetch.folder) == LOADED


def test_what_lies_in_a_files_place_is_left(server, fetch):
    fetch.folder.mkdir()
    (fetch.folder / FLOW).write_bytes(b"mine")
    told = fetch(code=4)
    assert f"{fetch.folder / FLOW} has 4 bytes, and that of {REPO} has {len(LOADED[FLOW]):,}: it is left" in told
    assert files_in(fetch.folder) == {FLOW: b"mine"} and asked(server) == []


@pytest.mark.parametrize(
    ("status", "where", "code", "words"),
    [
        (404, "api", 4, f"has no repository {REPO}. Next: look at "),
        (404, "resolve", 4, f" in {REPO}. Next: look at "),
        (403, "resolve", 3, "to visitors without a login (HTTP 403). Next: take --source hub"),
        (429, "api", 4, f"answered 429 for the list of files of {REPO}: too many requests from here. Next: wait five"),
        (429, "resolve", 4, "too many requests from here"),
        (503, "api", 4, f"answered 503 for the list of files of {REPO}. Next: try again later; what has come is kept"),
        (503, "resolve", 4, "answered 503 for "),
    ],
)
def test_refusals_are_told_apart(server, fetch, status, where, code, words):
    server.fail = (status, "", "", where)
    told = fetch(code=code)
    assert words in told and f"http://127.0.0.1:{server.port}" in told
    assert len(asked(server)) == (where == "resolve")  # none of them is asked again and again


def test_a_repository_that_lacks_a_part(server, fetch):
    del server.files[REPO]["text_encoder_2/model-00001-of-00002.safetensors"]
    del server.files[REPO]["text_encoder_2/model-00002-of-00002.safetensors"]
    assert "has no text_encoder_2/*.safetensors. Next: take --source hub." in fetch(code=4)
    del server.files[REPO][FLOW]
    assert f"/models/{REPO} has no {FLOW}. Next" in fetch(code=4)


@pytest.mark.parametrize("path", ["../x", "text_encoder/../../x.json", "/x", "tokenizer/..\\..\\x.json", "C:\\x", ""])
def test_a_path_out_of_the_folder_stops_everything(server, fetch, path, tmp_path):
    server.listed = [{"Path": path, "Size": 1, "Type": "blob", "Sha256": ""}]
    told = fetch(code=4)
    assert "which is not a file in its folder: nothing is fetched" in told
    assert asked(server) == [] and not fetch.folder.exists()


@pytest.mark.parametrize("answer", [b"", b"<html>", b"[]", b'{"Data": null}', b'{"Data": {"Files": [{"Path": "x"}]}}'])
def test_what_is_no_list(answer, monkeypatch, fetch):
    from io import BytesIO

    monkeypatch.setattr(modelscope.Repository, "_open", lambda *_: BytesIO(answer))
    assert "answered with something else than the list of files" in fetch(code=4)


def test_a_full_disk_is_told_before_anything_is_fetched(server, fetch, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(2**28, 0, 2**28))
    told = fetch(code=6)
    assert (
        f"0.0 GB do not fit into {fetch.folder}: 0.3 GB are free. Next: make room, or name a folder with --out" in told
    )
    assert asked(server) == []


def test_a_disk_that_fills_up(server, fetch, monkeypatch):
    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    assert "could not be written: No space left on device. Next: make room there and run this again" in fetch(code=6)
    assert all(name.endswith(".part") for name in files_in(fetch.folder))


def test_a_place_that_cannot_be_a_folder(server, fetch, tmp_path):
    (tmp_path / "file").touch()
    told = fetch(folder=tmp_path / "file" / "krea", code=6)
    assert "cannot be written to" in told and "Next: set --output-dir to a folder that is" in told


def test_by_itself_the_folder_is_beside_the_hubs_cache(server, tmp_path):
    download("flux-dev-krea", f"http://127.0.0.1:{server.port}", "modelscope")
    assert files_in(tmp_path / "hf" / "modelscope" / REPO) == LOADED


def test_words_that_do_not_go_together(server):
    with pytest.raises(UsageError, match="--source must be one of hub, modelscope, not 'nowhere'"):
        download("flux-dev", source="nowhere")
    with pytest.raises(UsageError, match="--output-dir goes with --source modelscope"):
        download("flux-dev", output_dir="x")
    with pytest.raises(UsageError, match=r"--endpoint='ftp://x' is no address\. Next: write it as https://modelscope"):
        download("flux-dev", "ftp://x", "modelscope")


def test_on_the_command_line(server, tmp_path):
    env = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "OMP_NUM_THREADS": "1", "HF_TOKEN": CANARY}
    words = ["download", "flux-dev-krea", "--source", "modelscope", "--output_dir", "a folder"]
    words += ["--endpoint", f"http://127.0.0.1:{server.port}/"]
    command = [sys.executable, str(ROOT / "cli.py"), *words]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, encoding="utf-8", timeout=60)
    assert (done.returncode, done.stdout) == (0, f"FLUX_MODEL='{tmp_path / 'a folder'}'\n")
    assert CANARY not in done.stderr and server.tokens() == {None}
    assert files_in(tmp_path / "a folder") == LOADED
