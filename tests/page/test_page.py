"""The page over HTTP, as its own script speaks to it: what it draws, shows, fills, refuses and forgets."""

import io
import socket
import threading
import time
from functools import partial

import numpy as np
import pytest
import uvicorn
from PIL import Image
from random_lora import factors, write
from visitor import Visitor

from flux_core import load_pipeline
from flux_core.errors import UsageError
from flux_core.hooks import Lora, Scale, Skip
from flux_core.images.metadata import png_bytes, read_request
from flux_core.main import main
from flux_core.page import mount
from flux_core.page.controls import SHOWN, control
from flux_core.page.desk import Desk
from flux_core.page.exploring import cells
from flux_core.page.layers import blocks_plan
from flux_core.request.fields import FIELDS
from flux_core.server.app import make_app
from flux_core.server.jobs import Worker
from flux_core.server.shelf import Shelf
from flux_core.variants import VARIANTS

MINI = VARIANTS["flux-mini"]
FAST = {"prompt": "a red apple", "seed": 5, "width": 128, "height": 128, "num_steps": 2}
SAME = {name: FAST[name] for name in ("width", "height", "num_steps")}


@pytest.fixture(scope="module")
def pipeline():
    return load_pipeline("flux-mini", "cpu")


@pytest.fixture(scope="module")
def place(pipeline, tmp_path_factory):
    """A page on a free port: its address, its worker, and its folder of LoRAs."""
    loras = tmp_path_factory.mktemp("loras")
    write(loras / "style.safetensors", factors(MINI.params))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", str(tmp_path_factory.mktemp("shown")))
        patch.setenv("GRADIO_ANALYTICS_ENABLED", "False")
        worker = Worker(pipeline, tmp_path_factory.mktemp("drawn"), 100, lambda name: load_pipeline(name, "cpu"))
        listening = socket.create_server(("127.0.0.1", 0))
        names = ["flux-mini", "flux-mini-fast"]
        app = make_app(worker, loras=loras, extend=partial(mount, worker=worker, names=names))
        server = uvicorn.Server(uvicorn.Config(app, log_level="error"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}", worker
        server.should_exit = True
        thread.join()


@pytest.fixture
def visitor(place):
    found = Visitor(place[0])
    found.set(**FAST)
    return found


def pixels(data):
    return np.asarray(Image.open(io.BytesIO(data) if isinstance(data, bytes) else data).convert("RGB"))


def drawn_alone(pipeline, prompt="a red apple", seed=5, **fields):
    return np.asarray(pipeline.generate(prompt, seed, **SAME | fields)[0])


def test_the_picture_is_the_commands_and_comes_step_by_step(visitor, pipeline, place):
    seen = list(visitor.press("draw"))
    lines = [one["said"] for one in seen]
    assert any("step 1 of 2" in line for line in lines) and "done: flux-mini_seed5" in lines[-1]
    data = visitor.file(seen[-1]["picture"])
    assert np.array_equal(pixels(data), drawn_alone(pipeline))
    (path,) = place[1].folder.glob("flux-mini_seed5*.png")
    assert path.read_bytes() == data and read_request(path).prompt == "a red apple"
    early = next(one["picture"] for one in seen if "picture" in one)  # a preview, which the picture resembles
    assert np.abs(pixels(visitor.file(early)).astype(int) - pixels(data)).mean() < 40
    assert seen[-1]["history"][0]["image"]["orig_name"] == path.name


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"prompt": " "}, "--prompt has no words"),
        ({"prompt": "x" * 20_001}, "a prompt has at most 20,000 characters"),
        ({"seed": 2**32 - 1, "num_images": 2}, "past the last seed"),
    ],
)
def test_an_error_is_the_commands_sentence(visitor, values, said):
    visitor.set(**values)
    (only,) = visitor.press("draw")
    assert said in only["said"] and 'role="alert"' in only["said"]


def test_another_model_is_chosen_and_its_defaults_come_with_it(visitor, pipeline):
    visitor.set(model="flux-mini-fast")
    told = visitor.last("model", "change")
    assert told["num_steps"] == 4 and "seed" not in told
    data = visitor.file(visitor.last("draw")["picture"])
    assert not np.array_equal(pixels(data), drawn_alone(pipeline))


