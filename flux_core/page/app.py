"""The page: controls of a request on one side, and tabs that draw it, look inside, edit and explore."""

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import FluxError
from ..images.pictures import parse_picture
from ..server.jobs import Worker
from ..server.shelf import Shelf
from ..server.uploads import UPLOADED
from ..variants import get_variant
from . import drawing, editing, exploring, layers
from .desk import Desk
from .panel import Panel

if TYPE_CHECKING:
    import gradio as gr
    from fastapi import FastAPI

PATHS = re.compile(
    r"/($|v1/|sdapi/|health$|config$|theme\.css$|favicon\.ico$|manifest\.json$|static/|assets/|svelte/"
    r"|gradio_api/(queue/(join|data)$|run/|upload$|upload_progress$|file=|cancel$|heartbeat/|startup-events$|reset$))"
)
"""the server's endpoints, and what of gradio's the page asks for: the others are not there"""
COLOURS = {
    "color_accent": "*primary_700", "button_primary_background_fill": "*primary_700",
    "button_primary_background_fill_hover": "*primary_800", "button_primary_background_fill_dark": "*primary_700",
    "button_primary_background_fill_hover_dark": "*primary_800",
}  # fmt: skip
"""darker than gradio's, for letters on them to be read"""
STYLE, SCRIPT = ((Path(__file__).parent / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
LOOKED = 0.02
"""seconds between two looks of gradio's at its queue; its own thousandth takes a twentieth of a core, always"""


def make_blocks(desk: Desk) -> "gr.Blocks":
    """The page as gradio's blocks."""
    import gradio as gr

    name = desk.pipeline.variant.name
    with gr.Blocks(title=f"flux_core: {name}", analytics_enabled=False, fill_width=True) as blocks:
        gr.HTML(f"<h1>flux_core</h1><p>{get_variant(name).licence_line}</p>", elem_id="head")
        with gr.Row(elem_id="desk"):
            with gr.Column(scale=1, min_width=320):
                panel = Panel(desk)
            with gr.Column(scale=2, min_width=320), gr.Tabs():
                for tab in (drawing, layers, editing, exploring):
                    with gr.Tab(tab.NAME, elem_id=f"tab-{tab.NAME.lower()}"):
                        tab.build(desk, panel)

        def gone(request: gr.Request) -> None:
            desk.forget(request.session_hash)
            for forget in desk.leaving:
                forget(request)

        blocks.unload(gone)
    return blocks


def mount(app: "FastAPI", shelf: Shelf, worker: Worker, names: Sequence[str]) -> re.Pattern[str]:
    """Put the page at the root of the server's application. Returns the paths that are there then.

    names: models that can be drawn with.

    Uploads are read before they are kept: a file that is no picture is refused. Nothing is served but what the page
    drew and the output folder.
    """
    import gradio as gr
    from fastapi import Request
    from fastapi.responses import JSONResponse, Response
    from gradio.utils import get_upload_folder

    blocks = make_blocks(Desk(worker, names, shelf))

    @app.post("/gradio_api/upload")
    async def upload(request: Request) -> Any:
        async with request.form(max_files=2, max_fields=2) as form:
            files = [await x.read() for _, x in form.multi_items() if not isinstance(x, str)]
        try:
            return [_kept(data, Path(get_upload_folder()), blocks) for data in files]
        except FluxError as error:
            return JSONResponse({"detail": str(error)}, 400)

    @app.get("/gradio_api/upload_progress")
    async def progress() -> Response:
        return Response('data: {"msg": "done"}\n\n', media_type="text/event-stream")

    theme = gr.themes.Base(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]).set(**COLOURS)
    gr.mount_gradio_app(
        app, blocks, path="/", allowed_paths=[str(worker.folder.resolve())], show_error=False, theme=theme, css=STYLE,
        js=SCRIPT, footer_links=[], ssr_mode=False, enable_monitoring=False, pwa=False, mcp_server=False,
    )  # fmt: skip
    blocks._queue.sleep_when_free = blocks._queue.progress_update_sleep_when_free = LOOKED
    inner: Any = app.routes[-1]
    worker.when_stopped.append(inner.app.stop_event.set)  # else each open page keeps the server from ending
    return PATHS


def _kept(data: bytes, folder: Path, blocks: "gr.Blocks") -> str:
    """The path of an uploaded picture, as gradio keeps it. FileError for what is none."""
    kind = (parse_picture(data, "the file", UPLOADED).format or "png").lower()
    path = folder / hashlib.sha256(data).hexdigest() / f"picture.{kind}"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    blocks.upload_file_set.add(str(path))
    return str(path)
