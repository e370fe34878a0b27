"""Prompts as lines: `--prompt_file`, and what is typed in `--loop`. Drawn by a tiny model."""

import io
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from tiny import tiny_pipeline

import flux_core.pipeline
from flux_core.commands.generate import generate
from flux_core.errors import FileError, UsageError
from flux_core.images.metadata import read_request
from flux_core.jsonfile import MAX_BYTES
from flux_core.main import COMMANDS, main, parse
from flux_core.request.jobs import flags_of
from flux_core.request.loop import HELP, QUESTION, apply_command
from flux_core.request.prompt_lines import read_lines

pytestmark = pytest.mark.usefixtures("one_thread")
SIZE = {"width": "32", "height": "48", "num_steps": "2", "force": True}
LOOP = ["--prompt", "a red apple", "--width=32", "--height=48", "--steps", "2", "--force", "--loop"]
ROOT = Path(__file__).parents[2]
WORDS = ["a red apple", "x", "ein Käse", "🍎 and 🍐", 'quotes "', "a|b"]
TINY = f"""
import sys; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
import flux_core.pipeline; from tiny import tiny_pipeline; flux_core.pipeline.load_pipeline = tiny_pipeline
from flux_core.main import main; sys.exit(main())
"""


@pytest.fixture(autouse=True)
def tiny_models(monkeypatch, tmp_path):
    monkeypatch.setattr(flux_core.pipeline, "load_pipeline", tiny_pipeline)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def say(monkeypatch):
    """Put text or bytes where standard input is read."""

    def put(text):
        data = text if isinstance(text, bytes) else text.encode()
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))

    return put


def drawn(out: str) -> list:
    """The requests in the pictures whose paths were printed, without grids."""
    return [read_request(line) for line in out.splitlines() if line.endswith(".png") and "grid" not in line]


# --- a file of prompts


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.sampled_from(["a red apple", "x", "ein Käse", "🍎 and 🍐", 'quotes "', "a|b"]), min_size=1, max_size=3)
)
def test_lines_of_a_file_are_so_many_commands(tmp_path, prompts):
    Path("prompts.txt").write_text("\n".join(prompts), encoding="utf-8")
    together = generate(prompt_file="prompts.txt", seed=["1", "2"], **SIZE)
    alone = [generate(prompt=one, seed=["1", "2"], **SIZE) for one in dict.fromkeys(prompts)]
    assert [path.read_bytes() for path in together] == [path.read_bytes() for each in alone for path in each]


def test_names_are_those_of_any_picture_and_one_grid_ends_it(capsys):
    Path("prompts.txt").write_text("a red apple\na blue car\n")
    paths = generate(prompt_file="prompts.txt", seed=["5", "6"], **SIZE)
    assert [path.name for path in paths] == [f"flux-mini_seed{end}.png" for end in ("5", "6", "5_1", "6_1")]
    out = capsys.readouterr().out.splitlines()
    assert ", 2 prompts, seed 5, 6, " in out[0] and out[-1] == "output/grid_flux-mini_seed5.png"
    assert Image.open(out[-1]).size == (64, 96) and len(out) == 6


def test_without_a_seed_every_line_has_its_own():
    Path("prompts.txt").write_text("x\nx\nx\n")
    assert len({read_request(path).seed for path in generate(prompt_file="prompts.txt", **SIZE)}) == 3


def test_what_a_file_may_hold(say):
    data = b"\xef\xbb\xbf# fruit\r\n\r\n a red apple \r\n\t\n  # more\na \x0b b \xe2\x80\xa8 c #1\nlast"
    Path("prompts.txt").write_bytes(data)
    say(data)
    prompts = [[line.fields for line in read_lines(source)] for source in ("prompts.txt", "-")]
    assert prompts == 2 * [[{"prompt": text} for text in ("a red apple", "a \x0b b \u2028 c #1", "last")]]


@pytest.mark.parametrize(
    ("data", "finding"),
    [
        (b"", "holds no prompt"),
        (b"\n # nothing\n", "holds no prompt"),
        (b"apple\npe\xe4r\n", "line 2 is no UTF-8"),
        (b"a\x00pple\n".decode().encode("utf-16"), "line 1 is no UTF-8"),
        (b"x" * (MAX_BYTES + 1), "at most"),
        (None, "could not be read: No such file"),
    ],
)
def test_a_wrong_file_is_told_by_its_name(data, finding, say, capsys):
    if data is not None:
        Path("prompts.txt").write_bytes(data)
        say(data)
        with pytest.raises(FileError, match=f"^standard input.*{finding}"):
            read_lines("-")
    assert main(["--prompt_file", "prompts.txt"]) == 4
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: prompts.txt") and finding in err and err.count("\n") == 1


