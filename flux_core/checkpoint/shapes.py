"""Names and shapes of the tensors of the networks, by their sizes, to check a file's header. No torch.

They are those of the state dicts of `model.Flux`, `model.ControlNet`, `model.AutoEncoder`, `model.T5Encoder` and
`model.ClipText`; a test compares them, the last two with transformers', too.
"""

from collections.abc import Mapping
from dataclasses import fields
from itertools import pairwise
from typing import Any

from ..params import TIME_DIM, AutoEncoderParams, ClipParams, ControlNetParams, FluxParams, T5Params

Shape = tuple[int, ...]
Shapes = dict[str, Shape]

T5_DEFAULTS = {
    "vocab_size": 32_128,
    "d_model": 512,
    "d_kv": 64,
    "d_ff": 2048,
    "num_layers": 6,
    "num_heads": 8,
    "relative_attention_num_buckets": 32,
    "relative_attention_max_distance": 128,
}
CLIP_DEFAULTS = {
    "vocab_size": 49_408,
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "max_position_embeddings": 77,
}
"""sizes that a config.json may leave out, as in transformers"""
GATED = "gated-gelu"
"""the `feed_forward_proj` of T5 1.1, which FLUX.1 reads prompts with"""
LARGEST, DEEPEST = 2**20, 1000
"""bounds of a size and of a number of layers in a config.json"""


def flux_shapes(params: FluxParams) -> Shapes:
    """The transformer's tensors, by official names."""
    dim = params.hidden_size
    final = {"final_layer.linear": (params.out_channels, dim), "final_layer.adaLN_modulation.1": (2 * dim, dim)}
    return _backbone(params) | _dense(final)


def controlnet_shapes(params: ControlNetParams) -> Shapes:
    """A ControlNet's tensors, by the names that XLabs gave them."""
    dim, out = params.hidden_size, {"weight": (params.hidden_size,) * 2, "bias": (params.hidden_size,)}
    hints = enumerate(pairwise(params.hint_channels))
    convs = {f"input_hint_block.{2 * i}": (after, before, 3, 3) for i, (before, after) in hints}
    shapes = _backbone(params) | _dense({"pos_embed_input": (dim, params.cond_channels), **convs})
    shapes |= {"controlnet_mode_embedder.weight": (params.modes, dim)} if params.modes else {}
    shapes |= _repeated("controlnet_blocks", params.depth, out)
    return shapes | _repeated("controlnet_single_blocks", params.depth_single_blocks, out)


def _backbone(params: FluxParams) -> Shapes:
    """The tensors that a transformer and its ControlNets have alike."""
    dim, hidden = params.hidden_size, params.mlp_hidden_dim
    shapes = _dense({"img_in": (dim, params.in_channels), "txt_in": (dim, params.context_in_dim)})
    embedders = {"time_in": TIME_DIM, "vector_in": params.vec_in_dim}
    for name, width in (embedders | ({"guidance_in": TIME_DIM} if params.guidance_embed else {})).items():
        shapes |= _dense({f"{name}.in_layer": (dim, width), f"{name}.out_layer": (dim, dim)})
    head = (params.head_dim,)
    double: Shapes = {}
    for side in ("img", "txt"):
        double |= _dense({f"{side}_mod.lin": (6 * dim, dim)})
        double |= _dense({f"{side}_attn.qkv": (3 * dim, dim)}, bias=params.qkv_bias)
        double |= {f"{side}_attn.norm.{x}_norm.scale": head for x in ("query", "key")}
        double |= _dense({f"{side}_attn.proj": (dim, dim)})
        double |= _dense({f"{side}_mlp.0": (hidden, dim), f"{side}_mlp.2": (dim, hidden)})
    single = _dense({"linear1": (3 * dim + hidden, dim), "linear2": (dim, dim + hidden)})
    single |= {f"norm.{x}_norm.scale": head for x in ("query", "key")} | _dense({"modulation.lin": (3 * dim, dim)})
    shapes |= _repeated("double_blocks", params.depth, double)
    return shapes | _repeated("single_blocks", params.depth_single_blocks, single)


def autoencoder_shapes(params: AutoEncoderParams) -> Shapes:
    """The autoencoder's tensors, by official names."""
    widths, z = [params.ch * mult for mult in params.ch_mult], params.z_channels
    first, last, levels = widths[0], widths[-1], len(widths)
    modules: Shapes = {"encoder.conv_in": (params.ch, params.in_channels, 3, 3)}
    for i, (before, width) in enumerate(zip([params.ch, *widths], widths, strict=False)):
        modules |= _level(f"encoder.down.{i}", before, width, params.num_res_blocks)
        modules |= {f"encoder.down.{i}.downsample.conv": (width, width, 3, 3)} if i < levels - 1 else {}
    modules |= _middle("encoder.mid", last)
    modules |= {"encoder.norm_out": (last,), "encoder.conv_out": (2 * z, last, 3, 3)}
    modules |= {"decoder.conv_in": (last, z, 3, 3)} | _middle("decoder.mid", last)
    for i, (width, before) in enumerate(zip(widths, [*widths[1:], last], strict=True)):
        modules |= _level(f"decoder.up.{i}", before, width, params.num_res_blocks + 1)
        modules |= {f"decoder.up.{i}.upsample.conv": (width, width, 3, 3)} if i else {}
    modules |= {"decoder.norm_out": (first,), "decoder.conv_out": (params.out_ch, first, 3, 3)}
    return _dense(modules)


