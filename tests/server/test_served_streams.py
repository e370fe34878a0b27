"""Pictures in a stream, as OpenAI's own client reads them: previews, the picture, errors, a client that goes."""

import base64
import io

import numpy as np
import pytest
from openai import APIError, OpenAI
from PIL import Image
from running import SMALL

from flux_core.images.pictures import crop_centre
from flux_core.pipeline.preview import preview

BICUBIC = Image.Resampling.BICUBIC


def client_of(server):
    return OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0)


def picture_of(event):
    return Image.open(io.BytesIO(base64.b64decode(event.b64_json)))


def test_previews_come_before_the_picture_of_the_command(start, pipeline):
    own = {"num_inference_steps": 4, "seed": 5}
    asked = {"prompt": "a fox", "size": "136x128", "stream": True, "extra_body": own}
    first, second, done = client_of(start()).images.generate(**asked, partial_images=2)
    assert [type(one).__name__ for one in (first, done)] == ["ImageGenPartialImageEvent", "ImageGenCompletedEvent"]
    assert [one.partial_image_index for one in (first, second)] == [0, 1] and done.size == "136x128"
    seen = []
    with pytest.warns(UserWarning, match="cropped"):
        (expected,) = pipeline.generate("a fox", 5, width=136, height=128, num_steps=4, on_step=seen.append)
    assert np.array_equal(picture_of(done), expected)
    for event, step in ((first, seen[0]), (second, seen[1])):
        small = preview(step, (144, 128), pipeline.variant.rgb)
        assert np.array_equal(picture_of(event), crop_centre(small.resize((144, 128), BICUBIC), 136, 128))


def test_an_edit_streams_too_and_a_picture_alone(start, pipeline):
    given = io.BytesIO()
    Image.new("RGB", (64, 64), "navy").save(given, "png")
    own = {"num_inference_steps": 4, "seed": 5, "strength": 0.5}
    asked = {"image": given.getvalue(), "prompt": "a fox", "size": "128x128", "stream": True, "extra_body": own}
    client = client_of(start())
    events = list(client.images.edit(**asked, partial_images=3, output_format="webp"))
    assert [one.type for one in events] == ["image_edit.partial_image", "image_edit.completed"]  # of two steps
    assert [picture_of(one).format for one in events] == ["WEBP"] * 2
    (alone,) = client.images.edit(**asked)
    (expected,) = pipeline.generate(
        "a fox", 5, init_image=Image.open(given), width=128, height=128, num_steps=4, strength=0.5
    )
    assert np.array_equal(picture_of(alone), expected)


def test_a_stream_ends_with_the_error_of_its_job(start, tmp_path):
    server = start()
    server.worker.folder = tmp_path / "gone"
    stream = client_of(server).images.generate(prompt="a fox", stream=True, extra_body={**SMALL, "num_steps": 1})
    with pytest.raises(APIError, match="gone"):
        list(stream)
    refused = server.client.post("/v1/jobs", json={"prompt": "x", "stream": True})
    assert refused.status_code == 400 and "a job is no stream" in refused.text


def test_a_stream_whose_client_goes_is_dropped(start):
    server = start()
    own = {**SMALL, "num_steps": 400}
    stream = client_of(server).images.generate(prompt="a fox", stream=True, partial_images=3, extra_body=own)
    (job,) = server.worker.jobs.values()
    stream.close()
    assert job.over.wait(20) and job.state == "cancelled"
    assert server.wait(server.job(num_steps=1).json()["id"], "done")