def test_without_a_standard_input_there_are_no_prompts(monkeypatch):
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(FileError, match="standard input holds no prompt"):
        read_lines("-")


@pytest.mark.parametrize("flags", [["--prompt", "x"], ["--loop"]])
def test_a_file_of_prompts_goes_with_no_other_prompts(flags, capsys):
    Path("prompts.txt").write_text("x\n")
    assert main(["--prompt-file", "prompts.txt", *flags]) == 2
    assert "give one of them" in capsys.readouterr().err


def test_a_prompt_file_gives_a_repeated_picture_other_words():
    (old,) = generate(prompt="a red apple", seed=["3"], guidance="2", **SIZE)
    Path("prompts.txt").write_text("x\n")
    (new,) = map(read_request, generate(from_image=str(old), prompt_file="prompts.txt", force=True))
    assert (new.prompt, new.seed, new.guidance) == ("x", 3, 2)


CSV = """prompt,negative-prompt,CFG Scale,seed,steps
a flower,a red flower,3,7,
"a ""big"" fish,
and a cat",,,,3

x,,,-1,
"""
JSONL = """
{"prompt": "a flower", "negative_prompt": "a red flower", "true_cfg_scale": 3, "seed": 7, "steps": null}
{"prompt": "a \\"big\\" fish,\\nand a cat", "num-steps": 3}
{"prompt": "x", "seed": -1}
"""