def test_a_dropped_picture_fills_the_controls(visitor, pipeline):
    fields = {"negative_prompt": "a pig", "true_cfg_scale": 2.0, "cfg_zero": 1, "plan": [Skip(blocks="layer.6")]}
    image = pipeline.generate("a fox", 7, **SAME, **fields)[0]
    visitor.set(again=visitor.picture(png_bytes(image)))
    told = visitor.last("again", "change")
    assert told["prompt"] == "a fox" and (told["seed"], told["true_cfg_scale"]) == (7, 2)
    assert told["negative_prompt"] == "a pig" and "but for: skip, CFG zero" in told["said"]
    plain = io.BytesIO()
    Image.new("RGB", (9, 9)).save(plain, "png")
    visitor.set(again=visitor.picture(plain.getvalue()))
    told = visitor.last("again", "change")
    assert set(told) == {"said"} and "the picture was not made by flux_core" in told["said"]


def test_a_visitor_reads_no_other_file(visitor, tmp_path, place):
    image = tmp_path / "secret.png"
    image.write_bytes(b"x")
    with pytest.raises(AssertionError):
        visitor.last("history", "select", {"value": {"image": {"path": str(image)}}, "index": 0})
    assert Desk(place[1], [], Shelf(None, MINI.params)).picture(str(image)) == str(place[1].folder / "secret.png")
    visitor.set(init={"path": str(image), "meta": {"_type": "gradio.FileData"}})
    with pytest.raises(AssertionError):
        visitor.last("draw")
    for path in (f"/gradio_api/file={image}", "/gradio_api/file=setup.cfg", "/gradio_api/file=/etc/passwd"):
        assert visitor.client.get(path).status_code == 403
    for path in ("/gradio_api/proxy=http://x", "/monitoring", "/gradio_api/vibe-code", "/gradio_api/info", "/docs"):
        assert visitor.client.get(path).status_code == 404


@pytest.mark.parametrize("data", [b"<html>", b"<svg xmlns='http://www.w3.org/2000/svg'/>", b"GIF89a", b""])
def test_what_is_no_picture_is_not_taken(visitor, data):
    answer = visitor.client.post("/gradio_api/upload", files={"files": ("x.png", data)})
    assert answer.status_code == 400 and "no picture" in answer.json()["detail"]


def test_other_sites_may_not_speak_to_it(visitor):
    for headers in ({"host": "evil.example"}, {"origin": "http://evil.example"}):
        assert visitor.client.get("/", headers=headers).status_code == 403
    answer = visitor.client.get("/")
    assert "default-src 'self'" in answer.headers["content-security-policy"]
    assert visitor.client.post("/gradio_api/queue/join", content="{}").status_code == 415


def test_a_block_that_is_off_is_skipped_and_a_factor_scales_its_gates(visitor, pipeline):
    visitor.set(**{"on-single_blocks.2": False, "factor-double_blocks.1": 0.5, "few-steps": 2})
    data = visitor.file(visitor.last("redraw")["layers-picture"])
    plan = [Skip(blocks="single_blocks.2"), Scale(sites="double_blocks.1.*gate", value=0.5)]
    assert np.array_equal(pixels(data), drawn_alone(pipeline, plan=plan))
    names = ["double_blocks.0", "single_blocks.0"]
    assert blocks_plan(names, [True, True], [1, 1]) == []
    assert blocks_plan(names, [True, False], [0, 2]) == [Skip(blocks=names)]


def test_a_word_looks_where_its_thing_is(visitor):
    visitor.set(prompt="a red apple left of a dog face", width=256, height=256, **{"few-steps": 4})
    told = visitor.last("look")
    words = [name for name, _ in told["word"]["choices"]]
    assert words == ["red", "apple", "dog", "face", "background"] and told["map-step"]["maximum"] == 4

    def heat(word, step=0, block="all"):
        visitor.set(word=word, map_step=step, map_block=block)
        found = pixels(visitor.file(visitor.last("word", "input")["map"])).astype(int)
        return found[..., 0][64:192]

    apple, dog = heat("apple"), heat("dog")
    assert apple[:, :128].mean() > apple[:, 128:].mean() and dog[:, :128].mean() < dog[:, 128:].mean()
    assert not np.array_equal(heat("dog", 1), heat("dog", 4))
    assert not np.array_equal(heat("dog", 0, "double_blocks.0"), heat("dog", 0, "double_blocks.3"))


def test_an_edit_keeps_source_and_edit_side_by_side(visitor, place):
    visitor.set(edit="a green apple", num_steps=3)
    source, edit = visitor.last("start-edit")["compared"]
    assert not np.array_equal(pixels(visitor.file(source)), pixels(visitor.file(edit)))
    (path,) = place[1].folder.glob("*_edit1.png")
    assert read_request(path).functions == ("Stable Flow, edit1 of 'a red apple', 2 blocks shared",)
    visitor.set(edit="")
    assert "nothing to edit" in visitor.last("start-edit")["said"]


