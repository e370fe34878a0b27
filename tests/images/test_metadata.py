"""A picture says what it is, to us and to other tools; what a strange file says is not believed."""

import io
import json
import xml.etree.ElementTree as ElementTree

import pytest
from PIL import Image, PngImagePlugin

from flux_core.errors import FileError, UsageError
from flux_core.images.metadata import (
    KEY,
    MAX_PROMPT,
    describe,
    differences,
    parameters,
    png_bytes,
    read_request,
    read_texts,
)
from flux_core.images.output import save_picture
from flux_core.request.generation import GenerationRequest
from flux_core.request.pictures import InitImage

HOSTILE = [
    "nul \x00 inside",
    "\u202eright to left \u05d0\u05d1",
    "family \U0001f468\u200d\U0001f469\u200d\U0001f467",
    "two\nlines\r\nand\ttabs",
    "a|b|c",
    "../../etc/passwd",
    "%s{} %d {prompt.__class__}",
    '<script>alert(1)</script> & "quotes" \' ]]>',
    "\x1b[31mred\x1b[0m \x9b31m",
    "Steps: 1, Seed: 2\nNegative prompt: none",
    "\u2028line\u2029paragraph \ufeff",
    "\U0010ffff\ud7ff",
]


def request(**fields) -> GenerationRequest:
    return GenerationRequest(**{"prompt": "a red apple", "seed": 1, **fields})


def picture(made: GenerationRequest) -> Image.Image:
    return describe(Image.new("RGB", (made.width, made.height), "red"), made)


@pytest.mark.parametrize("prompt", HOSTILE)
def test_any_prompt_comes_back_and_names_no_file(tmp_path, prompt):
    made = request(prompt=prompt)
    path = save_picture(picture(made), tmp_path, "flux-mini_seed1")
    assert read_request(path).prompt == prompt
    assert [entry.name for entry in tmp_path.iterdir()] == ["flux-mini_seed1.png"]


@pytest.mark.parametrize("prompt", HOSTILE)
def test_the_text_for_other_tools_has_no_control_characters(prompt):
    lines = parameters(request(prompt=prompt)).split("\n")
    assert all(not (ord(c) < 32 and c != "\t") and not 0x7F <= ord(c) < 0xA0 for line in lines for c in line)
    settings = "Steps: 28, Sampler: Euler, Distilled CFG Scale: 3.5, Seed: 1, Size: 256x256, Model: flux-mini"
    assert lines[-1].startswith(settings)


def test_other_tools_read_the_negative_prompt_and_the_scale_where_they_look_for_them():
    text = parameters(request(negative_prompt="a \x07 frame", true_cfg_scale=2.5))
    assert text.startswith("a red apple\nNegative prompt: a   frame\nSteps: 28, Sampler: Euler, CFG scale: 2.5, Dist")
    away_from_nothing = parameters(request(true_cfg_scale=2.5))
    assert "Negative" not in away_from_nothing and "CFG scale: 2.5" in away_from_nothing
    assert "CFG scale" not in parameters(request(true_cfg_scale=1, guidance=None, name="flux-schnell"))


def test_every_field_comes_back(tmp_path):
    made = request(
        width=200, height=130, num_steps=3, guidance=0.25, seed=2**32 - 1, dtype="bf16", weights={"a": "0f"},
        init_image=InitImage(file="cat.png", sha256="ab" * 32), strength=0.5, negative_prompt="a\nb: c",
        true_cfg_scale=2.5, cfg_zero=0, mimic_scale=1.5, threshold_percentile=99.5, cfg_schedule="cosine",
    )  # fmt: skip
    read = read_request(save_picture(picture(made), tmp_path, "p"))
    assert read.model_dump() == made.model_dump()


def test_the_mark_names_how_the_picture_was_made():
    def source_type(made: GenerationRequest) -> str:
        packet = Image.open(io.BytesIO(png_bytes(picture(made)))).info["xmp"]
        tag = "{http://iptc.org/std/Iptc4xmpExt/2008-02-29/}DigitalSourceType"
        return ElementTree.fromstring(packet).find(f".//{tag}").text.rpartition("/")[2]

    assert source_type(request()) == "trainedAlgorithmicMedia"
    origin = InitImage(file="cat.png", sha256="0" * 64)
    assert source_type(request(init_image=origin)) == "compositeWithTrainedAlgorithmicMedia"


def test_keys_of_other_tools_are_left_alone(tmp_path):
    path = save_picture(picture(request()), tmp_path, "p")
    assert set(read_texts(path)) == {KEY, "parameters"} | {"XML:com.adobe.xmp"}


