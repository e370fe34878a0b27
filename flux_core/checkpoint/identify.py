"""Identify the weights in a file by the names and shapes in its header: which network, which layout, which model.

A table of marks, read from the top: the first whose tensor is in the header decides. Whether all tensors fit is
checked in `check.py`. Nothing here opens a file or needs torch.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from .adapters import is_adapter

Shapes = Mapping[str, tuple[int, ...]]
Part = Literal["transformer", "autoencoder", "t5", "clip", "controlnet", "lora", "other"]
Layout = Literal["official", "diffusers"]

COMFY = "model.diffusion_model."
"""ComfyUI's prefix, in front of a transformer's official names"""
WHOLE = {
    "transformer": COMFY,
    "autoencoder": "vae.",
    "t5": "text_encoders.t5xxl.transformer.",
    "clip": "text_encoders.clip_l.transformer.",
}
"""prefixes of the parts in ComfyUI's all-in-one file"""


@dataclass(frozen=True)
class Identity:
    part: Part
    text: str
    """for people, to follow "is" """
    layout: Layout = "official"
    prefix: str = ""
    """in front of the names that `layout` gives them"""
    features: tuple[int, ...] = ()
    """of a transformer: hidden size, input features, whether guidance is embedded"""


@dataclass(frozen=True)
class Mark:
    """The name of a tensor that only this kind of file has."""

    name: str
    part: Part
    text: str
    layout: Layout = "official"


MARKS = (
    Mark("double_stream_modulation_img.lin.weight", "other", "a FLUX.2 transformer, which is another architecture"),
    Mark("joint_blocks.0.x_block.attn.qkv.weight", "other", "a Stable Diffusion 3 transformer"),
    Mark("input_blocks.0.0.weight", "other", "a Stable Diffusion UNet"),
    Mark("down_blocks.0.resnets.0.conv1.weight", "other", "a Stable Diffusion UNet in diffusers' layout"),
    Mark("redux_up.weight", "other", "the FLUX.1 Redux adapter"),
    Mark("pos_embed_input.weight", "controlnet", "a ControlNet by XLabs' names"),
    Mark("controlnet_x_embedder.weight", "controlnet", "a ControlNet in diffusers' layout", "diffusers"),
    Mark("img_in.weight", "transformer", "a FLUX.1 transformer"),
    Mark("x_embedder.weight", "transformer", "a FLUX.1 transformer in diffusers' layout", "diffusers"),
    Mark("encoder.down.0.block.0.conv1.weight", "autoencoder", "an autoencoder"),
    Mark(
        "encoder.down_blocks.0.resnets.0.conv1.weight",
        "autoencoder",
        "an autoencoder in diffusers' layout",
        "diffusers",
    ),
    Mark("encoder.block.0.layer.0.SelfAttention.q.weight", "t5", "a T5 text encoder"),
    Mark("enc.blk.0.attn_q.weight", "t5", "a T5 text encoder by llama.cpp's names"),
    Mark("text_model.encoder.layers.0.self_attn.q_proj.weight", "clip", "a CLIP text encoder"),
    Mark("encoder.layers.0.self_attn.q_proj.weight", "clip", "a CLIP text encoder"),  # as transformers 5 writes it
)
MODELS: dict[tuple[int, ...], str] = {
    (3072, 64, True): "of FLUX.1-dev's kind (dev, Krea, Kontext)",
    (3072, 64, False): "of FLUX.1-schnell's kind (no guidance_in)",
    (3072, 128, True): "of FLUX.1-Canny's or Depth's kind (img_in takes 128 features)",
    (3072, 384, True): "of FLUX.1-Fill's kind (img_in takes 384 features)",
}
"""hidden size, input features, whether guidance is embedded -> which of the family"""


def identify(shapes: Shapes, part: Part = "transformer", architecture: str | None = None) -> Identity:
    """The network in a file. part: which to find in a file that holds several; architecture: what a GGUF file says."""
    if any(is_adapter(name) for name in shapes):
        return Identity("lora", "a LoRA, which goes on top of a model")
    prefixes = ("", WHOLE[part], *WHOLE.values()) if part in WHOLE else ("", *WHOLE.values())
    whole = sum(any(name.startswith(prefix) for name in shapes) for prefix in WHOLE.values()) > 1
    for prefix in prefixes:
        for mark in MARKS:
            if prefix + mark.name in shapes:
                features = _features(mark, shapes, prefix)
                text = _text(mark, features, prefix, whole)
                return Identity(mark.part, text, mark.layout, prefix, features)
    if architecture:
        return Identity("other", f"a GGUF file of the architecture {architecture[:40]!a}, which is not known here")
    return Identity("other", "no kind of weights that is known here")


def _features(mark: Mark, shapes: Shapes, prefix: str) -> tuple[int, ...]:
    shape = shapes[prefix + mark.name]
    if mark.part != "transformer" or len(shape) != 2:
        return ()
    guides = ("guidance_in.in_layer.weight", "time_text_embed.guidance_embedder.linear_1.weight")
    return (*shape, any(prefix + name in shapes for name in guides))


def _text(mark: Mark, features: tuple[int, ...], prefix: str, whole: bool) -> str:
    text = mark.text
    if features:
        text += f" {MODELS.get(features) or f'of hidden size {features[0]}'}"
    if whole:
        return f"ComfyUI's all-in-one file, in it {text}"
    return f"{text} under ComfyUI's prefix" if prefix else text
