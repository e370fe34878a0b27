"""Several folders of pictures: what is named with them, how often their pictures come, and pairs by names of files."""

from collections import Counter
from fractions import Fraction
from pathlib import Path

import pytest
from PIL import Image
from test_data import fixed, picture

from flux_core.errors import UsageError
from flux_core.training.folders import Folder, epoch_of, parse_folders, read_folders


def read(tmp_path, *texts, priors=(), **how):
    folders = parse_folders(list(texts))
    folders += [one._replace(prior=True) for one in parse_folders(list(priors), "--regularization")]
    return read_folders(folders, fixed(32, 32), tmp_path / "hub", **how)


@pytest.fixture
def work(tmp_path, monkeypatch):
    """Folders a and b with two and three pictures, and one of a class."""
    monkeypatch.chdir(tmp_path)
    for j, (folder, count) in enumerate({"a": 2, "b": 3, "class": 3}.items()):
        for i in range(count):
            picture(tmp_path / folder / f"{i}.png", colour=(i, j, 9), caption=f"a [trigger] pig {folder}{i}")
    return tmp_path


def test_a_folder_and_what_is_its_own(work):
    assert parse_folders("a") == [Folder("a")] == parse_folders(["a"]) and parse_folders(None) == []
    text = "b,weight=0.25,trigger=zwx, red,masks=m,reference=before+style"
    assert parse_folders(["user/set", text]) == [
        Folder("user/set"), Folder("b", Fraction(1, 4), "zwx, red", "m", "before+style"),
    ]  # fmt: skip
    assert parse_folders("a,trigger=")[0].trigger == ""
    (work / "a,weight=2").mkdir()
    assert parse_folders("a,weight=2") == [Folder("a,weight=2")]
    assert parse_folders("a,weight=2,weight=3") == [Folder("a,weight=2", Fraction(3))]


@pytest.mark.parametrize(("text", "said"), [
    ("a,wieght=2", "a folder has no 'wieght'. Did you mean weight"),
    ("a,weight=0", "weight must be a number from 0.01 to 100, not '0'"),
    ("a,weight=-1", "weight must be"), ("a,weight=nan", "weight must be"), ("a,weight=0.001", "weight must be"),
    ("a,weight=101", "weight must be"), ("a,weight=", "weight is empty"), ("a,masks=", "masks is empty"),
    ("a,weight=1,weight=2", "weight is set twice"), (",weight=2", "names no folder"),
])  # fmt: skip
def test_what_is_wrong_with_a_folder_is_said(work, text, said):
    with pytest.raises(UsageError, match=said.replace(".", r"\.")):
        parse_folders(text)


@pytest.mark.parametrize(("text", "said"), [
    ("none", "none is no folder"), ("a,weight,2", "is no folder"), ("a,masks=none", "none is no folder"),
    ("a,masks=a", "the pictures' own folder"), ("a,reference=b", "reference= goes with --takes reference"),
    ("a,masks=metadata", "whose lines name a mask for each picture. Next: write one$"),
])  # fmt: skip
def test_what_is_not_there_is_said(work, text, said):
    with pytest.raises(UsageError, match=said):
        read(work, text)


def test_triggers_are_a_folders_own(work):
    found = read(work, "a", "b,trigger=zwx", priors=["class"], trigger="noto").pictures
    assert [one.caption for one in found[::2]] == ["a noto pig a0", "a zwx pig b0", "a zwx pig b2", "a pig class1"]
    assert [one.trigger for one in found] == [None] * 2 + ["zwx"] * 3 + [""] * 3
    assert [one.prior for one in found] == [False] * 5 + [True] * 3


def test_a_picture_is_in_one_folder(work):
    (work / "b" / "0.png").write_bytes((work / "a" / "1.png").read_bytes())
    found = read(work, "a", "b")
    (reason,) = found.skipped.values()
    assert len(found.pictures) == 4 and reason == f"it is the same file as {Path('a', '1.png')}"
    with pytest.raises(UsageError, match="its folder is named twice"):
        read(work, "a", "a")


def shares(work, *texts, priors=(), repeats=1):
    """How often a picture of each folder comes in an epoch."""
    found = read(work, *texts, priors=priors).pictures
    times = Counter(epoch_of(found, repeats))
    return {name: sorted(n for one, n in times.items() if one.path.parent.name == name) for name in ("a", "b", "class")}


def test_an_epoch_has_pictures_by_weight_and_as_many_of_the_class(work):
    plain = read(work, "a", "b").pictures
    assert epoch_of(plain, 2) == plain * 2
    assert shares(work, "a,weight=2", "b") == {"a": [2, 2], "b": [1, 1, 1], "class": []}
    assert shares(work, "a", "b,weight=0.5", repeats=3) == {"a": [6, 6], "b": [3, 3, 3], "class": []}
    assert shares(work, "a", "b,weight=1.5") == {"a": [2, 2], "b": [3, 3, 3], "class": []}
    assert shares(work, "b", "a", priors=["class"]) == {"a": [1, 1], "b": [1, 1, 1], "class": [1, 2, 2]}
    assert shares(work, "a", priors=["class"]) == {"a": [2, 2], "b": [], "class": [1, 1, 2]}  # as many, none left out


def test_pairs_are_files_of_the_same_names(work):
    for i in range(3):
        picture(work / "before" / f"{i}.jpg", colour=(i, 9, 1))
        picture(work / "b" / "style" / f"{i}.png", (8, 8), colour=(i, 9, 2))  # inside, and no picture to learn
    found = read(work, "b,reference=before+b/style", takes="reference")
    assert [[path.as_posix() for path, _ in one.beside] for one in found.pictures] == [
        [f"before/{i}.jpg", f"b/style/{i}.png"] for i in range(3)
    ]
    assert not found.skipped
    (work / "before" / "1.jpg").unlink()
    Image.new("RGB", (4, 4)).save(work / "before" / "2.bmp")
    found = read(work, "b,reference=before+b/style", takes="reference")
    assert list(found.skipped.values()) == ["before has no file of its name", "before has several files of its name"]
    (work / "before" / "0.jpg").write_bytes(b"no picture")
    with pytest.raises(UsageError, match=r"0\.jpg is no picture"):
        read(work, "b,reference=before+b/style", takes="reference")
    with pytest.raises(UsageError, match="whose lines name a reference"):
        read(work, "b", takes="reference")
