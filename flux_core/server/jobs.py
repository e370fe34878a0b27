"""Jobs in a queue, and the one worker that does them in the order in which they came.

A `Job` draws requests as the command line draws them, one after the other, and saves each picture before anybody is
told; another kind of work is a subclass with a `run` of its own. A job is cancelled within a step. Whatever fails is an
error of its job alone: the worker goes on.
"""

import threading
import traceback
import uuid
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from PIL import Image

from ..errors import FluxError, UsageError
from ..images.given import NOTHING, Given, size_notes
from ..images.output import save_picture
from ..request.generation import GenerationRequest
from ..terminal import note
from ..variants import Variant

if TYPE_CHECKING:
    from ..pipeline import Pipeline
    from ..sampling import OnStep, Step

Load = Callable[[str | Variant], "Pipeline"]
"""a function from a model to its pipeline"""
State = Literal["queued", "drawing", "done", "failed", "cancelled"]
REMEMBERED = 1000
"""jobs that are over and may still be asked for"""


class QueueFull(FluxError):
    """As many jobs wait as may, or the server ends."""


class Broken(FluxError):
    """A fault of ours."""


class Cancelled(Exception):
    """Ends a picture between two steps."""


@dataclass(eq=False)
class Job:
    """Requests that are drawn with a pipeline, and what became of them."""

    requests: Sequence[GenerationRequest]
    """one for each picture"""
    source: Given = NOTHING
    watched: bool = False
    """whether somebody looks at a preview after each step"""
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    state: State = "queued"
    step: int = 0
    """of `steps`, over all pictures"""
    preview: Image.Image | None = None
    """of the last step, often small; None before the first, and once a picture is done"""
    paths: list[Path] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """what the command would say: a size that is cropped, words that T5 drops"""
    error: FluxError | None = None
    when_over: Callable[[], object] = lambda: None
    """called in the worker's thread"""
    unwanted: threading.Event = field(default_factory=threading.Event)
    over: threading.Event = field(default_factory=threading.Event)

    @property
    def steps(self) -> int:
        return sum(request.num_forward_steps for request in self.requests)

    def run(self, pipeline: "Pipeline", folder: Path) -> None:
        """Draw and save all pictures, in the worker's thread. Cancelled, and a picture's errors."""
        first, before = self.requests[0], 0
        self.notes += [*first.notes(), *size_notes(first, self.source)]
        self.notes += [*(line for text in first.texts for line in pipeline.text_notes(text, first.loras))]
        for number, request in enumerate(self.requests):
            image = self.draw(pipeline, request, partial(self.after, pipeline, before=before), number)
            self.save(image, folder, f"{request.name}_seed{request.seed}")
            before += request.num_forward_steps

    def draw(self, pipeline: "Pipeline", request: GenerationRequest, on_step: "OnStep", number: int) -> Image.Image:
        """The picture of one of the requests."""
        self.check()
        return pipeline.draw(request, self.source, on_step, (), (), number)

    def check(self) -> None:
        """Cancelled, if nobody wants the job any more."""
        if self.unwanted.is_set():
            raise Cancelled

    def after(self, pipeline: "Pipeline", step: "Step", before: int = 0) -> None:
        """A step callback. before: steps of earlier pictures. Cancelled."""
        self.check()
        if self.watched:
            from ..pipeline.preview import preview  # and with it torch

            self.preview = preview(step, self.requests[0].padded_size, pipeline.variant.rgb, tiny=pipeline.tiny)
        self.step = before + step.index + 1

    def save(self, image: Image.Image, folder: Path, stem: str) -> None:
        """Write a picture into the folder. DiskError."""
        self.paths.append(save_picture(image, folder, stem))
        self.preview = None


def _none(model: str | Variant) -> "Pipeline":
    raise UsageError(f"{model if isinstance(model, str) else model.name} is not loaded here")


class Worker:
    """A thread that runs jobs with a pipeline, and the jobs by their ids."""

    pipeline: "Pipeline"

    def __init__(self, pipeline: "Pipeline | Variant", folder: Path, most: int, load: "Load" = _none) -> None:
        """folder: for pictures. most: jobs that may wait. load: returns a model's pipeline; another model's is kept.

        pipeline: or the model that is loaded first, in the thread that draws: OpenMP keeps threads for each thread that
        ever used it, and where these are more than the cores, small operations take five times as long. What loading
        raises is raised here.
        """
        self.folder, self.most, self._load = folder, most, load
        self._pipelines: dict[str, Pipeline] = {}
        self.jobs: OrderedDict[str, Job] = OrderedDict()
        self.when_stopped: list[Callable[[], object]] = []
        """called by `stop`"""
        self.current: Job | None = None
        """the job that runs"""
        self._waiting: deque[Job] = deque()
        self._changed = threading.Condition()
        self._ends = False
        ready: Future[Pipeline] = Future()
        self._thread = threading.Thread(target=self._run, name="worker", args=(ready, pipeline), daemon=True)
        self._thread.start()
        self.pipeline = ready.result()
        self._pipelines[self.pipeline.variant.name] = self.pipeline

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    def submit(self, job: Job) -> Job:
        """Put a job at the end of the queue. QueueFull."""
        with self._changed:
            if self._ends:
                raise QueueFull("the server is ending")
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

    def stop(self) -> None:
        """End all jobs, the one that is drawn at its next step. May be called in a signal's handler: takes no lock."""
        self._ends = True
        for job in list(self.jobs.values()):
            job.unwanted.set()
        for call in self.when_stopped:
            call()

    def close(self) -> None:
        """End all jobs, and the thread."""
        self.stop()
        with self._changed:
            self._changed.notify()
        self._thread.join()

    def _run(self, ready: "Future[Pipeline]", first: "Pipeline | Variant") -> None:
        try:
            ready.set_result(self._load(first) if isinstance(first, Variant) else first)
        except BaseException as error:
            ready.set_exception(error)
            return
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._ends)
                if self._ends:
                    for job in self._waiting:
                        self._end(job, "cancelled")
                    self._waiting.clear()
                    return
                job = self._waiting.popleft()
                self.current, job.state = job, "drawing"
            self._draw(job)
            self.current = None

    def _draw(self, job: Job) -> None:
        try:
            job.run(self._pipeline_of(job.requests[0].name), self.folder)
            self._end(job, "done")
        except Cancelled:
            self._end(job, "cancelled")
        except FluxError as error:
            job.error = error
            self._end(job, "failed")
        except Exception as error:  # must not stop the others
            note(traceback.format_exc())
            job.error = Broken(f"unexpected error: {type(error).__name__}")
            self._end(job, "failed")

    def _pipeline_of(self, name: str) -> "Pipeline":
        if name not in self._pipelines:
            self._pipelines[name] = self._load(name)
        return self._pipelines[name]

    def _end(self, job: Job, state: State) -> None:
        job.state, job.source = state, NOTHING  # which is large, and jobs are remembered
        job.over.set()
        job.when_over()
