"""The endpoints: OpenAI's for pictures, A1111's, jobs with state, position and cancel, and what the server can do."""

import asyncio
import json
import re
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import DiskError, FluxError, MemoryShortage, NonFiniteError, UsageError
from ..images.given import NOTHING, Given
from ..request.generation import GenerationRequest
from . import a1111
from .events import NEVER_STORED, Streamed, event, events
from .forms import LORAS, NO_RECORDS, OWN, capabilities, format_of, previews_of, request_of
from .guard import DRAINED, LARGEST, LOOPBACK, Guard, error_body
from .jobs import Broken, Job, QueueFull, Worker
from .pictures import Ended, Missing, base64_of, pictures_of, read
from .shelf import Shelf
from .uploads import given_of, transparent

if TYPE_CHECKING:
    from fastapi import FastAPI

LOOKED = 0.5
"""seconds between two looks at whether a client is still there"""
FILES = 17
"""pictures of one form, as OpenAI has it, and a mask"""
_INSIDE = re.compile(rf"({OWN}|{LORAS})\[(.+)\]")
"""how a form spells a key of an object"""


class TooLarge(UsageError):
    """A body has more bytes than it may."""


STATUS: dict[type[FluxError], int] = {
    QueueFull: 429, Missing: 404, TooLarge: 413, Ended: 410,
    Broken: 500, MemoryShortage: 500, DiskError: 500, NonFiniteError: 500,
}  # fmt: skip
"""of errors; of all others 400"""


