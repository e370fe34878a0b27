"""`--lora` in every command that draws: typed, in jobs and prompt files, recorded, and repeated."""

import hashlib
import json
import os
import re
import shutil
from pathlib import Path
from zlib import crc32

import pytest
from PIL import Image, PngImagePlugin
from random_lora import factors, write
from tiny import tiny_pipeline, tiny_variant

from flux_core.commands.edit import edit
from flux_core.commands.importance import importance
from flux_core.errors import UsageError
from flux_core.hooks.lora import Typed, ranges
from flux_core.hub.client import without_network
from flux_core.images.metadata import read_request
from flux_core.main import main
from flux_core.session.record import read_rows
from flux_core.terminal import note, tell
from flux_core.variants import VARIANTS

SMALL = ["--steps", "2", "--width", "48", "--height", "32", "--force"]


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setitem(VARIANTS, "flux-mini", tiny_variant())
    monkeypatch.setattr("flux_core.pipeline.load_pipeline", tiny_pipeline)
    for command in ("generate", "explore", "repeat", "edit", "importance"):
        monkeypatch.setattr(f"flux_core.commands.{command}.check_files", lambda variant: None)


@pytest.fixture
def files(tmp_path):
    """Two LoRAs that no other test has: a file is found by its hash wherever it was seen."""
    params, own = tiny_variant().params, crc32(str(tmp_path).encode()) % 2**30
    return [
        str(write(tmp_path / f"{name}.safetensors", factors(params, seed=own + i)))
        for i, name in enumerate(("style", "other"))
    ]


def run(*words, out=None):
    """The pictures that a command draws into `out`."""
    before = set(out.rglob("*.png")) if out.exists() else set()
    assert main([*map(str, words), "--output-dir", str(out)]) == 0
    return sorted(set(out.rglob("*.png")) - before)


def sha(path):
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def edit_record(picture, change):
    """A copy of a picture, whose recorded plan somebody has changed."""
    image, chunks = Image.open(picture), PngImagePlugin.PngInfo()
    request = json.loads(image.text["flux_core"])
    change(request["plan"])
    chunks.add_itxt("flux_core", json.dumps(request))
    image.save(picture.with_name("edited.png"), pnginfo=chunks)
    return picture.with_name("edited.png")


def scales(path):
    return [(entry.name, entry.scale, entry.steps) for entry in read_request(path).loras]


def test_generate_takes_several_with_scales_and_steps(files, tmp_path, capsys):
    out = tmp_path / "out"
    words = ["--prompt", "a red apple", "--seed", "1", *SMALL]
    (plain,) = run(*words, out=out)
    (drawn,) = run(*words, "--lora", files[0], "0.8@0", "--lora", files[1], "--lora_scale", "0.5", out=out)
    assert scales(drawn) == [("style", 0.8, (0,)), ("other", 0.5, None)]
    assert "LoRA style 0.8@0, LoRA other 0.5" in capsys.readouterr().out
    assert Image.open(plain).tobytes() != Image.open(drawn).tobytes()
    (zero,) = run(*words, "--lora", files[0], "0", out=out)
    assert Image.open(plain).tobytes() == Image.open(zero).tobytes()
    (merged,) = run(*words, "--lora", files[0], "0.8", "--lora-merge", out=out)
    assert read_request(merged).loras[0].merge


def test_a_folder_is_what_a_trainer_wrote(files, tmp_path):
    folder = tmp_path / "trained"
    folder.mkdir()
    (tmp_path / "style.safetensors").rename(folder / "pytorch_lora_weights.safetensors")
    write(folder / "checkpoint-100.safetensors", {})
    (drawn,) = run("--prompt", "x", *SMALL, "--lora", folder, out=tmp_path / "out")
    assert scales(drawn) == [("pytorch_lora_weights", 1.0, None)]


