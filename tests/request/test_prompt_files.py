"""Files of prompts as people have them: out of spreadsheets, of JSON of every kind, in other encodings."""

import itertools
import json
from pathlib import Path

import pytest

from flux_core.commands.generate import build_requests
from flux_core.errors import FileError, UsageError
from flux_core.jsonfile import MAX_BYTES
from flux_core.methods.importance import default_prompts
from flux_core.request.prompt_lines import read_lines

APPLE, PEAR = {"prompt": "a red apple", "seed": "7"}, {"prompt": "pears, two", "seed": "8"}
ENCODINGS = ["utf-8", "utf-8-sig", "utf-16", "utf-32", "utf-16-le with a mark", "utf-16-be with a mark"]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def write(name: str, text: str, encoding: str = "utf-8") -> str:
    kind, _, mark = encoding.partition(" ")
    Path(name).write_bytes((("\ufeff" if mark else "") + text).encode(kind))
    return name


def fields(name: str) -> list[dict]:
    return [line.fields for line in read_lines(name)]


ROWS = [["prompt", "seed"], ["a red apple", "7"], ["pears, two", "8"]]


def table(delimiter: str, quoted: bool, space: str, end: str) -> str:
    def cell(text: str) -> str:
        return space + (f'"{text}"' if quoted or delimiter in text else text)

    return "".join(delimiter.join(map(cell, row)) + end for row in ROWS)


@pytest.mark.parametrize("delimiter", list(",;\t|"))
@pytest.mark.parametrize(
    ("name", "declared"), [("a.csv", ""), ("a.csv", "sep={}"), ("a.csv", '"SEP={}"'), ("A.TSV", "")]
)
def test_every_table_that_a_spreadsheet_writes_is_the_same(name, declared, delimiter):
    for encoding, quoted, space, end in itertools.product(ENCODINGS, (False, True), ("", " "), ("\n", "\r\n", "\r")):
        head = declared.format(delimiter) + end if declared else ""
        write(name, head + table(delimiter, quoted, space, end), encoding)
        assert fields(name) == [APPLE, PEAR], (encoding, quoted, space, end)


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_lines_and_json_come_in_every_encoding(encoding, end):
    write("a.txt", end.join(["a red apple", "", "# no", "ein Käse 🍎", ""]), encoding)
    assert fields("a.txt") == [{"prompt": "a red apple"}, {"prompt": "ein Käse 🍎"}]
    entries = [{"prompt": "ein Käse", "seed": 7}, "x"]
    write("a.json", json.dumps(entries, indent=1, ensure_ascii=False).replace("\n", end), encoding)
    for name in ("a.jsonl", "a.ndjson"):
        write(name, end.join(json.dumps(one, ensure_ascii=False) for one in entries), encoding)
        assert fields(name) == fields("a.json") == [entries[0], {"prompt": "x"}]


def test_a_list_in_json_is_so_many_prompts():
    assert fields(write("a.json", '["a", {"prompt": "b", "seed": 1, "steps": null}]')) == [
        {"prompt": "a"}, {"prompt": "b", "seed": 1},
    ]  # fmt: skip
    assert fields(write("a.json", '{"prompt": "b"}')) == [{"prompt": "b"}]
    assert read_lines("a.json")[0].where == "a.json, entry 1"


def test_the_prompts_of_a_study_are_a_file_of_prompts():
    lines = read_lines(str(default_prompts("flux-mini")))
    assert len(lines) == 64 and build_requests(None, {}, lines[:2])[0].seed == lines[0].fields["seed"]


@pytest.mark.parametrize("between", ["", "\n", "\n\n"])
def test_files_that_were_put_together(between):
    mark = "\ufeff"
    assert fields(write("a.txt", f"{mark}a red apple{between}{mark}two apples\n")) == [
        {"prompt": "a red apple"}, {"prompt": "two apples"},
    ]  # fmt: skip
    one = f"{mark}prompt;seed\na red apple;7{between}"
    assert fields(write("a.csv", one + one)) == [{"prompt": "a red apple", "seed": "7"}] * 2
    assert fields(write("a.jsonl", f'{mark}"a"{between}{mark}"b"')) == [{"prompt": "a"}, {"prompt": "b"}]
    assert fields(write("a.txt", f"{mark}{mark}a")) == [{"prompt": "a"}]


def test_cells_may_hold_lines_quotes_and_long_texts():
    text = 'prompt;seed\n"two\r\nlines; ""quoted""";1\n  spaces  ; 2 \n' + "x" * 200_000 + ";3\n"
    assert fields(write("a.csv", text)) == [
        {"prompt": 'two\nlines; "quoted"', "seed": "1"}, {"prompt": "spaces", "seed": "2"},
        {"prompt": "x" * 200_000, "seed": "3"},
    ]  # fmt: skip
    assert [line.where for line in read_lines("a.csv")] == ["a.csv, line 3", "a.csv, line 4", "a.csv, line 5"]


def test_empty_cells_at_the_end_say_nothing():
    text = "prompt,seed,,\na red apple,7,,\nb,,,\n,,,\nc,\n"
    assert fields(write("a.csv", text)) == [APPLE, {"prompt": "b"}, {"prompt": "c"}]


@pytest.mark.parametrize(
    "declared", ["sep=;", "sep=; ", "sep = ;", "sep=;;", "sep=;,,", '"sep=;",', '"sep=;"\t', "SEP=;", "Sep=;;;"]
)
def test_a_declared_delimiter_may_have_been_saved_by_another_program(declared):
    assert fields(write("a.csv", f"{declared}\nprompt;seed\na red apple;7\n")) == [APPLE]


