"""Captions by a vision-language model of transformers: any of a class that it has, from a folder or the hub.

Only safetensors are opened, and code that a repository may hold is never run. Florence-2 is asked by the name of a
task, all others in words, by the chat template that their repository has.

Answers are greedy, or drawn with a temperature by the Gumbel-max trick: the largest of logits / T plus Gumbel noise is
a sample of the softmax. Each picture's noise is its own, of the seed and its file's hash, so a caption depends neither
on the pictures beside it in a batch nor on where a run was stopped.
"""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor, nn

from ..device.choice import memory_errors
from ..device.defaults import plain_defaults
from ..errors import FileError, UsageError
from ..hub.places import network_folder
from ..linears.formats import FORMATS
from ..vision.networks import load_model, quiet, read_config, reading
from .words import Style

FILES = ["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model"]
"""of a model's repository"""
SMALLER = "choose a smaller --batch, --max-side or --max-new-tokens, --dtype int8 or nf4, or another --device"
FLORENCE = "florence2"
"""its `model_type`"""


class Preset(NamedTuple):
    """A model by a short name."""

    repo: str
    about: str
    system: str = ""
    """what it was told before each question while it was trained"""


PRESETS = {
    "florence2": Preset("florence-community/Florence-2-large", "0.8 B, 1.6 GB, MIT"),
    "qwen3-vl": Preset("Qwen/Qwen3-VL-4B-Instruct", "4 B, 9 GB, Apache-2.0"),
    "joycaption": Preset(
        "fancyfeast/llama-joycaption-beta-one-hf-llava",
        "8 B, 17 GB, Llama 3.1's licence",
        "You are a helpful image captioner.",
    ),
}


@dataclass(frozen=True, kw_only=True)
class Ask:
    """What a model is asked, and how it answers."""

    style: Style
    prompt: str = ""
    """in place of the style's"""
    max_new_tokens: int = 256
    temperature: float = 0.0
    """0: the likeliest token each time"""
    seed: int = 0


class VisionLanguage:
    """Captions pictures by asking a model about each."""

    def __init__(self, name: str, model: Any, processor: Any, ask: Ask, system: str = "") -> None:
        """UsageError for a style or prompt that the model does not take, FileError where it has no chat template."""
        self.name, self.model, self.processor, self.ask = name, model, processor, ask
        is_florence = model.config.model_type == FLORENCE
        self.text = _task(name, ask) if is_florence else _question(name, processor, ask, system)
        bos = processor.tokenizer.bos_token
        self.specials = is_florence or not (bos and self.text.startswith(bos))
        """whether the tokenizer adds its own; where a chat template wrote BOS, there would be two"""

    @torch.no_grad()
    @plain_defaults()
    def __call__(self, pictures: Sequence[Image.Image], keys: Sequence[str]) -> list[str]:
        """An answer for each RGB picture. keys: texts that tell the pictures apart, for what is drawn."""
        inputs = self.inputs(pictures).to(self.model.device, self.model.dtype)
        with quiet(), memory_errors(f"captioning {len(pictures)} picture(s)", self.model.device, SMALLER):
            tokens = self.model.generate(
                **inputs,
                max_new_tokens=self.ask.max_new_tokens,
                do_sample=False,
                num_beams=1,
                temperature=None,
                top_p=None,
                top_k=None,
                logits_processor=[Drawn(self.ask, keys)] if self.ask.temperature else [],
            )
        if not self.model.config.is_encoder_decoder:
            tokens = tokens[:, inputs["input_ids"].shape[1] :]
        answers: list[str] = self.processor.tokenizer.batch_decode(tokens, skip_special_tokens=True)
        return answers

    def inputs(self, pictures: Sequence[Image.Image]) -> Any:
        """transformers' BatchFeature of the question and each picture, on the CPU; texts are padded on the left."""
        return self.processor(
            text=[self.text] * len(pictures),
            images=[[picture] for picture in pictures],
            padding=True,
            padding_side="left",
            add_special_tokens=self.specials,
            return_tensors="pt",
        )


