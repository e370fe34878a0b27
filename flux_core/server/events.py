"""A picture while it is drawn, as server-sent events that OpenAI's clients read: a few previews, then the picture."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from PIL import Image

from .jobs import Job
from .pictures import base64_of, encoded, enlarged, pictures_of

if TYPE_CHECKING:
    from ..pipeline import Pipeline
    from ..sampling import Step

NEVER_STORED = {"cache-control": "no-store"}


@dataclass(eq=False)
class Streamed(Job):
    """A job of one picture that hands previews to the event loop in which it was made."""

    previews: int = 0
    """so many, after steps at equal distances; fewer where there are not as many steps before the last"""
    feed: asyncio.Queue[Image.Image | None] = field(default_factory=asyncio.Queue)
    """the previews, and None at the end"""

    def __post_init__(self) -> None:
        self.watched, self._loop = self.previews > 0, asyncio.get_running_loop()
        self._told_after = {self.steps * i // (self.previews + 1) for i in range(1, self.previews + 1)}
        self.when_over = lambda: self._put(None)

    def _put(self, preview: Image.Image | None) -> None:
        self._loop.call_soon_threadsafe(self.feed.put_nowait, preview)

    def after(self, pipeline: "Pipeline", step: "Step", before: int = 0) -> None:
        super().after(pipeline, step, before)
        if self.step in self._told_after:
            self._put(self.preview)


async def events(job: Streamed, kind: str, what: str) -> AsyncIterator[bytes]:
    """The previews of a job and its picture. The job's error, Ended, Missing.

    kind: the pictures' format. what: image_generation or image_edit.
    """
    (request,) = job.requests
    about = {
        "output_format": kind, "size": f"{request.width}x{request.height}", "quality": "auto", "background": "opaque",
    }  # fmt: skip

    def told(part: str, data: bytes, more: Mapping[str, Any]) -> bytes:
        body = {"type": f"{what}.{part}", "b64_json": base64_of(data), "created_at": int(time.time()), **about, **more}
        return event(body["type"], body)

    number = 0
    while (preview := await job.feed.get()) is not None:
        data = await asyncio.to_thread(encoded, enlarged(preview, request), kind)
        yield told("partial_image", data, {"partial_image_index": number})
        number += 1
    (data,) = await asyncio.to_thread(pictures_of, job, kind)
    yield told("completed", data, {"usage": None, "notes": job.notes})


def event(name: str, body: Mapping[str, Any]) -> bytes:
    """A server-sent event."""
    return f"event: {name}\ndata: {json.dumps(body)}\n\n".encode()
