"""Requests in a queue, and the one worker that draws them in the order in which they came.

Pictures are drawn as the command line draws them, one after the other, and saved before anybody is told. A job is
cancelled within a step. Whatever fails is an error of its job alone: the worker goes on.
"""

import threading
import uuid
from collections import OrderedDict, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from PIL import Image

from ..errors import FluxError
from ..images.output import save_picture
from ..request.generation import GenerationRequest
from ..terminal import one_line

if TYPE_CHECKING:
    from ..pipeline import Pipeline
    from ..sampling import Step

State = Literal["queued", "drawing", "done", "failed", "cancelled"]
REMEMBERED = 1000
"""jobs that are over and may still be asked for"""


class QueueFull(FluxError):
    """As many jobs wait as may."""


class Cancelled(Exception):
    """Ends a picture between two steps."""


@dataclass(eq=False)
class Job:
    """One request, and what became of it."""

    requests: Sequence[GenerationRequest]
    """one for each picture"""
    source: Image.Image | None = None
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    state: State = "queued"
    step: int = 0
    """of `steps`, over all pictures"""
    paths: list[Path] = field(default_factory=list)
    error: str = ""
    """a sentence for people"""
    unwanted: threading.Event = field(default_factory=threading.Event)
    over: threading.Event = field(default_factory=threading.Event)

    @property
    def steps(self) -> int:
        return sum(request.num_forward_steps for request in self.requests)


class Worker:
    """A thread that draws jobs with a pipeline, and the jobs by their ids."""

    def __init__(self, pipeline: "Pipeline", folder: Path, most: int) -> None:
        """folder: for pictures. most: jobs that may wait."""
        self.pipeline, self.folder, self.most = pipeline, folder, most
        self.jobs: OrderedDict[str, Job] = OrderedDict()
        self._waiting: deque[Job] = deque()
        self._changed = threading.Condition()
        self._ends = False
        self._thread = threading.Thread(target=self._run, name="worker", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    def submit(self, job: Job) -> Job:
        """Put a job at the end of the queue. QueueFull."""
        with self._changed:
            if len(self._waiting) >= self.most:
                raise QueueFull(f"{self.most} jobs are waiting. Next: try again later")
            self.jobs[job.id] = job
            self._waiting.append(job)
            over = [one for one in self.jobs.values() if one.over.is_set()]
            for old in over[: max(0, len(over) - REMEMBERED)]:
                del self.jobs[old.id]
            self._changed.notify()
        return job

    def position(self, job: Job) -> int:
        """Jobs before it; 0 for one that is being drawn, or is over."""
        with self._changed:
            return self._waiting.index(job) + 1 if job in self._waiting else 0

    def cancel(self, job: Job) -> None:
        """Drop a job that waits, or end one that is being drawn at its next step. One that is over stays as it is."""
        job.unwanted.set()
        with self._changed:
            if job in self._waiting:
                self._waiting.remove(job)
                self._end(job, "cancelled")

    def close(self) -> None:
        """End the thread, and all jobs."""
        with self._changed:
            self._ends = True
            for job in self.jobs.values():
                job.unwanted.set()
            self._changed.notify()
        self._thread.join()
        for job in self._waiting:
            self._end(job, "cancelled")

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._ends)
                if self._ends:
                    return
                job = self._waiting.popleft()
                job.state = "drawing"
            self._draw(job)

    def _draw(self, job: Job) -> None:
        try:
            for number, request in enumerate(job.requests):
                self._draw_one(job, number, request)
            self._end(job, "done")
        except Cancelled:
            self._end(job, "cancelled")
        except FluxError as error:
            job.error = one_line(str(error))
            self._end(job, "failed")
        except Exception as error:  # a fault of ours must not stop the others
            job.error = f"unexpected error: {type(error).__name__}"
            self._end(job, "failed")

    def _draw_one(self, job: Job, number: int, request: GenerationRequest) -> None:
        before = sum(one.num_forward_steps for one in job.requests[:number])

        def on_step(step: "Step") -> None:
            if job.unwanted.is_set():
                raise Cancelled
            job.step = before + step.index + 1

        if job.unwanted.is_set():
            raise Cancelled
        image = self.pipeline.draw(request, job.source, on_step, (), (), number)
        job.paths.append(save_picture(image, self.folder, f"{request.name}_seed{request.seed}"))

    def _end(self, job: Job, state: State) -> None:
        job.state = state
        job.over.set()
