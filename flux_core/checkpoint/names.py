"""Names of tensors: official ones, those of other tools, and diffusers' layout. No torch.

Two tables. `RENAMES` has other names of the same tensors, which are read as ours. The rows below are the modules of a
network by Black Forest Labs' (our) names and by diffusers', which also cuts and joins weights (`keymaps.py`).
"""

import re
from collections.abc import Iterable
from itertools import product
from typing import NamedTuple

from ..errors import FileError
from ..params import AutoEncoderParams, ControlNetParams, FluxParams
from .identify import Layout, Part
from .shapes import Shape, Shapes, autoencoder_shapes, controlnet_shapes, flux_shapes

Params = FluxParams | AutoEncoderParams  # a ControlNet's are a transformer's, and more

_ATTENTION_OF_T5, _MLP_OF_T5 = "encoder.block.N.layer.0.", "encoder.block.N.layer.1."
LLAMA_T5 = {
    "token_embd": "shared",
    "enc.output_norm": "encoder.final_layer_norm",
    "enc.blk.N.attn_norm": _ATTENTION_OF_T5 + "layer_norm",
    **{f"enc.blk.N.attn_{x}": f"{_ATTENTION_OF_T5}SelfAttention.{x}" for x in "qkvo"},
    "enc.blk.N.attn_rel_b": _ATTENTION_OF_T5 + "SelfAttention.relative_attention_bias",
    "enc.blk.N.ffn_norm": _MLP_OF_T5 + "layer_norm",
    "enc.blk.N.ffn_gate": _MLP_OF_T5 + "DenseReluDense.wi_0",
    "enc.blk.N.ffn_up": _MLP_OF_T5 + "DenseReluDense.wi_1",
    "enc.blk.N.ffn_down": _MLP_OF_T5 + "DenseReluDense.wo",
}
"""modules of T5's encoder in llama.cpp, and so in ComfyUI-GGUF's files -> in transformers; N counts blocks"""


def _llama_rule(theirs: str, ours: str) -> tuple[Part, str, str]:
    return "t5", re.escape(theirs).replace("N", r"(\d+)") + r"\.weight", ours.replace("N", r"\1", 1) + ".weight"


RENAMES: tuple[tuple[Part, str, str], ...] = (
    ("transformer", r"(.+\.(?:query|key)_norm)\.weight", r"\1.scale"),  # ComfyUI since February 2026
    ("t5", r"encoder\.embed_tokens\.weight", "shared.weight"),  # one tensor by two names
    *(_llama_rule(theirs, ours) for theirs, ours in LLAMA_T5.items()),
    ("clip", r"text_model\.(.+)", r"\1"),  # transformers before 5
)
"""part, another tool's name for a tensor (a pattern for all of it), our name"""


def renamed(names: Iterable[str], part: Part) -> dict[str, str]:
    """Our names -> those given. A name whose place is taken already by ours stays as it is."""
    given = list(names)
    rules = [(re.compile(theirs), ours) for owner, theirs, ours in RENAMES if owner == part]
    found = {name: name for name in given}
    for name in given:
        ours = next((theirs.sub(ours, name) for theirs, ours in rules if theirs.fullmatch(name)), name)
        if ours not in found:
            found[ours] = found.pop(name)
    return found


class Row(NamedTuple):
    """A module and its counterparts. {i} counts blocks or levels, {u} levels backwards, {j} in a level."""

    official: str
    diffusers: str
    """several, divided by spaces, where the official rows are cut"""
    how: str = ""
    """how values or shapes change: see `_diffusers_shape`, and `keymaps.py`"""


_DOUBLE, _SINGLE = "transformer_blocks.{i}.", "single_transformer_blocks.{i}."

