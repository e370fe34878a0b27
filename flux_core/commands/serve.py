"""`serve`: a model on an address of this machine, for other programs. `page`: the same, with a page in the browser."""

import os
import socket
import sys
import tempfile
import webbrowser
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

from ..checkpoint import check_files, with_files
from ..device.threads import set_threads
from ..errors import UsageError
from ..files import prepare_folder
from ..request.fields import DEVICE, FILES, LOADING, OUTPUT_DIR, THREADS, pop_fields
from ..server.guard import LOOPBACK
from ..terminal import note, tell
from ..variants import VARIANTS, Variant
from .table import SERVE

_FIELDS = {field.name: field for field in SERVE}
KEY = "FLUX_CORE_KEY"
"""environment variable with the key that clients must send"""
SHOWN = "GRADIO_TEMP_DIR"
"""and with the folder in which gradio keeps what it shows"""


def page(no_browser: bool = False, **flags: Any) -> None:
    """`serve`, and open a page on it. UsageError."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    try:
        import_module("gradio")
    except ImportError:
        raise UsageError('the page needs gradio. Next: pip install "flux1-core[page]"') from None
    before = os.environ.get(SHOWN)
    with tempfile.TemporaryDirectory() as shown:
        os.environ[SHOWN] = shown
        try:
            serve(page=True, opens=not no_browser, **flags)
        finally:
            os.environ.pop(SHOWN)
            os.environ |= {} if before is None else {SHOWN: before}


def serve(
    host: str | None = None,
    port: str | None = None,
    queue: str | None = None,
    loras: str | None = None,
    taef1: str | None = None,
    output_dir: str = OUTPUT_DIR.default,
    name: str | None = None,
    device: str = DEVICE.default,
    dtype: str | None = None,
    t5_dtype: str | None = None,
    offload: bool = False,
    vae_tiling: bool = False,
    compile: bool = False,
    threads: str | None = None,
    page: bool = False,
    opens: bool = False,
    **fields: Any,
) -> None:
    """Answer until Ctrl-C. On 127.0.0.1 without a key; elsewhere a key is needed.

    page: with the page at the root; opens: in the browser. fields: the user's own files (`fields.FILES`), and how a
    model is loaded (`LOADING`). UsageError.
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
    if taef1 is not None and variant.embedded:
        raise UsageError(f"{variant.name} has latents of its own, which taef1 cannot decode. Next: leave --taef1 out")
    folder = prepare_folder(output_dir)
    check_files(variant)

    from ..checkpoint.tiny import load_tiny_decoder
    from ..pipeline import Pipeline, load_pipeline
    from ..server.app import make_app
    from ..server.jobs import Worker

    def load(which: str | Variant) -> Pipeline:
        found = load_pipeline(which, device, dtype, offload, vae_tiling, compile, t5_dtype, **loading)
        found.tiny = None if taef1 is None else load_tiny_decoder(taef1, found.device)
        return found

    listening = listen(host or LOOPBACK[0], at)
    set_threads(number)
    if not variant.embedded:
        note(variant.licence_line)
    worker = Worker(variant, folder, most, load)
    app = make_app(worker, () if outside else LOOPBACK, key, shelf, _page_of(worker, variant) if page else None)
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", server_header=False))
    handle_exit = server.handle_exit

    def end(signal: int, frame: Any) -> None:
        worker.stop()  # else uvicorn waits until all that wait have their pictures
        handle_exit(signal, frame)

    server.handle_exit = end  # type: ignore[assignment,method-assign]
    address = f"http://{f'[{host}]' if ':' in (host or '') else host or LOOPBACK[0]}:{at}"
    way = f"{address}{'/?key=' + KEY if key else ''}" if page else f"{address}/v1"
    tell(f"{variant.name} on {way}, pictures in {folder}; Ctrl-C ends it")
    if opens and not key and _has_display():
        webbrowser.open(address)  # which waits until it is answered
    try:
        server.run(sockets=[listening])
    finally:
        worker.close()


def _has_display() -> bool:
    """Whether a browser would open a window; without one it would take over the terminal."""
    return sys.platform != "linux" or bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))


def _page_of(worker: Any, variant: Variant) -> Any:
    """What adds the page, with the models that it may draw with: the loaded one, and where it ships, all that do."""
    from ..page import mount

    ships = variant.embedded and not variant.files and not variant.takes
    names = [row.name for row in VARIANTS.values() if row.embedded and not row.takes] if ships else [variant.name]
    return partial(mount, worker=worker, names=names)


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens there, before a model is loaded. port 0: any that is free. UsageError."""
    try:
        found = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
        found.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # else an answer's end waits 40 ms for its start
        return found
    except (OSError, UnicodeError) as error:
        raise UsageError(f"nothing can listen on {host} port {port}: {error}. Next: another --port") from None
