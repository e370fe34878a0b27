"""A model of random weights as a folder that ships; T5 and CLIP have tokenizers trained on the spot."""

import json
from dataclasses import replace
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import nn
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    CLIPVisionConfig,
    Dinov2Config,
    Dinov2Model,
    T5Config,
    T5EncoderModel,
    T5ForConditionalGeneration,
    T5TokenizerFast,
)

from flux_core.checkpoint import write_safetensors
from flux_core.model import AutoEncoder, Flux
from flux_core.variants import VARIANTS, Variant

SENTENCES = [
    "a red apple on a blue table",
    "two green pigs and a yellow star",
    "a small house left of a big tree",
    "the moon above three purple balloons",
]


def small_variant(name: str = "flux-mini", **changes) -> Variant:
    """That row at a size that forwards in milliseconds, with an MLP of 3 times the hidden size."""
    row = VARIANTS[name]
    params = replace(
        row.params, vec_in_dim=16, context_in_dim=24, hidden_size=32, mlp_ratio=3.0, num_heads=2, depth=2,
        depth_single_blocks=3, axes_dim=(4, 6, 6), **changes,
    )  # fmt: skip
    ae_params = replace(row.ae_params, ch=32, ch_mult=(1, 2, 2, 2), num_res_blocks=1)
    return replace(row, params=params, ae_params=ae_params, max_text=20)


def random_weights(module: nn.Module, seed: int = 0, std: float = 0.1) -> nn.Module:
    """Normal weights with a seed; scales of norms around 1."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in module.named_parameters():
        noise = std * torch.randn(p.shape, generator=generator)
        is_scale = name.endswith("scale") or ("norm" in name and name.endswith("weight"))
        p.data.copy_(1 + noise if is_scale else noise)
    return module.eval().requires_grad_(False)


def t5_tokenizer() -> T5TokenizerFast:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    special = ["<pad>", "</s>", "<unk>"]
    tokenizer.train_from_iterator(
        SENTENCES, trainers.UnigramTrainer(vocab_size=120, special_tokens=special, unk_token="<unk>")
    )
    scores = {piece: -float(i) for i, piece in enumerate(sorted(tokenizer.get_vocab(), key=tokenizer.token_to_id))}
    return T5TokenizerFast(vocab=list(scores.items()), extra_ids=0)


def clip_tokenizer(length: int = 77) -> CLIPTokenizer:
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=700, initial_alphabet=alphabet, end_of_word_suffix="</w>")
    tokenizer.train_from_iterator(SENTENCES, trainer)
    pieces = sorted(tokenizer.get_vocab(), key=tokenizer.token_to_id)
    pieces += ["<|startoftext|>", "<|endoftext|>"]
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    return CLIPTokenizer(vocab=vocab, merges=[tuple(pair) for pair in merges], model_max_length=length)


def t5_config(variant: Variant, vocab_size: int) -> T5Config:
    return T5Config(
        d_model=variant.params.context_in_dim, d_kv=8, num_heads=2, d_ff=32, num_layers=2,
        vocab_size=vocab_size, feed_forward_proj="gated-gelu", tie_word_embeddings=False,
        decoder_start_token_id=0,
    )  # fmt: skip


def clip_config(variant: Variant, words: CLIPTokenizer) -> CLIPTextConfig:
    return CLIPTextConfig(
        hidden_size=variant.params.vec_in_dim, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, vocab_size=len(words), max_position_embeddings=77,
        eos_token_id=words.eos_token_id, bos_token_id=words.bos_token_id, pad_token_id=words.pad_token_id,
    )  # fmt: skip


def write_text_encoders(folder: Path, variant: Variant) -> None:
    """Folders `t5` and `clip`, of the sizes that the variant's transformer takes."""
    t5_words, clip_words = t5_tokenizer(), clip_tokenizer()
    t5 = T5EncoderModel(t5_config(variant, len(t5_words)))
    clip = CLIPTextModel(clip_config(variant, clip_words))
    for name, model, words in (("t5", t5, t5_words), ("clip", clip, clip_words)):
        random_weights(model, seed=2).save_pretrained(folder / name)
        words.save_pretrained(folder / name)


def write_hub(folder: Path, variant: Variant) -> None:
    """The hub's repositories as folders: CLIP with its vision half, T5's weights in the FLUX.1 one only."""
    t5_words, clip_words = t5_tokenizer(), clip_tokenizer()
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=32
    )
    both = {"text_config": clip_config(variant, clip_words).to_dict(), "vision_config": vision.to_dict()}
    clip = random_weights(CLIPModel(CLIPConfig(**both, projection_dim=8)), seed=2)
    t5 = random_weights(T5ForConditionalGeneration(t5_config(variant, len(t5_words))), seed=2)
    clip.save_pretrained(folder / variant.clip)
    clip_words.save_pretrained(folder / variant.clip)
    t5.save_pretrained(folder / variant.repo / "text_encoder_2")
    t5_words.save_pretrained(folder / variant.repo / "tokenizer_2")
    t5_words.save_pretrained(folder / variant.t5)


def write_model(folder: Path, variant: Variant, dtype: torch.dtype = torch.float32) -> Path:
    """The whole folder, as `weights/flux-mini` is."""
    write_text_encoders(folder, variant)
    flux, ae = random_weights(Flux(variant.params)), random_weights(AutoEncoder(variant.ae_params), 1)
    write_safetensors(folder / variant.flow_file, flux.to(dtype).state_dict())
    write_safetensors(folder / variant.ae_file, ae.to(dtype).state_dict())
    return folder


def write_scorer(folder: Path) -> Path:
    """A DINOv2 that sees pictures at 32x32, as transformers keeps one."""
    config = Dinov2Config(
        image_size=32, patch_size=8, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, use_mask_token=False
    )
    random_weights(Dinov2Model(config), seed=3, std=0.5).save_pretrained(folder)
    sizes = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    kind = {"image_processor_type": "BitImageProcessor", "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    (folder / "preprocessor_config.json").write_text(json.dumps(sizes | kind))
    return folder
