"""The command line: its grammar, its speed, its exit codes, and terminals of every kind (users.md 4c, rows
36, 54).
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from tiny import tiny_pipeline

import flux_core.pipeline
from flux_core.commands.table import RUN
from flux_core.errors import UsageError
from flux_core.main import COMMANDS, build_parser, main, parse
from flux_core.request.fields import REQUEST
from flux_core.request.generation import GenerationRequest
from flux_core.variants import VARIANTS

pytestmark = pytest.mark.usefixtures("one_thread")
ROOT = Path(__file__).parent.parent
FAST = ["--prompt", "a red apple", "--width=32", "--height=48", "--steps", "2", "--force", "--seed", "42"]
TINY = f"""
import sys; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
import flux_core.pipeline; from tiny import tiny_pipeline; flux_core.pipeline.load_pipeline = tiny_pipeline
from flux_core.main import main; sys.exit(main())
"""
"""the real command with a tiny model, for a process of its own"""


@pytest.fixture(autouse=True)
def tiny_models(monkeypatch, tmp_path):
    monkeypatch.setattr(flux_core.pipeline, "load_pipeline", tiny_pipeline)
    monkeypatch.chdir(tmp_path)


def cli(*words: str, **options) -> subprocess.CompletedProcess:
    command = [sys.executable, ROOT / "cli.py", *words]
    return subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", **options)


def test_it_draws(capsys):
    assert main(FAST) == 0
    assert capsys.readouterr().out.endswith("output/flux-mini_seed42.png\n")
    assert Image.open("output/flux-mini_seed42.png").size == (32, 48)
    assert main(["info", "output/flux-mini_seed42.png"]) == 0
    assert '"prompt": "a red apple"' in capsys.readouterr().out


@pytest.mark.parametrize("field", [f for f in REQUEST + RUN if f.kind is not bool], ids=lambda f: f.name)
def test_every_flag_takes_dashes_and_underscores(field):
    spellings = [field.flag, field.flag.replace("-", "_").replace("__", "--"), *field.flags]
    for flag in spellings:
        words = ["7"] if field.multiple else "7"
        expected = {field.name: [words] if field.repeated else words}
        assert parse([flag, "7"])[1] == expected, flag
        if flag.startswith("--"):
            assert parse([f"{flag}=7"])[1] == expected


def test_values_keep_their_underscores():
    assert parse(["--prompt", "--snake_case in words", "--output_dir=a_b"])[1] == {
        "prompt": "--snake_case in words",
        "output_dir": "a_b",
    }
    assert parse(["--prompt=--snake_case"])[1] == {"prompt": "--snake_case"}


def test_values_may_be_negative_numbers():
    assert parse(["--seed", "-1", "--guidance", "-1"])[1] == {"seed": ["-1"], "guidance": "-1"}
    assert parse(["--seed", "1", "2", "3"])[1] == {"seed": ["1", "2", "3"]}


def test_a_flag_may_have_a_value_of_its_own():
    given = [parse(words)[1] for words in (["--cfg-zero"], ["--cfg_zero", "2"], ["--cfg-zero", "--seed", "1"])]
    assert given == [{"cfg_zero": "1"}, {"cfg_zero": "2"}, {"cfg_zero": "1", "seed": ["1"]}]
    assert parse(["-n", "a dog", "--cfg-scale", "3"])[1] == {"negative_prompt": "a dog", "true_cfg_scale": "3"}


def test_help_shows_every_flag_and_the_defaults_of_the_rows():
    text = " ".join(build_parser("generate").format_help().split())
    assert all(field.flag in text and field.help in text for field in REQUEST + RUN)
    steps = [row.num_steps for row in VARIANTS.values()]
    assert f"(default: {steps[0]}, flux-schnell {steps[-1]})" in text
    assert all(command in text for command in COMMANDS if command != "generate")
    assert "%" not in text and "_" not in text.replace("flux_core", "")


@pytest.mark.parametrize(
    ("words", "finding"),
    [
        (["--promt", "x"], "unknown flag --promt. Did you mean --prompt?"),
        (["--prom", "x"], "unknown flag --prom."),
        (["--num_stepz=3"], "Did you mean --num-steps?"),
        (["--prompt"], "expected one argument"),
        (["a", "red", "apple"], "a prompt follows --prompt"),
        (["--prompt", "x", "info"], "unexpected 'info'"),
        ([], "--prompt is missing"),
        (["--prompt", "x", "--width", "big"], "--width must be a whole number"),
        (["--prompt", "x", "--name", "flux-schnel"], "Did you mean flux-schnell?"),
        (["info"], "file"),
        (["save", "--format", "zip"], "zip"),
        (["lora", "inof"], "no command lora inof; there are info, convert, merge, extract. Did you mean info?"),
        (["lora", "convert", "a.safetensors"], "required: OUT"),
        (["lora", "extract", "--rnak", "4"], "Did you mean --rank?"),
    ],
)
def test_usage_errors_are_one_line_and_exit_2(words, finding, capsys):
    assert main(words) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1 and finding in err


@pytest.mark.parametrize("words", [["lora"], ["lora", "--help"], ["lora", "-h"], ["cache"]])
def test_a_group_lists_its_commands(words, capsys):
    assert main(words) == 0
    out = capsys.readouterr().out
    assert all(
        f"  {name.split()[1]} " in out and COMMANDS[name].help in out
        for name in COMMANDS
        if name.startswith(f"{words[0]} ")
    )


def test_a_command_of_two_words_takes_several_values_without_flags():
    command, given = parse(["lora", "merge", "a", "b", "--scale", "0.8", "0.5"])
    assert command is COMMANDS["lora merge"] and given == {"loras": ["a", "b"], "scale": ["0.8", "0.5"]}
    assert parse(["lora", "convert", "a", "b", "--to=kohya"])[1] == {"source": "a", "target": "b", "to": "kohya"}


def test_exit_codes_of_other_errors(capsys, monkeypatch):
    assert main(["info", "missing.png"]) == 4
    Path("file").write_text("")
    assert main([*FAST, "--output-dir", "file"]) == 6
    monkeypatch.setattr(flux_core.pipeline, "load_pipeline", lambda *_: 1 / 0)
    capsys.readouterr()
    assert main(FAST) == 1
    err = capsys.readouterr().err
    assert "ZeroDivisionError" in err and "--debug" in err and "Traceback" not in err
    assert main([*FAST, "--debug"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_an_interrupt_exits_130_and_leaves_no_files(monkeypatch, capsys):
    def interrupted(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupted)
    assert main(FAST) == 130
    assert list(Path("output").iterdir()) == [] and "Traceback" not in capsys.readouterr().err


def test_no_progress_bar_without_a_terminal(capsys):
    main(FAST)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "words", [["--help"], ["--version"], ["--promt", "x"], ["info", "--help"], ["info", "--x"], ["lora"]]
)
def test_help_and_wrong_flags_are_answered_with_the_standard_library_alone(words):
    code = (
        "import sys; before = set(sys.modules); from flux_core.main import main; main(sys.argv[1:])\n"
        "print(*sorted(sys.modules.keys() - before), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code, *words], cwd=ROOT, capture_output=True, text=True)
    imported = done.stderr.splitlines()[-1].split()
    ours = [name for name in imported if name.split(".")[0] == "flux_core"]
    assert "flux_core.commands.table" in ours and len(ours) < 25, ours
    assert {name.split(".")[0] for name in imported} <= {"flux_core", *sys.stdlib_module_names}
    assert not any(name.startswith(("asyncio", "email", "http", "multiprocessing", "unittest")) for name in imported)


def as_module(*words):
    command = [sys.executable, "-m", "flux_core", *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, encoding="utf-8")


def test_the_package_itself_is_the_command():
    shown, info = as_module("--help"), as_module("info", "--help")
    assert shown.returncode == info.returncode == 0 and shown.stderr == ""
    assert shown.stdout.startswith("usage: python -m flux_core [-h]")
    assert info.stdout.startswith("usage: python -m flux_core info ") and "cli.py" not in shown.stdout + info.stdout
    wrong = as_module("--promt", "x")
    assert (wrong.returncode, wrong.stdout, wrong.stderr.count("\n")) == (2, "", 1)
    assert "Did you mean --prompt?" in wrong.stderr and "See `python -m flux_core --help`" in wrong.stderr
    assert as_module("info", "missing.png").returncode == 4
    assert as_module("--version").stdout == cli("--version").stdout


@pytest.mark.parametrize(
    ("path", "program"),
    [
        ("cli.py", "python cli.py"),
        ("/usr/local/bin/flux1", "flux1"),
        ("flux1", "flux1"),
        ("Scripts/flux1.exe", "flux1"),
        ("/somewhere/flux_core/__main__.py", "python -m flux_core"),
        ("/somewhere/pytest/__main__.py", "python cli.py"),
        ("", "python cli.py"),
    ],
)
def test_help_names_the_command_that_was_typed(monkeypatch, path, program):
    monkeypatch.setattr(sys, "argv", [path])
    assert build_parser("generate").prog == program and build_parser("info").prog == f"{program} info"


def test_requests_are_checked_without_torch():
    code = (
        "import sys; from flux_core.main import main; main(['--prompt', 'x', '--width', '0'])\n"
        "sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert "--width must be" in done.stderr and done.returncode == 0


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_terminals_without_unicode(encoding):
    env = {**os.environ, "PYTHONIOENCODING": encoding, "LC_ALL": "C", "PYTHONUTF8": "0"}
    words = ["--prompt", "x", "--name", "яблоко\U0001f34e"]
    done = cli(*words, env=env)
    assert done.returncode == 2 and "unknown model name" in done.stderr and "Traceback" not in done.stderr
    done = cli("--help", env=env)
    assert done.returncode == 0 and "--num-steps" in done.stdout


def test_an_undecodable_prompt_exits_2():
    done = subprocess.run([sys.executable, ROOT / "cli.py", b"--prompt", b"apple \xff"], capture_output=True)
    assert done.returncode == 2 and b"no valid text" in done.stderr


def test_a_reader_that_left_is_no_error_worth_a_word():
    """`python cli.py … | true`: the pipe is broken before the first line."""
    for words in (["-c", TINY, *FAST], [str(ROOT / "cli.py"), "--help"]):
        read, write = os.pipe()
        os.close(read)
        done = subprocess.run([sys.executable, *words], stdout=write, stderr=subprocess.PIPE)
        os.close(write)
        assert done.stderr == b"" and done.returncode in (0, 141)


def test_without_streams_it_still_draws():
    done = subprocess.run(["sh", "-c", 'exec "$@" >&- 2>&-', "sh", sys.executable, "-c", TINY, *FAST])
    assert done.returncode == 0 and Image.open("output/flux-mini_seed42.png").size == (32, 48)


def test_parsed_flags_are_what_a_request_takes():
    command, flags = parse(FAST)
    request = GenerationRequest(**{**flags, "seed": flags["seed"][0]})
    assert command is COMMANDS["generate"] and (request.width, request.num_steps) == (32, 2)
    with pytest.raises(UsageError):
        GenerationRequest(**flags)  # several seeds are several requests
