"""`caption`: what is written where, what happens to captions that are there, and that no run loses or doubles any."""

import json
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet
import pytest
import tiny_captioners as tiny
from PIL import Image

from flux_core.captioning import run
from flux_core.captioning.folder import JOURNAL, LOCK, Captions, only_captioner
from flux_core.errors import FileError, UsageError
from flux_core.main import main
from flux_core.training.data import read_folder

NAMES = ["a.png", "b.png", "in/c.jpg"]
ROOT = Path(__file__).parents[2]


@pytest.fixture
def folder(tmp_path):
    """Three pictures, one of them in a folder."""
    (tmp_path / "pictures" / "in").mkdir(parents=True)
    for name, colour in zip(NAMES, ("red", "green", "blue"), strict=True):
        Image.new("RGB", (20, 10), colour).save(tmp_path / "pictures" / name)
    return tmp_path / "pictures"


class Says:
    """A captioner that says which pixels it was shown; `fails` are colours at which it raises."""

    name = "says"

    def __init__(self, word="", fails=(), stops_at=None):
        self.word, self.fails, self.stops_at, self.asked = word, fails, stops_at, []

    def __call__(self, pictures, keys):
        colours = [max(zip(picture.getpixel((0, 0)), ("red", "green", "blue"), strict=True))[1] for picture in pictures]
        if self.stops_at in colours:
            raise KeyboardInterrupt
        if any(colour in self.fails for colour in colours):
            raise ValueError("such a picture is not taken")
        self.asked += colours
        return [f"{self.word}{colour}" for colour in colours]


def caption(folder, to="txt", existing="skip", captioner=None, batch=1, **settings):
    captions = Captions(folder, to, {"existing": existing, **settings})
    return run.caption_folder(captions, lambda: captioner or Says(), run.Wording(existing=existing), batch)


def texts(folder):
    """What `train` reads."""
    found = read_folder(folder, lambda shape: shape)
    return {picture.path.relative_to(folder).as_posix(): picture.caption for picture in found.pictures}


ALL = {"a.png": "red", "b.png": "green", "in/c.jpg": "blue"}


@pytest.mark.parametrize("batch", [1, 2, 8])
@pytest.mark.parametrize("to", ["txt", "jsonl", "parquet"])
def test_train_reads_what_is_written(folder, to, batch):
    caption(folder, to, batch=batch)
    assert texts(folder) == ALL
    assert not (folder / JOURNAL).exists()


@pytest.mark.parametrize("to", ["jsonl", "parquet"])
def test_tables_have_the_hashes_that_train_has(folder, to):
    caption(folder, to)
    if to == "jsonl":
        rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text(encoding="utf-8").splitlines()]
    else:
        rows = pyarrow.parquet.read_table(folder / "metadata.parquet").to_pylist()
    hashes = {picture.path: picture.sha256 for picture in read_folder(folder, lambda shape: shape).pictures}
    assert [row["file_name"] for row in rows] == NAMES
    assert {folder / row["file_name"]: row["sha256"] for row in rows} == hashes


@pytest.mark.parametrize("to", ["txt", "jsonl", "parquet"])
@pytest.mark.parametrize(
    ("existing", "wanted"), [("skip", "old"), ("overwrite", "green"), ("append", "old green"), ("prepend", "green old")]
)
def test_a_caption_that_is_there(folder, to, existing, wanted):
    caption(folder, to, captioner=Says("old-"))
    captions = Captions(folder, to, {})
    captions.put(folder / "b.png", "old", "0")
    captions.close()
    report = caption(folder, to, existing)
    found = Captions(folder, to, {})
    assert found.of(folder / "b.png") == wanted
    assert len(report.written) == (0 if existing == "skip" else 3) and report.kept == 3 - len(report.written)


@pytest.mark.parametrize("existing", ["skip", "overwrite", "append"])
def test_no_caption_is_written_over_that_of_a_picture_of_the_same_name(folder, existing):
    Image.new("RGB", (20, 10), "blue").save(folder / "a.webp")
    report = caption(folder, existing=existing)
    assert (folder / "a.txt").read_text(encoding="utf-8") == "red\n"
    assert report.doubles == {folder / "a.webp": folder / "a.png"} and not report.failed
    rows = caption(folder, "jsonl", "overwrite")
    assert not rows.doubles and rows.written[folder / "a.webp"] == "blue"


