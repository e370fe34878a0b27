"""The metadata of a picture: writing it into a PNG, and reading a request back.

A PNG carries three texts. `flux_core` is the request as compact JSON, from which the picture is repeated. `parameters`
is the text that Automatic1111 introduced and most tools read. The XMP packet holds IPTC's mark for media made by a
trained model. None of them names a folder, a user or a token.

A file is never trusted: its JSON is limited in size and depth, validated as any request, grants no permissions, and
cannot make us open a path. We never write the keys `prompt` and `workflow`, which tools read as a ComfyUI graph.
"""

import io
import re
from pathlib import Path
from typing import Any

import pydantic_core
from PIL import Image, PngImagePlugin

from ..errors import UsageError
from ..request.fields import PICTURE_FILES, REQUEST
from ..request.generation import MAX_PROMPT, GenerationRequest, check_untrusted
from ..terminal import one_line, printable
from ..version import __version__
from . import png
from .pictures import parse_picture, read_bytes

KEY = "flux_core"
MAX_JSON = 14 * MAX_PROMPT
"""characters: two prompts, each character up to six as a JSON escape, and the other fields"""
_XMP_KEY = "XML:com.adobe.xmp"
_XMP = """<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>
<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">
<rdf:Description rdf:about="" xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/">
<Iptc4xmpExt:DigitalSourceType>http://cv.iptc.org/newscodes/digitalsourcetype/{}</Iptc4xmpExt:DigitalSourceType>
</rdf:Description></rdf:RDF></x:xmpmeta>
<?xpacket end="w"?>"""


def describe(image: Image.Image, request: GenerationRequest) -> Image.Image:
    """Put a request's metadata into `image.info`, for `png_bytes` to write. Returns the same image."""
    negative = request.negative_prompt and cut(request.negative_prompt)
    short = request.model_copy(update={"prompt": cut(request.prompt), "negative_prompt": negative})
    image.info[KEY] = short.model_dump_json(exclude_none=True)
    image.info["parameters"] = parameters(short)
    image.info["xmp"] = _XMP.format(source_type(request)).encode()
    return image


def marked(image: Image.Image) -> Image.Image:
    """The image with IPTC's mark for media made by a model, where no request describes it. The same image."""
    image.info["xmp"] = _XMP.format("trainedAlgorithmicMedia").encode()
    return image


def source_type(request: GenerationRequest) -> str:
    """IPTC's digital source type: made by a model, or by a model from another picture."""
    made_from = any(getattr(request, name) for name in PICTURE_FILES)
    return "compositeWithTrainedAlgorithmicMedia" if made_from else "trainedAlgorithmicMedia"


def cut(prompt: str) -> str:
    """The first 64 KB of a prompt in UTF-8, whole characters."""
    return prompt.encode()[:MAX_PROMPT].decode(errors="ignore")


def parameters(request: GenerationRequest) -> str:
    """The `parameters` text of A1111. Its `CFG scale` is true CFG; learned guidance has Forge's name."""
    loras = [(re.sub('[,<>:"]', "_", entry.name), entry) for entry in request.loras]  # at these readers split
    words = "".join(f"<lora:{name}:{entry.scale:g}>" for name, entry in loras)
    texts = [request.prompt + words] + (
        [f"Negative prompt: {request.negative_prompt}"] if request.negative_prompt else []
    )
    values: dict[str, Any] = {"Steps": request.num_steps, "Sampler": "Euler"}
    if request.uses_true_cfg:
        values["CFG scale"] = request.true_cfg_scale
    if request.guidance is not None:
        values["Distilled CFG Scale"] = request.guidance
    values |= {"Seed": request.seed, "Size": f"{request.width}x{request.height}", "Model": request.name}
    if request.init_image is not None:
        values["Denoising strength"] = request.strength
    if hashes := dict.fromkeys(f"{name}: {entry.autov3}" for name, entry in loras if entry.autov3):
        values["Lora hashes"] = f'"{", ".join(hashes)}"'
    values["Version"] = f"flux_core {request.version}"
    return "\n".join([*map(printable, texts), ", ".join(f"{key}: {value}" for key, value in values.items())])