def t5_params(config: Mapping[str, Any]) -> T5Params:
    """T5's sizes by a config.json. ValueError for what is no size, or for another feed-forward layer than T5 1.1's."""
    if (kind := config.get("feed_forward_proj", "relu")) != GATED:
        raise ValueError(f"feed_forward_proj is {str(kind)[:40]!a}, not {GATED}")
    params = T5Params(**_named(config, T5Params) | _sizes(config, T5_DEFAULTS))
    count, reach = params.relative_attention_num_buckets, params.relative_attention_max_distance
    if not 0 < count // 4 < reach:  # as `model.t5.buckets` needs them
        raise ValueError(f"relative_attention_num_buckets is {count}, and relative_attention_max_distance {reach}")
    return params


def clip_params(config: Mapping[str, Any]) -> ClipParams:
    """CLIP's sizes by a config.json. ValueError for what is no size."""
    return ClipParams(**_named(config, ClipParams) | _sizes(config, CLIP_DEFAULTS))


def _named(config: Mapping[str, Any], kind: type[T5Params | ClipParams]) -> dict[str, Any]:
    """The entries of a config.json that are fields of that class. ValueError for one of another type."""
    found = {field.name: config[field.name] for field in fields(kind) if field.name in config}
    for field in fields(kind):
        types = (int, float) if field.type is float else (field.type,)
        if field.name in found and type(found[field.name]) not in types:
            raise ValueError(f"{field.name} is {str(found[field.name])[:40]!a}")
    return found


def t5_shapes(config: Mapping[str, Any]) -> Shapes:
    """The tensors of T5's encoder, by a config.json. ValueError for what is no size."""
    size = _sizes(config, T5_DEFAULTS)
    dim, heads, hidden = size["d_model"], size["num_heads"], size["d_ff"]
    inner = heads * size["d_kv"]
    gated = str(config.get("feed_forward_proj", "relu")).startswith("gated")
    block: Shapes = {f"layer.0.SelfAttention.{x}": (inner, dim) for x in "qkv"}
    block.update((f"layer.1.DenseReluDense.{x}", (hidden, dim)) for x in (("wi_0", "wi_1") if gated else ("wi",)))
    block["layer.0.SelfAttention.o"] = (dim, inner)
    block |= {"layer.1.DenseReluDense.wo": (dim, hidden), "layer.0.layer_norm": (dim,), "layer.1.layer_norm": (dim,)}
    modules: Shapes = {"shared": (size["vocab_size"], dim), "encoder.final_layer_norm": (dim,)}
    modules |= _repeated("encoder.block", size["num_layers"], block)
    places = (size["relative_attention_num_buckets"], heads)
    return _dense(modules | {"encoder.block.0.layer.0.SelfAttention.relative_attention_bias": places}, bias=False)


def clip_shapes(config: Mapping[str, Any]) -> Shapes:
    """The tensors of CLIP's text encoder, by a config.json. ValueError likewise."""
    size = _sizes(config, CLIP_DEFAULTS)
    dim, hidden = size["hidden_size"], size["intermediate_size"]
    layer: Shapes = {f"self_attn.{x}_proj": (dim, dim) for x in ("q", "k", "v", "out")}
    layer |= {"layer_norm1": (dim,), "layer_norm2": (dim,), "mlp.fc1": (hidden, dim), "mlp.fc2": (dim, hidden)}
    rows = {"token_embedding": size["vocab_size"], "position_embedding": size["max_position_embeddings"]}
    shapes: Shapes = {f"embeddings.{name}.weight": (count, dim) for name, count in rows.items()}
    layers = _repeated("encoder.layers", size["num_hidden_layers"], layer)
    return shapes | _dense(layers | {"final_layer_norm": (dim,)})


def redux_shapes(features: int, hidden: int, width: int) -> Shapes:
    """The tensors of Redux: two layers from SigLIP's features to words of that width."""
    return _dense({"redux_up": (hidden, features), "redux_down": (width, hidden)})


def _dense(modules: Mapping[str, Shape], bias: bool = True) -> Shapes:
    """Weights, each with a bias as long as its first axis."""
    ends = {"weight": None, "bias": 1} if bias else {"weight": None}
    return {f"{name}.{end}": shape[:axes] for name, shape in modules.items() for end, axes in ends.items()}


def _repeated(name: str, count: int, inner: Mapping[str, Shape]) -> Shapes:
    """`inner` in each of `count` blocks."""
    return {f"{name}.{i}.{key}": shape for i in range(count) for key, shape in inner.items()}


def _resnet(name: str, before: int, width: int) -> Shapes:
    convs: Shapes = {
        "norm1": (before,),
        "conv1": (width, before, 3, 3),
        "norm2": (width,),
        "conv2": (width, width, 3, 3),
    }
    shortcut = {} if before == width else {"nin_shortcut": (width, before, 1, 1)}
    return {f"{name}.{key}": shape for key, shape in (convs | shortcut).items()}


def _level(name: str, before: int, width: int, blocks: int) -> Shapes:
    modules: Shapes = {}
    for j in range(blocks):
        modules |= _resnet(f"{name}.block.{j}", width if j else before, width)
    return modules


def _middle(name: str, width: int) -> Shapes:
    attention: Shapes = {"norm": (width,)}
    attention |= dict.fromkeys(("q", "k", "v", "proj_out"), (width, width, 1, 1))
    blocks = _resnet(f"{name}.block_1", width, width) | _resnet(f"{name}.block_2", width, width)
    return blocks | {f"{name}.attn_1.{x}": shape for x, shape in attention.items()}


def _sizes(config: Mapping[str, Any], defaults: Mapping[str, int]) -> dict[str, int]:
    """The sizes by name. ValueError for the first that is no size."""
    sizes = {key: config.get(key, default) for key, default in defaults.items()}
    for key, value in sizes.items():
        if type(value) is not int or not 0 < value <= (DEEPEST if key.endswith("layers") else LARGEST):
            raise ValueError(f"{key} is {str(value)[:40]!a}")
    return sizes
