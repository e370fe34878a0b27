"""`--controlnet`: what is typed, what a picture records and how it is repeated, and a sentence for what is wrong."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from controlnets import params_for, theirs, write_net
from PIL import Image, PngImagePlugin
from random_lora import factors, write
from safetensors.torch import save_file
from tiny import tiny_pipeline, tiny_variant

from flux_core.errors import UsageError
from flux_core.hub.client import without_network
from flux_core.images.controlnets import Wanted
from flux_core.images.metadata import read_request
from flux_core.main import main
from flux_core.request.fields import MODES
from flux_core.request.generation import GenerationRequest
from flux_core.request.prompt_lines import read_lines
from flux_core.server.forms import capabilities, request_of
from flux_core.server.shelf import Shelf
from flux_core.variants import VARIANTS

pytestmark = pytest.mark.usefixtures("one_thread")
OF = tiny_variant().params
SMALL = ["--steps", "2", "--width", "48", "--height", "32", "--force", "--seed", "1"]
DRAW = ["--prompt", "a red apple", *SMALL]


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setitem(VARIANTS, "flux-mini", tiny_variant())
    monkeypatch.setattr("flux_core.pipeline.load_pipeline", tiny_pipeline)
    for command in ("generate", "repeat"):
        monkeypatch.setattr(f"flux_core.commands.{command}.check_files", lambda variant: None)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """The current folder, with files of nets and pictures."""
    monkeypatch.chdir(tmp_path)
    write_net(tmp_path / "plain.safetensors", params_for(OF))
    write_net(tmp_path / "union.safetensors", params_for(OF, modes=4), seed=6)
    levels = np.random.default_rng(0).integers(0, 256, (2, 4, 6, 3), dtype=np.uint8)
    for name, one in zip(("photo.png", "pose.png"), levels, strict=True):
        Image.fromarray(one).resize((48, 32), Image.Resampling.NEAREST).save(name)
    return tmp_path


def run(*words, out="out"):
    """The pictures that a command draws, without maps."""
    before = set(Path(out).glob("*.png"))
    assert main([*map(str, words), "--output-dir", out]) == 0
    new = sorted(set(Path(out).glob("*.png")) - before)
    return [path for path in new if "_canny" not in path.name]


def refused(capsys, *words):
    """Exit code and text of an error."""
    capsys.readouterr()
    code = main([*map(str, words)])
    err = capsys.readouterr().err
    assert re.fullmatch(r"error: [^\n]*\n", err), err
    return code, err


def pixels(path):
    return Image.open(path).tobytes()


def settings(path):
    uses = read_request(path).controlnet
    return [(use.net, use.map, use.file, use.scale, use.start, use.end, use.mode) for use in uses]


# What is typed ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("a.safetensors pose.png", (None, None, None)),
        ("a.safetensors pose.png 0.6", (0.6, None, None)),
        ("a.safetensors pose.png 0.6@0.1-.9", (0.6, (0.1, 0.9), None)),
        ("a.safetensors pose.png -1@0-1 pose", (-1.0, (0.0, 1.0), "pose")),
        ("a.safetensors pose.png pose", (None, None, "pose")),
        ("a.safetensors pose.png 1 4", (1.0, None, "4")),
    ],
)
def test_words(words, expected):
    assert Wanted.typed(words.split()) == ("a.safetensors", "pose.png", *expected)


@pytest.mark.parametrize(
    ("words", "finding"),
    [
        ("plain.safetensors", "that is not a file and what to follow"),
        ("plain.safetensors pose.png 1 pose more", "that is not a file and what to follow"),
        ("plain.safetensors pose.png o.7", "'o.7' is no scale. Next: write it as 0.7, or 0.7@0-0.8"),
        ("plain.safetensors pose.png 0.7@0", "'0.7@0' is no scale"),
        ("plain.safetensors pose.png pose 0.7", "'pose' is no scale"),
        ("plain.safetensors pose.png 101", "plain.safetensors: a scale is from -100 to 100, not 101"),
        ("plain.safetensors pose.png 1@0.8-0.2", "0.8-0.2 is no part of the steps. Next: two numbers from 0"),
        ("plain.safetensors pose.png 1@0-1.5", "0-1.5 is no part of the steps"),
        ("plain.safetensors pose.png pose", "is for conditions of one kind. Next: leave the mode pose out"),
        (
            "union.safetensors pose.png",
            "is a union of 4 kinds. Next: add which one the map is: canny, tile, depth, blur, or",
        ),
        ("union.safetensors pose.png 1 cany", "has no mode 'cany'. Next: one of canny, .* Did you mean canny"),
        ("union.safetensors pose.png 1 pose", "has no mode 'pose'"),
        ("union.safetensors pose.png 1 4", "has no mode '4'. Next: one of canny, .* or a number from 0 to 3"),
        ("https://example.org/a.safetensors pose.png", "links are not fetched. .* as in --controlnet owner/name/file"),
    ],
)
def test_what_cannot_be_meant_is_a_sentence(tiny, capsys, words, finding):
    code, err = refused(capsys, *DRAW, "--controlnet", *words.split())
    assert code == 2 and re.search(finding, err)


def test_modes_have_names_and_numbers(folder):
    file = write_net(folder / "seven.safetensors", params_for(OF, modes=7))
    for number, name in enumerate(MODES):
        for said in (name, name.replace("_", "-").upper(), number, str(number)):
            _, record = Wanted(file, "pose.png", mode=said).found("", OF)
            assert record["mode"] == number


# Files ------------------------------------------------------------------------------------------------


def test_other_files_are_called_by_their_names(folder, capsys):
    save_file({"img_in.weight": torch.zeros(16, 64)}, "flux.safetensors")
    write(folder / "style.safetensors", factors(OF))
    write_net(folder / "wide.safetensors", params_for(VARIANTS["flux-mini"].params))
    (folder / "empty").mkdir()
    for file, picture, finding in (
        (
            "flux.safetensors",
            "pose.png",
            "is a FLUX.1 transformer of hidden size 16, and no ControlNet. Next: .*--model",
        ),
        ("style.safetensors", "pose.png", "is a LoRA, which goes on top of a model, and no ControlNet. Next: .*--lora"),
        ("plain.safetensors", "pose.png", "for another transformer: hidden size 16 instead of"),
        ("lost.safetensors", "pose.png", "lost.safetensors"),
        ("empty", "pose.png", "is a folder with no safetensors file"),
        ("wide.safetensors", "lost.png", "lost.png"),
        ("wide.safetensors", "canny:lost.png", "lost.png"),
        ("wide.safetensors", "wide.safetensors", "is no picture"),
    ):
        code, err = refused(capsys, *DRAW, "--controlnet", file, picture)
        assert code == 4 and re.search(finding, err), err


def test_a_ControlNet_in_another_place_names_its_flag(tiny, capsys):
    code, err = refused(capsys, *DRAW, "--lora", "plain.safetensors")
    assert code == 4 and "is a ControlNet in diffusers' layout, and no LoRA. Next: give it with --controlnet." in err
    code, err = refused(capsys, *DRAW, "--model", "plain.safetensors")
    assert code == 4 and re.search("is a ControlNet .* and no transformer of .* Next: give it with --controlnet.", err)


def test_a_folder_of_diffusers_has_a_name_of_its_own(tiny, folder):
    theirs(params_for(OF)).save_pretrained(folder / "nets" / "Canny-Alpha")
    (picture,) = run(*DRAW, "--controlnet", folder / "nets" / "Canny-Alpha", "pose.png")
    assert settings(picture) == [("Canny-Alpha", "", "pose.png", 1.0, 0.0, 1.0, None)]


@pytest.mark.parametrize("given", ["owner/Union", "owner/Union/diffusion_pytorch_model.safetensors"])
def test_a_hub_id_is_found_where_it_was_fetched(tiny, tmp_path, monkeypatch, capsys, given):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    repo = tmp_path / "hub" / "models--owner--Union"
    (repo / "snapshots" / "0").mkdir(parents=True)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("0")
    (repo / "snapshots" / "0" / "README.md").touch()
    with without_network():  # which imports the client, that reads the variable below once
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        code, err = refused(capsys, *DRAW, "--controlnet", given, "pose.png")
        assert code == 4 and "owner/Union" in err
        shutil.copy("plain.safetensors", repo / "snapshots" / "0" / "diffusion_pytorch_model.safetensors")
        (picture,) = run(*DRAW, "--controlnet", given, "pose.png")
    assert settings(picture)[0][0] == given.rpartition("/")[2]


# Pictures ---------------------------------------------------------------------------------------------


def test_flux_mini_follows_a_union(folder, capsys):
    """The model that ships, with a random ControlNet of its sizes; its map lies beside the picture."""
    params = params_for(VARIANTS["flux-mini"].params, modes=4)
    write_net(folder / "mini.safetensors", params, std=0.03)
    size = ["--steps", "2", "--width", "128", "--height", "96", "--force", "--seed", "1"]
    net = ["--controlnet", "mini.safetensors", "canny:photo.png"]
    (picture,) = run("--prompt", "a red apple", *size, *net, "0.7@0-0.5")
    assert sorted(x.name for x in folder.glob("out/*")) == ["flux-mini_seed1.png", "flux-mini_seed1_canny.png"]
    assert Image.open("out/flux-mini_seed1_canny.png").size == (128, 96)
    assert "ControlNet mini.safetensors 0.7@0-0.5 (canny) along canny of photo.png, seed 1" in capsys.readouterr().out
    assert settings(picture) == [("mini.safetensors", "canny", "photo.png", 0.7, 0.0, 0.5, 0)]
    (again,) = run("--from-image", picture, *net, "--force")
    assert again.read_bytes() == picture.read_bytes()
    (zero,) = run("--from-image", picture, *net, "0", "--force")
    (plain,) = run("--prompt", "a red apple", *size)
    assert pixels(zero) == pixels(plain) != pixels(picture)


def test_what_others_draw_records_no_net(tiny):
    (picture,) = run(*DRAW)
    assert "controlnet" not in Image.open(picture).text["flux_core"] and read_request(picture).controlnet is None


def test_a_picture_is_what_python_draws(tiny):
    (picture,) = run(*DRAW, "--controlnet", "plain.safetensors", "canny:photo.png", "0.7@0-0.5",
                     "--controlnet", "union.safetensors", "pose.png", "0.5", "2")  # fmt: skip
    nets = [
        ("plain.safetensors", "canny:photo.png", 0.7, (0, 0.5)),
        ("union.safetensors", "pose.png", 0.5, None, "depth"),
    ]
    sizes = {"width": 48, "height": 32, "num_steps": 2, "force": True}
    (drawn,) = tiny_pipeline().generate("a red apple", 1, controlnet=nets, **sizes)
    assert pixels(picture) == drawn.tobytes() and drawn.info["flux_core"] == Image.open(picture).text["flux_core"]
    recorded = GenerationRequest(**json.loads(drawn.info["flux_core"]), force=True)
    assert recorded.controlnet == read_request(picture).controlnet and len(recorded.controlnet) == 2
    assert "compositeWithTrainedAlgorithmicMedia" in drawn.info["xmp"].decode()


def test_a_repeated_picture_asks_for_its_files_and_keeps_what_is_not_typed(tiny, folder, capsys):
    (picture,) = run(*DRAW, "--controlnet", "union.safetensors", "pose.png", "0.7@0-0.5", "tile")
    code, err = refused(capsys, "--from-image", picture, "--force")
    told = "that picture followed ControlNet union.safetensors 0.7@0-0.5 (tile) along pose.png: give both files"
    assert code == 2 and told in err
    code, err = refused(capsys, "repeat", picture)
    assert code == 2 and f"python cli.py --from-image {picture} --controlnet FILE MAP" in err
    again = ["--from-image", picture, "--force", "--controlnet", "union.safetensors"]
    (same,) = run(*again, "pose.png")
    assert same.read_bytes() == picture.read_bytes()
    (other,) = run(*again, "pose.png", "0.2")
    assert settings(other) == [("union.safetensors", "", "pose.png", 0.2, 0.0, 0.5, 1)]
    (other,) = run(*again, "canny:pose.png")
    assert settings(other) == [("union.safetensors", "canny", "pose.png", 0.7, 0.0, 0.5, 0)]
    capsys.readouterr()
    shutil.copy("union.safetensors", "first.safetensors")
    write_net(folder / "union.safetensors", params_for(OF, modes=4), seed=7)
    run(*again, "photo.png")
    err = capsys.readouterr().err
    assert "'photo.png' is another picture than the 'pose.png' that was used" in err
    assert "'union.safetensors' is another ControlNet than the 'union.safetensors' that was used" in err
    (moved,) = run(*again[:-1], "first.safetensors", "pose.png", "tile")
    assert pixels(moved) == pixels(picture)


def test_jobs_have_it_as_a_list(tiny, folder):
    own = {"prompt": "a red apple", "steps": 2, "width": 48, "height": 32, "force": True, "output_dir": "out"}
    job = {
        **own,
        "seed": 1,
        "controlnet": [["union.safetensors", "pose.png", 0.7, 1], ["plain.safetensors", "pose.png"]],
    }
    (folder / "job.json").write_text(json.dumps(job), encoding="utf-8")
    assert main(["run", "job.json"]) == 0
    found = settings(folder / "out" / "flux-mini_seed1.png")
    assert [(net, scale, mode) for net, *_, scale, _, _, mode in found] == [
        ("union.safetensors", 0.7, 1), ("plain.safetensors", 1.0, None),
    ]  # fmt: skip


# Whoever else may ask ---------------------------------------------------------------------------------


def edited(picture, **changes):
    """A copy of a picture whose record somebody has changed."""
    image, chunks = Image.open(picture), PngImagePlugin.PngInfo()
    request = json.loads(image.text["flux_core"])
    request["controlnet"][0] |= changes
    chunks.add_itxt("flux_core", json.dumps(request))
    image.save("edited.png", pnginfo=chunks)
    return "edited.png"


def test_no_record_opens_a_file(tiny, folder, capsys):
    (picture,) = run(*DRAW, "--controlnet", "plain.safetensors", "pose.png")
    code, err = refused(capsys, "--from-image", edited(picture, net=f"{folder}/plain.safetensors"), "--force")
    assert code == 2 and "names a folder; only a file's own name is kept" in err
    code, err = refused(capsys, "--from-image", edited(picture, net="a\x1b[2J\nb", file="c\nd"), "--force")
    assert code == 2 and "\x1b" not in err
    for name in ("plain.safetensors", "pose.png"):
        (folder / name).unlink()
    assert refused(capsys, "--from-image", picture, "--force")[0] == 2


def test_no_line_of_a_file_of_prompts_names_one(folder):
    (folder / "lines.jsonl").write_text('{"prompt": "x", "controlnet": ["plain.safetensors", "pose.png"]}')
    with pytest.raises(UsageError, match="there is no column 'controlnet'"):
        read_lines("lines.jsonl")


@pytest.mark.parametrize("own", [False, True])
def test_no_client_names_one(folder, own):
    net = {"controlnet": [["plain.safetensors", "pose.png"]]}
    body = {"prompt": "x", **({"flux_core": net} if own else net)}
    with pytest.raises(UsageError, match="controlnet names something on this machine, which a client cannot"):
        request_of(body, "flux-mini", Shelf(None, OF))
    assert "controlnet" not in capabilities("flux-mini")["fields"]
