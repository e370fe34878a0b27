"""What the hub answers, in our words. No network: the hub's client is replaced."""

import errno
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
from huggingface_hub import errors as hub
from random_model import small_variant

from flux_core.checkpoint import files, resolve
from flux_core.checkpoint.files import text_files
from flux_core.errors import AccessError, DiskError, FileError
from flux_core.hub import places

DEV = small_variant("flux-dev")


def answer(status):
    return SimpleNamespace(status_code=status, headers={}, request=None)


@pytest.fixture
def failing(monkeypatch):
    def fail_with(error):
        def download(*args, **kwargs):
            raise error

        for variable in ("FLUX_MODEL", "FLUX_AE"):
            monkeypatch.delenv(variable, raising=False)
        for name in ("get_hf_file_metadata", "hf_hub_download", "snapshot_download"):
            monkeypatch.setattr(huggingface_hub, name, download)
        monkeypatch.setattr(huggingface_hub.HfApi, "model_info", download)

    return fail_with


@pytest.mark.parametrize(
    "error",
    [
        hub.GatedRepoError("403", response=answer(403)),
        hub.RepositoryNotFoundError("401", response=answer(401)),
        hub.HfHubHTTPError("401", response=answer(401)),
    ],
)
def test_no_access(failing, error):
    failing(error)
    with pytest.raises(AccessError, match=r"huggingface.co/black-forest-labs/FLUX.1-dev.*HF_TOKEN"):
        resolve(DEV)


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (hub.LocalEntryNotFoundError("no connection"), "could not be reached"),
        (hub.OfflineModeIsEnabled("offline"), "could not be reached"),
        (RuntimeError("name resolution"), "could not be reached.*name resolution"),
        (hub.RemoteEntryNotFoundError("404", response=answer(404)), "has no flux1-dev.safetensors"),
        (hub.HfHubHTTPError("503", response=answer(503)), "the hub answered 503"),
    ],
)
def test_no_file(failing, error, words):
    failing(error)
    with pytest.raises(FileError, match=words):
        resolve(DEV)


def test_no_room(failing):
    failing(OSError(errno.ENOSPC, "No space left on device"))
    with pytest.raises(DiskError, match=r"No space left.*HF_HOME"):
        places.hub_folder("google/t5-v1_1-xxl", ["*.json"])


def test_pickles_of_t5_are_left_where_they_are(monkeypatch, tmp_path):
    """google/t5-v1_1-xxl has no safetensors; the FLUX.1 repository has the same encoder."""
    asked = []

    def folder(repo, patterns):
        asked.append(repo)
        assert not any("bin" in pattern for pattern in patterns)
        return tmp_path / Path(repo).name

    monkeypatch.setattr(files, "hub_folder", folder)
    found = text_files(DEV)
    assert asked == ["openai/clip-vit-large-patch14", "google/t5-v1_1-xxl", "black-forest-labs/FLUX.1-dev"]
    assert found.t5 == tmp_path / "FLUX.1-dev" / "text_encoder_2"
    (tmp_path / "t5-v1_1-xxl").mkdir()
    (tmp_path / "t5-v1_1-xxl" / "model.safetensors").touch()
    assert text_files(DEV).t5 == tmp_path / "t5-v1_1-xxl"
