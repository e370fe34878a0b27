"""`serve`: a model on an address of this machine, for other programs."""

import os
import socket
from pathlib import Path
from typing import Any

from ..checkpoint import check_files, with_files
from ..device.threads import set_threads
from ..errors import UsageError
from ..files import prepare_folder
from ..request.fields import DEVICE, FILES, LOADING, OUTPUT_DIR, THREADS, pop_fields
from ..server.guard import LOOPBACK
from ..terminal import note, tell
from .table import SERVE

_FIELDS = {field.name: field for field in SERVE}
KEY = "FLUX_CORE_KEY"
"""environment variable with the key that clients must send"""


def serve(
    host: str | None = None,
    port: str | None = None,
    queue: str | None = None,
    loras: str | None = None,
    output_dir: str = OUTPUT_DIR.default,
    name: str | None = None,
    device: str = DEVICE.default,
    dtype: str | None = None,
    t5_dtype: str | None = None,
    offload: bool = False,
    vae_tiling: bool = False,
    compile: bool = False,
    threads: str | None = None,
    **fields: Any,
) -> None:
    """Answer until Ctrl-C. On 127.0.0.1 without a key; elsewhere a key is needed.

    fields: the user's own files (`fields.FILES`), and how a model is loaded (`LOADING`). UsageError.
    """
    key = os.environ.get(KEY)
    at, most = (_FIELDS[name].parse(text, _FIELDS[name].default) for name, text in (("port", port), ("queue", queue)))
    outside = host not in (None, *LOOPBACK)
    if outside and not key:
        raise UsageError(f"--host {host} lets others in. Next: set {KEY} to a key that clients must send")
    try:
        import fastapi  # noqa: F401
        import python_multipart  # noqa: F401
        import uvicorn
    except ImportError:
        raise UsageError('the server needs FastAPI and uvicorn. Next: pip install "flux1-core[server]"') from None
    shelf = None if loras is None else Path(loras)
    if shelf is not None and not shelf.is_dir():
        raise UsageError(f"--loras {loras} is no folder. Next: name one with safetensors files in it")
    loading = pop_fields(fields, LOADING)
    variant, number = with_files(name, **pop_fields(fields, FILES)), THREADS.parse(threads)
    folder = prepare_folder(output_dir)
    check_files(variant)

    from ..pipeline import load_pipeline
    from ..server.app import make_app
    from ..server.jobs import Worker

    listening = _listen(host or LOOPBACK[0], at)
    set_threads(number)
    if not variant.embedded:
        note(variant.licence_line)
    pipeline = load_pipeline(variant, device, dtype, offload, vae_tiling, compile, t5_dtype, **loading)
    worker = Worker(pipeline, folder, most)
    app = make_app(worker, () if outside else LOOPBACK, key, shelf)
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", server_header=False))
    handle_exit = server.handle_exit

    def end(signal: int, frame: Any) -> None:
        worker.stop()  # else uvicorn waits until all that wait have their pictures
        handle_exit(signal, frame)

    server.handle_exit = end  # type: ignore[assignment,method-assign]
    address = f"[{host}]" if ":" in (host or "") else host or LOOPBACK[0]
    tell(f"{variant.name} on http://{address}:{at}/v1, pictures in {folder}; Ctrl-C ends it")
    try:
        server.run(sockets=[listening])
    finally:
        worker.close()


def _listen(host: str, port: int) -> socket.socket:
    """A socket that listens there, before a model is loaded. UsageError."""
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except (OSError, UnicodeError) as error:
        raise UsageError(f"nothing can listen on {host} port {port}: {error}. Next: another --port") from None
