"""The server, by real HTTP and by OpenAI's own client: what it draws, refuses, forgets and survives."""

import base64
import io
import json
import signal
import socket
import sys
import threading
import time

import httpx
import numpy as np
import pytest
from openai import BadRequestError, OpenAI
from PIL import Image
from running import SMALL, Running, command

from flux_core.commands.serve import listen
from flux_core.images.metadata import read_request
from flux_core.main import main
from flux_core.request.generation import GenerationRequest
from flux_core.server.forms import capabilities
from flux_core.server.guard import LARGEST
from flux_core.server.jobs import Job, QueueFull, Worker
from flux_core.variants import VARIANTS


@pytest.fixture(scope="module")
def idle(pipeline, tmp_path_factory):
    """A server that refuses."""
    server = Running(pipeline, tmp_path_factory.mktemp("idle"))
    yield server
    server.close()


def test_the_client_of_openai_gets_the_pictures_of_the_command(start, pipeline, tmp_path):
    server = start()
    client = OpenAI(base_url=f"{server.url}/v1", api_key="any")
    assert [model.id for model in client.models.list()] == ["flux-mini"]
    given = {"num_inference_steps": 2, "seed": 5, "guidance_scale": 3}
    answer = client.images.generate(prompt="a fox", model="flux-mini", n=2, size="128x128", extra_body=given)
    found = [Image.open(io.BytesIO(base64.b64decode(one.b64_json))) for one in answer.data]
    expected = pipeline.generate("a fox", 5, width=128, height=128, num_steps=2, guidance=3.0, num_images=2)
    assert all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["flux-mini_seed5.png", "flux-mini_seed6.png"]
    assert read_request(tmp_path / "flux-mini_seed6.png").guidance == 3
    with pytest.raises(BadRequestError, match="--width 4096 is not among"):
        client.images.generate(prompt="a fox", size="4096x4096")


def test_a_whole_request_comes_with_its_plan(start, pipeline):
    server = start()
    plan = [{"kind": "skip", "blocks": ["layer.6"]}]
    own = {"prompt": "a fox", "width": 128, "height": 128, "num_steps": 2, "seed": 5, "plan": plan}
    answer = server.client.post("/v1/images/generations", json={"flux_core": own, "output_format": "webp"}).json()
    image = Image.open(io.BytesIO(base64.b64decode(answer["data"][0]["b64_json"])))
    assert image.format == "WEBP" and image.size == (128, 128)
    (path,) = server.worker.folder.iterdir()
    assert [entry.kind for entry in read_request(path).plan] == ["skip"]


def test_a_picture_is_edited_as_an_init_image(start, pipeline):
    server = start()
    given = io.BytesIO()
    Image.new("RGB", (64, 64), "navy").save(given, "png")
    client = OpenAI(base_url=f"{server.url}/v1", api_key="any")
    own = {"num_inference_steps": 4, "seed": 5, "strength": 0.5}
    answer = client.images.edit(image=given.getvalue(), prompt="a fox", size="128x128", extra_body=own)
    found = Image.open(io.BytesIO(base64.b64decode(answer.data[0].b64_json)))
    fields = {"width": 128, "height": 128, "num_steps": 4, "strength": 0.5}
    (expected,) = pipeline.generate("a fox", 5, init_image=Image.open(given), **fields)
    assert np.array_equal(found, expected)
    for files in ({}, {"image": b"GIF89a"}, {"image": given.getvalue(), "mask": given.getvalue()}):
        files = {name: (name, data) for name, data in files.items()} or {"other": ("x", b"")}
        assert server.client.post("/v1/images/edits", data={"prompt": "x"}, files=files).status_code == 400