def test_pictures_of_one_name_are_told(folder, capsys):
    Image.new("RGB", (20, 10), "blue").save(folder / "in" / "c.png")
    for name in ("a.txt", "b.txt", "in/c.txt"):
        (folder / name).write_text("mine", encoding="utf-8")
    assert main(["caption", str(folder), "--model=sprites"]) == 0
    out, err = capsys.readouterr()
    assert "0 captioned, 3 kept, 1 left out" in out
    assert (
        "in/c.png is left out: c.txt is of c.jpg, and there is one for both. Next: rename one of them"
        in err.replace("\n", " ")
    )


def test_beside_another_table_it_says_what_train_does(folder, capsys):
    (folder / "metadata.jsonl").write_text("", encoding="utf-8")
    for to, how in (("txt", "reads captions from there"), ("parquet", "takes one table alone")):
        main(["caption", str(folder), "--model=sprites", f"--to={to}"])  # which finds none in these pictures
        assert f"and train {how}. Next: --to jsonl, or remove it" in capsys.readouterr().err


def test_a_table_keeps_what_else_its_owner_wrote(folder):
    row = {"file_name": "b.png", "prompt": "old", "control": "maps/b.png"}
    (folder / "metadata.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    (folder / "a.txt").write_text("mine\n", encoding="utf-8")
    caption(folder, "jsonl", "append")
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text(encoding="utf-8").splitlines()]
    assert rows[0] == row | {"prompt": "old green", "sha256": rows[0]["sha256"]}
    assert [(one["file_name"], one["text"]) for one in rows[1:]] == [("a.png", "mine red"), ("in/c.jpg", "blue")]


def test_a_table_that_is_skipped_gets_rows_for_captions_beside_pictures(folder):
    (folder / "a.txt").write_text("mine", encoding="utf-8")
    caption(folder, "jsonl")
    assert texts(folder) == ALL | {"a.png": "mine"}


@pytest.mark.parametrize("to", ["txt", "jsonl", "parquet"])
@pytest.mark.parametrize("existing", ["skip", "append"])
def test_a_run_that_was_stopped_goes_on(folder, to, existing):
    """Nothing is asked for twice, and nothing is put behind a caption twice."""
    caption(folder, to, captioner=Says("old-"))
    (folder / "in/c.txt").unlink(missing_ok=True)
    with pytest.raises(KeyboardInterrupt):
        caption(folder, to, existing if existing == "append" else "overwrite", captioner=Says(stops_at="blue"))
    rest = Says()
    caption(folder, to, existing if existing == "append" else "overwrite", captioner=rest)
    assert rest.asked == ["blue"]
    found = Captions(folder, to, {})
    old = "old-red " if existing == "append" else ""
    assert found.of(folder / "a.png") == f"{old}red" and found.of(folder / "in/c.jpg").endswith("blue")


@pytest.mark.parametrize("cut", range(1, 300, 37))
def test_a_line_that_was_cut_off_is_asked_for_again(folder, cut):
    """As if the process or the machine ended within a write to the journal."""
    with pytest.raises(KeyboardInterrupt):
        caption(folder, "jsonl", captioner=Says(stops_at="blue"))
    journal = folder / JOURNAL
    journal.write_bytes(journal.read_bytes()[:-cut])
    caption(folder, "jsonl")
    assert texts(folder) == ALL


def test_a_caption_in_the_journal_alone_is_written_first(folder):
    """As if the process ended between the journal and the .txt."""
    with pytest.raises(KeyboardInterrupt):
        caption(folder, captioner=Says(stops_at="blue"))
    (folder / "b.txt").unlink()
    rest = Says()
    caption(folder, captioner=rest)
    assert texts(folder) == ALL and rest.asked == ["blue"]


@pytest.mark.parametrize("to", ["txt", "jsonl", "parquet"])
def test_other_settings_begin_with_what_a_stopped_run_has(folder, to):
    with pytest.raises(KeyboardInterrupt):
        caption(folder, to, captioner=Says("x-", stops_at="blue"), model="one")
    rest = Says()
    caption(folder, to, captioner=rest, model="other")
    found = Captions(folder, to, {})
    assert rest.asked == ["blue"] and found.of(folder / "a.png") == "x-red"


def test_what_fails_is_told_and_alone(folder):
    (folder / "d.png").write_bytes(b"no picture")
    (folder / "a.txt").write_bytes(b"\xff\xfe\x00")
    report = caption(folder, captioner=Says(fails=("green",)), batch=3)
    assert {path.name for path in report.written} == {"c.jpg"}
    reasons = {path.name: reason for path, reason in report.failed.items()}
    assert reasons.keys() == {"a.png", "b.png", "d.png"}
    assert "no text in UTF-8" in reasons["a.png"] and "such a picture is not taken" in reasons["b.png"]
    assert (folder / "a.txt").read_bytes() == b"\xff\xfe\x00"


