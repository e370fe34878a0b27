"""A1111's endpoints, as far as our fields reach: what Open WebUI, SillyTavern and editors' plugins call.

Such clients send every setting that they know. One at the value that does nothing is passed over; any other that has no
field here is refused by name.
"""

import json
import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from PIL import Image

from ..errors import UsageError
from ..images.given import Given
from ..request.generation import GenerationRequest
from .forms import LORAS, request_of
from .pictures import base64_of, encoded
from .shelf import Shelf
from .uploads import decoded, given_of, is_transparent

if TYPE_CHECKING:
    from .jobs import Job

_LORA = re.compile(r"<lora:([^<>:]*)(?::([^<>:]*))?([^<>]*)>")
"""in a prompt: name, scale, and what else A1111 takes there"""
FIELDS = {
    "prompt": "prompt", "negative_prompt": "negative_prompt", "steps": "num_steps", "width": "width",
    "height": "height", "seed": "seed", "cfg_scale": "true_cfg_scale", "distilled_cfg_scale": "guidance",
    "denoising_strength": "strength",
}  # fmt: skip
"""A1111's and Forge's names, and ours"""
FITS = {0: "stretch", 1: "crop", 2: "pad"}
"""by `resize_mode`"""
SAMPLER, SCHEDULER = "Euler", "Simple"
NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "sampler_name": (SAMPLER,), "sampler_index": (SAMPLER,), "scheduler": (SCHEDULER, "Automatic", "automatic"),
    "send_images": (True,), "save_images": (True,), "subseed": (-1,), "seed_resize_from_h": (-1,),
    "seed_resize_from_w": (-1,), "clip_skip": (1,), "override_settings_restore_afterwards": (True,),
    "do_not_save_samples": (False,), "image_cfg_scale": (1.5,), "hr_scale": (2, 2.0), "s_noise": (1, 1.0),
    "hr_upscaler": ("Latent",), "mask_blur": (4,), "mask_round": (True,), "inpaint_full_res": (True,),
    "inpainting_fill": (1,),
    "firstphase_width": (0,), "refiner_switch_at": (0.8,), "eta": (0, 0.0), "initial_noise_multiplier": (1, 1.0),
}  # fmt: skip
"""other keys, and the values at which they change nothing here; so do false, 0, an empty text and an empty list"""


def request_and_source(body: Mapping[str, Any], model: str, shelf: Shelf) -> tuple[GenerationRequest, Given]:
    """The request of a body of txt2img or img2img, and its pictures. UsageError, FileError."""
    given = dict(body)
    fields: dict[str, Any] = {
        ours: given.pop(theirs) for theirs, ours in FIELDS.items() if given.get(theirs) is not None
    }
    fields["num_images"] = _count(given, "n_iter") * _count(given, "batch_size")
    mask, inverted = given.pop("mask", None), bool(given.pop("inpainting_mask_invert", None))
    masks = decoded([mask] if mask else None, "mask")
    images = decoded(given.pop("init_images", None), "init_images")
    if masks and is_transparent(masks[0]):
        inverted = not inverted  # A1111 paints where such a mask is opaque
    source, records = given_of(model, images, masks[0] if masks else None, inverted)
    padding = given.pop("inpaint_full_res_padding", None)
    if masks and given.pop("inpaint_full_res", True):
        fields["mask_padding"] = padding or 0
    if source.image is None:
        fields.pop("strength", None)  # of txt2img it is for a second pass, which is refused below
    else:
        fields["fit"] = _fit(given.pop("resize_mode", 0))
    if (fields.get("true_cfg_scale") or 1) == 1:
        fields.pop("true_cfg_scale", None)
    check_settings(given.pop("override_settings", None) or {}, model)
    for key, value in given.items():
        if value not in (None, False, 0, "", [], {}) and value not in NEUTRAL.get(key, ()):
            raise UsageError(f"{key[:60]} {str(value)[:60]!a} does nothing here. Next: leave it out")
    if isinstance(prompt := fields.get("prompt"), str):
        fields["prompt"], scales = without_loras(prompt)
        fields |= {LORAS: scales} if scales else {}
    return request_of(fields, model, shelf, source, records), source


def without_loras(prompt: str) -> tuple[str, dict[str, str]]:
    """A prompt without its `<lora:NAME:SCALE>`, and these. UsageError for one that is said twice, or says more."""
    scales: dict[str, str] = {}
    for name, scale, more in _LORA.findall(prompt):
        if more or name in scales:
            found = f"{more[:20]!a} after its scale" if more else "is there twice"
            raise UsageError(f"the LoRA {name[:60]!a} of the prompt: {found}. Next: <lora:NAME:SCALE> once")
        scales[name] = scale or "1"
    return (_LORA.sub("", prompt).strip() if scales else prompt), scales


def _count(given: dict[str, Any], key: str) -> int:
    value = given.pop(key, 1)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UsageError(f"{key} must be a whole number from 1 on, not {str(value)[:40]!a}")
    return value


def _fit(mode: object) -> str:
    if mode not in FITS:
        raise UsageError(f"resize_mode must be {', '.join(map(str, FITS))}, not {str(mode)[:40]!a}")
    return FITS[mode]  # type: ignore[index]


def check_settings(settings: Mapping[str, Any], model: str) -> None:
    """UsageError for a setting that would have to change something."""
    for key, value in settings.items():
        if key != "sd_model_checkpoint" or value != model:
            raise UsageError(f"{key[:60]} cannot be {str(value)[:60]!a} here: {model} is loaded")


def answer_of(job: "Job", body: Mapping[str, Any], pictures: list[bytes]) -> dict[str, Any]:
    """What txt2img and img2img answer."""
    first = job.requests[0]
    info = {
        "prompt": first.prompt, "negative_prompt": first.negative_prompt or "", "seed": first.seed,
        "all_seeds": [one.seed for one in job.requests], "width": first.width, "height": first.height,
        "steps": first.num_steps, "cfg_scale": first.true_cfg_scale or 1, "sampler_name": SAMPLER,
        "sd_model_name": first.name, "infotexts": list(_texts(job)),
    }  # fmt: skip
    return {
        "images": [base64_of(data) for data in pictures],
        "parameters": {key: x for key, x in body.items() if key not in ("init_images", "mask")},
        "info": json.dumps(info),
    }


def _texts(job: "Job") -> Iterator[str]:
    """The `parameters` of each picture, which other tools read."""
    for path in job.paths:
        with Image.open(path) as image:
            yield str(image.info.get("parameters", ""))


def progress_of(job: "Job | None", waiting: int, is_shown: bool) -> dict[str, Any]:
    """What `progress` answers: of the job that is being drawn. is_shown: with its preview, from the next step on."""
    step, steps, image = 0, 0, None
    if job is not None:
        step, steps, image = job.step, job.steps, job.preview if is_shown else None
        job.watched |= is_shown
    state = {"sampling_step": step, "sampling_steps": steps, "job_count": waiting, "interrupted": False}
    shown = None if image is None else base64_of(encoded(image, "png"))
    return {"progress": step / steps if steps else 0.0, "eta_relative": 0.0, "state": state, "current_image": shown}
