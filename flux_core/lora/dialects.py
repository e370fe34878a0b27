"""The dialects of LoRA files, as data: prefixes, names of modules, marks of other models. No torch.

A key is prefix + module + ending. `PREFIXES` says which network a prefix means, `checkpoint/adapters.py` which factor
an ending is, and `Table` which rows of which official weight a module trains, under every name that tools give it:
official ones, diffusers', XLabs' and OneTrainer's newer ones, each dotted or with `_` for `.`. So a mixture of dialects
is read like any of them. Sources: the tools' own writers, listed in `docs/lora.md`.
"""

import re
from collections.abc import Iterable, Mapping
from functools import cached_property
from itertools import product
from typing import Literal, NamedTuple

from ..checkpoint.adapters import OTHER_ALGEBRAS, split_ending
from ..checkpoint.names import TRANSFORMER, added_width
from ..checkpoint.shapes import Shape, flux_shapes
from ..params import FluxParams

Network = Literal["transformer", "clip", "t5"]
TEXT: tuple[Network, ...] = ("clip", "t5")
NETWORKS: tuple[Network, ...] = ("transformer", *TEXT)

PREFIXES: tuple[tuple[str, Network, str], ...] = (
    ("base_model.model.transformer.", "transformer", "PEFT"),
    ("base_model.model.text_model.", "clip", "PEFT"),
    ("base_model.model.encoder.block.", "t5", "PEFT"),
    ("base_model.model.", "transformer", "PEFT"),
    ("model.diffusion_model.", "transformer", "ComfyUI"),
    ("diffusion_model.", "transformer", "ComfyUI"),
    ("transformer.", "transformer", "diffusers"),
    ("lora_unet_", "transformer", "kohya"),
    ("lora_transformer_", "transformer", "OneTrainer"),
    ("lycoris_", "transformer", "LyCORIS"),
    ("text_encoders.clip_l.transformer.", "clip", "ComfyUI"),
    ("text_encoders.t5xxl.transformer.", "t5", "ComfyUI"),
    ("text_encoder_2.", "t5", "diffusers"),
    ("text_encoder.", "clip", "diffusers"),
    ("lora_te1_", "clip", "kohya"),
    ("lora_te2_", "t5", "OneTrainer"),
    ("lora_te3_", "t5", "kohya"),
    ("lora_te_", "clip", "kohya"),
    ("clip_l.", "clip", "OneTrainer"),
    ("t5.", "t5", "OneTrainer"),
    ("", "transformer", "official"),
)
"""prefix, network, the tool that writes it; the first that fits counts. What of a prefix goes on in the module's name
(`encoder.block.`) is put back by `split_key`"""
_GOES_ON = ("text_model.", "encoder.block.")

TOKENS = ("bundle_emb.", "emb_params", "clip_l_emb", "t5_emb")
"""what keys of trained tokens begin with; prompts can name those of `tokens.py`"""

FAMILIES: tuple[tuple[str, str], ...] = (
    (r"double_stream_modulation|single_stream_modulation|context_refiner", "FLUX.2"),
    (r"single_transformer_blocks[._]\d+[._]attn[._](to_qkv_mlp_proj|to_out)", "FLUX.2"),
    (r"ff(_context)?[._]linear_(in|out)", "FLUX.2"),
    (r"input_blocks|output_blocks|middle_block|down_blocks|up_blocks|mid_block", "Stable Diffusion (SD 1.5, SDXL)"),
    (r"joint_blocks", "Stable Diffusion 3"),
    (r"(img_mod|txt_mod)[._]1([._]|$)|(img_mlp|txt_mlp)[._]net", "Qwen-Image"),
    (r"(^|[._])blocks[._]\d+[._](self_attn|cross_attn|ffn)[._]", "Wan"),
    (r"distilled_guidance_layer", "Chroma"),
    (r"(^|[._])(layers[._]\d+[._](attention|feed_forward|adaLN_modulation)|noise_refiner)[._]", "Z-Image or Lumina"),
    (r"double_stream_blocks|single_stream_blocks", "HiDream"),
)
"""parts of names that only another model has -> its name"""
ARCHITECTURES: tuple[tuple[str, str], ...] = (
    (r"flux[-_. ]?2|klein", "FLUX.2"),
    (r"sdxl|stable-diffusion-xl", "SDXL"),
    (r"sd3|stable-diffusion-3", "Stable Diffusion 3"),
    (r"stable-diffusion|sd[_-]?v?[12]", "Stable Diffusion"),
    (r"qwen", "Qwen-Image"),
    (r"wan[-_. ]?2|wan_?video", "Wan"),
    (r"chroma", "Chroma"),
    (r"z[-_]?image|lumina", "Z-Image or Lumina"),
    (r"hidream", "HiDream"),
    (r"hunyuan", "Hunyuan"),
)
"""values of a header's `modelspec.architecture` or `ss_base_model_version` -> the model they mean"""
_SAYS_MODEL = ("modelspec.architecture", "ss_base_model_version")

WORDS = ("modelspec.trigger_phrase", "trigger_phrase", "trigger_words", "trigger_word", "ss_trigger_words")
"""a header's keys for the words that a LoRA was trained with"""


class Target(NamedTuple):
    """Rows of an official weight, as one trained module sees them."""

    module: str
    """official name of the Linear"""
    start: int
    stop: int
    """its rows, start to stop"""
    swapped: bool = False
    """whether the tool has the halves of these rows in the other order"""
    spare_rows: int = 0
    spare_columns: int = 0
    """features behind them that only diffusers' wider MLP has, and that must be zero"""