def test_a1111s_endpoints_draw_and_say_what_they_cannot(start, pipeline):
    server = start()
    body = {
        "prompt": "a fox", "negative_prompt": "", "steps": 2, "cfg_scale": 1, "distilled_cfg_scale": 3, "seed": 5,
        "width": 128, "height": 128, "sampler_name": "Euler", "batch_size": 2, "restore_faces": False, "styles": [],
        "denoising_strength": 0.7, "override_settings": {"sd_model_checkpoint": "flux-mini"}, "send_images": True,
    }  # fmt: skip
    answer = server.client.post("/sdapi/v1/txt2img", json=body).json()
    found = [Image.open(io.BytesIO(base64.b64decode(data))) for data in answer["images"]]
    expected = pipeline.generate("a fox", 5, width=128, height=128, num_steps=2, guidance=3.0, num_images=2)
    assert all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True))
    assert json.loads(answer["info"])["all_seeds"] == [5, 6]
    source = {"init_images": ["data:image/png;base64," + answer["images"][0]], "denoising_strength": 0.5}
    again = server.client.post("/sdapi/v1/img2img", json=body | source | {"batch_size": 1, "steps": 4}).json()
    assert len(again["images"]) == 1 and "init_images" not in again["parameters"]
    for wrong in (
        {"sampler_name": "DPM++ 2M"}, {"enable_hr": True}, {"init_images": ["?"]}, {"n_iter": 0}, {"n_iter": 9},
        {"override_settings": {"sd_model_checkpoint": "x"}}, {"alwayson_scripts": {"x": 1}},
    ):  # fmt: skip
        assert server.client.post("/sdapi/v1/txt2img", json=body | wrong).status_code == 400, wrong
    assert server.client.get("/sdapi/v1/options").json() == {"sd_model_checkpoint": "flux-mini"}
    assert server.client.post("/sdapi/v1/options", json={"sd_model_checkpoint": "x"}).status_code == 400
    assert server.client.get("/sdapi/v1/sd-models").json()[0]["model_name"] == "flux-mini"
    job = server.job(num_steps=400).json()
    server.wait(job["id"], "drawing")
    hidden = server.client.get("/sdapi/v1/progress?skip_current_image=true").json()
    assert hidden["state"]["sampling_steps"] == 400 and not server.worker.jobs[job["id"]].watched
    while (shown := server.client.get("/sdapi/v1/progress").json()["current_image"]) is None:
        assert server.worker.current is not None
    preview = Image.open(io.BytesIO(base64.b64decode(shown)))
    assert (preview.format, preview.size) == ("PNG", (16, 16)) and hidden["current_image"] is None
    server.client.post("/sdapi/v1/interrupt")
    assert server.wait(job["id"], "cancelled")


def test_a_job_has_a_place_is_cancelled_within_a_step_and_the_next_is_drawn(start):
    server = start()
    first, second, third = (server.job(num_steps=steps).json() for steps in (400, 3, 1))
    assert server.wait(first["id"], "drawing")["steps"] == 400
    assert server.client.get(f"/v1/jobs/{third['id']}").json()["position"] == 2
    assert server.client.post(f"/v1/jobs/{second['id']}/cancel", json={}).json()["state"] == "cancelled"
    server.client.post(f"/v1/jobs/{first['id']}/cancel", json={})
    assert server.wait(first["id"], "cancelled")["step"] < 400
    done = server.wait(third["id"], "done")
    picture = server.client.get(done["pictures"][0])
    assert picture.headers["content-type"] == "image/png" and Image.open(io.BytesIO(picture.content)).size == (128, 128)
    assert server.client.post(f"/v1/jobs/{third['id']}/cancel", json={}).json()["state"] == "done"
    for path in ("1", "x"):
        assert server.client.get(f"/v1/jobs/{third['id']}/pictures/{path}").json()["error"]["type"] == "not_found_error"
    server.worker.jobs[third["id"]].paths[0].unlink()
    gone = server.client.get(done["pictures"][0])
    assert gone.status_code == 404 and "is no longer there" in gone.text
    assert server.client.get("/v1/jobs/nonsense").status_code == 404


