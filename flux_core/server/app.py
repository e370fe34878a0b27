"""The endpoints: OpenAI's for pictures, jobs with state, position and cancel, and what the server can do."""

import asyncio
import base64
import io
import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from PIL import Image

from ..errors import FluxError, UsageError
from .forms import capabilities, format_of, request_of
from .guard import DRAINED, LARGEST, LOOPBACK, Guard, error_body
from .jobs import Job, QueueFull, Worker

POLLED = 0.05
"""seconds between two looks at a job"""


class Missing(UsageError):
    """What a request names is not there."""


class TooLarge(UsageError):
    """A body has more bytes than it may."""


STATUS = {QueueFull: 429, Missing: 404, TooLarge: 413}
"""of errors; of all others 400"""


def make_app(worker: Worker, hosts: tuple[str, ...] = LOOPBACK, key: str | None = None) -> Guard:
    """The application for an ASGI server. UsageError with the pip line where FastAPI is missing."""
    try:
        from fastapi import FastAPI, Request
        from fastapi.responses import JSONResponse, Response
    except ImportError:
        raise UsageError('the server needs FastAPI and uvicorn. Next: pip install "flux1-core[server]"') from None

    model = worker.pipeline.variant.name

    @asynccontextmanager
    async def lifespan(app: Any) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(worker.close)

    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None, lifespan=lifespan)  # those fetch from elsewhere

    def refused(status: int, message: str) -> JSONResponse:
        return JSONResponse(error_body(status, message), status)

    @app.exception_handler(404)
    async def not_found(request: Request, error: Exception) -> JSONResponse:
        return refused(404, f"there is no {request.url.path[:80]!a} here")

    @app.exception_handler(405)
    async def not_allowed(request: Request, error: Exception) -> JSONResponse:
        return refused(404, f"{request.url.path[:80]!a} takes no {request.method}")

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

    def job_of(name: str) -> Job:
        if (job := worker.jobs.get(name)) is None:
            raise Missing(f"there is no job {name[:40]!a}, or it is long over")
        return job

    def told(job: Job) -> dict[str, Any]:
        return {
            "id": job.id, "state": job.state, "position": worker.position(job), "step": job.step, "steps": job.steps,
            "pictures": [f"/v1/jobs/{job.id}/pictures/{i}" for i in range(len(job.paths))], "error": job.error or None,
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

    @app.post("/v1/images/generations")
    async def generations(request: Request) -> JSONResponse:
        body = await body_of(request)
        kind, job = format_of(body), worker.submit(Job(request_of(body, model).images()))
        while not job.over.is_set():
            if await request.is_disconnected():
                worker.cancel(job)
            await asyncio.sleep(POLLED)
        if job.state != "done":
            return refused(500, job.error or "the job was cancelled")
        data = [{"b64_json": base64.b64encode(data).decode(), "revised_prompt": None} for data in bytes_of(job, kind)]
        return JSONResponse({"created": int(time.time()), "output_format": kind, "data": data})

    @app.post("/v1/jobs")
    async def new_job(request: Request) -> JSONResponse:
        job = worker.submit(Job(request_of(await body_of(request), model).images()))
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
        return Response(job.paths[number].read_bytes(), media_type="image/png")

    return Guard(app, hosts, key)


def bytes_of(job: Job, kind: str) -> list[bytes]:
    """The files of a job's pictures, as they are or in another format."""
    if kind == "png":
        return [path.read_bytes() for path in job.paths]
    found = []
    for path in job.paths:
        out = io.BytesIO()
        Image.open(path).convert("RGB").save(out, kind, quality=95)
        found.append(out.getvalue())
    return found