class Drawn:
    """Adds each row's own Gumbel noise to its logits, so that the largest is a sample of softmax(logits / T)."""

    def __init__(self, ask: Ask, keys: Sequence[str]) -> None:
        self.temperature = ask.temperature
        digests = [sha256(f"{ask.seed} {key}".encode()).digest() for key in keys]
        self.generators = [torch.Generator("cpu").manual_seed(int.from_bytes(x[:4], "big")) for x in digests]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Logits [B, N], with noise. input_ids: unused."""
        waits = torch.stack(
            [
                torch.empty(scores.shape[1], dtype=torch.float32, device="cpu").exponential_(generator=generator)
                for generator in self.generators
            ]
        )
        return scores.float() - self.temperature * waits.log().to(scores.device)


def _task(name: str, ask: Ask) -> str:
    if ask.prompt or not ask.style.task:
        what = "prompt of your own" if ask.prompt else "tags"
        others = ", ".join(other for other in PRESETS if other != "florence2")
        raise UsageError(f"{name} is a Florence-2, which takes no {what}. Next: another --model, as {others}")
    return ask.style.task


def _question(name: str, processor: Any, ask: Ask, system: str) -> str:
    """The question as the model's chat template writes it, with one place for a picture. FileError without one.

    A template may take parts (a picture, a text), or a text alone, and then put the picture's place there itself, or
    not. It is told by what it writes.
    """
    prompt, image = ask.prompt or ask.style.prompt, _image_token(processor)
    contents: list[Any] = [[{"type": "image"}, {"type": "text", "text": prompt}], prompt, f"{image}\n{prompt}"]
    for content in contents:
        told = [{"type": "text", "text": system}] if isinstance(content, list) else system
        messages = [*([{"role": "system", "content": told}] if system else []), {"role": "user", "content": content}]
        with suppress(Exception):  # whatever a template raises
            text = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            if text.count(image) == 1 and text.count(prompt) == 1 and "'type'" not in text:
                return str(text)
    raise FileError(
        f"{name} has no chat template that takes a picture. Next: name a model that was made for questions, as "
        f"{PRESETS['qwen3-vl'].repo}"
    )


def _image_token(processor: Any) -> str:
    """The text that stands for a picture."""
    return str(
        getattr(processor, "image_token", None) or getattr(processor.tokenizer, "image_token", None) or "<image>"
    )


# Loading -----------------------------------------------------------------------------------------------


@plain_defaults()
def load_vision_language(
    name: str, ask: Ask, device: torch.device, dtype: torch.dtype, format: str | None = None
) -> VisionLanguage:
    """A model, frozen. name: of `PRESETS`, a folder or a hub id; format: of its language model's Linears.

    FileError where there is none, transformers has no such class, or a file is missing or damaged; UsageError as of
    `VisionLanguage`; AccessError and DiskError as of the hub.
    """
    preset = PRESETS.get(name, Preset(name, ""))
    choice = f"{', '.join(PRESETS)}, sprites, a folder, or a hub id"
    folder = network_folder(preset.repo, "captioner", choice, FILES)
    kind = read_config(name, folder, "captioner")
    with quiet():
        import transformers

        with reading(f"{name}: its processor"):
            processor = _load_processor(folder, kind)
        with reading(f"{name}: the captioner"):
            place = "cpu" if format else device
            model = load_model(transformers.AutoModelForImageTextToText, folder, place, dtype, "captioner")
    captioner = VisionLanguage(name, model, processor, ask, preset.system)
    if format:
        narrow(model, format, device)
    return captioner


def narrow(model: Any, format: str, device: torch.device) -> frozenset[str]:
    """Replace the Linears of a model's language model by layers of that format, on the device, and move the rest there.

    Each is moved before it is quantized, so the device never holds more than one that is whole. Returns their names.
    The vision tower and the last layer, which often is the embedding, stay as they are.
    """
    language = model.get_decoder()
    linears = {name: one for name, one in language.named_modules() if isinstance(one, nn.Linear)}
    names = frozenset(linears)
    while linears:
        name, linear = linears.popitem()
        language.set_submodule(name, FORMATS[format].kind.of(linear.to(device)))
    model.to(device)
    return names


def _load_processor(folder: Path, kind: str) -> Any:
    """The processor of a `model_type`. FileError for a type that has none, UsageError where it needs torchvision."""
    import transformers
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES

    if kind not in PROCESSOR_MAPPING_NAMES:
        version = transformers.__version__
        raise FileError(f"{folder}: transformers {version} has nothing that asks a {kind[:40]!a} model about pictures")
    try:
        whole = _of_pictures(getattr(transformers, PROCESSOR_MAPPING_NAMES[kind]))
        return whole.from_pretrained(folder, local_files_only=True, trust_remote_code=False, backend="pil")
    except ImportError:
        raise UsageError(f"the processor of {kind} needs torchvision. Next: pip install torchvision") from None


def _of_pictures(kind: Any) -> Any:
    """A processor's class without its last part where that is for videos, which needs torchvision and is not used."""
    *parts, last = kind.get_attributes()
    if last != "video_processor":
        return kind
    return type(kind.__name__, (kind,), {"get_attributes": classmethod(lambda cls: parts)})
