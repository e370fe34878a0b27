"""Masks and pictures that clients send: OpenAI's transparent ones, A1111's white ones, and what each model takes."""

import base64
import io
import json

import numpy as np
import pytest
from openai import BadRequestError, OpenAI
from PIL import Image, ImageOps
from running import Running

from flux_core.errors import FileError, UsageError
from flux_core.images.metadata import read_request
from flux_core.server.uploads import given_of

pytestmark = pytest.mark.usefixtures("one_thread")


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    """Rectangles of noise."""
    small = np.random.default_rng(seed).integers(0, 256, (height // 8 + 1, width // 8 + 1, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.NEAREST)


def hole(image: Image.Image, mask: Image.Image) -> Image.Image:
    """The picture, transparent where the mask is white."""
    found = image.copy()
    found.putalpha(ImageOps.invert(mask))
    return found


def png(image: Image.Image, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


def text(image: Image.Image) -> str:
    return base64.b64encode(png(image)).decode()


def decoded(data: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(data)))


ROOM = noise(160, 128)
MASK = Image.new("L", ROOM.size)
MASK.paste(255, (40, 30, 100, 90))
KEPT = np.asarray(MASK) == 0
WORDS, DRAW = "a fox", {"num_steps": 2, "width": 160, "height": 128}


@pytest.fixture(scope="module")
def idle(pipeline, tmp_path_factory):
    """A server that refuses."""
    server = Running(pipeline, tmp_path_factory.mktemp("idle"))
    yield server
    server.close()


# OpenAI's ---------------------------------------------------------------------------------------------


def test_what_is_transparent_is_painted_and_the_rest_is_the_sources_own(start, pipeline, tmp_path):
    server = start()
    client = OpenAI(base_url=f"{server.url}/v1", api_key="any")
    own = {"num_inference_steps": 2, "seed": 5}
    answer = client.images.edit(image=png(ROOM), mask=png(hole(ROOM, MASK)), prompt=WORDS, extra_body=own)
    found = np.asarray(decoded(answer.data[0].b64_json))
    assert found.shape == (128, 160, 3)  # the picture's own size, as nobody named another
    assert np.array_equal(found[KEPT], np.asarray(ROOM)[KEPT])
    assert (found[~KEPT] != np.asarray(ROOM)[~KEPT]).any(-1).mean() > 0.9
    (expected,) = pipeline.generate(WORDS, 5, init_image=ROOM, mask=MASK, **DRAW)
    assert np.array_equal(found, expected)
    record = read_request(tmp_path / "flux-mini_seed5.png")
    assert (record.init_image.file, record.mask.file, record.strength) == ("", "", 1.0)


def test_a_form_may_draw_a_part_alone_or_extend_the_picture(start, pipeline):
    server = start()
    form = {"prompt": WORDS, "num_steps": "2", "seed": "5", "size": "128x128"}
    files = {"image": png(ROOM), "mask": png(hole(ROOM, MASK))}
    part = server.client.post("/v1/images/edits", data=form | {"mask_padding": "8"}, files=files)
    found = np.asarray(decoded(part.json()["data"][0]["b64_json"]))
    sizes = {"num_steps": 2, "width": 128, "height": 128}
    (expected,) = pipeline.generate(WORDS, 5, init_image=ROOM, mask=MASK, mask_padding=8, **sizes)
    assert np.array_equal(found, expected) and np.array_equal(found[KEPT], np.asarray(ROOM)[KEPT])
    del form["size"]
    wide = server.client.post("/v1/images/edits", data=form | {"pad": "16,0,0,0"}, files={"image": png(ROOM)})
    found = np.asarray(decoded(wide.json()["data"][0]["b64_json"]))
    assert found.shape == (128, 176, 3) and np.array_equal(found[:, 16:], ROOM)


def test_a_stream_ends_with_what_is_kept(start):
    server = start()
    form = {"prompt": WORDS, "num_steps": "3", "seed": "5", "stream": "true", "partial_images": "1"}
    files = {"image": png(ROOM), "mask": png(hole(ROOM, MASK))}
    answer = server.client.post("/v1/images/edits", data=form, files=files).text
    last = json.loads(answer.strip().rpartition("data: ")[2])
    assert last["type"] == "image_edit.completed"
    assert np.array_equal(np.asarray(decoded(last["b64_json"]))[KEPT], np.asarray(ROOM)[KEPT])


OPAQUE = hole(ROOM, Image.new("L", ROOM.size))
TWO = [("image[]", ("a.png", png(ROOM))), ("image[]", ("b.png", png(ROOM)))]


@pytest.mark.parametrize(
    ("files", "fields", "finding"),
    [
        ({"image": png(ROOM), "mask": png(MASK)}, {}, "the mask has no transparency: what is to be painted must be"),
        ({"image": png(ROOM), "mask": png(OPAQUE)}, {}, "the mask has no transparency"),
        ({"image": png(ROOM), "mask": png(ROOM, "JPEG")}, {}, "the mask has no transparency"),
        ({"image": png(ROOM), "mask": png(hole(noise(32, 32), Image.new("L", (32, 32), 255)))}, {}, "has 32x32 pixels"),
        ({"image": png(ROOM), "mask": png(hole(ROOM, MASK))[:600]}, {}, "the mask is a damaged picture"),
        ({"image": png(ROOM), "mask": b"GIF89a"}, {}, "the mask is no picture that can be read"),
        ({"mask": png(hole(ROOM, MASK))}, {}, "there is no picture in the field image"),
        (TWO, {}, "flux-mini takes one picture, not 2"),
        ({"image": png(ROOM), "control": png(ROOM)}, {}, "there is no field 'control' for a file"),
        ({"image": png(ROOM)}, {"mask_padding": "8"}, "--mask-padding does nothing without --mask"),
        ({"image": png(ROOM)}, {"pad": "8,8"}, "--pad: give pixels for left, top, right and bottom"),
        ({"image": png(ROOM)}, {"pad": "9999,9999,9999,9999"}, "at most 64,000,000 are drawn from"),
        ({"image": png(ROOM)}, {"mask": "/etc/passwd"}, "mask names something on this machine"),
        ({"image": png(ROOM)}, {"reference": "x"}, "reference names something on this machine"),
    ],
)
def test_what_is_no_edit_is_refused_in_a_sentence(idle, files, fields, finding):
    answer = idle.client.post("/v1/images/edits", data={"prompt": WORDS, "num_steps": "1", **fields}, files=files)
    error = answer.json()["error"]
    assert (answer.status_code, error["type"]) == (400, "invalid_request_error") and finding in error["message"]


def test_openais_client_is_told_so(idle):
    client = OpenAI(base_url=f"{idle.url}/v1", api_key="any")
    with pytest.raises(BadRequestError, match="the mask has no transparency"):
        client.images.edit(image=png(ROOM), mask=png(MASK), prompt=WORDS)
    with pytest.raises(BadRequestError, match="takes one picture, not 2"):
        client.images.edit(image=[png(ROOM), png(ROOM)], prompt=WORDS)


# A1111's ----------------------------------------------------------------------------------------------


BODY = {"prompt": WORDS, "steps": 2, "seed": 5, "width": 160, "height": 128, "denoising_strength": 1,
        "init_images": [text(ROOM)], "inpaint_full_res": False}  # fmt: skip


@pytest.fixture(scope="module")
def painted(pipeline):
    return np.asarray(pipeline.generate(WORDS, 5, init_image=ROOM, mask=MASK, fit="stretch", **DRAW)[0])


def img2img(server, **more) -> np.ndarray:
    answer = server.client.post("/sdapi/v1/img2img", json=BODY | more)
    assert answer.status_code == 200, answer.text
    assert not {"init_images", "mask"} & answer.json()["parameters"].keys()
    return np.asarray(decoded(answer.json()["images"][0]))


@pytest.mark.parametrize(
    ("mask", "inverted"),
    [
        (MASK, 0),
        (ImageOps.invert(MASK), 1),
        (hole(ROOM, ImageOps.invert(MASK)), 0),  # as A1111 has it: painted where it is opaque
        (hole(ROOM, MASK), 1),
        (hole(MASK.convert("RGB"), Image.new("L", MASK.size)), 0),  # an alpha channel that says nothing
    ],
)
def test_white_is_painted_and_inverted_black(start, painted, mask, inverted):
    found = img2img(start(), mask=text(mask), inpainting_mask_invert=inverted)
    assert np.array_equal(found, painted) and np.array_equal(found[KEPT], np.asarray(ROOM)[KEPT])


def test_its_whole_resolution_is_the_masked_part_alone(start, pipeline):
    """What A1111 does by default, with no padding."""
    server, large = start(), noise(300, 200, 1)
    mask = Image.new("L", large.size)
    mask.paste(255, (120, 40, 180, 90))
    given = {"init_images": [text(large)], "mask": text(mask), "width": 128, "height": 128}
    for padding, asked in ((0, {}), (24, {"inpaint_full_res_padding": 24})):
        found = img2img(server, **given, **asked, inpaint_full_res=True)
        sizes = {"num_steps": 2, "width": 128, "height": 128, "fit": "stretch"}
        (expected,) = pipeline.generate(WORDS, 5, init_image=large, mask=mask, mask_padding=padding, **sizes)
        assert found.shape == (200, 300, 3) and np.array_equal(found, expected)
        kept = np.asarray(mask) == 0
        assert np.array_equal(found[kept], np.asarray(large)[kept])


def test_what_clients_send_without_a_mask_changes_nothing(start, pipeline):
    """An editor's plugin sends the settings of masks always."""
    idle = {"mask": "", "mask_blur": 4, "inpaint_full_res": True, "inpaint_full_res_padding": 0,
            "inpainting_mask_invert": 0, "inpainting_fill": 1}  # fmt: skip
    (expected,) = pipeline.generate(WORDS, 5, init_image=ROOM, fit="stretch", strength=0.5, **DRAW)
    assert np.array_equal(img2img(start(), **idle, denoising_strength=0.5), expected)


@pytest.mark.parametrize(
    ("more", "finding"),
    [
        ({"mask": "?"}, "mask holds no base64"),
        ({"mask": 7}, "mask must be"),
        ({"mask": text(MASK), "init_images": []}, "init_images must be a list of one picture"),
        ({"mask": text(MASK), "init_images": None}, "a mask needs a picture to paint in"),
        ({"mask": text(MASK.resize((8, 8)))}, "the mask has 8x8 pixels, the picture 160x128"),
        ({"mask": text(Image.new("L", ROOM.size))}, "the mask is black everywhere: nothing would be painted"),
        ({"mask": base64.b64encode(png(OPAQUE)[:600]).decode()}, "the mask is a damaged picture"),
        ({"mask": text(MASK), "inpaint_full_res": True, "inpaint_full_res_padding": "x"}, "--mask-padding must be"),
        ({"mask": text(MASK), "inpaint_full_res": True, "inpaint_full_res_padding": [8]}, "--mask-padding must be"),
        ({"mask": text(MASK), "mask_blur": 8}, "mask_blur '8' does nothing here"),
        ({"mask": text(MASK), "inpainting_fill": 2}, "inpainting_fill '2' does nothing here"),
    ],
)
def test_what_it_cannot_do_it_says(idle, more, finding):
    answer = idle.client.post("/sdapi/v1/img2img", json=BODY | more)
    assert answer.status_code == 400 and finding in answer.json()["error"]["message"]


# By model ---------------------------------------------------------------------------------------------


def test_a_clients_pictures_are_what_the_model_takes():
    one, two, mask = png(ROOM), png(noise(64, 64)), png(hole(ROOM, MASK))
    found, records = given_of("flux-dev-fill", [one], mask)
    assert found.mask.tobytes() == MASK.tobytes() and records.keys() == {"init_image", "mask"}
    found, records = given_of("flux-dev-canny-lora", [one])
    assert found.control.tobytes() == ROOM.tobytes() and records["control"].map == "canny" and found.image is None
    for name in ("flux-dev-kontext", "flux-schnell-redux"):
        found, records = given_of(name, [one, two])
        assert [image.size for image in found.references] == [(160, 128), (64, 64)] and len(records["reference"]) == 2
    assert given_of("flux-mini", []) == (given_of("flux-dev-canny", [])[0], {})


@pytest.mark.parametrize("name", ["flux-dev-canny", "flux-dev-depth-lora", "flux-dev-kontext", "flux-dev-redux"])
def test_a_mask_that_a_model_would_not_see_is_refused(name):
    with pytest.raises(UsageError, match=f"{name} does not start from its picture, and a mask does nothing"):
        given_of(name, [png(ROOM)], png(hole(ROOM, MASK)))
    with pytest.raises(FileError, match="the picture is no picture that can be read"):
        given_of(name, [b"GIF89a"])
