"""Encoded captions in parquet: the encoders' bits, once for each text, and nothing of other encoders or captions."""

import hashlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from test_captions import is_near

from flux_core.errors import FileError, NonFiniteError, UsageError
from flux_core.training.captions import draw, variants
from flux_core.training.data import Picture
from flux_core.training.sizes import Size
from flux_core.training.texts import ROWS, Row, Text, TextCache, build, texts_of

BF16 = torch.bfloat16
SHAPES = (1, 6, 8), (1, 4)


def picture(i, caption):
    return Picture(Path(f"{i}.png"), caption, f"{i:064x}", Size(1, 1))


PICTURES = [picture(i, f"noto, thing {i}, red, large") for i in range(9)]
TEXTS = texts_of(PICTURES, "noto", shuffles=3, keep=1)
"""2 + 9 * 4 = 38: two parts, and a third with 6 rows"""


def encode(text, dtype=BF16):
    """Numbers that hang on the text."""
    draw = torch.Generator("cpu").manual_seed(int(hashlib.sha256(text.encode()).hexdigest()[:8], 16))
    txt, vec = (torch.randn(shape, generator=draw).to(dtype) for shape in SHAPES)
    return txt, vec


def built(folder, texts=TEXTS, depends="encoders", encode=encode):
    """A cache after a run's start, and what had to be encoded for it."""
    cache, done = TextCache(folder, depends), []
    build(cache, texts, encode, done.append)
    assert cache.missing(texts) == []
    return cache, [text.caption for text in done]


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def same(found, expected):
    return all(x.dtype == y.dtype and torch.equal(x, y[0]) for x, y in zip(found, expected, strict=True))


def test_texts_are_those_in_common_and_each_pictures(tmp_path):
    assert TEXTS[:3] == [
        Text("", "empty", ""), Text("", "trigger", "noto"), Text(f"{0:064x}", "caption", PICTURES[0].caption),
    ]  # fmt: skip
    assert len(TEXTS) == 38 and texts_of(PICTURES[:1])[0] == Text("", "empty", "")
    of_third = {text.kind: text.caption for text in TEXTS if text.sha256 == PICTURES[3].sha256}
    assert {**of_third, "empty": "", "trigger": "noto"} == variants(PICTURES[3].caption, "noto", 3, 1)


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
def test_the_numbers_come_back_to_the_bit(tmp_path, dtype):
    odd = torch.tensor([-0.0, 1e-40, 3e38, -1 / 3], dtype=dtype)

    def extremes(text):
        txt, _ = encode(text, dtype)
        return txt.index_fill(1, torch.tensor([2]), 1e-30), odd[None]

    built(tmp_path, encode=extremes)
    cache, encoded = built(tmp_path, encode=extremes)
    assert encoded == []
    for text in TEXTS:
        txt, vec = cache.get(text.sha256, text.kind)
        assert same((txt, vec), extremes(text.caption)) and txt.device.type == "cpu"
        assert vec.view(torch.uint8).tolist() == odd.view(torch.uint8).tolist()
    shared = cache.get(PICTURES[5].sha256, "empty")
    assert same(shared, extremes(""))


def test_others_can_read_a_part(tmp_path):
    built(tmp_path)
    parts = [pq.ParquetFile(tmp_path / f"texts-{i:05d}.parquet") for i in range(3)]
    assert [part.num_row_groups for part in parts] == [ROWS, ROWS, 6]
    assert all(part.metadata.row_group(i).num_rows == 1 for part in parts for i in range(part.num_row_groups))
    rows = [row for part in parts for row in part.read().to_pylist()]
    assert [Text(row["sha256"], row["kind"], row["caption"]) for row in rows] == TEXTS
    assert {(*row["txt_shape"], row["txt_dtype"], len(row["txt"])) for row in rows} == {(6, 8, "bfloat16", 96)}
    assert {(*row["vec_shape"], row["vec_dtype"], len(row["vec"])) for row in rows} == {(4, "bfloat16", 8)}


def test_equal_texts_are_encoded_once(tmp_path):
    texts = texts_of([picture(i, "noto") for i in range(20)], "noto")
    cache, encoded = built(tmp_path, texts)
    assert encoded == ["", "noto"] and len(pq.read_table(tmp_path)) == 2
    assert all(same(cache.get(text.sha256, text.kind), encode(text.caption)) for text in texts)