def test_a_megabyte_of_prompt_is_cut_to_whole_characters(tmp_path):
    made = request(prompt="é" * 500_000)
    read = read_request(save_picture(picture(made), tmp_path, "p"))
    assert read.prompt == "é" * (MAX_PROMPT // 2)
    worst = request(prompt="\x01" * 100_000 + "x", negative_prompt="\x02" * 100_000, true_cfg_scale=2)
    read = read_request(save_picture(picture(worst), tmp_path, "p"))
    assert (read.prompt, read.negative_prompt) == ("\x01" * MAX_PROMPT, "\x02" * MAX_PROMPT)


def foreign(path, **texts) -> str:
    chunks = PngImagePlugin.PngInfo()
    for key, value in texts.items():
        chunks.add_itxt(key, value)
    Image.new("RGB", (8, 8)).save(path, pnginfo=chunks)
    return str(path)


OF_A_FILE = {"kind": "add", "sites": ["vec"], "value": {"file": "/nowhere/x.safetensors", "tensor": "x"}}
GOOD = json.loads(request().model_dump_json(exclude_none=True))


@pytest.mark.parametrize(
    ("texts", "finding"),
    [
        ({}, "no text at all"),
        ({"prompt": '{"3": {"class_type": "KSampler"}}', "workflow": "{}"}, "ComfyUI"),
        ({"parameters": "a cat\nSteps: 20"}, "another tool"),
        ({KEY: ""}, "cannot be used"),
        ({KEY: "not json"}, "cannot be used"),
        ({KEY: "[1, 2]"}, "no JSON object"),
        ({KEY: "{}"}, "--prompt"),
        ({KEY: "[" * 100_000}, "cannot be used"),
        ({KEY: '{"prompt": ' + "[" * 100_000}, "cannot be used"),
        ({KEY: json.dumps({**GOOD, "prompt": "x" * 5_000_000})}, "characters"),
        ({KEY: json.dumps({**GOOD, "lora": "/etc/passwd"})}, "no field 'lora'"),
        ({KEY: json.dumps({**GOOD, "init_image": "/etc/passwd"})}, "--init-image"),
        ({KEY: json.dumps({**GOOD, "width": "wide"})}, "--width"),
        ({KEY: json.dumps({**GOOD, "width": 10**9})}, "--width"),
        ({KEY: json.dumps({**GOOD, "weights": {"a": {"b": 1}}})}, "weights"),
        ({KEY: json.dumps({**GOOD, "name": "/etc/passwd"})}, "unknown model name"),
        ({KEY: json.dumps({**GOOD, "prompt": "\ud800"})}, "cannot be used"),
        ({KEY: json.dumps({**GOOD, "force": True})}, "cannot grant force"),
        ({KEY: json.dumps({**GOOD, "plan": [OF_A_FILE]})}, r"cannot make us read or write other files \(add\)"),
        ({KEY: json.dumps({**GOOD, "version": "99.0", "new": 1})}, "version 99.0"),
    ],
)
def test_foreign_and_malicious_metadata_is_refused(tmp_path, texts, finding):
    path = foreign(tmp_path / "foreign.png", **texts)
    with pytest.raises(UsageError, match=finding) as caught:
        read_request(path)
    assert path in str(caught.value) and len(str(caught.value)) < 500


@pytest.mark.parametrize("kind", ["JPEG", "GIF", "BMP"])
def test_a_picture_of_another_kind_holds_no_request(tmp_path, kind):
    path = tmp_path / "p.png"
    Image.new("RGB", (4, 4)).save(path, kind)
    with pytest.raises(FileError, match=r"p\.png is no PNG file: give a PNG file"):
        read_request(path)


def test_metadata_names_no_folder(tmp_path):
    origin = {"file": "/etc/passwd", "sha256": ""}
    path = foreign(tmp_path / "p.png", **{KEY: json.dumps({**GOOD, "init_image": origin})})
    with pytest.raises(UsageError, match="names a folder"):
        read_request(path)


@pytest.mark.parametrize("content", [b"", b"\x89PNG\r\n\x1a\n", b"<svg/>", b"GIF89a" + b"\0" * 100])
def test_what_is_no_png_is_a_file_error(tmp_path, content):
    (tmp_path / "x.png").write_bytes(content)
    with pytest.raises(FileError, match=r"x\.png"):
        read_texts(tmp_path / "x.png")


def test_other_weights_or_versions_are_told():
    old = request(weights={"a": "1"}, version="0.0.1")
    assert differences(old, old) == []
    assert len(differences(old, request(weights={"a": "2"}))) == 2
    assert differences(old, request(name="flux-schnell")) == []