def test_jobs_and_prompt_files(files, tmp_path):
    out, job, lines = tmp_path / "out", tmp_path / "job.json", tmp_path / "lines.jsonl"
    small = {"steps": 2, "width": 48, "height": 32, "force": True, "output_dir": str(out)}
    job.write_text(json.dumps([
        {"prompt": "x", "seed": 1, "lora": files[0], **small},
        {"prompt": "x", "seed": 2, "lora": [files[0], 0.5], **small},
        {"prompt": "x", "seed": 3, "lora": [[files[0], "0.5@1"], [files[1]]], **small},
    ]))  # fmt: skip
    assert main(["run", str(job)]) == 0
    found = {read_request(path).seed: scales(path) for path in out.glob("flux*.png")}
    assert found == {
        1: [("style", 1.0, None)],
        2: [("style", 0.5, None)],
        3: [("style", 0.5, (1,)), ("other", 1.0, None)],
    }
    rows = [{"prompt": "x", "seed": 4}, {"prompt": "x", "seed": 5, "lora": [files[1], 0.25]},
            {"prompt": "x", "seed": 6, "lora": f"{files[1]} 0.75"}]  # fmt: skip
    lines.write_text("\n".join(map(json.dumps, rows)))
    run("--prompt-file", lines, *SMALL, "--lora", files[0], "--skip", "layer.1", out=out)
    found = {read_request(path).seed: path for path in out.glob("flux*.png")}
    assert [scales(found[seed]) for seed in (4, 5, 6)] == [
        [("style", 1.0, None)], [("other", 0.25, None)], [("other", 0.75, None)],
    ]  # fmt: skip
    assert all([entry.kind for entry in read_request(found[seed]).hooks] == ["skip"] for seed in (4, 5, 6))
    lines.write_text(json.dumps({"prompt": "x", "lora": [files[0], "loud"]}))
    assert main(["--prompt-file", str(lines), *SMALL]) == 2


def test_explore_fills_a_column_and_a_folder(files, tmp_path, capsys):
    out = tmp_path / "out"
    words = ["explore", "--prompt", "x", "--seeds", "1", *SMALL, "--lora", files[0], "--lora", files[1], "0.3"]
    run(*words, "--lora-scales", "0,0.5,1", out=out)
    (session,) = out.iterdir()
    assert sorted(path.name for path in (session / "lora_images").iterdir()) == [
        "lora_0.5.png", "lora_0.png", "lora_1.png",
    ]  # fmt: skip
    assert (session / "lora_grid.png").is_file()
    rows = {row["File"]: row for row in read_rows(session / "metadata.csv")}
    assert [rows[f"lora_images/lora_{x}.png"]["LoraScale"] for x in ("0", "0.5", "1")] == ["0 0.3", "0.5 0.3", "1 0.3"]
    assert main(["repeat", str(session / "metadata.csv"), "--row", "3", "--force", "--output-dir", str(out)]) == 0
    assert "byte for byte" in capsys.readouterr().out
    (session / "lora_images" / "lora_1.png").unlink()
    assert main(["explore", "--resume", str(session)]) == 0
    assert (session / "lora_images" / "lora_1.png").is_file()
    assert main([*words[:-3], "0.4", "--lora-scales", "0,1"]) == 2
    assert "--lora-scales is for LoRAs without a scale" in capsys.readouterr().err


def test_a_picture_is_repeated_where_its_file_went(files, tmp_path, capsys):
    out = tmp_path / "out"
    (picture,) = run("--prompt", "x", "--seed", "1", *SMALL, "--lora", files[0], "0.5", out=out)
    (again,) = run("--from-image", picture, "--force", out=out)
    assert again.read_bytes() == picture.read_bytes()
    moved = tmp_path / "moved.safetensors"
    (tmp_path / "style.safetensors").rename(moved)
    capsys.readouterr()
    for words in (["repeat", picture, "--force"], ["--from-image", picture, "--force"]):
        assert main([*map(str, words), "--output-dir", str(out)]) == 4
        assert re.search(r"LoRA style\.safetensors, SHA-256 \w{16}.*--lora FILE", capsys.readouterr().err)
        assert main([*map(str, words), "--lora", files[1], "--output-dir", str(out)]) == 4
        assert f"{files[1]} has another, {sha(files[1])[:16]}" in capsys.readouterr().err
    assert main(["repeat", str(picture), "--force", "--lora", str(moved), "--output-dir", str(out)]) == 0
    assert "same" in capsys.readouterr().out
    (louder,) = run("--from-image", picture, "--force", "--lora", moved, "0.9", "--lora", files[1], out=out)
    assert [(entry.file, entry.scale) for entry in read_request(louder).loras] == [
        ("moved.safetensors", 0.9), ("other.safetensors", 1.0),
    ]  # fmt: skip
    assert main(["repeat", str(louder), "--force", "--lora", "nothing.safetensors", "--output-dir", str(out)]) == 4