BACKBONE = (
    Row("img_in", "x_embedder"),
    Row("txt_in", "context_embedder"),
    Row("time_in.in_layer", "time_text_embed.timestep_embedder.linear_1"),
    Row("time_in.out_layer", "time_text_embed.timestep_embedder.linear_2"),
    Row("guidance_in.in_layer", "time_text_embed.guidance_embedder.linear_1"),
    Row("guidance_in.out_layer", "time_text_embed.guidance_embedder.linear_2"),
    Row("vector_in.in_layer", "time_text_embed.text_embedder.linear_1"),
    Row("vector_in.out_layer", "time_text_embed.text_embedder.linear_2"),
    Row("double_blocks.{i}.img_mod.lin", _DOUBLE + "norm1.linear"),
    Row("double_blocks.{i}.txt_mod.lin", _DOUBLE + "norm1_context.linear"),
    Row("double_blocks.{i}.img_attn.qkv", " ".join(_DOUBLE + f"attn.to_{x}" for x in "qkv")),
    Row("double_blocks.{i}.txt_attn.qkv", " ".join(_DOUBLE + f"attn.add_{x}_proj" for x in "qkv")),
    Row("double_blocks.{i}.img_attn.norm.query_norm", _DOUBLE + "attn.norm_q"),
    Row("double_blocks.{i}.img_attn.norm.key_norm", _DOUBLE + "attn.norm_k"),
    Row("double_blocks.{i}.txt_attn.norm.query_norm", _DOUBLE + "attn.norm_added_q"),
    Row("double_blocks.{i}.txt_attn.norm.key_norm", _DOUBLE + "attn.norm_added_k"),
    Row("double_blocks.{i}.img_attn.proj", _DOUBLE + "attn.to_out.0"),
    Row("double_blocks.{i}.txt_attn.proj", _DOUBLE + "attn.to_add_out"),
    Row("double_blocks.{i}.img_mlp.0", _DOUBLE + "ff.net.0.proj", "widen rows"),
    Row("double_blocks.{i}.img_mlp.2", _DOUBLE + "ff.net.2", "widen columns"),
    Row("double_blocks.{i}.txt_mlp.0", _DOUBLE + "ff_context.net.0.proj", "widen rows"),
    Row("double_blocks.{i}.txt_mlp.2", _DOUBLE + "ff_context.net.2", "widen columns"),
    Row("single_blocks.{i}.modulation.lin", _SINGLE + "norm.linear"),
    Row(
        "single_blocks.{i}.linear1",
        " ".join(_SINGLE + x for x in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")),
        "widen rows",
    ),
    Row("single_blocks.{i}.linear2", _SINGLE + "proj_out", "widen columns"),
    Row("single_blocks.{i}.norm.query_norm", _SINGLE + "attn.norm_q"),
    Row("single_blocks.{i}.norm.key_norm", _SINGLE + "attn.norm_k"),
)
TRANSFORMER = (
    *BACKBONE,
    Row("final_layer.linear", "proj_out"),
    Row("final_layer.adaLN_modulation.1", "norm_out.linear", "swap halves"),
)
_HINTS = ("conv_in", *(f"blocks.{j}" for j in range(6)), "conv_out")
CONTROLNET = (
    *BACKBONE,
    Row("pos_embed_input", "controlnet_x_embedder"),
    *(Row(f"input_hint_block.{2 * n}", f"input_hint_block.{name}") for n, name in enumerate(_HINTS)),
    Row("controlnet_mode_embedder", "controlnet_mode_embedder"),
    *(Row(name, name) for name in ("controlnet_blocks.{i}", "controlnet_single_blocks.{i}")),
)

_RESNET = {
    "norm1": "norm1",
    "conv1": "conv1",
    "norm2": "norm2",
    "conv2": "conv2",
    "nin_shortcut": "conv_shortcut",
}
_ATTENTION = {"q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}

AUTOENCODER = (
    *(Row(f"{side}.conv_in", f"{side}.conv_in") for side in ("encoder", "decoder")),
    *(Row("encoder.down.{i}.block.{j}." + a, "encoder.down_blocks.{i}.resnets.{j}." + b) for a, b in _RESNET.items()),
    Row("encoder.down.{i}.downsample.conv", "encoder.down_blocks.{i}.downsamplers.0.conv"),
    *(
        Row(f"{side}.mid.block_{n + 1}.{a}", f"{side}.mid_block.resnets.{n}.{b}")
        for side, n, (a, b) in product(("encoder", "decoder"), (0, 1), _RESNET.items())
    ),
    *(
        Row(f"{side}.mid.attn_1.{a}", f"{side}.mid_block.attentions.0.{b}", "square")
        for side, (a, b) in product(("encoder", "decoder"), _ATTENTION.items())
    ),
    *(Row(f"{side}.mid.attn_1.norm", f"{side}.mid_block.attentions.0.group_norm") for side in ("encoder", "decoder")),
    *(Row("decoder.up.{i}.block.{j}." + a, "decoder.up_blocks.{u}.resnets.{j}." + b) for a, b in _RESNET.items()),
    Row("decoder.up.{i}.upsample.conv", "decoder.up_blocks.{u}.upsamplers.0.conv"),
    *(Row(f"{side}.norm_out", f"{side}.conv_norm_out") for side in ("encoder", "decoder")),
    *(Row(f"{side}.conv_out", f"{side}.conv_out") for side in ("encoder", "decoder")),
)

SUFFIXES = {"weight": "weight", "bias": "bias", "scale": "weight"}


class Pair(NamedTuple):
    """One official tensor and the tensors it becomes."""

    official: str
    diffusers: tuple[str, ...]
    how: str


def pairs_of(params: Params) -> list[Pair]:
    """The rows expanded for a network of these sizes, in the order of the table. FileError as in `network_shapes`."""
    _check_representable(params)
    table, blocks, parts = _table(params)
    names, pairs = set(network_shapes(params)), []
    for row, i, j, (ours, theirs) in product(table, range(blocks), range(parts), SUFFIXES.items()):
        count = {"i": i, "j": j, "u": blocks - 1 - i}
        official = f"{row.official.format(**count)}.{ours}"
        if official in names:
            names.remove(official)  # a row without a count comes round again
            diffusers = tuple(f"{name.format(**count)}.{theirs}" for name in row.diffusers.split())
            pairs.append(Pair(official, diffusers, row.how))
    return pairs


def network_shapes(params: Params, layout: Layout = "official") -> Shapes:
    """Names and shapes of a network's tensors in that layout. FileError if diffusers has no network of these sizes."""
    shapes = _official_shapes(params)
    if layout == "official":
        return shapes
    return {
        name: shape
        for pair in pairs_of(params)
        for name, shape in zip(pair.diffusers, _parts(shapes[pair.official], pair, params), strict=True)
    }


def _official_shapes(params: Params) -> Shapes:
    if isinstance(params, AutoEncoderParams):
        return autoencoder_shapes(params)
    return controlnet_shapes(params) if isinstance(params, ControlNetParams) else flux_shapes(params)


def _parts(shape: Shape, pair: Pair, params: Params) -> list[Shape]:
    """The shapes that diffusers has for one official tensor; `keymaps.py` does the same to tensors."""
    rows, rest = shape[0], shape[1:]
    if len(pair.diffusers) > 1:
        assert isinstance(params, FluxParams)
        rows -= (len(pair.diffusers) - 1) * params.hidden_size
        return [(params.hidden_size, *rest)] * (len(pair.diffusers) - 1) + [
            _diffusers_shape((rows, *rest), pair.how, params)
        ]
    return [_diffusers_shape(shape, pair.how, params)]


def _diffusers_shape(shape: Shape, how: str, params: Params) -> Shape:
    match how:
        case "square":
            return shape[:2]
        case "widen rows":
            return (shape[0] + added_width(params), *shape[1:])
        case "widen columns" if len(shape) == 2:
            return (shape[0], shape[1] + added_width(params))
    return shape


def added_width(params: Params) -> int:
    """Features by which diffusers' MLP is wider than the official MLP."""
    assert isinstance(params, FluxParams)
    return 4 * params.hidden_size - params.mlp_hidden_dim


def _table(params: Params) -> tuple[tuple[Row, ...], int, int]:
    """A network's table, and the ranges of {i} and {j}."""
    if isinstance(params, AutoEncoderParams):
        return AUTOENCODER, len(params.ch_mult), params.num_res_blocks + 1
    table = CONTROLNET if isinstance(params, ControlNetParams) else TRANSFORMER
    return table, max(params.depth, params.depth_single_blocks), 1


def _check_representable(params: Params) -> None:
    """FileError where diffusers fixes what the official parameters leave open."""
    if isinstance(params, FluxParams) and (params.mlp_ratio > 4 or params.theta != 10_000 or not params.qkv_bias):
        raise FileError(
            f"diffusers has no FLUX transformer with mlp_ratio {params.mlp_ratio}, theta {params.theta} and "
            f"qkv_bias {params.qkv_bias}: it takes at most 4, 10000 and True."
        )