@pytest.mark.parametrize("before", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize(("name", "text"), [("a.csv", CSV), ("b.CSV", CSV.replace("\n", "\r\n")), ("c.jsonl", JSONL)])
def test_a_line_of_a_table_may_say_more_than_a_prompt(name, text, before, capsys):
    Path(name).write_bytes(before + text.encode())
    generate(prompt_file=name, **SIZE, seed=["1", "2"], guidance="2")
    flower, *fish, x = drawn(capsys.readouterr().out)
    assert (flower.prompt, flower.negative_prompt, flower.true_cfg_scale) == ("a flower", "a red flower", 3)
    assert (flower.seed, flower.num_steps, flower.guidance, flower.width) == (7, 2, 2, 32)
    assert [(one.seed, one.num_steps, one.true_cfg_scale) for one in fish] == [(1, 3, None), (2, 3, None)]
    assert {" ".join(one.prompt.split()) for one in fish} == {'a "big" fish, and a cat'}
    assert x.prompt == "x" and x.seed > 2


def test_lines_of_several_sizes_and_settings_are_all_drawn(capsys):
    Path("a.jsonl").write_text('{"prompt": "x", "width": 48, "num_images": 2}\n"x"\n{"prompt": "x", "guidance": 1}\n')
    generate(prompt_file="a.jsonl", **SIZE, seed=["1"])
    out = capsys.readouterr().out
    assert [(one.width, one.seed, one.guidance) for one in drawn(out)] == [
        (48, 1, 3.5), (48, 2, 3.5), (32, 1, 3.5), (32, 1, 1),
    ]  # fmt: skip
    assert "(and 2 other settings), seed 1, 2" in out and Image.open(out.split()[-1]).size == (96, 96)


def test_a_table_without_prompts_changes_a_repeated_picture(capsys):
    (old,) = generate(prompt="a red apple", seed=["3"], **SIZE)
    Path("a.csv").write_text("seed,guidance\n4,1\n5,2\n")
    generate(from_image=str(old), prompt_file="a.csv", force=True)
    found = [(one.prompt, one.seed, one.guidance) for one in drawn(capsys.readouterr().out)[1:]]
    assert found == [("a red apple", 4, 1), ("a red apple", 5, 2)]


@pytest.mark.parametrize(
    ("name", "text", "finding"),
    [
        ("a.csv", "prompt,widht\nx,3\n", "line 1: there is no column 'widht'. Did you mean width?"),
        ("a.csv", "prompt,dtype\nx,fp8\n", "line 1: there is no column 'dtype'"),
        ("a.csv", "prompt,force\nx,1\n", "line 1: there is no column 'force'"),
        ("a.csv", "prompt,steps,num_steps\nx,1,2\n", "line 1 names num_steps twice"),
        ("a.csv", "prompt,width\nx,16\n\na, b,16\n", "line 4 has 3 cell(s), the header 2"),
        ("a.csv", "prompt,width\nx\n", "line 2 has 1 cell(s), the header 2"),
        ("a.csv", 'prompt,width\n"x,1\n', "is no CSV"),
        ("a.csv", "prompt,width\nx,16\nx,big\n", "line 3: --width must be a whole number"),
        ("a.csv", "prompt,width\nx,16\n,16\n", "line 3: --prompt is missing"),
        ("a.csv", "seed\n1\n", "line 2: --prompt is missing"),
        ("a.csv", "prompt,negative_prompt\nx,y\n", "line 2: --negative-prompt does nothing without"),
        ("a.jsonl", '"x"\n{"prompt": "x", "sede": 1}\n', "line 2: there is no column 'sede'. Did you mean seed?"),
        ("a.jsonl", '"x"\n\n{"prompt": "x"\n', "line 3 is no JSON"),
        ("a.jsonl", "[1]\n", "line 1 is neither an object nor a string"),
        ("a.jsonl", "[" * 100_000, "line 1 is no JSON"),
        ("a.jsonl", '{"prompt": 7}\n', "line 1: --prompt must be text"),
        ("a.jsonl", '{"prompt": "x", "seed": [1, 2]}\n', "line 1: --seed must be"),
        ("a.jsonl", '{"prompt": "x", "init_image": {"file": "/etc/passwd"}}\n', "there is no column 'init_image'"),
    ],
)
def test_a_wrong_table_is_told_by_line_before_a_model_is_loaded(name, text, finding, monkeypatch, capsys):
    Path(name).write_text(text)
    monkeypatch.setattr(flux_core.pipeline, "load_pipeline", lambda *_: pytest.fail("too late"))
    assert main(["--prompt-file", name, "--force", "--width=32", "--height=48"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith(f"error: {name}, ") and finding in err and err.count("\n") == 1


@pytest.mark.parametrize(("name", "data", "finding"), [
    ("a.csv", b"", "holds no prompt"),
    ("a.csv", b"prompt,seed\r\n\r\n", "holds no prompt"),
    ("a.jsonl", b"\n \n", "holds no prompt"),
    ("a.csv", b"prompt\nx\npe\xe4r\n", "line 3 is no UTF-8"),
    ("a.jsonl", b'"pe\xe4r"\n', "line 1 is no UTF-8"),
])  # fmt: skip
def test_a_table_that_cannot_be_read_is_a_file_error(name, data, finding, capsys):
    Path(name).write_bytes(data)
    assert main(["--prompt-file", name]) == 4
    assert finding in capsys.readouterr().err


def test_jobs_have_the_flags():
    job = {"prompt_file": "-", "offload": True, "loop": True}
    assert flags_of(job, COMMANDS["generate"].fields, "job") == parse(["--prompt-file", "-", "--offload", "--loop"])[1]


# --- what is typed


def test_lines_are_prompts_and_an_empty_one_repeats(say, capsys):
    say("a blue car\n\n")
    assert main([*LOOP, "--seed", "7"]) == 0
    out, err = capsys.readouterr()
    first, second, third = drawn(out)
    assert (first.prompt, first.seed) == ("a red apple", 7)
    assert second.prompt == third.prompt == "a blue car"
    assert len({7, second.seed, third.seed}) == 3 and err == ""


def test_commands_hold_until_they_are_changed_but_a_seed_is_for_one_picture(say, capsys):
    say("/w 48\n/h 32\n/g 2.5 /n 3\n/s 5\na pig\n\n/w 16\n\n")
    assert main(LOOP) == 0
    _, pig, again, narrow = drawn(capsys.readouterr().out)
    assert (pig.width, pig.height, pig.guidance, pig.num_steps, pig.seed) == (48, 32, 2.5, 3, 5)
    assert again.seed != 5 and (again.width, again.prompt) == (48, "a pig")
    assert (narrow.width, narrow.height, narrow.num_steps) == (16, 32, 3)


def test_a_typed_picture_is_that_of_a_command_and_the_model_is_loaded_once(say, capsys, monkeypatch):
    loaded = []
    monkeypatch.setattr(flux_core.pipeline, "load_pipeline", lambda *a: loaded.append(tiny_pipeline(*a)) or loaded[-1])
    say("/s 5 /n 3\na pig\n")
    assert main(LOOP) == 0 and len(loaded) == 1
    (alone,) = generate(**{**SIZE, "num_steps": "3"}, prompt="a pig", seed=["5"])
    assert alone.name == "flux-mini_seed5_1.png"
    assert alone.read_bytes() == Path("output/flux-mini_seed5.png").read_bytes()


def test_a_negative_prompt_is_typed_as_a_line_of_its_own(say, capsys):
    say("/np a dog\n/c 3\n/np a big dog\na cat\n/np\na pig\n")
    assert main(LOOP) == 0
    out, err = capsys.readouterr()
    _, cat, pig = drawn(out)
    assert (cat.negative_prompt, cat.true_cfg_scale) == ("a big dog", 3)
    assert (pig.negative_prompt, pig.true_cfg_scale) == (None, 3)
    assert "error: --negative-prompt does nothing without --true-cfg-scale" in err


@pytest.mark.parametrize(
    ("line", "finding"),
    [
        ("/c 0.5", "--true-cfg-scale must be"),
        ("/w big", "--width must be a whole number from 1 to 65536, not 'big'"),
        ("/w 0", "--width must be"),
        ("/n 1.5", "--num-steps must be"),
        ("/g inf", "--guidance must be"),
        ("/s 4294967296", "--seed must be"),
        ("/w", "/w needs a value"),
        ("/w 64 /n", "/n needs a value"),
        ("/x 3", "there is no '/x' here: /w WIDTH"),
        ("/", "there is no '/' here"),
        ("/width 3", "there is no '/width' here"),
        (b"pe\xe4r", "no UTF-8 text"),
    ],
)
def test_a_wrong_line_is_told_and_the_loop_goes_on(line, finding, say, capsys):
    say((line if isinstance(line, bytes) else line.encode()) + b"\n\n")
    assert main(LOOP) == 0
    out, err = capsys.readouterr()
    assert err.startswith("error: ") and finding in err and err.count("\n") == 1
    first, second = drawn(out)
    assert second == first.model_copy(update={"seed": second.seed})


def test_a_line_is_applied_whole_or_not_at_all():
    fields = {"prompt": "x", **SIZE}
    with pytest.raises(UsageError):
        apply_command("/w 64 /h big", fields)
    assert fields == {"prompt": "x", **SIZE}


def test_a_picture_too_large_is_told_and_the_next_may_be_smaller(say, capsys, monkeypatch):
    def small_device(*args):
        pipeline = tiny_pipeline(*args)
        forward = pipeline.model.forward
        pipeline.model.forward = lambda x, *rest: forward(x if x.shape[1] == 6 else x.new_empty(2**60), *rest)
        return pipeline

    monkeypatch.setattr(flux_core.pipeline, "load_pipeline", small_device)
    say("/w 64\n/s 3\n\n/w 32\n\n")
    assert main(LOOP) == 0
    out, err = capsys.readouterr()
    assert err.startswith("error: out of memory") and [one.width for one in drawn(out)] == [32, 32]
    assert drawn(out)[1].seed == 3  # it was for a picture that did not come


@pytest.mark.parametrize("quit", ["/q\n", "/n 3 /q\n", ""])
def test_q_and_the_end_of_the_input_quit(quit, say, capsys):
    say(quit + ("x\n" if quit else ""))
    assert main(LOOP) == 0
    assert len(drawn(capsys.readouterr().out)) == 1


def test_help_is_no_picture(say, capsys):
    say("/h\n")
    assert main(LOOP) == 0
    out, err = capsys.readouterr()
    assert err == HELP + "\n" and len(drawn(out)) == 1


def test_several_pictures_of_a_line_have_their_grid(say, capsys):
    say("/s 5\n\n")
    assert main([*LOOP, "--num-images", "2"]) == 0
    assert capsys.readouterr().out.endswith(
        "flux-mini_seed5.png\noutput/flux-mini_seed6.png\noutput/grid_flux-mini_seed5.png\n"
    )


def test_a_line_without_an_end_is_not_read_for_ever(say, capsys):
    say(b"x" * (MAX_BYTES + 2))
    assert main(LOOP) == 2
    assert "at most" in capsys.readouterr().err


def test_an_interrupt_while_drawing_is_130(say, monkeypatch, capsys):
    def interrupted(*args):
        pipeline = tiny_pipeline(*args)
        draw = pipeline.draw
        pipeline.draw = lambda request, *rest: draw(request, *rest) if request.prompt != "stop" else _interrupt()
        return pipeline

    def _interrupt():
        raise KeyboardInterrupt

    monkeypatch.setattr(flux_core.pipeline, "load_pipeline", interrupted)
    say("x\nstop\nx\n")
    assert main(LOOP) == 130
    assert len(drawn(capsys.readouterr().out)) == 2


def test_without_a_standard_input_the_loop_ends():
    command = ["sh", "-c", 'exec "$@" <&-', "sh", sys.executable, "-c", TINY, *LOOP]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stdout.count(".png") == 1 and done.stderr == ""


def test_at_a_terminal_it_asks_on_stderr():
    ours, theirs = pty.openpty()
    with subprocess.Popen(
        [sys.executable, "-c", TINY, *LOOP], stdin=theirs, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        os.close(theirs)
        os.write(ours, b"a pig\n/q\n")
        out, err = process.communicate(timeout=60)
    os.close(ours)
    assert process.returncode == 0 and err.count(QUESTION) == 2
    assert len(drawn(out)) == 2 and "prompt" not in out
