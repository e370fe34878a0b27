"""Data sets of the library `datasets` as folders of pictures and captions; the hub itself is not asked."""

import pytest
from PIL import Image

from flux_core.errors import AccessError, UsageError
from flux_core.main import main
from flux_core.training import parse_resolution, read_folder
from flux_core.training.hub_data import from_hub, write_rows

datasets = pytest.importorskip("datasets")
COLOURS = [(255, 0, 0), (0, 255, 0), (0, 0, 255)]


def rows(tmp_path, **columns):
    """A data set of three pictures, one of them to be turned."""
    exif = Image.Exif()
    exif[0x0112] = 6
    for i, colour in enumerate(COLOURS):
        Image.new("RGB", (48, 32), colour).save(tmp_path / f"{i}.jpg", exif=exif if i == 2 else Image.Exif())
    found = datasets.Dataset.from_dict({"image": [str(tmp_path / f"{i}.jpg") for i in range(3)], **columns})
    return found.cast_column("image", datasets.Image())


@pytest.mark.parametrize("streams", [False, True])
def test_rows_become_pictures_with_captions(tmp_path, streams):
    found = rows(tmp_path, text=["a red thing", "a green thing", "a blue thing"])
    folder = write_rows(found.to_iterable_dataset() if streams else found, "some/set", tmp_path / "out")
    pictures = read_folder(folder, parse_resolution("32x32").size_of).pictures
    assert [one.caption for one in pictures] == ["a red thing", "a green thing", "a blue thing"]
    assert [one.shape for one in pictures] == [(48, 32), (48, 32), (32, 48)]
    for one, colour in zip(pictures, COLOURS, strict=True):
        with Image.open(one.path) as image:
            assert all(abs(a - b) <= 2 for a, b in zip(image.getpixel((9, 9)), colour, strict=True))


def test_what_was_written_is_not_fetched_again(tmp_path):
    write_rows(rows(tmp_path, text=["a", "b", "c"]), "some/set", tmp_path / "out")
    assert from_hub("some/set", tmp_path / "out") == tmp_path / "out"


def test_a_folder_that_is_not_there_is_not_looked_for_elsewhere(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets, "load_dataset", None)
    (tmp_path / "output").mkdir()
    assert main(["train", "--data", "output/nodir", "--dry-run"]) == 2
    assert "output/nodir is no folder" in capsys.readouterr().err


def test_what_is_wrong_is_said(tmp_path, monkeypatch):
    with pytest.raises(UsageError, match="has no column of pictures, but text"):
        write_rows(datasets.Dataset.from_dict({"text": ["a"]}), "some/set", tmp_path / "out")
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **fields: 1 / 0)
    with pytest.raises(AccessError, match="the data set some/set could not be read"):
        from_hub("some/set", tmp_path / "other")
