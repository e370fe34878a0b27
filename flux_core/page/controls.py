"""The controls of a request, from the table of its fields, and requests of their values."""

import html
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UsageError
from ..hooks import Lora
from ..hooks.intervention import Intervention
from ..request.fields import FIELDS, FIT, STRENGTH, Field
from ..request.generation import GenerationRequest
from ..server.forms import LONGEST, NO_RECORDS
from ..variants import Variant, get_variant

if TYPE_CHECKING:
    import gradio as gr

SHOWN = (
    ("width", "height"), ("num_steps", "guidance"), ("seed", "num_images"), ("true_cfg_scale", "negative_prompt"),
)  # fmt: skip
"""fields of a request that have a control beside prompt and model, row by row"""
RANDOM = -1
"""a seed that is drawn"""
OFF = {"true_cfg_scale": 1.0, "seed": RANDOM, "strength": STRENGTH, "fit": FIT}
"""values of controls that stand for a field that is not set"""
SCALES = 2.0
"""the largest scale of a LoRA's slider, and the smallest below 0"""
STEP = 16
"""pixels by which a size changes"""
QUIET: dict[str, Any] = {"show_progress": "hidden", "queue": False, "api_visibility": "private"}
"""how gradio calls what answers at once: nothing spins, and it is no endpoint"""
DRAWING: dict[str, Any] = {"show_progress": "hidden", "concurrency_limit": None, "api_visibility": "private"}
"""and what draws: the worker has the queue"""
MOST = 16
"""pictures of one request"""


def control(field: Field, variant: Variant) -> "gr.components.Component":
    """A field's control, with its bounds, and its default for that model."""
    import gradio as gr

    told: dict[str, Any] = {"label": label(field.name), "info": field.help, "elem_id": field.name, "min_width": 120}
    value = default_of(field, variant)
    if field.name in ("width", "height"):
        return gr.Slider(variant.min_side, variant.max_side, value, step=STEP, **told)
    if field.choices:
        return gr.Dropdown(list(field.choices), value=value, **told)
    if field.kind is str:
        return gr.Textbox(value or "", lines=1, **told)
    lowest = RANDOM if field.name == "seed" else field.minimum
    highest = MOST if field.name == "num_images" else field.maximum
    precision = 0 if field.kind is int else None
    return gr.Number(value, minimum=lowest, maximum=highest, precision=precision, **told)


def default_of(field: Field, variant: Variant) -> Any:
    """What a field's control shows at first."""
    return getattr(variant, field.name) if field.from_variant else OFF.get(field.name, field.default)


def label(name: str) -> str:
    """A field's name for people: `num_steps` -> `Steps`."""
    return re.sub("cfg", "CFG", name.removeprefix("num_").replace("_", " ").capitalize(), flags=re.IGNORECASE)


def request_of(
    name: str,
    prompt: str,
    values: Mapping[str, Any],
    loras: Mapping[Path, float] | None = None,
    plan: Sequence[Intervention] = (),
    records: Mapping[str, Any] = NO_RECORDS,
) -> GenerationRequest:
    """The request of the controls' values. loras: scales of files; those of scale 0 are left out. UsageError."""
    chosen = {key: x for key, x in values.items() if x not in (None, "") and x != OFF.get(key)}
    if len(prompt := prompt or "") > LONGEST:
        raise UsageError(f"a prompt has at most {LONGEST:,} characters here")
    if not get_variant(name).params.guidance_embed:
        chosen.pop("guidance", None)
    if not (chosen.get("true_cfg_scale") or 1) > 1:
        chosen.pop("negative_prompt", None)  # kept in its control for when it counts
    entries = [Lora(file=str(path), scale=scale) for path, scale in (loras or {}).items() if scale]
    return GenerationRequest(name=name, prompt=prompt, plan=(*entries, *plan), **records, **chosen)  # type: ignore[arg-type]


def values_of(request: GenerationRequest) -> dict[str, Any]:
    """A request's values for the controls, by field."""
    found = {name: getattr(request, name) for row in SHOWN for name in row}
    return {name: OFF.get(name, "" if FIELDS[name].kind is str else None) if x is None else x
            for name, x in found.items()}  # fmt: skip


def said(text: str, kind: str = "status") -> str:
    """A line for people as HTML that a screen reader speaks: a `status`, or an `alert`."""
    return f'<p role="{kind}" class="{kind}">{html.escape(text)}</p>' if text else ""