def png_bytes(image: Image.Image) -> bytes:
    """The bytes of a PNG file: the pixels, and the metadata that `describe` put into `image.info`."""
    chunks = PngImagePlugin.PngInfo()
    for key in (KEY, "parameters"):
        if key in image.info:
            chunks.add_itxt(key, image.info[key])
    if "xmp" in image.info:
        chunks.add_itxt(_XMP_KEY, image.info["xmp"].decode())
    buffer = io.BytesIO()
    image.save(buffer, "PNG", pnginfo=chunks)
    return buffer.getvalue()


def read_texts(path: str | Path) -> dict[str, str]:
    """The text chunks of a PNG, anywhere in the file. FileError when it is no PNG."""
    data = read_bytes(path)
    parse_picture(data, str(path), formats=("PNG",))
    return png.texts(data)


def read_request(path: str | Path) -> GenerationRequest:
    """The request in a picture's metadata. UsageError when there is none, or it cannot be used."""
    texts = read_texts(path)
    if KEY not in texts:
        raise UsageError(f"{path} was not made by flux_core: {describe_foreign(texts)}. Say what to draw with --prompt")
    return parse_request(texts[KEY], str(path))


def parse_request(text: str, source: str) -> GenerationRequest:
    """A request from its recorded JSON. UsageError names the source when it cannot be used."""
    try:
        fields = _fields(text)
        check_untrusted(fields)
        return GenerationRequest(**fields, force=True, allow_empty_prompt=True)
    except (UsageError, ValueError) as error:
        writer = re.search(r'"version": ?"([\w.]{1,20})"', text[-MAX_JSON:])
        by = f" (written by version {writer[1]}, this is {__version__})" if writer else ""
        raise UsageError(f"the request in {source} cannot be used{by}: {error}") from None


def _fields(text: str) -> dict[str, Any]:
    """The fields in a recorded request. ValueError when it is too long, no object, or grants a permission."""
    if len(text) > MAX_JSON:
        raise ValueError(f"it has {len(text):,} characters, at most {MAX_JSON:,} are read")
    fields = pydantic_core.from_json(text)  # unlike json.loads it bounds the depth
    if not isinstance(fields, dict):
        raise ValueError("it is no JSON object")
    granted = sorted(fields.keys() & {field.name for field in REQUEST if field.kind is bool})
    if granted:
        raise ValueError(f"a file cannot grant {', '.join(granted)}")
    if fields.get("init_image"):
        fields.setdefault("fit", "stretch")  # version 0.1 always stretched, and recorded no fit
    return fields


def describe_foreign(texts: dict[str, str]) -> str:
    """A description of the texts in a file that flux_core did not write, for an error message."""
    if "workflow" in texts or "prompt" in texts:
        return "it holds a ComfyUI graph"
    if "parameters" in texts:
        return "it holds another tool's `parameters` text"
    return f"it holds {', '.join(sorted(printable(key)[:20] for key in texts)[:5]) or 'no text at all'}"


def differences(old: GenerationRequest, new: GenerationRequest) -> list[str]:
    """Reasons why a repeated picture may have other pixels, a line each."""
    if old.name != new.name:
        return []
    before, now = old.environment or {}, new.environment or {}
    found = [
        *([f"version {old.version} drew it, this is {new.version}"] if old.version != new.version else []),
        *(["it was drawn with other weights"] if old.weights != new.weights else []),
        *([f"it was drawn {'with' if old.compiled else 'without'} --compile"] if old.compiled != new.compiled else []),
        *_moved_t5(before, now),
        *(f"{key} was {then}, now it is {now[key]}" for key, then in before.items() if now.get(key, then) != then),
    ]
    return [one_line(reason) for reason in found]


def _moved_t5(before: dict[str, str], now: dict[str, str]) -> list[str]:
    """That T5 encoded on the model's device, and does not now, or the other way round."""
    if not before or not now or ("t5_device" in before) == ("t5_device" in now):
        return []
    then, here = (found.get("t5_device", found.get("device")) for found in (before, now))
    return [f"t5_device was {then}, now it is {here}"]