def test_what_repeat_would_ignore_is_an_error(files, tmp_path, capsys):
    out = tmp_path / "out"
    (plain,) = run("--prompt", "x", *SMALL, out=out)
    (picture,) = run("--prompt", "x", *SMALL, "--lora", files[0], "0.5", out=out)
    run("explore", "--prompt", "x", *SMALL, "--lora", files[0], out=out)
    (session,) = out.glob("exploration_*")
    for words in (["repeat", picture, "--force"], ["explore", "--resume", session]):
        for given, code, finding in (
            ([files[0], "0.3"], 2, f"--lora {files[0]} 0.3: the .* has scales of its own"),
            ([files[1]], 4, f"{files[1]} is none of the .*LoRAs, by its SHA-256"),
        ):
            capsys.readouterr()
            assert main([*map(str, words), "--lora", *given]) == code
            assert re.search(finding, capsys.readouterr().err)
    assert main(["repeat", str(plain), "--force", "--lora", files[0]]) == 4
    assert "is no LoRA of the picture" in capsys.readouterr().err


def test_edit_and_importance_draw_with_it(files, tmp_path):
    fields = {
        "num_steps": "2",
        "width": "48",
        "height": "32",
        "force": True,
        "lora": [[files[0], "0.5"]],
        "layers": "all",
    }
    strip, source, *_ = edit("a pig", ["a dog"], output_dir=str(tmp_path / "edit"), seed="1", **fields)
    assert [entry.name for entry in read_request(source).loras] == ["style"]
    plain = edit("a pig", ["a dog"], output_dir=str(tmp_path / "edit"), seed="1", **fields | {"lora": None})[1]
    assert Image.open(plain).tobytes() != Image.open(source).tobytes()
    assert strip.is_file()


def test_a_record_opens_no_path(files, tmp_path):
    """A picture's metadata may not name a file that is then read, by a path or without a hash."""
    from flux_core.images.metadata import parse_request

    for entry in (
        {"kind": "lora", "file": files[0]},
        {"kind": "lora", "file": "/etc/passwd", "sha256": "0" * 64},
        {"kind": "lora", "file": "..\\x.safetensors", "sha256": "0" * 64},
    ):
        with pytest.raises(UsageError, match="cannot make us read"):
            parse_request(json.dumps({"prompt": "x", "name": "flux-mini", "plan": [entry]}), "a picture")


@pytest.mark.parametrize(
    ("words", "finding"),
    [
        (["a", "1", "2"], "not 3 values"),
        (["a", "one"], "a scale is a number"),
        (["a", "1@"], "a scale is a number"),
        ([""], "names no file"),
        (["", "0.8"], "names no file"),
        (["a", "\u0660.\u0665"], "a scale is a number"),
        (["a", "1e999"], "a scale is a number"),
        (["a.safetensors", "0.8@1-0"], "--lora a.safetensors 0.8@1-0: no steps .* Next: .*0.8@0-13"),
        (["a.safetensors 0.8@1-"], "--lora a.safetensors 0.8@1-: '1-' is no step"),
    ],
)
def test_what_is_typed_wrong(words, finding):
    with pytest.raises(UsageError, match=finding):
        Typed.of(words)


