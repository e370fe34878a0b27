"""Folders of pictures and captions: what is used, and why something is not."""

import base64
import json

import pyarrow
import pytest
from golden_files import FOLDER
from PIL import Image
from pyarrow import parquet

from flux_core.errors import FileError, UsageError
from flux_core.training.data import read_folder, with_trigger
from flux_core.training.sizes import Resolution, Size

CAPTIONS = json.loads((FOLDER / "train" / "captions.json").read_text())


def picture(path, size=(40, 32), colour=(1, 2, 3), caption=None, **how):
    path.parent.mkdir(exist_ok=True, parents=True)
    Image.new("RGB", size, colour).save(path, **how)
    if caption is not None:
        path.with_suffix(".txt").write_text(caption, encoding="utf-8")


def fixed(width, height):
    """The size of all pictures."""
    return Resolution("fixed", (Size(width, height),)).size_of


def captions(found, folder):
    return {one.path.relative_to(folder).as_posix(): one.caption for one in found.pictures}


def test_a_caption_is_beside_its_picture(tmp_path):
    picture(tmp_path / "b.PNG", caption="a red\n apple \n")
    picture(tmp_path / "more" / "a.jpg", colour=(9, 9, 9), caption="\ufeffa pig")
    found = read_folder(tmp_path, fixed(32, 32))
    assert captions(found, tmp_path) == {"b.PNG": "a red apple", "more/a.jpg": "a pig"} and not found.skipped


def test_what_cannot_be_used_is_left_out_with_its_reason(tmp_path):
    picture(tmp_path / "good.png", caption="good")
    picture(tmp_path / "twin.png", caption="the same")
    picture(tmp_path / "small.png", (31, 200), caption="small")
    picture(tmp_path / "bare.png", colour=(4, 4, 4))
    picture(tmp_path / "empty.png", colour=(5, 5, 5), caption=" \n")
    picture(tmp_path / "bytes.png", colour=(6, 6, 6))
    (tmp_path / "bytes.txt").write_bytes(b"caf\xe9")
    (tmp_path / "broken.png").write_bytes(b"no picture")
    (tmp_path / "broken.txt").write_text("broken")
    (tmp_path / "notes.md").write_text("not looked at")
    found = read_folder(tmp_path, fixed(32, 32))
    assert captions(found, tmp_path) == {"good.png": "good"}
    reasons = {path.name: reason for path, reason in found.skipped.items()}
    assert reasons.keys() == {"twin.png", "small.png", "bare.png", "empty.png", "bytes.png", "broken.png"}
    assert reasons["twin.png"] == "it is the same file as good.png"
    assert reasons["small.png"] == "it has 31x200 pixels, fewer than 32x32"
    assert reasons["bare.png"] == reasons["empty.png"] == "it has no caption"
    assert reasons["bytes.png"] == "its caption bytes.txt is no text in UTF-8"
    assert "is no picture that can be read" in reasons["broken.png"]


def test_a_picture_is_measured_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    picture(tmp_path / "a.jpg", (64, 32), caption="turned", exif=exif)
    assert len(read_folder(tmp_path, fixed(32, 64)).pictures) == 1
    with pytest.raises(UsageError, match=r"a\.jpg: it has 32x64 pixels, fewer than 64x32"):
        read_folder(tmp_path, fixed(64, 32))


def test_a_trigger_word_is_a_caption(tmp_path):
    picture(tmp_path / "a.png")
    picture(tmp_path / "b.png", colour=(7, 7, 7), caption="a [trigger] pig")
    assert list(captions(read_folder(tmp_path, fixed(32, 32), "noto"), tmp_path).values()) == ["noto", "a noto pig"]


@pytest.mark.parametrize(
    ("caption", "left"),
    [
        ("a photo of [trigger] robot", "a photo of robot"),
        ("[trigger] [trigger][trigger] robot", "robot"),
        ("a robot by [trigger]", "a robot by"),
        ("a[trigger] robot", "a robot"),
        ("[trigger], a robot", ", a robot"),
    ],
)
def test_a_place_without_a_trigger_word_leaves_single_spaces(tmp_path, caption, left):
    picture(tmp_path / "a.png", caption=caption)
    assert list(captions(read_folder(tmp_path, fixed(32, 32)), tmp_path).values()) == [left]


def test_the_trigger_word_is_where_ai_toolkit_has_it():
    """But for its spaces."""
    seen = 0
    for row in CAPTIONS["ai_toolkit"]:
        options = row["options"]
        if options.keys() <= {"trigger"} and "expected" in row and "[name]" not in row["caption"]:
            expected = " ".join(row["expected"].replace(",", ", ").split())
            found = with_trigger(row["caption"], options.get("trigger", ""))
            assert " ".join(found.replace(",", ", ").split()) == expected
            seen += 1
    assert seen >= 6


