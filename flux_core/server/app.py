"""The endpoints: OpenAI's for pictures, A1111's, jobs with state, position and cancel, and what the server can do."""

import asyncio
import base64
import io
import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

from PIL import Image

from ..errors import DiskError, FluxError, MemoryShortage, NonFiniteError, UsageError
from ..request.generation import GenerationRequest
from . import a1111
from .a1111 import uploaded
from .forms import capabilities, format_of, request_of
from .guard import DRAINED, LARGEST, LOOPBACK, Guard, error_body
from .jobs import Broken, Job, QueueFull, Worker

LOOKED = 0.5
"""seconds between two looks at whether a client is still there"""


class Missing(UsageError):
    """What a request names is not there."""


class TooLarge(UsageError):
    """A body has more bytes than it may."""


class Ended(FluxError):
    """A job was cancelled."""


STATUS: dict[type[FluxError], int] = {
    QueueFull: 429, Missing: 404, TooLarge: 413, Ended: 410,
    Broken: 500, MemoryShortage: 500, DiskError: 500, NonFiniteError: 500,
}  # fmt: skip
"""of errors; of all others 400"""


def make_app(worker: Worker, hosts: tuple[str, ...] = LOOPBACK, key: str | None = None) -> Guard:
    """The application for an ASGI server. UsageError with the pip line where FastAPI is missing."""
    try:
        from fastapi import FastAPI, HTTPException, Request
        from fastapi.exceptions import RequestValidationError
        from fastapi.responses import JSONResponse, Response
        from starlette.requests import ClientDisconnect
    except ImportError:
        raise UsageError('the server needs FastAPI and uvicorn. Next: pip install "flux1-core[server]"') from None

    model = worker.pipeline.variant.name

    @asynccontextmanager
    async def lifespan(app: Any) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(worker.close)

    app = FastAPI(  # pages of documentation fetch from elsewhere, a redirect would go where Host says
        docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False, lifespan=lifespan
    )

    def refused(status: int, message: str) -> JSONResponse:
        return JSONResponse(error_body(status, message), status)

    @app.exception_handler(404)
    async def not_found(request: Request, error: Exception) -> JSONResponse:
        return refused(404, f"there is no {request.url.path[:80]!a} here")

    @app.exception_handler(405)
    async def not_allowed(request: Request, error: HTTPException) -> JSONResponse:
        found = refused(405, f"{request.url.path[:80]!a} takes no {request.method}")
        found.headers.update(error.headers or {})
        return found

    @app.exception_handler(RequestValidationError)
    async def not_valid(request: Request, error: Exception) -> JSONResponse:
        return refused(404, f"there is no {request.url.path[:80]!a} here")

    @app.exception_handler(ClientDisconnect)
    async def gone(request: Request, error: Exception) -> Response:
        return Response(status_code=400)

    @app.exception_handler(FluxError)
    async def ours(request: Request, error: FluxError) -> JSONResponse:
        return refused(STATUS.get(type(error), 400), str(error))

    async def body_of(request: Request) -> dict[str, Any]:
        data, taken = bytearray(), 0
        async for part in request.stream():
            taken += len(part)
            if taken <= LARGEST:
                data += part
            elif taken > DRAINED:
                break
        if taken > LARGEST:
            raise TooLarge(f"a request has at most {LARGEST:,} bytes")
        try:
            body = json.loads(data)
        except (ValueError, RecursionError):
            raise UsageError("the body is no JSON") from None
        if not isinstance(body, dict):
            raise UsageError("the body must be an object")
        return body

    async def form_of(request: Request) -> tuple[dict[str, Any], bytes]:
        """The fields of a form, and the bytes of its one picture."""
        try:
            async with request.form(max_files=2, max_fields=100) as form:
                files = {key: x for key, x in form.multi_items() if not isinstance(x, str)}
                body: dict[str, Any] = {key: x for key, x in form.multi_items() if isinstance(x, str)}
                picture = files.pop("image", None) or files.pop("image[]", None)
                data = b"" if picture is None else await picture.read()
        except HTTPException as error:
            raise UsageError(f"the body is no form: {error.detail}") from None
        if files:
            raise UsageError(f"{next(iter(files))[:40]} is not there yet. Next: leave it out")
        if not data:
            raise UsageError("there is no picture in the field image")
        return body, data

    def job_of(name: str) -> Job:
        if (job := worker.jobs.get(name)) is None:
            raise Missing(f"there is no job {name[:40]!a}, or it is long over")
        return job

    def told(job: Job) -> dict[str, Any]:
        return {
            "id": job.id, "state": job.state, "position": worker.position(job), "step": job.step, "steps": job.steps,
            "pictures": [f"/v1/jobs/{job.id}/pictures/{i}" for i in range(len(job.paths))], "notes": job.notes,
            "error": None if job.error is None else str(job.error),
        }  # fmt: skip

    @app.get("/health")
    async def health() -> dict[str, Any]:
        return {"status": "ok", "waiting": worker.waiting}

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [{"id": model, "object": "model", "created": 0, "owned_by": "flux_core"}]}

    @app.get("/v1/capabilities")
    async def can() -> dict[str, Any]:
        return capabilities(model)

    async def drawn(request: Request, wanted: GenerationRequest, source: Image.Image | None = None) -> Job:
        """The job of a request, done; it is given up when its client goes. QueueFull, Ended, and a picture's errors."""
        over, loop = asyncio.Event(), asyncio.get_running_loop()
        job = Job(wanted.images(), source, when_over=lambda: loop.call_soon_threadsafe(over.set))
        worker.submit(job)
        while not over.is_set():
            with suppress(TimeoutError):
                await asyncio.wait_for(over.wait(), LOOKED)
            if not over.is_set() and await request.is_disconnected():
                worker.cancel(job)
        if job.error is not None:
            raise job.error
        if job.state != "done":
            raise Ended("the job was cancelled")
        return job

    async def pictures_of(job: Job, kind: str) -> dict[str, Any]:
        files = await asyncio.to_thread(bytes_of, job, kind)
        data = [{"b64_json": base64.b64encode(data).decode(), "revised_prompt": None} for data in files]
        return {"created": int(time.time()), "output_format": kind, "data": data, "notes": job.notes}

    @app.post("/v1/images/generations")
    async def generations(request: Request) -> dict[str, Any]:
        body = await body_of(request)
        kind, wanted = format_of(body), await asyncio.to_thread(request_of, body, model)
        return await pictures_of(await drawn(request, wanted), kind)

    @app.post("/v1/images/edits")
    async def edits(request: Request) -> dict[str, Any]:
        body, data = await form_of(request)
        source, origin = await asyncio.to_thread(uploaded, data)
        kind, wanted = format_of(body), await asyncio.to_thread(request_of, body, model, origin)
        return await pictures_of(await drawn(request, wanted, source), kind)

    async def of_a1111(request: Request) -> dict[str, Any]:
        body = await body_of(request)
        job = await drawn(request, *await asyncio.to_thread(a1111.request_and_source, body, model))
        return a1111.answer_of(job, body, await asyncio.to_thread(bytes_of, job, "png"))

    @app.post("/sdapi/v1/txt2img")
    async def txt2img(request: Request) -> dict[str, Any]:
        return await of_a1111(request)

    @app.post("/sdapi/v1/img2img")
    async def img2img(request: Request) -> dict[str, Any]:
        return await of_a1111(request)

    @app.get("/sdapi/v1/progress")
    async def progress() -> dict[str, Any]:
        return a1111.progress_of(worker.current, worker.waiting)

    @app.post("/sdapi/v1/interrupt")
    async def interrupt() -> dict[str, Any]:
        if (job := worker.current) is not None:
            worker.cancel(job)
        return {}

    @app.get("/sdapi/v1/options")
    async def options() -> dict[str, Any]:
        return {"sd_model_checkpoint": model}

    @app.post("/sdapi/v1/options")
    async def set_options(request: Request) -> dict[str, Any]:
        a1111.check_settings(await body_of(request), model)
        return {}

    @app.get("/sdapi/v1/sd-models")
    async def sd_models() -> list[dict[str, Any]]:
        return [{"title": model, "model_name": model, "hash": None, "sha256": None, "filename": model, "config": None}]

    @app.get("/sdapi/v1/samplers")
    async def samplers() -> list[dict[str, Any]]:
        return [{"name": a1111.SAMPLER, "aliases": ["euler"], "options": {}}]

    @app.get("/sdapi/v1/loras")
    async def loras() -> list[Any]:
        return []

    @app.post("/v1/jobs")
    async def new_job(request: Request) -> JSONResponse:
        wanted = await asyncio.to_thread(request_of, await body_of(request), model)
        job = worker.submit(Job(wanted.images()))
        return JSONResponse(told(job), 202)

    @app.get("/v1/jobs/{name}")
    async def one_job(name: str) -> dict[str, Any]:
        return told(job_of(name))

    @app.post("/v1/jobs/{name}/cancel")
    async def cancel(name: str) -> dict[str, Any]:
        job = job_of(name)
        worker.cancel(job)
        return told(job)

    @app.get("/v1/jobs/{name}/pictures/{number}")
    async def picture(name: str, number: int) -> Response:
        job = job_of(name)
        if not 0 <= number < len(job.paths):
            raise Missing(f"job {job.id} has {len(job.paths)} pictures")
        return Response(read(job.paths[number]), media_type="image/png")

    return Guard(app, hosts, key)


def read(path: Path) -> bytes:
    """A picture's file. Missing."""
    try:
        return path.read_bytes()
    except OSError:
        raise Missing(f"{path.name} is no longer there") from None


def bytes_of(job: Job, kind: str) -> list[bytes]:
    """The files of a job's pictures, as they are or in another format. Missing."""
    files = [read(path) for path in job.paths]
    return files if kind == "png" else [_converted(data, kind) for data in files]


def _converted(data: bytes, kind: str) -> bytes:
    out = io.BytesIO()
    Image.open(io.BytesIO(data)).convert("RGB").save(out, kind, quality=95)
    return out.getvalue()
