"""T5's encoder in pure PyTorch: the version 1.1 that FLUX.1 reads prompts with.

Source: Raffel et al. 2020 (arXiv 1910.10683), section 2.1; its gated GELU: Shazeer 2020 (arXiv 2002.05202). Modules
have the names of transformers, whose files it reads, and each operation rounds as there.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..params import T5Params
from .layers import Embedding


class T5Encoder(nn.Module):
    """Token ids to a vector for each token; all of them attend, padding as well."""

    def __init__(self, params: T5Params) -> None:
        super().__init__()
        self.shared = Embedding(params.vocab_size, params.d_model)
        self.encoder = Stack(params)

    def forward(self, ids: Tensor) -> Tensor:
        """int64 [B, L] -> [B, L, d_model]"""
        return self.encoder(self.shared(ids))


class Stack(nn.Module):
    """The blocks. The first one's bias by position is that of all."""

    def __init__(self, params: T5Params) -> None:
        super().__init__()
        self.block = nn.ModuleList(Block(params, is_first=i == 0) for i in range(params.num_layers))
        self.final_layer_norm = Norm(params)

    def forward(self, x: Tensor) -> Tensor:
        bias = None
        for block in self.block:
            x, bias = block(x, bias)
        return self.final_layer_norm(x)


class Block(nn.Module):
    """Attention, then a feed-forward layer."""

    def __init__(self, params: T5Params, is_first: bool) -> None:
        super().__init__()
        self.layer = nn.ModuleList([AttentionLayer(params, is_first), DenseLayer(params)])

    def forward(self, x: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        x, bias = self.layer[0](x, bias)
        return self.layer[1](x), bias


class AttentionLayer(nn.Module):
    """Attention behind a norm, beside a residual path."""

    def __init__(self, params: T5Params, has_bias: bool) -> None:
        super().__init__()
        self.SelfAttention = Attention(params, has_bias)
        self.layer_norm = Norm(params)

    def forward(self, x: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        y, bias = self.SelfAttention(self.layer_norm(x), bias)
        return within_range(x + y), bias


class DenseLayer(nn.Module):
    """The feed-forward layer behind a norm, beside a residual path."""

    def __init__(self, params: T5Params) -> None:
        super().__init__()
        self.DenseReluDense = GatedDense(params)
        self.layer_norm = Norm(params)

    def forward(self, x: Tensor) -> Tensor:
        return within_range(x + self.DenseReluDense(self.layer_norm(x)))


def within_range(x: Tensor) -> Tensor:
    """In fp16, whose range T5 leaves, finite values; as they are in other dtypes."""
    if x.dtype != torch.float16:
        return x
    largest = torch.finfo(x.dtype).max
    limit = torch.where(torch.isinf(x).any(), largest - 1000, largest)
    return x.clamp(-limit, limit)


class Norm(nn.Module):
    """Root mean square norm with statistics in fp32: x / rms(x) * weight."""

    def __init__(self, params: T5Params) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(params.d_model)), params.layer_norm_epsilon

    def forward(self, x: Tensor) -> Tensor:
        scale = torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * (x * scale).to(self.weight.dtype)


class Attention(nn.Module):
    """softmax(q k^T + bias) v: scores are not scaled, and the bias depends on the distance of two tokens."""

    def __init__(self, params: T5Params, has_bias: bool) -> None:
        super().__init__()
        self.heads, self.reach = params.num_heads, params.relative_attention_max_distance
        dim, inner = params.d_model, params.num_heads * params.d_kv
        self.q, self.k, self.v = (nn.Linear(dim, inner, bias=False) for _ in range(3))
        self.o = nn.Linear(inner, dim, bias=False)
        if has_bias:
            self.relative_attention_bias = Embedding(params.relative_attention_num_buckets, self.heads)

    def forward(self, x: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        """x: [B, L, d_model]. Returns as much, and the bias [1, heads, L, L]."""
        q, k, v = (layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        bias = self.bias(x.shape[1], x.device) if bias is None else bias
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=1.0)
        return self.o(y.transpose(1, 2).flatten(2)), bias

    def bias(self, length: int, device: torch.device) -> Tensor:
        """[1, heads, L, L], by query and key."""
        place = torch.arange(length, dtype=torch.int64, device=device)
        found = buckets(place[None] - place[:, None], self.relative_attention_bias.num_embeddings, self.reach)
        return self.relative_attention_bias(found).permute(2, 0, 1)[None].contiguous()


def buckets(distance: Tensor, count: int, reach: int) -> Tensor:
    """The row of the bias for each distance from query to key.

    Half of `count` rows are for keys behind the query. In each half, one half is for single distances, the other for
    distances that grow by a factor, the last for all from `reach` on. Source: the paper's section 2.1.
    """
    half, far = count // 2, distance.abs()
    single = half // 2
    grown = torch.log(far.float() / single) / math.log(reach / single) * (half - single)
    by_factor = (single + grown.to(torch.int64)).clamp(max=half - 1)
    return half * (distance > 0) + torch.where(far < single, far, by_factor)


class GatedDense(nn.Module):
    """wo(GELU(wi_0 x) * wi_1 x)"""

    def __init__(self, params: T5Params) -> None:
        super().__init__()
        self.wi_0, self.wi_1 = (nn.Linear(params.d_model, params.d_ff, bias=False) for _ in range(2))
        self.wo = nn.Linear(params.d_ff, params.d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.wo(gelu(self.wi_0(x)) * self.wi_1(x))


def gelu(x: Tensor) -> Tensor:
    """GELU by tanh, written out as T5 was trained with it: `F.gelu` rounds in other places."""
    return 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0))))