def test_a_request_is_dropped_when_its_client_goes(start):
    server = start()
    with pytest.raises(httpx.ReadTimeout):
        server.client.post("/v1/images/generations", json={"prompt": "a fox", "num_steps": 400, **SMALL}, timeout=0.5)
    (job,) = server.worker.jobs.values()
    assert job.over.wait(20) and job.state == "cancelled"
    assert server.wait(server.job(num_steps=1).json()["id"], "done")


@pytest.mark.parametrize(
    ("body", "finding"),
    [
        ({}, "prompt"),
        ({"prompt": " "}, "has no words"),
        ({"prompt": "x", "n": 1000}, "n must be 1 to 10"),
        ({"prompt": "x", "n": 0}, "num-images"),
        ({"prompt": "x", "size": "1x1x1"}, "size must be WIDTHxHEIGHT"),
        ({"prompt": "x", "size": "99999x99999"}, "--width must be"),
        ({"prompt": "x", "size": "٣x٣"}, "size must be"),
        ({"prompt": "x", "sede": 1}, "Did you mean seed?"),
        ({"prompt": "x", "model": "flux-dev"}, "flux-mini is loaded here"),
        ({"prompt": "x", "model": "nonsense"}, "unknown model name"),
        ({"prompt": "x", "response_format": "url"}, "b64_json"),
        ({"prompt": "x", "output_format": "gif"}, "png, jpeg, webp"),
        ({"prompt": "x", "stream": "perhaps"}, "stream must be true or false"),
        ({"prompt": "x", "stream": True, "n": 2}, "a stream has one picture, not 2"),
        ({"prompt": "x", "stream": True, "partial_images": 4}, "partial_images must be 0 to 3"),
        ({"prompt": "x", "stream": True, "partial_images": True}, "partial_images must be 0 to 3"),
        ({"prompt": "x", "partial_images": 1}, "does nothing without stream"),
        ({"prompt": "x", "force": True}, "force cannot be set from outside"),
        ({"prompt": "x", "dtype": "float32"}, "dtype cannot be set from outside"),
        ({"prompt": "x", "n": 2, "num_images": 3}, "num_images is said twice"),
        ({"prompt": "x", "size": "128x128", "width": 256}, "width is said twice"),
        ({"prompt": "x", "strength": 0.5}, "does nothing without a picture"),
        ({"prompt": "x" * 20_001}, "at most 20,000 characters"),
        ({"flux_core": {"prompt": "x", "functions": ["f"]}}, "drawn with functions"),
        ({"prompt": "x", "init_image": {"file": "/etc/passwd"}}, "names something on this machine"),
        ({"prompt": "x", "flux_core": []}, "must be an object"),
        ({"prompt": "x", "plan": [{"kind": "custom", "fn": "a.py:b"}]}, "names something on this machine"),
        ({"prompt": "x", "plan": [{"kind": "capture", "sites": ["vec"], "to": "/tmp/x"}]}, "names something"),
        ({"flux_core": {"prompt": "x", "plan": [{"kind": "lora", "name": "x"}]}}, "LoRA"),
        ({"flux_core": {"prompt": "x", "plan": [{"kind": "nonsense"}]}}, "nonsense"),
        ({"prompt": "x", "seed": 2**70}, "seed"),
        ({"prompt": "x", "num_inference_steps": 10**9}, "num-steps"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_with_the_sentence_of_the_command(idle, body, finding):
    answer = idle.client.post("/v1/images/generations", json=body)
    error = answer.json()["error"]
    assert (answer.status_code, error["type"]) == (400, "invalid_request_error") and finding in error["message"]
    assert not idle.worker.jobs


@pytest.mark.parametrize("data", [b"", b"{", b"[1]", b"[" * 100_000, "\ud800".encode("utf-8", "surrogatepass")])
def test_a_body_that_is_no_object_is_refused(idle, data):
    answer = idle.client.post("/v1/jobs", content=data, headers={"content-type": "application/json"})
    assert answer.status_code == 400 and "error" in answer.json()


def test_a_browser_gets_the_key_as_a_cookie(start):
    server = start(key="hush é")
    assert server.client.get("/?key=hus").status_code == 401
    answer = server.client.get("/", params={"key": "hush é"})
    cookie = answer.headers["set-cookie"]
    assert answer.status_code == 303 and answer.headers["location"] == "/"
    assert "HttpOnly" in cookie and "SameSite=Strict" in cookie
    sent = {"cookie": f"other=1; {cookie.partition(';')[0]}"}
    assert server.client.get("/v1/models", headers=sent).status_code == 200
    for wrong in ("flux_core_key=hus", "flux_core_key", "other=hush"):
        server.client.cookies.clear()
        assert server.client.get("/v1/models", headers={"cookie": wrong}).status_code == 401
    server.client.cookies.clear()
    assert server.client.get("/v1/models", params={"key": "hush é"}).status_code == 401  # for the page alone


def test_other_sites_and_hosts_are_refused_on_every_route(start):
    server = start()
    given = {"content-type": "application/json"}
    for method, path in (("GET", "/health"), ("GET", "/v1/models"), ("POST", "/v1/jobs"), ("GET", "/nonsense")):
        for headers in ({"host": "evil.example"}, {"origin": "http://evil.example"}, {"origin": "null"}, {"host": ""},
                        {"origin": "http://["}, {"host": "["}):  # fmt: skip
            answer = server.client.request(method, path, headers=given | headers)
            assert answer.status_code == 403, (path, headers)
    body = json.dumps({"prompt": "x"})
    assert server.client.post("/v1/jobs", content=body, headers={"content-type": "text/plain"}).status_code == 415
    same = server.client.get("/health", headers={"origin": server.url})
    assert same.json() == {"status": "ok", "waiting": 0} and "access-control-allow-origin" not in same.headers
    assert server.client.get("/docs").status_code == 404 and not server.worker.jobs
    form = server.client.post("/v1/jobs", data={"prompt": "x"}, files={"image": b"x"})
    assert form.status_code == 415
    wrong = server.client.get("/v1/jobs")
    assert wrong.status_code == 405 and wrong.headers["allow"] == "POST"


def test_a_head_is_answered_as_a_get_without_a_body(start):
    server = start()
    for path, status in (("/health", 200), ("/v1/models", 200), ("/sdapi/v1/loras", 200), ("/v1/jobs/x", 404)):
        whole, head = server.client.get(path), server.client.head(path)
        assert head.status_code == whole.status_code == status and head.content == b""
        assert [head.headers[x] == whole.headers[x] for x in ("content-type", "content-length")] == [True] * 2
    assert server.client.head("/v1/jobs").status_code == 405
    assert server.client.head("/health", headers={"host": "evil.example"}).status_code == 403


def test_a_body_that_is_too_large_is_refused_whatever_it_says_of_itself(start):
    server = start()
    given = {"content-type": "application/json"}
    assert server.client.post("/v1/jobs", content=b" " * (LARGEST + 1), headers=given).status_code == 413
    parts = (b" " * 2**20 for _ in range(LARGEST // 2**20 + 2))  # chunked: no length
    assert server.client.post("/v1/jobs", content=parts, headers=given).status_code == 413
    assert server.client.get("/health").status_code == 200


def test_with_a_key_nobody_comes_in_without_it(start):
    server = start(hosts=(), key="hush")
    for headers in ({}, {"authorization": "Bearer hus"}, {"authorization": "Basic hush"}, {"authorization": b"\xe9"}):
        answer = server.client.get("/v1/models", headers=headers)
        assert answer.status_code == 401 and "hush" not in answer.text
    assert server.client.get("/v1/models", headers={"authorization": "Bearer hush", "host": "any"}).status_code == 200


def test_a_full_queue_says_so_and_goes_on(start):
    server = start(most=1)
    first = server.job(num_steps=400).json()
    server.wait(first["id"], "drawing")
    second = server.job(num_steps=1).json()
    full = server.job(num_steps=1)
    assert full.status_code == 429 and full.json()["error"]["type"] == "rate_limit_error"
    server.client.post(f"/v1/jobs/{first['id']}/cancel", json={})
    assert server.wait(second["id"], "done")


def test_a_folder_that_is_gone_fails_its_job_alone(start, tmp_path):
    server = start()
    kept, server.worker.folder = server.worker.folder, tmp_path / "gone"
    failed = server.wait(server.job(num_steps=1).json()["id"], "failed")
    assert "gone" in failed["error"] and "Traceback" not in failed["error"]
    server.worker.folder = kept
    assert server.wait(server.job(num_steps=1).json()["id"], "done")


def test_two_clients_at_once_get_their_own_pictures(start):
    server, found = start(), {}

    def ask(seed):
        body = {"prompt": f"a fox {seed}", "num_steps": 1, **SMALL, "seed": seed}
        answer = httpx.post(f"{server.url}/v1/images/generations", json=body, timeout=60).json()
        found[seed] = Image.open(io.BytesIO(base64.b64decode(answer["data"][0]["b64_json"])))

    threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(6)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    assert {seed: json.loads(image.info["flux_core"])["seed"] for seed, image in found.items()} == {
        n: n for n in range(6)
    }


def test_notes_are_told_and_what_recorded_another_drawing_is_not_taken(start):
    server = start()
    own = {"prompt": "x", "seed": 5, "num_steps": 1, "width": 130, "height": 128, "version": "9", "weights": {"a": "b"}}
    answer = server.client.post("/v1/images/generations", json={"flux_core": own}).json()
    assert any("multiples of 16" in line for line in answer["notes"])
    (path,) = server.worker.folder.iterdir()
    found = read_request(path)
    assert found.version != "9" and "a" not in found.weights


def test_a_worker_that_ends_takes_nothing_and_tells_all_that_wait(pipeline, tmp_path):
    worker, request = Worker(pipeline, tmp_path, 9), GenerationRequest(name="flux-mini", prompt="x", num_steps=400)
    jobs = [worker.submit(Job([request])) for _ in range(3)]
    worker.close()
    assert [job.state for job in jobs] == ["cancelled"] * 3 and all(job.over.is_set() for job in jobs)
    with pytest.raises(QueueFull, match="is ending"):
        worker.submit(Job([request]))


def test_capabilities_are_those_of_the_table():
    found = capabilities("flux-mini")
    assert found["fields"]["width"] == {"type": "int", "help": "pixels", "default": 256, "minimum": 128, "maximum": 512}
    assert found["fields"]["num_images"]["maximum"] == 10 and found["model"] in VARIANTS
    assert not {"init_image", "force", "dtype", "name"} & found["fields"].keys()


def test_without_the_extra_it_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert main(["serve"]) == 2 and 'pip install "flux1-core[server]"' in capsys.readouterr().err


def test_another_address_needs_a_key(monkeypatch, capsys):
    monkeypatch.delenv("FLUX_CORE_KEY", raising=False)
    assert main(["serve", "--host", "0.0.0.0"]) == 2 and "FLUX_CORE_KEY" in capsys.readouterr().err
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert main(["serve", "--port", str(taken.getsockname()[1])]) == 2
    assert "another --port" in capsys.readouterr().err


def test_no_part_of_an_answer_waits_for_the_last_to_be_acknowledged():
    with listen("127.0.0.1", 0) as there, socket.create_connection(there.getsockname()), there.accept()[0] as accepted:
        assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_the_command_answers_until_ctrl_c(tmp_path):
    with command(tmp_path) as (process, address):
        body = {"prompt": "a fox", "num_steps": 600, "seed": 1}
        jobs = [httpx.post(f"{address}/v1/jobs", json=body).json() for _ in range(3)]
        url = f"{address}/v1/images/generations"
        waiting = threading.Thread(target=httpx.post, args=(url,), kwargs={"json": body, "timeout": 90})
        waiting.start()
        time.sleep(0.3)
        assert jobs[2]["position"] >= 2
        process.send_signal(signal.SIGINT)
        assert process.wait(30) in (0, 130)
        waiting.join()
        assert "Traceback" not in process.stderr.read()
