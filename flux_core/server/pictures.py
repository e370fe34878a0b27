"""A job's pictures as clients get them: the files, other formats, previews, base64."""

import base64
import io
from pathlib import Path

from PIL import Image

from ..errors import FluxError, UsageError
from ..images.pictures import crop_centre
from ..request.generation import GenerationRequest
from .jobs import Job


class Missing(UsageError):
    """What a request names is not there."""


class Ended(FluxError):
    """A job was cancelled."""


def read(path: Path) -> bytes:
    """A picture's file. Missing."""
    try:
        return path.read_bytes()
    except OSError:
        raise Missing(f"{path.name} is no longer there") from None


def pictures_of(job: Job, kind: str) -> list[bytes]:
    """The files of the pictures of a job that is over, as they are or in another format. The job's error, or Ended;
    Missing."""
    if job.error is not None:
        raise job.error
    if job.state != "done":
        raise Ended("the job was cancelled")
    files = [read(path) for path in job.paths]
    return files if kind == "png" else [encoded(Image.open(io.BytesIO(data)).convert("RGB"), kind) for data in files]


def encoded(image: Image.Image, kind: str) -> bytes:
    """A picture in a format, without metadata."""
    out = io.BytesIO()
    image.save(out, kind, quality=95)
    return out.getvalue()


def enlarged(preview: Image.Image, request: GenerationRequest) -> Image.Image:
    """A preview in the size of the picture."""
    whole = preview.resize(request.padded_size, Image.Resampling.BICUBIC)
    return crop_centre(whole, request.width, request.height)


def base64_of(data: bytes) -> str:
    return base64.b64encode(data).decode()