def test_spellings():
    found = Typed.of("my style.safetensors"), Typed.of("style.safetensors .5@0-3,7")
    assert [(one.file, one.scale, one.steps) for one in found] == [
        ("my style.safetensors", None, None), ("style.safetensors", 0.5, "0-3,7"),
    ]  # fmt: skip
    assert Typed.of(["style.safetensors -0.5@0-3"]).scale == -0.5
    assert ranges((0, 1, 2, 5, 7, 8)) == "0-2,5,7-8"


def test_a_step_that_there_is_not(files, capsys):
    assert main(["--prompt", "x", *SMALL, "--lora", files[0], "1@0-5"]) == 2
    assert re.search(r"--lora style.safetensors 1@0-5: there is no step 5, .*1@0-1", capsys.readouterr().err)


@pytest.mark.parametrize("scale", ["0.8", True, None, "nan"])
def test_a_scale_that_is_no_number_is_refused(files, tmp_path, capsys, scale):
    out, plan = tmp_path / "out", tmp_path / "plan.json"
    plan.write_text(json.dumps([{"kind": "lora", "file": files[0], "scale": scale}]))
    assert main(["--prompt", "x", *SMALL, "--plan", str(plan)]) == 2
    assert "(lora): scale: " in capsys.readouterr().err
    (picture,) = run("--prompt", "x", *SMALL, "--lora", files[0], out=out)
    edited = edit_record(picture, lambda plan: plan[0].update(scale=scale))
    assert main(["repeat", str(edited), "--force"]) == 2


def test_minus_zero_is_zero(files, tmp_path):
    words = ["--prompt", "x", "--seed", "1", *SMALL, "--lora"]
    pictures = [run(*words, files[0], *scale, out=tmp_path / "out") for scale in (["0"], ["-0"], ["--lora-scale=-0"])]
    assert len({sha(picture) for (picture,) in pictures}) == 1


def test_a_word_of_other_tools_in_the_prompt_is_said_to_do_nothing(tmp_path, capsys):
    run("--prompt", "an apple <lora:style:0.8>", *SMALL, out=tmp_path / "out")
    assert "<lora:style:0.8> in a prompt does nothing here. Next: --lora FILE SCALE" in capsys.readouterr().err


def test_importance_keeps_it_for_every_picture(files, tmp_path):
    from flux_core.methods.importance import REFERENCE, Prompt, Study, Task
    from flux_core.request.generation import GenerationRequest

    request = GenerationRequest(prompt="x", width=48, height=32, force=True, plan=[{"kind": "lora", "file": files[0]}])
    study = Study(tmp_path, [Prompt(prompt="x", seed=1)], 1, request)
    kinds = [[entry.kind for entry in study.request_of(Task(0, 1, block)).plan] for block in (REFERENCE, "layer.0")]
    assert kinds == [["lora"], ["lora", "skip"]]
    assert importance  # which builds that request from --lora


@pytest.mark.parametrize("in_the_way", ["folder", "file", "no list of ours"])
def test_where_nothing_can_be_remembered_it_draws_all_the_same(files, tmp_path, monkeypatch, in_the_way):
    from flux_core.lora import known

    place = tmp_path / "flux_core" / "loras.json"
    if in_the_way == "folder":
        place.mkdir(parents=True)
    elif in_the_way == "file":
        place.parent.write_text("in the way")
    else:
        place.parent.mkdir()
        place.write_text(json.dumps([{"path": None, "size": 1, "changed": 1, "sha256": sha(files[0]), "autov3": ""}]))
    monkeypatch.setattr(known, "_place", lambda: place)
    copy = shutil.copy(files[0], tmp_path / "copy.safetensors")
    (drawn,) = run("--prompt", "x", *SMALL, "--lora", files[0], "--lora", copy, "0.5", out=tmp_path / "out")
    assert scales(drawn) == [("style", 1.0, None), ("copy", 0.5, None)]
    os.unlink(copy)  # the same bytes are at the other path
    run("--from-image", drawn, "--force", out=tmp_path / "out")