def test_metadata_names_what_is_used_as_imagefolder_has_it(tmp_path):
    seen = 0
    for i, case in enumerate(CAPTIONS["imagefolder"]["cases"]):
        rows = case["result"].get("rows") if isinstance(case["result"], dict) else None
        if case["metadata_file"] != "metadata.jsonl" or not rows or not case["metadata"] or case["metadata_base64"]:
            continue
        if not all(row.get("text", row.get("prompt", "")) for row in rows):
            continue
        folder = tmp_path / str(i)
        for j, name in enumerate(case["images"]):
            picture(folder / name, colour=(j, i, 0))
        (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, case["metadata"])))
        found = captions(read_folder(folder, fixed(32, 32)), folder)
        there = [row for row in rows if row["image"] in case["images"]]  # datasets fails when it opens the others
        assert found == {row["image"]: row.get("text", row.get("prompt")) for row in there}, case["name"]
        seen += 1
    assert seen >= 2


def test_wrong_metadata_is_said(tmp_path):
    picture(tmp_path / "a.png")
    for text, said in [
        ('{"file_name": "a.png"}', r"line 1: not as in"),
        ('{"file_name": "a.png", "text": "x"}\nno json', r"line 2: not as in"),
        ('{"file_name": "../a.png", "text": "x"}', "is outside of the folder"),
    ]:
        (tmp_path / "metadata.jsonl").write_text(text)
        with pytest.raises(FileError, match=said):
            read_folder(tmp_path, fixed(32, 32))
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "b.png", "text": "x"}\n{"file_name": "a.png", "text": "y"}')
    found = read_folder(tmp_path, fixed(32, 32))
    assert [one.caption for one in found.pictures] == ["y"]
    assert list(found.skipped.values()) == ["metadata.jsonl names it, and it is not there"]


def test_a_table_in_parquet_is_read_as_lines_are(tmp_path):
    """With what is null in a row, as of tables whose rows have not the same keys."""
    for name in "ab":
        picture(tmp_path / f"{name}.png", colour=(ord(name), 0, 0))
        picture(tmp_path / f"before/{name}.png", colour=(0, ord(name), 0))
    rows = [{"file_name": "a.png", "text": "x", "reference": ["before/a.png", "before/b.png"]},
            {"file_name": "b.png", "caption": "y", "reference": ["before/b.png"]}]  # fmt: skip
    columns = dict.fromkeys(key for row in rows for key in row)
    table = pyarrow.Table.from_pylist([{key: row.get(key) for key in columns} for row in rows])
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    expected = read_folder(tmp_path, fixed(32, 32), key="reference")
    parquet.write_table(table, tmp_path / "metadata.parquet")
    with pytest.raises(FileError, match=r"has metadata.jsonl and metadata.parquet. Next: move one of them away"):
        read_folder(tmp_path, fixed(32, 32))
    (tmp_path / "metadata.jsonl").unlink()
    found = read_folder(tmp_path, fixed(32, 32), key="reference")
    assert found == expected and [len(one.beside) for one in found.pictures] == [2, 1]
    late = pyarrow.array([2**53, 0], pyarrow.timestamp("ms"))  # of a year that Python does not know
    parquet.write_table(table.append_column("taken", late), tmp_path / "metadata.parquet")
    assert read_folder(tmp_path, fixed(32, 32), key="reference") == expected
    parquet.write_table(table.append_column("prompt", late), tmp_path / "metadata.parquet")
    with pytest.raises(FileError, match=r"metadata.parquet cannot be read: .* Next: write it again"):
        read_folder(tmp_path, fixed(32, 32))
    parquet.write_table(table.drop_columns("file_name"), tmp_path / "metadata.parquet")
    with pytest.raises(FileError, match=r"metadata.parquet, row 1: not as in"):
        read_folder(tmp_path, fixed(32, 32))
    (tmp_path / "metadata.parquet").write_bytes(b"no table")
    with pytest.raises(FileError, match=r"metadata.parquet cannot be read: .* Next: write it again"):
        read_folder(tmp_path, fixed(32, 32))


def test_where_nothing_is_left_it_says_why(tmp_path):
    with pytest.raises(UsageError, match="is no folder"):
        read_folder(tmp_path / "none", fixed(32, 32))
    with pytest.raises(UsageError, match=r"has no picture to train on\. Next: pictures of at least the training size"):
        read_folder(tmp_path, fixed(32, 32))


def test_the_golden_captions_are_read(tmp_path):
    """As the bytes are: one line, without the mark of a byte order."""
    for i, row in enumerate(CAPTIONS["read_file"]):
        picture(tmp_path / f"{i:02d}.png", colour=(i, 1, 1))
        (tmp_path / f"{i:02d}.txt").write_bytes(base64.b64decode(row["bytes_base64"]))
    found = read_folder(tmp_path, fixed(32, 32))
    used = {int(one.path.stem): one.caption for one in found.pictures}
    for i, row in enumerate(CAPTIONS["read_file"]):
        whole = base64.b64decode(row["bytes_base64"]).decode("utf-8-sig", "replace")
        if i in used:
            assert used[i] == with_trigger(" ".join(whole.split()), "")
        else:
            assert "\ufffd" in whole or not whole.strip()