def test_a_grid_grows_and_a_cell_tells_its_request(visitor, pipeline):
    visitor.set(values_0="1, 2", axis_1="num_steps", values_1="1, 2")
    seen = list(visitor.press("explore"))
    counts = [len(one["grid"]["value"]) for one in seen if "value" in one.get("grid", {})]
    assert counts == sorted(counts) and counts[-1] == 4 and seen[-1]["grid"]["columns"] == 2
    cell = seen[-1]["grid"]["value"][3]
    assert cell["caption"] == "Seed 2, Steps 2"
    assert np.array_equal(pixels(visitor.file(cell["image"])), drawn_alone(pipeline, seed=2))
    told = visitor.last("grid", "select", {"value": cell, "index": 3})
    assert (told["seed"], told["num_steps"]) == (2, 2)


@pytest.mark.parametrize(
    ("axes", "said"),
    [
        ([("none", ""), ("none", "1")], "nothing to explore"),
        ([("seed", "1"), ("seed", "2")], "both axes are Seed"),
        ([("seed", " , ")], "Seed has no values"),
        ([("num_steps", "0")], "--num-steps must be a whole number from 1"),
        ([("seed", ",".join(map(str, range(65))))], "at most 64"),
    ],
)
def test_a_grid_that_cannot_be(axes, said):
    with pytest.raises(UsageError, match=said):
        cells(axes)


def test_a_lora_has_a_slider(visitor, pipeline, place):
    slider = next(key for key, props in visitor.components.items() if props.get("label") == "style")
    visitor.values[slider] = 1.5
    data = visitor.file(visitor.last("draw")["picture"])
    assert not np.array_equal(pixels(data), drawn_alone(pipeline))
    newest = max(place[1].folder.glob("*.png"), key=lambda path: path.stat().st_mtime)
    (entry,) = read_request(newest).loras
    assert (entry.file, entry.scale) == ("style.safetensors", 1.5)


def test_a_dropped_picture_sets_the_slider_of_its_lora_whatever_the_file_was_called(visitor, pipeline, tmp_path):
    params = MINI.params
    write(tmp_path / "renamed.safetensors", factors(params))  # the bytes of the page's `style`
    write(tmp_path / "style.safetensors", factors(params, strength=0.3))
    names = ("renamed", "style", "renamed")
    plan = [Lora(file=str(tmp_path / f"{name}.safetensors"), scale=0.5) for name in names]
    plan[2] = plan[2].model_copy(update={"steps": (0,)})
    image = pipeline.generate("a fox", 7, plan=plan, **SAME)[0]
    visitor.set(again=visitor.picture(png_bytes(image)))
    told = visitor.last("again", "change")
    slider = next(key for key, props in visitor.components.items() if props.get("label") == "style")
    assert told[slider] == 0.5
    assert "but for: LoRA style 0.5, whose file is not here, LoRA renamed 0.5@0" in told["said"]


def test_a_job_ends_within_a_step_and_visitors_do_not_mix(visitor, place):
    visitor.set(num_steps=400)
    began = False
    seen, other = [], Visitor(place[0])
    other.set(**FAST | {"prompt": "a fox"})
    for one in visitor.press("draw"):
        if "step " in one["said"] and "step 0" not in one["said"] and not began:
            began, first = True, one["said"]
            begun = time.monotonic()
            other.last("cancel")  # which is somebody else's
            later = threading.Timer(0.3, lambda: Visitor.last(visitor, "cancel"))
            later.start()
        seen.append(one["said"])
    assert "cancelled" in seen[-1] and time.monotonic() - begun > 0.3
    assert any("step " in line and line != first for line in seen[seen.index(first) :])  # it went on
    data = other.file(other.last("draw")["picture"])
    assert "done" in other.last("draw")["said"] and len(data)


def test_a_decoder_of_other_latents_is_refused(capsys, tmp_path):
    assert main(["page", "--taef1", "taef1.safetensors", "--output-dir", str(tmp_path), "--no-browser"]) == 2
    assert "flux-mini has latents of its own" in capsys.readouterr().err


def test_controls_have_the_bounds_of_the_table():
    for name in (name for row in SHOWN for name in row):
        made, field = control(FIELDS[name], MINI), FIELDS[name]
        assert made.info == field.help
        if field.kind is not str and name not in ("width", "height", "seed", "num_images"):
            assert (made.minimum, made.maximum) == (field.minimum, field.maximum)
    wide = control(FIELDS["width"], MINI)
    assert (wide.minimum, wide.maximum, wide.value) == (MINI.min_side, MINI.max_side, MINI.width)
