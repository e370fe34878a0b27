"""`download` of a model that another one's transformer and an adapter make: all that is loaded is fetched."""

import pytest
from fake_hub import fake_hub, parts_of, weights

from flux_core.commands import doctor
from flux_core.commands.download import download
from flux_core.errors import FileError, UsageError
from flux_core.variants import VARIANTS

ROW = VARIANTS["flux-schnell-redux"]
FILES = parts_of(ROW) | {
    ROW.adapter.repo: {ROW.adapter.file: weights(b"r" * 100), "README.md": b"x"},
    ROW.takes.words: {"config.json": b"{}", "preprocessor_config.json": b"{}", "model.safetensors": weights(b"v"),
                      "pytorch_model.bin": b"pickle"},
}  # fmt: skip


def test_the_adapter_and_what_it_sees_by_are_fetched_once(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    with fake_hub(FILES) as hub:
        address = f"http://127.0.0.1:{hub.port}"
        paths = download(ROW.name, address)
        assert {path.name for path in paths} >= {ROW.flow_file, "ae.safetensors", ROW.adapter.file}
        assert {path.name for path in paths[-1].iterdir()} == {*FILES[ROW.takes.words]} - {"pytorch_model.bin"}
        fetched = len(hub.seen)
        assert any(path.endswith(ROW.adapter.file) and ROW.adapter.repo in path for _, path, *_ in hub.seen)
        assert download(ROW.name, address) == paths and len(hub.seen) == fetched
    assert "nothing is downloaded" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["fill", "depth"])
def test_what_a_command_makes_is_nowhere_to_be_fetched(kind):
    with pytest.raises(FileError, match=rf"does not ship. Next: .* {kind} .*` .* point FLUX_MINI_{kind.upper()}"):
        download(f"flux-mini-{kind}")


def test_doctor_says_where_it_is_or_how_it_is_made(monkeypatch, tmp_path):
    monkeypatch.setenv("FLUX_MINI_DEPTH_LORA", str(tmp_path))
    lines = {name: doctor._files(VARIANTS[f"flux-mini-{name}"])[0] for name in ("fill", "depth")}
    assert ".safetensors: not named by FLUX_LORA or FLUX_MINI_FILL_LORA; made by `python weights" in lines["fill"]
    assert f"flux-mini-depth.safetensors: FLUX_MINI_DEPTH_LORA={tmp_path}; made by" in lines["depth"]
    monkeypatch.setattr(doctor, "VARIANTS", {x: VARIANTS[x] for x in ("flux-mini-fill", "flux-mini-canny")})
    assert [line.split()[0] for line in doctor.doctor() if line.startswith("flux-mini")] == ["flux-mini-fill"]


def test_another_source_has_no_adapters():
    with pytest.raises(UsageError, match="of another repository"):
        download("flux-dev-canny-lora", source="modelscope")
