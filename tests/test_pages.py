"""The pages: links, files, commands and flags that they name exist, and every flag of every command is described."""

import ast
import csv
import importlib
import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
from tiny import tiny_pipeline

from flux_core.commands.info import info
from flux_core.commands.table import COMMANDS
from flux_core.device.memory import shares
from flux_core.device.verdict import verdict
from flux_core.errors import FluxError
from flux_core.hooks.plan import check_plan, parse_plan
from flux_core.hub.client import TOKENS
from flux_core.main import BROKEN_PIPE, INTERRUPTED, UNEXPECTED, parse
from flux_core.request.fields import FITS, PICTURES, REQUEST
from flux_core.request.generation import GenerationRequest
from flux_core.request.jobs import flags_of
from flux_core.request.prompt_lines import READERS, UNSUPPORTED, read_lines
from flux_core.variants import VARIANTS

ROOT = Path(__file__).parents[1]
README, COMMANDS_PAGE, WEIGHTS_PAGE = ROOT / "README.md", ROOT / "docs" / "commands.md", ROOT / "docs" / "weights.md"
PAGES = [README, *(ROOT / name for name in ("CONTRIBUTING.md", "CHANGELOG.md", "weights/README.md"))]
PAGES += sorted((ROOT / "docs").glob("*.md"))
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
FOLDERS = ("flux_core", "tests", "benchmarks", "docs", "examples", "jobs", "weights")
every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def read(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def blocks(page: Path, language: str) -> list[str]:
    """The bodies of a page's fenced blocks in that language."""
    return [body for word, body in FENCE.findall(read(page)) if word == language]


def prose(page: Path) -> str:
    """A page without its fenced blocks."""
    return FENCE.sub("", read(page))


def spans(text: str) -> list[str]:
    """The inline code of a text."""
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", text)]


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives to a page's headings."""
    heads = re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


def arguments(words: list[str]) -> list[str] | None:
    """What follows our command line in the words of a shell command; None where it is another command."""
    for i, word in enumerate(words):
        if Path(word).name == "cli.py" or words[max(i - 1, 0) : i + 1] == ["-m", "flux_core"] or words[:1] == ["flux1"]:
            return words[i + 1 :]
    return None


def commands(page: Path) -> Iterator[list[str]]:
    """The arguments of every command of ours in a page's shell blocks and inline code."""
    lines = [line for body in blocks(page, "sh") for line in body.splitlines()]
    lines += [span for span in spans(prose(page)) if re.search(r"cli\.py|-m flux_core|^flux1 ", span)]
    for line in lines:
        for command in re.split(r" (?:&&|\|) ", line):
            if (found := arguments(shlex.split(command, comments=True))) is not None:
                yield found


def test_the_readme_is_short():
    lines = read(README).splitlines()
    assert len(lines) <= 150
    code = "\n".join(blocks(README, "sh"))
    assert [line for line in lines if len(line) > 120 and line not in code] == []


def test_the_readme_installs_draws_and_tests_as_ci_does():
    first, second = blocks(README, "sh")[:2]
    assert first.startswith("python3 -m venv .venv && .venv/bin/pip install ") and " .venv/bin/python cli.py " in first
    assert second.strip() in read(ROOT / ".ci" / "run")


@every_page
def test_links_and_pictures_resolve(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if "://" not in target:
            file, _, anchor = target.partition("#")
            path = (page.parent / file).resolve() if file else page
            assert path.exists(), target
            assert not anchor or anchor in anchors(path), target


@every_page
def test_commands_are_understood(page):
    for words in commands(page):
        if " ".join(words) in COMMANDS:
            continue  # a mention of the command, without its file
        try:
            command, given = parse(words)
        except SystemExit as done:  # --help and --version
            assert not done.code
            continue
        assert given.get("name", "flux-dev") in {*VARIANTS, "NAME"}, words
        for field in command.fields:
            value = given.get(field.name)
            if isinstance(value, str) and not field.multiple and "…" not in value and value.upper() != value:
                field.parse(value)


def test_commands_are_found():
    assert len(list(commands(README))) >= 8
    named = {" ".join(words[:count]) for words in commands(COMMANDS_PAGE) for count in (1, 2)}
    assert named >= set(COMMANDS) - {"generate"}


@every_page
def test_files_exist(page):
    text = read(page)
    named = re.findall(rf"(?<![\w/.-])((?:{'|'.join(FOLDERS)})/[\w./-]*\w)", text)
    missing = [name for name in named if not (ROOT / name).exists()]
    short = [span for span in spans(prose(page)) if re.fullmatch(r"[\w./-]+/[\w-]+\.py|[\w-]+/", span)]
    places = (ROOT, ROOT / "flux_core", page.parent)
    missing += [name for name in short if not any((place / name).exists() for place in places)]
    assert missing == []


@every_page
def test_python_names_exist(page):
    for body in blocks(page, "python"):
        for node in ast.walk(ast.parse(body)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("flux_core"):
                module = importlib.import_module(str(node.module))
                assert [alias.name for alias in node.names if not hasattr(module, alias.name)] == []
    for name in spans(prose(page)):
        if re.fullmatch(r"flux_core(\.[a-z_]+)+", name):
            importlib.import_module(name)


@every_page
def test_json_examples_are_jobs_or_plans(page):
    for body in blocks(page, "json"):
        entries = json.loads(body)
        entries = entries if isinstance(entries, list) else [entries]
        if "kind" in entries[0]:
            check_plan(parse_plan(entries), VARIANTS["flux-mini"].params, 28, ("image",))
        else:
            for job in entries:
                assert flags_of(job, COMMANDS[job.get("command", "generate")].fields, str(page))


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_prompt_file_examples_are_pictures(kind, tmp_path):
    file = tmp_path / f"prompts.{kind}"
    (body,) = blocks(COMMANDS_PAGE, kind)
    file.write_text(body, encoding="utf-8")
    rows = len(list(csv.reader(body.splitlines()))) - (kind == "csv")
    lines = read_lines(str(file))
    assert len(lines) == rows
    for line in lines:
        GenerationRequest(**({"true_cfg_scale": 2} | line.fields))


def sections() -> dict[str, str]:
    """The text below each heading of docs/commands.md, by its anchor."""
    heads = re.split(r"^## (.*)$", read(COMMANDS_PAGE), flags=re.MULTILINE)
    return {head.lower().replace(" ", "-"): body for head, body in zip(heads[1::2], heads[2::2], strict=True)}


def flags(text: str) -> set[str]:
    return set(re.findall(r"`(--?[a-zA-Z][\w-]*)`", text))


def table_flags(section: str) -> set[str]:
    """The flags in the first cells of a section's table."""
    return flags("\n".join(re.findall(r"^\| ([^|]*) \|", section, re.MULTILINE)))


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_is_described_with_exactly_its_flags(name):
    """A section has a table of its own, and says "Flags: [group](#group) without `--x`, `--y` as for a [group]…"."""
    found, section = sections(), sections()[name.replace(" ", "-")]
    said = " ".join((re.search(r"Flags?: .*?(?=\n\n|\Z)", section, re.DOTALL) or [""])[0].split())
    left_out = flags(" ".join(re.findall(r"without (.*?)(?=\[|$)", said)))
    whole = re.findall(r"(?<!as for a )(?<!of the )\[[^\]]+\]\(#([\w-]+)\)", said)
    offered = table_flags(section) | flags(said) | {flag for group in whole for flag in table_flags(found[group])}
    fields = COMMANDS[name].fields
    spelled = {word: field.flag for field in (*REQUEST, *fields) for word in (field.flag, *field.flags)}
    described, absent = ({spelled.get(flag, flag) for flag in some} for some in (offered, left_out))
    assert described - absent == {field.flag for field in fields}


def test_the_page_of_commands_names_what_is_read():
    pictures, prompts = sections()["init-images"], sections()["prompt-files"]
    assert all(re.search(rf"\b{kind}", pictures) for kind in (*PICTURES, *FITS))
    named = set(re.findall(r"`(\.\w+)`", prompts))
    assert set(READERS) <= named <= {*READERS, *UNSUPPORTED}


def test_the_page_of_commands_has_all_of_the_environment():
    request = GenerationRequest(prompt="a red apple")
    keys = re.findall(r"^\| `(\w+)` \|", sections()["metadata"], re.MULTILINE)
    assert keys == list(tiny_pipeline().complete(request).environment)


def test_the_page_of_commands_has_the_exit_codes():
    codes = {int(code) for code in re.findall(r"^\| (\d+) \|", sections()["exit-codes"], re.MULTILINE)}
    errors = {kind.exit_code for kind in FluxError.__subclasses__()}
    assert codes == {0, UNEXPECTED, *errors, INTERRUPTED, BROKEN_PIPE}


def test_the_page_of_weights_names_tokens_in_their_order_and_shows_what_info_prints(monkeypatch):
    text = read(WEIGHTS_PAGE)
    named = re.findall(r"`(\w*TOKEN)`", text.split("The token is the first of")[1])
    assert named[:3] == list(TOKENS)
    monkeypatch.chdir(ROOT)
    (shown,) = blocks(WEIGHTS_PAGE, "")
    assert shown.strip() == info(shown.split(":")[0])


def test_every_command_is_in_the_list_of_commands():
    beginning = read(COMMANDS_PAGE).split("\n## ")[0]
    named = re.findall(r"^\| \[`([\w ]+)`\]\(#([\w-]+)\) \|", beginning, re.MULTILINE)
    assert named == [(name, name.replace(" ", "-")) for name in COMMANDS]


DTYPES_OF_CARDS = {"bfloat16": "", "fp8": "--dtype fp8", "nf4": "--dtype nf4"}


def test_the_readme_says_what_fits_as_the_code_computes_it():
    rows = re.findall(r"^\| (\d+) GB \| (.*?) \| (.*?) \|$", read(README), re.MULTILINE)
    assert [int(size) for size, *_ in rows] == [8, 12, 16, 24, 80]
    for size, cell, source in rows:
        assert cell.replace("`", "") == verdict(VARIANTS["flux-dev"], "cuda", int(size) * 10**9, DTYPES_OF_CARDS)
        assert "computed" in source


def test_the_readme_says_the_sizes_that_the_code_computes():
    sizes = [sum(part.weights for part in shares(VARIANTS["flux-dev"], x)) for x in ("float32", "bfloat16")]
    text = read(README)
    assert f"{sizes[0] / 1e9:.1f} GB in fp32" in text and f"{sizes[1] / 1e9:.1f} GB of weights" in text