def test_a_copy_is_named_as_it_was_given(files, tmp_path, capsys):
    words, out = ["--prompt", "x", *SMALL, "--lora"], tmp_path / "out"
    copy = shutil.copy(files[0], tmp_path / "copy.safetensors")
    for given in (files[0], copy):
        run(*words, given, out=out)
        assert capsys.readouterr().err.startswith(Path(given).name)
    run(*words, files[0], "--lora", copy, out=out)
    assert capsys.readouterr().err.startswith("style.safetensors")


def test_a_file_that_was_only_touched_is_found(files, tmp_path):
    (picture,) = run("--prompt", "x", *SMALL, "--lora", files[0], out=tmp_path / "out")
    os.utime(files[0], (1, 1))
    run("--from-image", picture, "--force", out=tmp_path / "out")


def test_a_path_is_remembered_in_one_spelling(files, tmp_path):
    from flux_core.lora.known import locate, remember

    inner = tmp_path / "inner"
    inner.mkdir()
    (tmp_path / "link").symlink_to(inner)
    assert remember(locate(f"{tmp_path}/link/../style.safetensors")).path == files[0]


def test_names_from_a_picture_cannot_steer_the_terminal(capsys):
    from flux_core.hooks import Lora

    entry = Lora(file="a\x1b[2J\nerror: b.safetensors", sha256="0" * 64)
    assert "\n" not in entry.settings() + entry.label and "\x1b" not in entry.settings() + entry.label
    note("one\x1b[2J"), tell("two\x9b2J")
    assert capsys.readouterr() == ("two 2J\n", "one [2J\n")


def test_a_picture_with_such_a_name_is_one_line_of_error(files, tmp_path, capsys):
    bad = "a\x1b[2J\nerror: b.safetensors"
    (picture,) = run("--prompt", "x", *SMALL, "--lora", files[0], out=tmp_path / "out")
    edited = edit_record(picture, lambda plan: plan[0].update(file=bad, sha256="0" * 64))
    for command in (["repeat", edited], ["--from-image", edited]):
        capsys.readouterr()
        assert main([*map(str, command), "--force", "--output-dir", str(tmp_path / "out")]) == 4
        err = capsys.readouterr().err
        assert err.count("\n") == 1 and "\x1b" not in err


def test_names_in_the_text_for_other_tools_are_what_they_split_rightly():
    from flux_core.images.metadata import parameters
    from flux_core.request.generation import GenerationRequest

    plan = [
        {"kind": "lora", "file": f"{name}.safetensors", "sha256": "0" * 64, "autov3": digits * 12}
        for name, digits in (('a,b:<c>"', "1"), ("a_b__c__", "2"))
    ]
    text = parameters(GenerationRequest(prompt="x", width=48, height=32, force=True, plan=plan))
    assert text.startswith("x<lora:a_b__c__:1><lora:a_b__c__:1>\n")
    assert f'Lora hashes: "a_b__c__: {"1" * 12}, a_b__c__: {"2" * 12}"' in text


@pytest.mark.parametrize(
    ("value", "code", "finding"),
    [
        (5, 2, "lora must be a text"),
        ([], 2, "lora must be a text"),
        ([5, 0.8], 2, "lora must be a text"),
        ({"file": "a.safetensors", "scale": 1}, 2, "lora must be a text"),
        ("", 2, "names no file"),
        ("lost.safetensors 0.5", 4, "lost.safetensors"),
    ],
)
def test_what_is_wrong_in_a_file_of_prompts_is_told_with_its_line(files, tmp_path, capsys, value, code, finding):
    lines = tmp_path / "lines.jsonl"
    lines.write_text(json.dumps({"prompt": "x"}) + "\n" + json.dumps({"prompt": "x", "lora": value}))
    assert main(["--prompt-file", str(lines), *SMALL]) == code
    assert re.match(rf"error: {lines}, line 2: .*{finding}", capsys.readouterr().err)


