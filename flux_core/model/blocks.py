"""The two blocks of FLUX.1 and its last layer.

A double block has an image and a text stream with weights of their own and one joint attention over [txt ; img].
A single block works on the joined sequence, with attention and MLP side by side between two wide Linears.

A block receives tensors only: its modulation is computed before the blocks run, and the functions around its Linears
are `self.ops`. So all blocks of a kind share one compiled graph. `tap` receives the named values (`hooks/sites.py`
lists them); the default tap returns them unchanged.
"""

from einops import rearrange
from torch import Tensor, nn

from ..params import FluxParams
from . import ops
from .layers import Modulation, ModulationOut, QKNorm, SelfAttention
from .ops import Heads
from .tap import UNTOUCHED, Tap


def split_heads(qkv: Tensor, num_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """[B, L, 3*H*D] -> q, k, v of [B, H, L, D] each; heads are contiguous in each third."""
    q, k, v = rearrange(qkv, "B L (K H D) -> K B H L D", K=3, H=num_heads)
    return q, k, v


class DoubleStreamBlock(nn.Module):
    """Joint attention of img [B, L, D] and txt [B, T, D], then an MLP for each stream."""

    ops = ops.PLAIN

    def __init__(self, params: FluxParams) -> None:
        super().__init__()
        dim, mlp_dim = params.hidden_size, params.mlp_hidden_dim
        self.num_heads = params.num_heads

        self.img_mod = Modulation(dim, double=True)
        self.img_attn = SelfAttention(dim, params.num_heads, params.qkv_bias)
        self.img_mlp = nn.Sequential(nn.Linear(dim, mlp_dim), nn.GELU(approximate="tanh"), nn.Linear(mlp_dim, dim))

        self.txt_mod = Modulation(dim, double=True)
        self.txt_attn = SelfAttention(dim, params.num_heads, params.qkv_bias)
        self.txt_mlp = nn.Sequential(nn.Linear(dim, mlp_dim), nn.GELU(approximate="tanh"), nn.Linear(mlp_dim, dim))

    def modulation(self, vec: Tensor) -> tuple[ModulationOut, ...]:
        """vec [B, D] -> the four sets that `forward` takes: img attention and MLP, txt attention and MLP."""
        return *self.img_mod(vec), *self.txt_mod(vec)

    def forward(
        self,
        img: Tensor,
        txt: Tensor,
        img_mod1: ModulationOut,
        img_mod2: ModulationOut,
        txt_mod1: ModulationOut,
        txt_mod2: ModulationOut,
        pe: Tensor,
        tap: Tap = UNTOUCHED,
    ) -> tuple[Tensor, Tensor]:
        img_heads = self._heads("img", self.img_attn, img, img_mod1, tap)
        txt_heads = self._heads("txt", self.txt_attn, txt, txt_mod1, tap)
        scales = self.txt_attn.norm.scales, self.img_attn.norm.scales
        q, k, v = self.ops.norm_rope_join(txt_heads, img_heads, *scales, pe)
        attn = tap.attend(self.ops.attend, tap("q", q), tap("k", k), v)
        txt_attn, img_attn = tap("txt.attn", attn[:, : txt.shape[1]]), tap("img.attn", attn[:, txt.shape[1] :])

        img = self.ops.gated_sum(img, img_mod1.gate, self.img_attn.proj(img_attn))
        img_mlp = self.ops.mlp(self.img_mlp, self.ops.modulate(img, img_mod2.shift, img_mod2.scale, self.img_mlp))
        img = self.ops.gated_sum(img, img_mod2.gate, tap("img.mlp", img_mlp))
        txt = self.ops.gated_sum(txt, txt_mod1.gate, self.txt_attn.proj(txt_attn))
        txt_mlp = self.ops.mlp(self.txt_mlp, self.ops.modulate(txt, txt_mod2.shift, txt_mod2.scale, self.txt_mlp))
        txt = self.ops.gated_sum(txt, txt_mod2.gate, tap("txt.mlp", txt_mlp))
        return img, txt

    def _heads(self, stream: str, attn: SelfAttention, x: Tensor, mod: ModulationOut, tap: Tap) -> Heads:
        q, k, v = split_heads(attn.qkv(self.ops.modulate(x, mod.shift, mod.scale, attn.qkv)), self.num_heads)
        return tap(f"{stream}.q", q), tap(f"{stream}.k", k), tap(f"{stream}.v", v)


class SingleStreamBlock(nn.Module):
    """The joined sequence x [B, T + L, D], text first: attention and MLP in parallel (arXiv 2302.05442)."""

    ops = ops.PLAIN

    def __init__(self, params: FluxParams) -> None:
        super().__init__()
        dim, mlp_dim = params.hidden_size, params.mlp_hidden_dim
        self.num_heads = params.num_heads
        self.split = [3 * dim, mlp_dim]

        self.linear1 = nn.Linear(dim, 3 * dim + mlp_dim)
        self.linear2 = nn.Linear(dim + mlp_dim, dim)
        self.norm = QKNorm(params.head_dim)
        self.modulation = Modulation(dim, double=False)

    def forward(self, x: Tensor, mod: ModulationOut, pe: Tensor, tap: Tap = UNTOUCHED) -> Tensor:
        # One expression: a name for the modulated tokens would keep them in memory through all that follows.
        qkv, hidden = self.ops.linear1(
            self.linear1, self.ops.modulate(x, mod.shift, mod.scale, self.linear1), self.split
        )
        q, k, v = split_heads(qkv, self.num_heads)
        q, k, v = tap.joined("q", q, 2), tap.joined("k", k, 2), tap.joined("v", v, 2)
        q, k = self.ops.norm_rope(q, k, *self.norm.scales, pe)
        attn = tap.joined("attn", tap.attend(self.ops.attend, tap("q", q), tap("k", k), v), 1)
        return self.ops.gated_sum(x, mod.gate, tap.joined("linear2", self.ops.linear2(self.linear2, attn, hidden), 1))


class LastLayer(nn.Module):
    """Modulated norm and a Linear back to the features of a latent patch."""

    ops = ops.PLAIN

    def __init__(self, hidden_size: int, out_channels: int) -> None:
        super().__init__()
        self.linear = nn.Linear(hidden_size, out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 2 * hidden_size))

    def modulation(self, vec: Tensor) -> tuple[Tensor, Tensor]:
        """vec [B, D] -> shift and scale, [B, 1, D] each."""
        shift, scale = self.ops.modulation(self.adaLN_modulation[1], vec)[..., None, :].chunk(2, dim=-1)
        return shift, scale

    def forward(self, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        return self.linear(self.ops.modulate(x, shift, scale, self.linear))
