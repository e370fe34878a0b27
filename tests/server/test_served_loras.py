"""LoRAs by name: those of one folder draw what the command draws with their files, and nothing else has a name."""

import base64
import io
import json
from dataclasses import replace

import numpy as np
import pytest
from openai import OpenAI
from PIL import Image
from random_lora import factors, write

from flux_core.hooks import Lora
from flux_core.images.metadata import KEY, read_request, read_texts
from flux_core.images.output import save_picture
from flux_core.main import main
from flux_core.variants import VARIANTS

FIELDS = {"prompt": "a fox", "width": 128, "height": 128, "num_steps": 2, "seed": 5}


@pytest.fixture(scope="module")
def shelf(tmp_path_factory):
    """A folder with a style, a LoRA for another model, and files that are none; beside it another style."""
    folder, params = tmp_path_factory.mktemp("shelf"), VARIANTS["flux-mini"].params
    (folder / "loras").mkdir()
    write(folder / "loras" / "style.safetensors", factors(params, strength=0.3))
    write(folder / "outside.safetensors", factors(params))
    write(folder / "loras" / "other.safetensors", factors(replace(params, hidden_size=64, num_heads=1)))
    (folder / "loras" / "notes.txt").write_text("none")
    (folder / "loras" / ".hidden.safetensors").write_bytes(b"")
    return folder / "loras"


def picture_of(text):
    return Image.open(io.BytesIO(base64.b64decode(text)))


def test_a_lora_by_its_name_draws_the_picture_of_its_file(start, pipeline, shelf, tmp_path):
    server = start(loras=shelf)
    plan = [Lora(file=str(shelf / "style.safetensors"), scale=0.8)]
    (expected,) = pipeline.generate(plan=plan, **FIELDS)
    (plain,) = pipeline.generate(**FIELDS)
    assert not np.array_equal(expected, plain)
    ask = OpenAI(base_url=f"{server.url}/v1", api_key="any").images
    own = {key: x for key, x in FIELDS.items() if key != "prompt"}
    for body in (
        {**own, "loras": {"style": 0.8}},
        {"flux_core": {**own, "loras": {"style": "0.8@0-1"}}},
    ):
        answer = ask.generate(prompt="a fox", extra_body=body)
        assert np.array_equal(picture_of(answer.data[0].b64_json), expected)
    (recorded,) = read_request(tmp_path / "flux-mini_seed5.png").plan
    assert (recorded.file, recorded.scale, recorded.portable) == ("style.safetensors", 0.8, True)
    body = {"width": 128, "height": 128, "steps": 2, "seed": 5}
    for prompt, picture in (("a fox <lora:style:0.8>", expected), ("a fox", plain)):
        found = server.client.post("/sdapi/v1/txt2img", json=body | {"prompt": prompt}).json()
        assert np.array_equal(picture_of(found["images"][0]), picture)
    assert server.client.get("/v1/capabilities").json()["loras"] == ["other", "style"]
    listed = server.client.get("/sdapi/v1/loras").json()
    assert [(one["name"], one["path"]) for one in listed] == [(x, f"{x}.safetensors") for x in ("other", "style")]


def test_a_form_names_loras_as_openais_client_spells_them(start, pipeline, shelf):
    given = io.BytesIO()
    Image.new("RGB", (128, 128), "navy").save(given, "png")
    ask = OpenAI(base_url=f"{start(loras=shelf).url}/v1", api_key="any").images
    own = {"loras": {"style": 0.8}, "num_steps": 2, "seed": 5, "strength": 0.5}
    answer = ask.edit(image=given.getvalue(), prompt="a fox", size="128x128", extra_body=own)
    plan = [Lora(file=str(shelf / "style.safetensors"), scale=0.8)]
    (expected,) = pipeline.generate(plan=plan, init_image=Image.open(given), strength=0.5, **FIELDS)
    assert np.array_equal(picture_of(answer.data[0].b64_json), expected)


def test_nothing_but_the_folders_names_is_a_lora(start, shelf):
    server, none = start(loras=shelf), start()
    for name in ("outside", "../outside", str(shelf / "style"), "style.safetensors", "owner/style", ".hidden", ""):
        for body in ({"loras": {name: 1}}, {"flux_core": {"loras": {name: 1}}}):
            answer = server.client.post("/v1/jobs", json={"prompt": "x"} | body)
            assert answer.status_code == 400 and "Next: one of other, style" in answer.text, name
    for loras, finding in (
        ({"other": 1}, "other.safetensors"), ({"style": "a"}, "style a: a scale is"), ({"style": True}, "a scale is"),
        ({"style": 2000}, "a scale is"), ({"style": "1@0-99"}, "there is no step 99"), (["style"], "loras must be"),
    ):  # fmt: skip
        answer = server.client.post("/v1/jobs", json={"prompt": "x", "loras": loras})
        assert answer.status_code == 400 and finding in answer.text and str(shelf) not in answer.text, loras
    twice = {"prompt": "x", "loras": {"style": 1}, "flux_core": {"loras": {"style": 1}}}
    assert "loras is said twice" in server.client.post("/v1/jobs", json=twice).text
    for prompt, finding in (
        ("x <lora:nix:1>", "one of other, style"), ("x <lora:style:1:2>", "':2' after its scale"),
        ("x <lora:style:1> <lora:style>", "is there twice"), ("<lora:style:1>", "has no words"),
    ):  # fmt: skip
        answer = server.client.post("/sdapi/v1/txt2img", json={"prompt": prompt})
        assert answer.status_code == 400 and finding in answer.text, prompt
    assert "there is none" in none.client.post("/v1/jobs", json={"prompt": "x", "loras": {"style": 1}}).text
    assert none.client.get("/sdapi/v1/loras").json() == [] and not server.worker.jobs


def test_a_picture_with_a_lora_is_drawn_again_from_its_record(start, pipeline, shelf, tmp_path):
    copy = tmp_path / "loras" / "renamed.safetensors"
    copy.parent.mkdir()
    copy.write_bytes((shelf / "style.safetensors").read_bytes())
    plan = [Lora(file=str(shelf / "style.safetensors"), scale=0.8, blocks=("single_blocks.*",), steps=(1,))]
    (image,) = pipeline.generate(plan=plan, **FIELDS)
    own = json.loads(read_texts(save_picture(image, tmp_path, "alone"))[KEY])
    ask = OpenAI(base_url=f"{start(loras=copy.parent).url}/v1", api_key="any").images
    answer = ask.generate(prompt=own.pop("prompt"), extra_body={"flux_core": own})
    assert np.array_equal(picture_of(answer.data[0].b64_json), image)
    (entry,) = own["plan"]
    for changes, finding in (
        ({"sha256": "0" * 64}, "drawn with the LoRA style, SHA-256 0000000000000000…, which is not in the folder"),
        ({"file": str(copy)}, "the file's own name"), ({"sha256": None}, "names something"),
        ({"sha256": "x"}, "sha256"),
    ):  # fmt: skip
        answer = start(loras=copy.parent).client.post(
            "/v1/jobs", json={"flux_core": own | {"prompt": "x", "plan": [entry | changes]}}
        )
        assert answer.status_code == 400 and finding in answer.text and str(tmp_path) not in answer.text, changes


def test_a_folder_that_is_none_is_refused_before_a_model_is_loaded(tmp_path, capsys):
    assert main(["serve", "--loras", str(tmp_path / "none")]) == 2
    assert "is no folder" in capsys.readouterr().err