def test_a_table_with_decimal_commas(files, tmp_path, capsys):
    lines, out = tmp_path / "lines.csv", tmp_path / "out"
    cells = [f"{files[0]} 0,8", f"{files[0]} -,5@0,1", f"{files[0]} 1@0,1"]
    lines.write_text("prompt;seed;lora\n" + "\n".join(f"x;{seed};{cell}" for seed, cell in enumerate(cells)))
    run("--prompt-file", lines, *SMALL, out=out)
    found = {read_request(path).seed: scales(path) for path in out.glob("flux*.png")}
    assert found == {0: [("style", 0.8, None)], 1: [("style", -0.5, (0, 1))], 2: [("style", 1.0, (0, 1))]}
    lines.write_text("prompt;lora\nx;lost.safetensors 0,8")
    assert main(["--prompt-file", str(lines), *SMALL]) == 4
    assert f"error: {lines}, line 2: lost.safetensors" in capsys.readouterr().err


def test_a_scale_that_none_would_have_is_an_error(files, tmp_path, capsys):
    out = tmp_path / "out"
    (plain,) = run("--prompt", "x", *SMALL, out=out)
    (picture,) = run("--prompt", "x", *SMALL, "--lora", files[0], "0.8", out=out)
    for words in (
        ["--prompt", "x", *SMALL, "--lora", files[0], "0.8"],
        ["--from-image", plain, "--force"],
        ["--from-image", picture, "--force", "--lora", files[0], "0.8"],
        ["explore", "--prompt", "x", *SMALL, "--lora", files[0], "--lora-scales", "0,0.5"],
    ):
        capsys.readouterr()
        assert main([*map(str, words), "--lora-scale", "0.3"]) == 2
        assert re.search("--lora-scale .* Next: leave", capsys.readouterr().err)
    assert main(["--from-image", str(picture), "--force", "--lora-merge"]) == 2
    (merged,) = run("--from-image", picture, "--force", "--lora", files[0], "--lora-merge", out=out)
    assert read_request(merged).loras[0].merge and scales(merged) == [("style", 0.8, None)]
    (changed,) = run("--from-image", picture, "--force", "--lora-scale", "0.3", out=out)
    assert scales(changed) == [("style", 0.3, None)]


@pytest.mark.parametrize("given", ["owner/name", "owner/name/file.safetensors"])
def test_without_network_the_hub_was_not_reached(tmp_path, monkeypatch, capsys, given):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    (tmp_path / "models--owner--name" / "snapshots" / "0").mkdir(parents=True)
    (tmp_path / "models--owner--name" / "snapshots" / "0" / "README.md").touch()
    with without_network():  # which imports the client, that reads the variable below once
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        assert main(["--prompt", "x", "--lora", given]) == 4
    err = capsys.readouterr().err
    assert "of owner/name is not on this disk, and the hub could not be reached" in err and "FLUX_MODEL" not in err


def test_a_link_is_not_fetched(capsys):
    assert main(["--prompt", "x", "--lora", "https://example.org/a.safetensors"]) == 2
    assert "links are not fetched. Next: download the file and name it, or give its id" in capsys.readouterr().err


def test_a_scale_in_one_word_or_behind_an_equals_sign(files, tmp_path, capsys):
    (drawn,) = run(
        "--prompt", "x", *SMALL, "--lora", f"{files[0]} 0.5@1", f"--lora={files[1]} -2", out=tmp_path / "out"
    )
    assert scales(drawn) == [("style", 0.5, (1,)), ("other", -2.0, None)]
    assert main(["--prompt", "x", "--lora=a.safetensors", "0.5"]) == 2
    assert "Next: write --lora a.safetensors 0.5" in capsys.readouterr().err
    assert main(["--prompt", "x", "--width=1", "2"]) == 2
    assert "unexpected '2'" in capsys.readouterr().err
    assert main(["--prompt", "x", "--lora", ""]) == 2
    assert "--lora names no file" in capsys.readouterr().err
