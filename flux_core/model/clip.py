"""CLIP's text encoder in pure PyTorch: a causal transformer, of which FLUX.1 takes one vector.

Source: Radford et al. 2021 (arXiv 2103.00020), section 2.4. Modules have the names of transformers, whose files it
reads, and each operation rounds as there.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..params import ClipParams
from .layers import Embedding


def quick_gelu(x: Tensor) -> Tensor:
    """OpenAI's GELU: x sigmoid(1.702 x)."""
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = MappingProxyType({"quick_gelu": quick_gelu, "gelu": F.gelu})
"""by the `hidden_act` of a config.json"""
ARGMAX = 2
"""the end-of-text token of old configurations, which is wrong: the true one is a text's largest id"""


class ClipText(nn.Module):
    """Token ids to one vector: that of the first end-of-text token."""

    def __init__(self, params: ClipParams) -> None:
        """ValueError for an unknown activation, or heads that do not share the width evenly."""
        super().__init__()
        self.eos_token_id = params.eos_token_id
        rows = {"token_embedding": params.vocab_size, "position_embedding": params.max_position_embeddings}
        self.embeddings = nn.ModuleDict({name: Embedding(n, params.hidden_size) for name, n in rows.items()})
        self.encoder = Stack(params)
        self.final_layer_norm = nn.LayerNorm(params.hidden_size, eps=params.layer_norm_eps)

    def forward(self, ids: Tensor) -> Tensor:
        """int64 [B, L] -> [B, hidden_size]"""
        places = torch.arange(ids.shape[1], dtype=torch.int64, device=ids.device)
        x = self.embeddings["token_embedding"](ids) + self.embeddings["position_embedding"](places)[None]
        x = self.encoder(x)
        is_end = ids if self.eos_token_id == ARGMAX else (ids == self.eos_token_id).int()
        rows = torch.arange(len(ids), dtype=torch.int64, device=ids.device)
        return self.final_layer_norm(x)[rows, is_end.argmax(-1)]


class Stack(nn.Module):
    """The layers, one after another."""

    def __init__(self, params: ClipParams) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(params) for _ in range(params.num_hidden_layers))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class Layer(nn.Module):
    """Causal attention and feed-forward layer, each behind a norm and beside a residual path."""

    def __init__(self, params: ClipParams) -> None:
        super().__init__()
        width, hidden, eps = params.hidden_size, params.intermediate_size, params.layer_norm_eps
        self.self_attn = Attention(width, params.num_attention_heads)
        self.layer_norm1, self.layer_norm2 = (nn.LayerNorm(width, eps=eps) for _ in range(2))
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, hidden), "fc2": nn.Linear(hidden, width)})
        if (name := params.hidden_act) not in ACTIVATIONS:
            raise ValueError(f"hidden_act is {str(name)[:40]!a}, and none of {', '.join(ACTIVATIONS)}")
        self.activation = ACTIVATIONS[name]

    def forward(self, x: Tensor) -> Tensor:
        """[B, L, hidden_size] -> as much"""
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp["fc2"](self.activation(self.mlp["fc1"](self.layer_norm2(x))))


class Attention(nn.Module):
    """Attention of each token to those before it."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"hidden_size {width} is no multiple of num_attention_heads {heads}")
        self.heads = heads
        self.k_proj, self.v_proj, self.q_proj, self.out_proj = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        """[B, L, hidden_size] -> as much"""
        layers = (self.q_proj, self.k_proj, self.v_proj)
        q, k, v = (layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in layers)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out_proj(y.transpose(1, 2).flatten(2))