@pytest.mark.parametrize("delimiter", ["{};{};{}", '{},"{}","{}"', "{}\t{}\t{}"])
def test_numbers_may_have_a_decimal_comma(delimiter):
    rows = [("prompt", "guidance", "strength"), ("a 3,5 m tall, red tree".replace(",", "."), "3,5", ",25")]
    (found,) = fields(write("a.csv", "\r\n".join(delimiter.format(*row) for row in rows)))
    assert (found["guidance"], found["strength"]) == ("3.5", ".25")
    (request,) = build_requests(None, {}, read_lines("a.csv"))
    assert (request.guidance, request.strength, request.prompt) == (3.5, 0.25, "a 3.5 m tall. red tree")


def test_a_comma_stays_in_words_and_in_whole_numbers():
    assert fields(write("a.csv", "prompt;seed\n3,5;7\n")) == [{"prompt": "3,5", "seed": "7"}]
    with pytest.raises(UsageError, match=r"line 2: --seed must be a whole number .*, not '1,024'"):
        build_requests(None, {}, read_lines(write("a.csv", "prompt;seed\nx;1,024\n")))


def test_other_names_of_the_same_kinds():
    assert fields(write("a.tab", "prompt\tseed\na red apple\t7\n")) == [APPLE]
    assert fields(write("a.jsonlines", '{"prompt": "a red apple", "seed": "7"}\n')) == [APPLE]


def test_a_flag_without_a_value_is_true_in_json():
    (asked,) = build_requests(
        None, {}, read_lines(write("a.json", '{"prompt": "x", "cfg_zero": true, "cfg_scale": 2}'))
    )
    assert asked.cfg_zero == 1


def test_one_column_needs_no_delimiter():
    assert fields(write("a.tsv", 'prompt\na, b; c\n"d"\n')) == [{"prompt": "a, b; c"}, {"prompt": "d"}]
    assert fields(write("a.csv", 'prompt\n"a, b"\n')) == [{"prompt": "a, b"}]


@pytest.mark.parametrize(
    ("name", "text", "finding"),
    [
        ("a.csv", "prompt,seed,guidance\na red apple\n", "line 2 has 1 cell(s), the header 3. Next: write ',' also"),
        ("a.csv", "prompt;seed\na; b;7\n", "line 2 has 3 cell(s), the header 2. Next: put quotes around a cell"),
        ("a.csv", "sep=;\nprompt;seed\nx\n", "line 3 has 1 cell(s)"),
        ("a.csv", "sep=;\nprompt,seed\nx,1\n", "line 2: there is no column 'prompt,seed'"),
        (
            "a.csv",
            'prompt,seed\n"x" ,1\n',
            "line 2 is no CSV: ',' expected after '\"'. Next: put quotes around a whole",
        ),
        ("a.csv", "a red apple\na blue car\n", "line 1: there is no column 'a red apple'. There are prompt, "),
        ("a.csv", ",prompt\n0,x\n", "line 1: there is no column ''"),
        ("a.csv", "a red apple\n", "Next: name the columns in the first line, or call a file of prompts .txt"),
        (
            "a.json",
            '[{"prompt": "a", "seed": true}]',
            "entry 1: --seed must be a whole number from 0 to",
        ),
        ("a.json", '{"prompts": ["a"]}', "entry 1: there is no column 'prompts'. Did you mean prompt?"),
        ("a.json", '["a", 7]', "entry 2 is neither an object nor a string"),
        ("a.json", '"a"\n"b"\n', "is no JSON: trailing characters at line 2 column 1. Next: name a list .json"),
        ("a.json", '[["a"]]', "entry 1 is neither"),
        ("a.json", "[" * 100_000, "is no JSON"),
        ("a.ndjson", '"a"\n["b"]\n', "line 2 is neither an object nor a string"),
    ],
)
def test_what_cannot_be_understood_says_what_to_do(name, text, finding):
    with pytest.raises(UsageError) as caught:
        read_lines(write(name, text))
    assert str(caught.value).startswith(name) and finding in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "data", "finding"),
    [
        ("a.csv", "prompt\nx\n".encode("utf-16-le"), "line 1 is no UTF-8 text, nor UTF-16"),
        ("a.txt", "x\ny\n".encode("utf-16-be"), "Next: save the file as UTF-8"),
        ("a.txt", b"\xff\xfex\0y", "is no UTF-8 text, nor UTF-16"),
        ("a.txt", b"\xff\xfe\x00\xd8x\0", "is no UTF-8 text, nor UTF-16"),
        ("a.txt", b"x\ry\r\nz\xe4\n", "line 3 is no UTF-8 text"),
        ("a.json", b'["\xe4"]', "line 1 is no UTF-8 text"),
        ("a.json", b"[]", "holds no prompt"),
        ("a.json", b" \n", "holds no prompt"),
        ("a.csv", b"sep=;\n", "holds no prompt"),
        ("a.txt", "\ufeff".encode(), "holds no prompt"),
        ("a.jsonl", "x".encode("utf-16") * (MAX_BYTES // 4 + 1), "at most"),
        ("a.yaml", b"- a red apple\n", "cannot be read from .yaml. Next: save them as .txt, .csv, .tsv, .tab, .json"),
        ("a.XLSX", b"PK\3\4", "cannot be read from .xlsx"),
        ("a.docx", b"PK\3\4", "cannot be read from .docx"),
        ("a.pdf", b"%PDF-1.4\n", "cannot be read from .pdf"),
        ("a.jsonc", b'["a"]', "cannot be read from .jsonc"),
        ("a.zip", b"x\nPK\3\4x", "line 2 is no UTF-8 text"),
    ],
)
def test_what_cannot_be_read_says_what_to_do(name, data, finding):
    Path(name).write_bytes(data)
    with pytest.raises(FileError) as caught:
        read_lines(name)
    assert str(caught.value).startswith(name) and finding in str(caught.value) and "\n" not in str(caught.value)