def test_dropout_and_shuffling_work_from_the_cache(tmp_path):
    cache, _ = built(tmp_path)
    steps, one = 2000, PICTURES[4]
    kinds = variants(one.caption, "noto", 3, 1)
    number = {cache.get(one.sha256, kind)[0].float().sum().item(): kind for kind in kinds}
    assert len(number) == 6
    found = []
    for step in range(steps):
        kind = draw(kinds, torch.Generator("cpu").manual_seed(step), caption_dropout=0.1, trigger_only=0.2)
        found.append(number[cache.get(one.sha256, kind)[0].float().sum().item()])
    for kind, chance in {"empty": 0.1, "trigger": 0.2, "caption": 0.175, "shuffle-3": 0.175}.items():
        assert is_near(found.count(kind) / steps, chance, steps), kind


def test_equal_runs_are_equal_bytes_without_a_path(tmp_path):
    built(tmp_path / "a")
    built(tmp_path / "b")
    whole = contents(tmp_path / "a")
    assert whole == contents(tmp_path / "b") and len(whole) == 3
    assert all(str(tmp_path).encode() not in data for data in whole.values())


def test_what_was_killed_goes_on_behind_its_last_part(tmp_path):
    code = (
        "import os, signal, sys; from pathlib import Path; sys.path[:0] = ['tests', 'tests/training']\n"
        "from test_texts import TEXTS, build, encode, TextCache\n"
        "def killed(text):\n"
        "    if text == TEXTS[20].caption: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return encode(text)\n"
        "build(TextCache(Path(sys.argv[1]), 'encoders'), TEXTS, killed)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "a")], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert list(contents(tmp_path / "a")) == ["texts-00000.parquet"]
    _, encoded = built(tmp_path / "a")
    assert encoded == [text.caption for text in TEXTS[ROWS:]]
    built(tmp_path / "b")
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_what_is_encoded_is_written_whatever_ends_it(tmp_path, error):
    def ended(text):
        if text == TEXTS[20].caption:
            raise error
        return encode(text)

    with pytest.raises(error):
        build(TextCache(tmp_path, "encoders"), TEXTS, ended)
    cache, encoded = built(tmp_path)
    assert encoded == [text.caption for text in TEXTS[20:]]
    assert all(same(cache.get(text.sha256, text.kind), encode(text.caption)) for text in TEXTS)


def flipped(data):
    at = data.index(encode(TEXTS[17].caption)[0].view(torch.uint8).numpy().tobytes())
    return data[: at + 9] + bytes([data[at + 9] ^ 1]) + data[at + 10 :]


@pytest.mark.parametrize("damage", [lambda data: data[:-1], lambda data: data[:999], lambda data: b"", flipped])
def test_a_damaged_part_is_told_and_made_again(tmp_path, capsys, damage):
    built(tmp_path)
    part = tmp_path / "texts-00001.parquet"
    part.write_bytes(damage(part.read_bytes()))
    cache, encoded = built(tmp_path)
    assert encoded == [text.caption for text in TEXTS[ROWS : 2 * ROWS]] and not part.exists()
    assert capsys.readouterr().err == f"{part} is damaged, or could not be read: its captions are encoded again\n"
    assert all(same(cache.get(text.sha256, text.kind), encode(text.caption)) for text in TEXTS)
    assert built(tmp_path)[1] == [] and capsys.readouterr().err == ""


def test_no_flipped_bit_changes_a_number(tmp_path):
    """It is noticed, or it does not matter."""
    texts = TEXTS[:2]
    cache, _ = built(tmp_path, texts)
    (part,) = tmp_path.iterdir()
    whole, seen = part.read_bytes(), 0
    for at in range(0, len(whole), 5):
        part.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << at % 8]) + whole[at + 1 :])
        cache = TextCache(tmp_path, "encoders")
        missing = cache.missing(texts)
        seen += bool(missing)
        for text in texts:
            assert text in missing or same(cache.get(text.sha256, text.kind), encode(text.caption)), at
    assert seen > len(whole) / 10