@pytest.mark.parametrize("table", ["{", '{"file_name": "a.png", "text": 5}', '{"file_name": 5, "text": "a"}'])
def test_a_damaged_table_is_left_as_it_is(folder, table):
    (folder / "metadata.jsonl").write_text(table, encoding="utf-8")
    with pytest.raises(FileError, match="could not be read, and is left as it is"):
        caption(folder, "jsonl", "append")
    assert (folder / "metadata.jsonl").read_text(encoding="utf-8") == table


@pytest.mark.parametrize("first", [{"settings": {}}, {"settings": []}, {"settings": {"to": 1}}])
@pytest.mark.parametrize("name", ["../out.png", "/no/such/out.png", 5])
def test_a_journal_that_came_with_the_pictures_writes_nothing_beside_them(folder, first, name):
    row = {"file_name": name, "text": "x", "sha256": ""}
    (folder / JOURNAL).write_text(f"{json.dumps(first)}\n{json.dumps(row)}\n", encoding="utf-8")
    caption(folder)
    assert texts(folder) == ALL
    assert {path.name for path in folder.parent.iterdir()} == {folder.name}


def test_one_process_at_a_time(folder):
    with only_captioner(folder), pytest.raises(UsageError, match="another process captions"), only_captioner(folder):
        pass
    assert not (folder / LOCK).exists()


@pytest.mark.slow
def test_the_command_captions_a_folder_and_goes_on_after_a_kill(folder, tmp_path, capsys):
    """By a tiny Qwen3-VL; the first process ends by a signal while it answers about the second picture."""
    model = tiny.qwen(tmp_path / "model")
    flags = [
        "caption",
        str(folder),
        "--model",
        str(model),
        "--name",
        "flux-mini",
        "--max-new-tokens",
        "8",
        "--to",
        "jsonl",
    ]
    code = (
        "import os, signal, sys; from flux_core.captioning import folder as f; from flux_core.main import main\n"
        "put, count = f.Captions.put, []\n"
        "def killing(self, *parts):\n"
        "    put(self, *parts); count.append(0)\n"
        "    if len(count) == 2: os.kill(os.getpid(), signal.SIGKILL)\n"
        "f.Captions.put = killing; main(sys.argv[1:])"
    )
    killed = subprocess.run([sys.executable, "-c", code, *flags], cwd=ROOT, capture_output=True, check=False)
    assert killed.returncode == -9 and not (folder / "metadata.jsonl").exists()
    assert main(flags) == 0
    out = capsys.readouterr().out
    assert "in/c.jpg: " in out and "a.png: " not in out and "1 captioned, 2 kept, 0 left out" in out
    assert "tokens of T5" in out and texts(folder).keys() == set(NAMES)


def test_a_captioner_that_answers_nothing(folder, tmp_path, capsys):
    model = tiny.silent(tmp_path / "model")
    assert main(["caption", str(folder), "--model", str(model), "--name", "flux-mini"]) == FileError.exit_code
    assert (
        "3 of the pictures" in (error := capsys.readouterr().err) and "a.png: the captioner answered nothing" in error
    )
    assert not list(folder.rglob("*.txt")) and not (folder / JOURNAL).exists()


def test_captions_that_are_too_long_are_told(folder, tmp_path, capsys):
    model = tiny.qwen(tmp_path / "model")
    assert main(["caption", str(folder), "--model", str(model), "--name", "flux-mini", "--max-new-tokens", "60"]) == 0
    assert "and flux-mini reads 32 of them" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "finding"),
    [
        (["--model", "sprites", "--style", "tags"], "leave out --style"),
        (["--style", "tags", "--prompt", "What?"], "two ways to ask"),
        (["--existing", "keep"], "--existing must be one of skip, overwrite, append, prepend"),
        (["--batch", "0"], "--batch must be a whole number from 1 to 1024"),
        (["--name", "flux-x"], "flux-x"),
    ],
)
def test_wrong_flags_are_told_before_anything_is_loaded(folder, capsys, flags, finding):
    assert main(["caption", str(folder), *flags]) == UsageError.exit_code
    assert finding in capsys.readouterr().err


def test_a_folder_without_pictures_is_told(tmp_path, capsys):
    assert main(["caption", str(tmp_path / "none")]) == UsageError.exit_code
    assert main(["caption", str(tmp_path)]) == UsageError.exit_code
    assert "has no pictures" in capsys.readouterr().err
