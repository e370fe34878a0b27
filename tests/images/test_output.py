"""Files appear whole or not at all, under a name of their own (users.md 4b and 4c, rows 24 and 38)."""

import errno
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
from PIL import Image

from flux_core.errors import DiskError, UsageError
from flux_core.files import prepare_folder
from flux_core.images.metadata import describe
from flux_core.images.output import save_picture, saver
from flux_core.request.generation import GenerationRequest


def picture(value: int = 0) -> Image.Image:
    return describe(Image.new("RGB", (16, 16), (value, 0, 0)), GenerationRequest(prompt="x", seed=value))


def names(folder) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def no_links(*_):
    raise OSError(errno.EPERM, "no hard links on this file system")


@pytest.mark.parametrize("links", [True, False])
def test_nothing_is_overwritten(tmp_path, monkeypatch, links):
    if not links:
        monkeypatch.setattr(os, "link", no_links)
    (tmp_path / "p.png").write_text("mine")
    paths = [save_picture(picture(i), tmp_path, "p") for i in (1, 2)]
    assert [path.name for path in paths] == ["p_1.png", "p_2.png"]
    assert (tmp_path / "p.png").read_text() == "mine"
    assert [Image.open(path).getpixel((0, 0))[0] for path in paths] == [1, 2]
    assert names(tmp_path) == ["p.png", "p_1.png", "p_2.png"]


@pytest.mark.parametrize("links", [True, False])
def test_many_writers_get_a_file_each(tmp_path, monkeypatch, links):
    if not links:
        monkeypatch.setattr(os, "link", no_links)
    with ThreadPoolExecutor(8) as pool:
        paths = list(pool.map(lambda i: save_picture(picture(i), tmp_path, "p"), range(24)))
    assert len(set(paths)) == 24 == len(names(tmp_path))
    assert [Image.open(path).getpixel((0, 0))[0] for path in paths] == list(range(24))


@pytest.mark.parametrize("fault", [KeyboardInterrupt(), OSError(errno.ENOSPC, "full"), OSError(errno.EIO, "broken")])
def test_an_interrupted_write_leaves_nothing(tmp_path, monkeypatch, fault):
    def fail(_):
        raise fault

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises((KeyboardInterrupt, DiskError)) as caught:
        save_picture(picture(), tmp_path, "p")
    assert names(tmp_path) == []
    if isinstance(fault, OSError):
        assert "p.png" in str(caught.value) and fault.strerror in str(caught.value)


def test_a_limit_on_file_sizes_is_a_disk_error(tmp_path):
    """The kernel's own refusal, in a process of its own: RLIMIT_FSIZE stands for a full disk."""
    code = (
        "import resource, sys; from pathlib import Path; sys.path[:0] = ['tests', 'tests/images']\n"
        "from test_output import picture; from flux_core.images.output import save_picture, saver\n"
        "from flux_core.errors import DiskError\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))\n"
        "try: save_picture(picture(), Path(sys.argv[1]), 'p')\n"
        "except DiskError as error: print(error); sys.exit(error.exit_code)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 6 and "p.png" in done.stdout, done.stderr
    assert names(tmp_path) == []


def test_folders_are_made_and_left_empty(tmp_path):
    folder = prepare_folder(tmp_path / "a" / "b")
    assert names(folder) == [] and prepare_folder(folder) == folder


def test_odd_folders_say_what_is_wrong(tmp_path):
    (tmp_path / "file").write_text("")
    for folder, text in (
        (tmp_path / "file", "a file is in the way"),
        (tmp_path / "file" / "below", "a file is in the way"),
        (tmp_path / ("x" * 300), "too long"),
        ("/proc/nowhere", "cannot write"),
    ):
        with pytest.raises(DiskError, match=text) as caught:
            prepare_folder(folder)
        assert str(folder) in str(caught.value)
    with pytest.raises(UsageError):
        prepare_folder("nul\0")


def test_a_read_only_folder_is_found_before_drawing(tmp_path, monkeypatch):
    def read_only(*_, **__):
        raise OSError(errno.EROFS, "read-only")

    monkeypatch.setattr("pathlib.Path.touch", read_only)  # root may write anywhere, so the fault is made
    with pytest.raises(DiskError, match=r"read-only.*--output-dir"):
        prepare_folder(tmp_path)


def test_the_umask_decides_who_may_read(tmp_path):
    old = os.umask(0o022)
    try:
        assert save_picture(picture(), tmp_path, "p").stat().st_mode & 0o777 == 0o644
    finally:
        os.umask(old)


def test_pictures_are_saved_in_order_while_others_are_drawn(tmp_path, capsys):
    pictures = [Image.new("RGB", (8, 8), (shade, 0, 0)) for shade in (1, 2, 3)]
    with saver(tmp_path) as save:
        paths = [save(picture, "same") for picture in pictures]
    names = [path.result().name for path in paths]
    assert names == ["same.png", "same_1.png", "same_2.png"]
    assert capsys.readouterr().out.split() == [str(tmp_path / name) for name in names]
    assert [Image.open(tmp_path / name).getpixel((0, 0))[0] for name in names] == [1, 2, 3]


def test_a_picture_that_cannot_be_saved_is_an_error_and_those_before_it_stay(tmp_path):
    folder = tmp_path / "gone"
    folder.mkdir()
    with pytest.raises(DiskError), saver(folder) as save:
        save(Image.new("RGB", (8, 8)), "one").result()
        (folder / "one.png").rename(tmp_path / "one.png")
        folder.rmdir()
        save(Image.new("RGB", (8, 8)), "two")
    assert (tmp_path / "one.png").exists() and not folder.exists()


def test_what_was_drawn_is_saved_when_the_next_fails(tmp_path):
    with pytest.raises(KeyboardInterrupt), saver(tmp_path) as save:
        save(Image.new("RGB", (8, 8)), "one")
        raise KeyboardInterrupt
    assert (tmp_path / "one.png").exists()