def test_a_part_that_is_lost_later_is_said(tmp_path):
    cache, _ = built(tmp_path)
    (tmp_path / "texts-00000.parquet").unlink()
    with pytest.raises(FileError, match=r"texts-00000.parquet could not be read: .* Next: start again"):
        cache.get("", "empty")
    assert built(tmp_path)[1] == [text.caption for text in TEXTS[:ROWS]]


def test_a_changed_caption_is_encoded_again(tmp_path, capsys):
    _, digest = built(tmp_path)[0], built(tmp_path)[0].digest
    changed = [PICTURES[0], picture(1, "another"), *PICTURES[2:]]
    texts = texts_of(changed, "noto", 3, 1)
    cache, encoded = built(tmp_path, texts)
    assert encoded == ["another"] and cache.digest != digest
    assert f"{tmp_path} has 4 encoded captions of other captions, encoders or settings" in capsys.readouterr().err
    assert same(cache.get(PICTURES[1].sha256, "caption"), encode("another"))
    with pytest.raises(KeyError):
        cache.get(PICTURES[1].sha256, "shuffle-1")
    assert built(tmp_path, texts)[1] == [] and capsys.readouterr().err == ""


def test_other_encoders_encode_all_again(tmp_path, capsys):
    built(tmp_path)
    cache, encoded = built(tmp_path, depends="encoders in int8", encode=lambda text: encode(text, torch.float32))
    assert encoded == [text.caption for text in TEXTS]
    assert "has 38 encoded captions of other captions, encoders or settings" in capsys.readouterr().err
    assert cache.get("", "empty")[0].dtype == torch.float32
    assert len(contents(tmp_path)) == 3 and cache.stale == 0


def test_a_changed_picture_of_the_same_caption_needs_no_encoder(tmp_path):
    before = built(tmp_path)[0].digest
    cache, encoded = built(tmp_path, texts_of([*PICTURES[:8], picture(99, PICTURES[8].caption)], "noto", 3, 1))
    assert encoded == [] and cache.digest != before
    with pytest.raises(KeyError):
        cache.get(PICTURES[8].sha256, "caption")


def test_a_plan_writes_nothing(tmp_path):
    cache = TextCache(tmp_path / "none", "encoders")
    assert cache.missing(TEXTS) == TEXTS and len(cache.digest) == 16 and not (tmp_path / "none").exists()
    assert cache.digest == built(tmp_path)[0].digest


def test_nan_is_not_kept(tmp_path):
    def broken(text):
        txt, vec = encode(text)
        return (txt * float("nan") if text == "noto" else txt), vec

    with pytest.raises(NonFiniteError, match="'noto'"):
        build(TextCache(tmp_path, "encoders"), TEXTS, broken)
    assert len(pq.read_table(tmp_path)) == 1


def test_a_full_disk_is_a_disk_error_and_keeps_what_was_there(tmp_path):
    """RLIMIT_FSIZE stands for a full disk: no file may grow past the limit."""
    code = (
        "import resource, sys; from pathlib import Path; sys.path[:0] = ['tests', 'tests/training']\n"
        "from test_texts import TEXTS, build, encode, TextCache; from flux_core.errors import DiskError\n"
        "cache = TextCache(Path(sys.argv[1]), 'encoders'); build(cache, TEXTS[:2], encode)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000))\n"
        "try: build(cache, TEXTS, encode)\n"
        "except DiskError as error: print(error); sys.exit(error.exit_code)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 6 and "texts-00001.parquet: files may not grow so large here" in done.stdout, done.stderr
    assert os.listdir(tmp_path) == ["texts-00000.parquet"]
    assert built(tmp_path)[1] == [text.caption for text in TEXTS[2:]]


def test_without_pyarrow_it_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UsageError, match="Next: pip install pyarrow") as caught:
        TextCache(tmp_path, "encoders")
    assert caught.value.exit_code == 2


def test_rows_may_be_added_by_hand(tmp_path):
    cache = TextCache(tmp_path, "encoders")
    text = Text("", "empty", "")
    assert cache.missing([text]) == [text]
    cache.add([Row(text, torch.ones(2, 3), torch.zeros(4))])
    assert cache.missing([text]) == [] and cache.get("", "empty")[0].tolist() == [[1.0] * 3] * 2
