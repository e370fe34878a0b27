"""The three networks that stage 2 trains together: the transformer, a small T5 encoder and a small CLIP text model.

The text encoders are transformers' own classes, at the sizes below, so that what ships loads like any T5 and CLIP.
They are trained from nothing, together with the transformer, on its loss alone.
"""

import torch
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from flux_core.model import Flux
from flux_core.sampling import image_ids
from flux_core.variants import VARIANTS

VARIANT = VARIANTS["flux-mini"]

T5_CONFIG = T5Config(
    vocab_size=2048,
    d_model=VARIANT.params.context_in_dim,
    d_kv=64,
    d_ff=384,
    num_layers=3,
    num_heads=4,
    feed_forward_proj="gated-gelu",
    dropout_rate=0.0,
    pad_token_id=0,
    eos_token_id=1,
)
CLIP_CONFIG = CLIPTextConfig(
    vocab_size=2048,
    hidden_size=VARIANT.params.vec_in_dim,
    intermediate_size=256,
    num_hidden_layers=2,
    num_attention_heads=2,
    max_position_embeddings=77,
    projection_dim=VARIANT.params.vec_in_dim,
    bos_token_id=2046,
    eos_token_id=2047,
    pad_token_id=2047,
)


QUERY_RATE = T5_CONFIG.d_kv**-0.5
"""T5 divides nothing by sqrt(d_kv): its query weights hold that factor, so they are as much smaller than a usual
attention's, and AdamW's steps, whose size does not depend on the gradient's, must be, too. At the full rate
the logits outgrow the softmax within a few hundred steps, each word attends to itself for good, and T5
becomes a list of words without an order."""


class Networks(nn.Module):
    """Transformer and text encoders as one module; `forward` maps token ids and latents to a velocity."""

    def __init__(self) -> None:
        super().__init__()
        self.flux = Flux(VARIANT.params)
        self.t5 = T5EncoderModel(T5_CONFIG)
        self.clip = CLIPTextModel(CLIP_CONFIG)
        initialize(self.flux)
        give_order(self.t5)

    def rates(self) -> dict[str, float]:
        """Parameters with a lower learning rate, and its share of the others'."""
        return {
            name: QUERY_RATE for name, _ in self.t5.named_parameters("t5") if name.endswith("SelfAttention.q.weight")
        }

    def encode_text(self, t5_ids: Tensor, clip_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Ids [B, T] and [B, C] -> text tokens [B, T, D] and pooled vectors [B, V]."""
        txt = self.t5(input_ids=t5_ids).last_hidden_state
        return txt, self.clip(input_ids=clip_ids).pooler_output

    def velocity(self, x: Tensor, t: Tensor, txt: Tensor, vec: Tensor, guidance: Tensor) -> Tensor:
        """x: packed latents [B, L, 64] of square pictures; t, guidance: [B]."""
        side = int(x.shape[1] ** 0.5)
        ids = image_ids(x.shape[0], side, side, x.device)
        txt_ids = torch.zeros(x.shape[0], txt.shape[1], 3, device=x.device)
        return self.flux(x, ids, txt, txt_ids, t, vec, guidance)

    def forward(self, x: Tensor, t: Tensor, t5_ids: Tensor, clip_ids: Tensor, guidance: Tensor) -> Tensor:
        return self.velocity(x, t, *self.encode_text(t5_ids, clip_ids), guidance)


def initialize(flux: Flux) -> None:
    """Xavier for all Linears, and every block the identity at the start (adaLN-Zero, arXiv 2212.09748)."""
    for module in flux.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
    for name, module in flux.named_modules():
        if name.endswith(("_mod.lin", "modulation.lin", "adaLN_modulation.1", "final_layer.linear")):
            nn.init.zeros_(module.weight)


def give_order(t5: T5EncoderModel) -> None:
    """Initialize T5's heads to attend to tokens before, tokens after, neighbours, and all.

    The bias falls off with the distance, as in ALiBi (arXiv 2108.12409). T5's own start hardly tells the order of
    words, and order is all that says which of two things is on the left.
    """
    distance = torch.arange(T5_CONFIG.relative_attention_num_buckets / 2)
    near, far, unseen = -0.3 * distance, torch.zeros_like(distance), torch.full_like(distance, -6.0)
    before = torch.stack([near, unseen, 2 * near, far], 1)
    behind = torch.stack([unseen, near, 2 * near, far], 1)
    bias = t5.encoder.block[0].layer[0].SelfAttention.relative_attention_bias
    with torch.no_grad():
        bias.weight.copy_(torch.cat([before, behind]))
