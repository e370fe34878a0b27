"""The same weights by two names: Black Forest Labs' (ours) and diffusers'.

One table of rows for each network; both directions read the same rows. Almost all is renaming. What is more:

- diffusers keeps q, k, v (and a single block's MLP input) as Linears of their own: official rows are cut;
- its last modulation gives (scale, shift) where the official one gives (shift, scale): halves are swapped;
- its autoencoder's attention has Linears [C, C] where the official one has 1x1 convolutions [C, C, 1, 1];
- its decoder counts levels from the coarsest, the official one from the finest;
- its MLPs are always 4 times as wide as the block. A narrower one is widened with zeros, which add nothing
  since GELU(0) = 0, and is cut back on the way home.

Going there and back gives the same bytes. Tensors are views of what was given wherever no values had to move.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import product
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import FileError
from ..model import AutoEncoder, Flux
from ..params import AutoEncoderParams, FluxParams

State = Mapping[str, Tensor]
Params = FluxParams | AutoEncoderParams


class Row(NamedTuple):
    """A module and its counterparts. {i} counts blocks or levels, {u} levels backwards, {j} in a level."""

    official: str
    diffusers: str
    """several, divided by spaces, where the official rows are cut"""
    how: str = ""
    """what happens besides: see `_there` and `_back`"""


_DOUBLE, _SINGLE = "transformer_blocks.{i}.", "single_transformer_blocks.{i}."

TRANSFORMER = (
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
    Row("final_layer.linear", "proj_out"),
    Row("final_layer.adaLN_modulation.1", "norm_out.linear", "swap halves"),
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


def to_diffusers(state: State, params: Params) -> dict[str, Tensor]:
    """Official names -> diffusers'. FileError if names or sizes are not those of `params`."""
    pairs = pairs_of(params)
    _same_names(state, [pair.official for pair in pairs])
    out: dict[str, Tensor] = {}
    for pair in pairs:
        parts = _cut(state[pair.official], len(pair.diffusers), params)
        parts[-1] = _there(parts[-1], pair.how, params)
        out.update(zip(pair.diffusers, parts, strict=True))
    return out


def from_diffusers(state: State, params: Params) -> dict[str, Tensor]:
    """diffusers' names -> official ones. FileError likewise."""
    pairs = pairs_of(params)
    _same_names(state, [name for pair in pairs for name in pair.diffusers])
    return dict(streamed_from_diffusers(state.__getitem__, pairs, params))


def streamed_from_diffusers(
    get: Callable[[str], Tensor], pairs: Iterable[Pair], params: Params
) -> Iterator[tuple[str, Tensor]]:
    """Official names and tensors, one by one, from a function that gives a tensor by its diffusers name."""
    for pair in pairs:
        yield pair.official, _joined([get(name) for name in pair.diffusers], pair.how, params)


def diffusers_shapes(state: State, params: Params) -> dict[str, tuple[int, ...]]:
    """Names and shapes that a network's official state dict, on `meta`, has in diffusers' layout."""
    return {name: tuple(x.shape) for name, x in to_diffusers(state, params).items()}


def pairs_of(params: Params) -> list[Pair]:
    """The rows written out for a network of these sizes, in the order of the table."""
    table, names, blocks, parts = _network(params)
    pairs = []
    for row, i, j, (ours, theirs) in product(table, range(blocks), range(parts), SUFFIXES.items()):
        count = {"i": i, "j": j, "u": blocks - 1 - i}
        official = f"{row.official.format(**count)}.{ours}"
        if official in names:
            names.remove(official)  # a row without a count comes round again
            diffusers = tuple(f"{name.format(**count)}.{theirs}" for name in row.diffusers.split())
            pairs.append(Pair(official, diffusers, row.how))
    return pairs


def _network(params: Params) -> tuple[tuple[Row, ...], set[str], int, int]:
    """Its table, its tensors' names, and how far {i} and {j} count."""
    with torch.device("meta"):
        if isinstance(params, AutoEncoderParams):
            names = set(AutoEncoder(params).state_dict())
            return AUTOENCODER, names, len(params.ch_mult), params.num_res_blocks + 1
        _check_representable(params)
        names = set(Flux(params).state_dict())
        return TRANSFORMER, names, max(params.depth, params.depth_single_blocks), 1


def _check_representable(params: FluxParams) -> None:
    """diffusers fixes what the official parameters leave open."""
    if params.mlp_ratio > 4 or params.theta != 10_000 or not params.qkv_bias:
        raise FileError(
            f"diffusers has no FLUX transformer with mlp_ratio {params.mlp_ratio}, theta {params.theta} and "
            f"qkv_bias {params.qkv_bias}: it takes at most 4, 10000 and True."
        )


def _same_names(state: State, names: list[str]) -> None:
    missing, extra = [x for x in names if x not in state], sorted(set(state) - set(names))
    if missing or extra:
        raise FileError(
            f"these are not the tensors of this model: {len(missing)} missing {missing[:5]}, "
            f"{len(extra)} unexpected {extra[:5]}."
        )


def _cut(x: Tensor, count: int, params: Params) -> list[Tensor]:
    """The rows of `x` in `count` pieces: q, k, v of the hidden size, and whatever is left."""
    if count == 1:
        return [x]
    assert isinstance(params, FluxParams)
    return list(x.tensor_split([params.hidden_size * n for n in range(1, count)]))


def _joined(parts: list[Tensor], how: str, params: Params) -> Tensor:
    """The official tensor of those that it is cut into. A function, so that nothing here holds on to the parts."""
    parts[-1] = _back(parts[-1], how, params)
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _there(x: Tensor, how: str, params: Params) -> Tensor:
    match how:
        case "swap halves":
            return _swap_halves(x)
        case "square":
            return x[:, :, 0, 0] if x.ndim == 4 else x
        case "widen rows" if zeros := _zeros(params):
            return torch.cat((x, x.new_zeros(zeros, *x.shape[1:])))
        case "widen columns" if (zeros := _zeros(params)) and x.ndim == 2:
            return F.pad(x, (0, zeros))
    return x


def _back(x: Tensor, how: str, params: Params) -> Tensor:
    match how:
        case "swap halves":
            return _swap_halves(x)
        case "square":
            return x[:, :, None, None] if x.ndim == 2 else x
        case "widen rows" if zeros := _zeros(params):
            return _narrow(x, 0, zeros)
        case "widen columns" if (zeros := _zeros(params)) and x.ndim == 2:
            return _narrow(x, 1, zeros)
    return x


def _zeros(params: Params) -> int:
    """By how much diffusers' MLP is wider."""
    assert isinstance(params, FluxParams)
    return 4 * params.hidden_size - params.mlp_hidden_dim


def _swap_halves(x: Tensor) -> Tensor:
    return torch.cat(x.chunk(2)[::-1])


def _narrow(x: Tensor, dim: int, zeros: int) -> Tensor:
    size = x.shape[dim] - zeros
    if x.narrow(dim, size, zeros).any():
        raise FileError("an MLP of this file is wider than this model's, and the rest of it is not zero.")
    return x.narrow(dim, 0, size).contiguous()