def make_app(
    worker: Worker,
    hosts: tuple[str, ...] = LOOPBACK,
    key: str | None = None,
    loras: Path | None = None,
    extend: "Callable[[FastAPI, Shelf], re.Pattern[str]] | None" = None,
) -> Guard:
    """The application for an ASGI server. UsageError with the pip line where FastAPI is missing.

    loras: a folder of LoRAs that requests may name. extend: adds to the application, and returns the paths that it has
    then.
    """
    try:
        from fastapi import FastAPI, HTTPException, Request
        from fastapi.exceptions import RequestValidationError
        from fastapi.responses import JSONResponse, Response, StreamingResponse
        from starlette.background import BackgroundTask
        from starlette.requests import ClientDisconnect
    except ImportError:
        raise UsageError('the server needs FastAPI and uvicorn. Next: pip install "flux1-core[server]"') from None

    model, shelf = worker.pipeline.variant.name, Shelf(loras, worker.pipeline.variant.params)

    @asynccontextmanager
    async def lifespan(app: Any) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(worker.close)

    app = FastAPI(  # pages of documentation fetch from elsewhere, a redirect would go where Host says
        docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False, lifespan=lifespan
    )

    def refused(status: int, message: str) -> JSONResponse:
        return JSONResponse(error_body(status, message), status)

    def said(error: FluxError) -> tuple[int, str]:
        return STATUS.get(type(error), 400), str(error)

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
        return refused(*said(error))

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

    async def form_of(request: Request) -> tuple[dict[str, Any], list[bytes], bytes | None]:
        """The fields of a form, and the bytes of its pictures and its mask."""
        try:
            async with request.form(max_files=FILES, max_fields=100) as form:
                body = nested({key: x for key, x in form.multi_items() if isinstance(x, str)})
                files = [(key, await x.read()) for key, x in form.multi_items() if not isinstance(x, str)]
        except HTTPException as error:
            raise UsageError(f"the body is no form: {error.detail}") from None
        if others := [key for key, _ in files if key not in ("image", "image[]", "mask")]:
            raise UsageError(f"there is no field {others[0][:40]!a} for a file. Next: image, image[] or mask")
        images = [data for key, data in files if key != "mask" and data]
        if not images:
            raise UsageError("there is no picture in the field image")
        return body, images, dict(files).get("mask") or None

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
        return {**capabilities(model), LORAS: list(shelf.files())}

    async def drawn(request: Request, wanted: GenerationRequest, source: Given = NOTHING) -> Job:
        """The job of a request, over; it is given up when its client goes. QueueFull."""
        over, loop = asyncio.Event(), asyncio.get_running_loop()
        job = Job(wanted.images(), source, when_over=lambda: loop.call_soon_threadsafe(over.set))
        worker.submit(job)
        while not over.is_set():
            with suppress(TimeoutError):
                await asyncio.wait_for(over.wait(), LOOKED)
            if not over.is_set() and await request.is_disconnected():
                worker.cancel(job)
        return job

    async def streamed(job: Streamed, kind: str, what: str) -> AsyncIterator[bytes]:
        """`events`, the last of which may be an error."""
        try:
            async for one in events(job, kind, what):
                yield one
        except FluxError as error:
            yield event("error", {"type": "error", **error_body(*said(error))})

    async def answer(
        request: Request, body: dict[str, Any], what: str, source: Given = NOTHING, records: Any = NO_RECORDS
    ) -> Any:
        """What OpenAI's endpoints answer: the pictures, or a stream of events. It is given up when its client goes."""
        kind, previews = format_of(body), previews_of(body)
        wanted = await asyncio.to_thread(request_of, body, model, shelf, source, records)
        if previews is None:
            job = await drawn(request, wanted, source)
            files = await asyncio.to_thread(pictures_of, job, kind)
            data = [{"b64_json": base64_of(data), "revised_prompt": None} for data in files]
            return {"created": int(time.time()), "output_format": kind, "data": data, "notes": job.notes}
        if wanted.num_images > 1:
            raise UsageError(f"a stream has one picture, not {wanted.num_images}. Next: n 1, or leave stream out")
        one = Streamed(wanted.images(), source, previews=previews)
        worker.submit(one)
        return StreamingResponse(
            streamed(one, kind, what),
            headers=NEVER_STORED,
            media_type="text/event-stream",
            background=BackgroundTask(worker.cancel, one),
        )

    @app.post("/v1/images/generations", response_model=None)
    async def generations(request: Request) -> Any:
        return await answer(request, await body_of(request), "image_generation")

    @app.post("/v1/images/edits", response_model=None)
    async def edits(request: Request) -> Any:
        body, images, mask = await form_of(request)
        given = await asyncio.to_thread(lambda: given_of(model, images, transparent(mask)))
        return await answer(request, body, "image_edit", *given)

    async def of_a1111(request: Request) -> dict[str, Any]:
        body = await body_of(request)
        job = await drawn(request, *await asyncio.to_thread(a1111.request_and_source, body, model, shelf))
        return a1111.answer_of(job, body, await asyncio.to_thread(pictures_of, job, "png"))

    @app.post("/sdapi/v1/txt2img")
    async def txt2img(request: Request) -> dict[str, Any]:
        return await of_a1111(request)

    @app.post("/sdapi/v1/img2img")
    async def img2img(request: Request) -> dict[str, Any]:
        return await of_a1111(request)

    @app.get("/sdapi/v1/progress")
    async def progress(skip_current_image: bool = False) -> dict[str, Any]:
        return a1111.progress_of(worker.current, worker.waiting, not skip_current_image)

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
    async def sd_loras() -> list[dict[str, Any]]:
        return [{"name": x, "alias": x, "path": path.name, "metadata": {}} for x, path in shelf.files().items()]

    @app.post("/v1/jobs")
    async def new_job(request: Request) -> JSONResponse:
        body = await body_of(request)
        if previews_of(body) is not None:
            raise UsageError("a job is no stream: its state is asked for. Next: leave stream out")
        wanted = await asyncio.to_thread(request_of, body, model, shelf)
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

    for route in app.routes:
        if "GET" in (methods := getattr(route, "methods", None) or set()):
            methods.add("HEAD")
    return Guard(app, hosts, key, extend(app, shelf) if extend else None)


def nested(form: dict[str, str]) -> dict[str, Any]:
    """The fields of a form, whose `loras[style]` is a key of an object. UsageError for an object that is text, too."""
    body: dict[str, Any] = {}
    for key, value in form.items():
        if (found := _INSIDE.fullmatch(key)) is None:
            body[key] = value
        elif isinstance(inside := body.setdefault(found[1], {}), dict):
            inside[found[2]] = value
        else:
            raise UsageError(f"{found[1]} is said twice")
    return body