class Key(NamedTuple):
    """A key of a file, taken apart."""

    network: Network
    tool: str
    stem: str
    """the key without its ending: one for each trained module"""
    module: str
    """the stem without its prefix"""
    role: str
    """the factor, of `adapters.ENDINGS`; "" for a tensor that replaces a parameter"""


def split_key(name: str) -> Key:
    """A key's parts. Keys with an unknown ending have the role "" and are a whole stem."""
    stem, role = split_ending(name)
    prefix, network, tool = next(row for row in PREFIXES if stem.startswith(row[0]))
    kept = next((end for end in _GOES_ON if prefix.endswith(end)), "")
    return Key(network, tool, stem, kept + stem[len(prefix) :], role)


def flat(name: str) -> str:
    """A module's name with `_` for `.`, under which dotted and underscored spellings are the same."""
    return name.replace(".", "_")


def flat_text(name: str) -> str:
    """`flat` for a module of a text encoder: transformers before 5 has CLIP's behind `text_model.`."""
    return flat(name).removeprefix("text_model_")


class Table:
    """The Linears and norms of a transformer, under every name that a tool gives them."""

    def __init__(self, params: FluxParams) -> None:
        self.params, self.shapes = params, flux_shapes(params)

    @cached_property
    def linears(self) -> Mapping[str, Target]:
        """Every name of a Linear, `flat`, and the rows that it trains."""
        params, dim = self.params, self.params.hidden_size
        rows = {name.removesuffix(".weight"): shape[0] for name, shape in self.shapes.items() if len(shape) == 2}
        found = {name: Target(name, 0, count) for name, count in rows.items()}
        for official, diffusers, how in _modules(params):
            if official not in rows:
                continue
            cuts = [dim * n for n in range(len(diffusers))]
            for i, (name, start, stop) in enumerate(zip(diffusers, cuts, [*cuts[1:], rows[official]], strict=True)):
                last = i == len(diffusers) - 1
                spare_rows = added_width(params) if how == "widen rows" and last else 0
                spare_columns = added_width(params) if how == "widen columns" else 0
                found[name] = Target(official, start, stop, how == "swap halves", spare_rows, spare_columns)
                if len(diffusers) > 1:
                    found[f"{official}.{i}"] = found[name]  # OneTrainer's newer layout
        found["img_in.proj"] = found["img_in"]
        for i in range(params.depth):
            for (number, side), part in product(((1, "img"), (2, "txt")), ("qkv", "proj")):
                name = f"double_blocks.{i}.processor.{part}_lora{number}"
                found[name] = found[f"double_blocks.{i}.{side}_attn.{part}"]
        for i in range(params.depth_single_blocks):
            found[f"single_blocks.{i}.processor.qkv_lora"] = Target(f"single_blocks.{i}.linear1", 0, 3 * dim)
            found[f"single_blocks.{i}.processor.proj_lora"] = found[f"single_blocks.{i}.linear2"]
        return {flat(name): target for name, target in found.items()}

    @cached_property
    def norms(self) -> Mapping[str, str]:
        """Every name of a norm's scale, or of the norm itself, `flat` -> the official parameter."""
        theirs, found = {official: names[0] for official, names, _ in _modules(self.params)}, {}
        for name in self.shapes:
            if name.endswith(".scale"):
                norm = name.removesuffix(".scale")
                for spelled in (name, norm, f"{norm}.weight", theirs[norm], f"{theirs[norm]}.weight"):
                    found[flat(spelled)] = name
        return found

    @cached_property
    def diffusers(self) -> Mapping[str, list[str]]:
        """Official module -> diffusers' modules for it, by the rows' order; of norms, too."""
        mine = {name.rpartition(".")[0] for name in self.shapes}
        return {official: names for official, names, _ in _modules(self.params) if official in mine}

    def shape(self, target: Target) -> Shape:
        """The shape of the rows that a module trains."""
        shape = self.shapes.get(f"{target.module}.weight", self.shapes.get(target.module, ()))
        return (target.stop - target.start, *shape[1:])


def _modules(params: FluxParams) -> Iterable[tuple[str, list[str], str]]:
    """The key map's rows for each block: an official module, diffusers' modules for it, and how values change."""
    for row in TRANSFORMER:
        for i in range(max(params.depth, params.depth_single_blocks) if "{i}" in row.official else 1):
            yield row.official.format(i=i), row.diffusers.format(i=i).split(), row.how


def other_model(names: Iterable[str], metadata: Mapping[str, str]) -> str | None:
    """The name of the model that a file is for, where it is none of FLUX.1: by its header, else by its names."""
    for said in (metadata.get(key, "").lower() for key in _SAYS_MODEL):
        if found := next((name for pattern, name in ARCHITECTURES if re.search(pattern, said)), None):
            return found
    every = list(names)
    return next((name for pattern, name in FAMILIES if any(re.search(pattern, x) for x in every)), None)


def other_algebra(names: Iterable[str]) -> tuple[str, str] | None:
    """The first key of an adapter that is no difference to a weight, and that adapter's name."""
    for name in names:
        if found := next((what for pattern, what in OTHER_ALGEBRAS if re.search(pattern, name)), None):
            return name, found
    return None
