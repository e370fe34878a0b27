"""What all tabs stand on: the worker, one job for each visitor, and what a visitor sees of it while it is drawn."""

import asyncio
import time
import traceback
from collections.abc import AsyncIterator, Callable, Sequence
from copy import copy, deepcopy
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from ..errors import FluxError
from ..server import pictures
from ..server.jobs import Job, Worker
from ..server.shelf import Shelf
from ..terminal import note
from ..variants import Takes

if TYPE_CHECKING:
    from ..text import TextEncoder

LOOKED = 0.01
"""seconds between two looks at a job"""
SHOWN = 0.5
"""seconds between two steps that are shown, at least: a browser paints on the cores that draw"""
RECENT = 24
"""pictures in the history"""


class Desk:
    """The worker's visitors, by gradio's name of their session."""

    def __init__(self, worker: Worker, names: Sequence[str], shelf: Shelf) -> None:
        """names: models that can be drawn with. shelf: with LoRAs, each of which gets a slider."""
        self.worker, self.names, self.shelf = worker, tuple(names), shelf
        self.loras = shelf.files()
        """which have a slider: those that were there at the start"""
        self.jobs: dict[str | None, Job] = {}
        self.seeds: dict[str | None, int] = {}
        """of what a visitor drew last"""
        self.leaving: list[Callable[[Any], None]] = []
        """called with gradio's request when a visitor has gone"""
        self.reader: TextEncoder | None = _reader(worker.pipeline.t5)

    @property
    def pipeline(self) -> Any:
        return self.worker.pipeline

    @property
    def takes(self) -> Takes:
        """What the model takes besides a prompt."""
        found: Takes = self.pipeline.variant.takes
        return found

    def begin(self, visitor: str | None, job: Job) -> Job:
        """Queue a visitor's job; the one before it is cancelled. QueueFull."""
        self.cancel(visitor)
        self.jobs[visitor] = self.worker.submit(job)
        self.seeds[visitor] = job.requests[0].seed
        return job

    def seed(self, visitor: str | None) -> int:
        """The seed of what a visitor drew last, for another look at it."""
        return self.seeds.get(visitor, 0)

    def forget(self, visitor: str | None) -> None:
        """Cancel the job of a visitor who has gone, and drop what is known of him."""
        self.cancel(visitor)
        self.seeds.pop(visitor, None)

    def cancel(self, visitor: str | None) -> None:
        """Cancel a visitor's job, if there is one."""
        if (job := self.jobs.pop(visitor, None)) is not None:
            self.worker.cancel(job)

    async def drawn(self, visitor: str | None, make: Callable[[], Job]) -> AsyncIterator[tuple[Job | None, str, bool]]:
        """A job, a line about it and whether that is an error, whenever something has changed, until it is over.

        make: returns the job, or says what is wrong with it. None: there is none.
        """
        try:
            job = self.begin(visitor, await asyncio.to_thread(make))
        except FluxError as error:
            yield None, str(error), True
            return
        except Exception as error:  # a fault of ours: gradio would show nothing
            note(traceback.format_exc())
            yield None, f"unexpected error: {type(error).__name__}", True
            return
        seen: object = None
        step, shown = 0, 0.0
        while True:
            over, now = job.over.is_set(), time.monotonic()
            state = job.state, len(job.paths), self.worker.position(job), over
            if state != seen or (job.step != step and now - shown >= SHOWN):
                shown = 0.0 if step == 0 else now  # the first step is shown at once
                seen, step = state, job.step
                yield job, self.line(job), job.error is not None
            if over:
                return
            await asyncio.sleep(LOOKED)

    def line(self, job: Job) -> str:
        """What a job does, in a line."""
        if job.error is not None:
            return str(job.error)
        if job.state == "queued":
            return f"waiting, {self.worker.position(job)} before it"
        if job.state == "drawing":
            return f"step {job.step} of {job.steps}"
        notes = "; ".join(dict.fromkeys(job.notes))
        said = [job.state, *([job.paths[-1].name] if job.paths else []), *([notes] if notes else [])]
        return ": ".join(said[:2]) + "".join(f"; {one}" for one in said[2:])

    def recent(self) -> list[str]:
        """The newest pictures of the output folder."""
        paths = (path for path in self.worker.folder.glob("*.png") if path.is_file())
        return [str(path) for path in sorted(paths, key=lambda path: path.stat().st_mtime, reverse=True)[:RECENT]]

    def picture(self, shown: str) -> str:
        """The file of the output folder that is shown under a name; a visitor can name no other."""
        return str(self.worker.folder / Path(shown).name)

    def tokens(self, prompt: str) -> str:
        """How much of a prompt T5 reads, in a line."""
        if self.reader is None:
            return ""
        number, most = len(self.reader.pieces(prompt)), self.reader.max_length
        return "; ".join([f"{number} of {most} tokens", *self.reader.notes(prompt)])


def _reader(t5: Any) -> "TextEncoder | None":
    """The text encoder with a tokenizer of its own, since the worker's thread uses the other."""
    if not hasattr(t5, "pieces"):
        return None
    found = copy(t5)
    found.tokenizer = deepcopy(t5.tokenizer)
    return found


def enlarged(job: Job) -> Image.Image | None:
    """A job's preview in the size of its picture."""
    return None if job.preview is None else pictures.enlarged(job.preview, job.requests[0])
