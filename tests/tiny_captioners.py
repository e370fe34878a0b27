"""Tiny random vision-language models of the real classes, saved as their repositories have them."""

from pathlib import Path
from string import ascii_lowercase

import torch
import transformers
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

TEXT = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": 320,
    "tie_word_embeddings": True,
}
SPREAD = 1.0
"""of weights: so large that an answer depends on the picture"""
BOS, EOS, PAD = "<s>", "</s>", "<pad>"
IMAGE_FIRST = (
    "{{ bos_token }}{% for message in messages %}{{ message['role'] }}: {% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}IMAGE{% else %}{{ part['text'] }}{% endif %}{% endfor %}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
"""a chat template that writes the first token itself, as Llama 3's does"""


def tokenizer(*special: str, image: str, bos: bool = True, **named: str) -> PreTrainedTokenizerFast:
    """Bytes, and these tokens; with `bos` the tokenizer puts BOS in front, as Llama's does."""
    words = [PAD, BOS, EOS, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    inner = Tokenizer(BPE({word: i for i, word in enumerate(words)}, []))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    if bos:
        inner.post_processor = TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, 1)])
    inner.add_special_tokens([AddedToken(word, special=True) for word in (image, *special)])
    names = {"image_token": image, **named}
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token=BOS, eos_token=EOS, pad_token=PAD, extra_special_tokens=names
    )


def ids(tokens: PreTrainedTokenizerFast) -> dict[str, int]:
    return {
        "bos_token_id": tokens.bos_token_id,
        "eos_token_id": tokens.eos_token_id,
        "pad_token_id": tokens.pad_token_id,
    }


def chat(image: str) -> str:
    return IMAGE_FIRST.replace("IMAGE", image)


def save(folder: Path, model, *parts) -> Path:
    for part in (model, *parts):
        part.save_pretrained(folder)
    return folder


def build(kind: str, config, words: PreTrainedTokenizerFast):
    """A model whose answers depend on pictures, in lower-case letters and spaces, never ending by itself."""
    torch.manual_seed(0)
    model = getattr(transformers, kind)(config).eval()
    with torch.no_grad():
        for x in model.parameters():
            x.normal_(std=SPREAD) if x.ndim > 1 else None
    spoken = set(words.convert_tokens_to_ids([*ascii_lowercase, "Ġ"]))
    model.generation_config.suppress_tokens = [i for i in range(config.get_text_config().vocab_size) if i not in spoken]
    model.generation_config.forced_bos_token_id = model.generation_config.forced_eos_token_id = None
    return model


def llava(folder: Path) -> Path:
    """As JoyCaption: SigLIP and Llama, a template with BOS in it."""
    words = tokenizer(image="<image>")
    vision = {"model_type": "siglip_vision_model", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
              "num_attention_heads": 2, "image_size": 28, "patch_size": 14}  # fmt: skip
    config = transformers.LlavaConfig(
        vision_config=vision, text_config={"model_type": "llama", **TEXT, **ids(words)},
        image_token_index=words.convert_tokens_to_ids("<image>"), vision_feature_select_strategy="full",
        vision_feature_layer=-1, image_seq_length=4,
    )  # fmt: skip
    pictures = transformers.SiglipImageProcessorPil(size={"height": 28, "width": 28})
    processor = transformers.LlavaProcessor(
        pictures, words, patch_size=14, vision_feature_select_strategy="full", chat_template=chat("<image>")
    )
    return save(folder, build("LlavaForConditionalGeneration", config, words), processor)


def idefics3(folder: Path) -> Path:
    """Idefics3, whose text model is `text_model`."""
    special = ["<fake_token_around_image>", "<end_of_utterance>", "<global-img>"]
    special += [f"<row_{i}_col_{j}>" for i in range(1, 7) for j in range(1, 7)]
    words = tokenizer(*special, image="<image>")
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
              "image_size": 32, "patch_size": 8}  # fmt: skip
    config = transformers.Idefics3Config(
        vision_config=vision, text_config={"model_type": "llama", **TEXT, **ids(words)}, scale_factor=2,
        image_token_id=words.convert_tokens_to_ids("<image>"), pad_token_id=words.pad_token_id,
    )  # fmt: skip
    pictures = transformers.Idefics3ImageProcessorPil(
        size={"longest_edge": 32}, max_image_size={"longest_edge": 32}, do_image_splitting=False
    )
    processor = transformers.Idefics3Processor(pictures, words, image_seq_len=4, chat_template=chat("<image>"))
    return save(folder, build("Idefics3ForConditionalGeneration", config, words), processor)


def qwen(folder: Path, kind: str = "Qwen3VL") -> Path:
    """Qwen3-VL or Qwen2.5-VL: grids of any size, and a processor that in its repository has one of videos, too."""
    words = tokenizer("<|vision_start|>", "<|vision_end|>", "<|video_pad|>", image="<|image_pad|>", bos=False)
    at = {
        name: words.convert_tokens_to_ids(f"<|{name}|>")
        for name in ("image_pad", "video_pad", "vision_start", "vision_end")
    }
    rope = {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [4, 2, 2], "mrope_interleaved": True}
    text = {**TEXT, **ids(words), "head_dim": 16, "rope_parameters": rope}
    vision = {"depth": 1, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "patch_size": 14,
              "spatial_merge_size": 2, "temporal_patch_size": 2, "out_hidden_size": 32, "in_channels": 3}  # fmt: skip
    if kind == "Qwen3VL":
        vision |= {"deepstack_visual_indexes": [0], "num_position_embeddings": 16}
    else:
        vision |= {"fullatt_block_indexes": [0], "window_size": 56}
    config = getattr(transformers, f"{kind}Config")(
        vision_config=vision, text_config=text, image_token_id=at["image_pad"], video_token_id=at["video_pad"],
        vision_start_token_id=at["vision_start"], vision_end_token_id=at["vision_end"], tie_word_embeddings=True,
    )  # fmt: skip
    pictures = transformers.Qwen2VLImageProcessorPil(
        size={"shortest_edge": 28 * 28, "longest_edge": 56 * 56}, patch_size=14, merge_size=2
    )
    words.chat_template = chat("<|vision_start|><|image_pad|><|vision_end|>").replace("{{ bos_token }}", "")
    return save(folder, build(f"{kind}ForConditionalGeneration", config, words), pictures, words)


def internvl(folder: Path) -> Path:
    """InternVL, which cuts a picture in patches."""
    words = tokenizer(
        "<img>", "</img>", "<video>", image="<IMG_CONTEXT>", context_image_token="<IMG_CONTEXT>",
        start_image_token="<img>", end_image_token="</img>", video_token="<video>",
    )  # fmt: skip
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
              "image_size": [28, 28], "patch_size": [14, 14]}  # fmt: skip
    config = transformers.InternVLConfig(
        vision_config=vision, text_config={"model_type": "qwen2", **TEXT, **ids(words)}, downsample_ratio=0.5,
        image_token_id=words.convert_tokens_to_ids("<IMG_CONTEXT>"), image_seq_length=1,
    )  # fmt: skip
    pictures = transformers.GotOcr2ImageProcessorPil(size={"height": 28, "width": 28})
    words.chat_template = chat("<IMG_CONTEXT>\n")
    folder = save(folder, build("InternVLForConditionalGeneration", config, words), pictures, words)
    (folder / "processor_config.json").write_text(
        '{"processor_class": "InternVLProcessor", "image_seq_length": 1}', encoding="utf-8"
    )
    return folder


def florence(folder: Path) -> Path:
    """Florence-2: DaViT and BART, asked by a task."""
    words = tokenizer(image="<image>", bos=False)
    vision = {"embed_dim": [16, 16], "depths": [1, 1], "num_heads": [2, 2], "num_groups": [2, 2], "window_size": 2,
              "patch_size": [7, 3], "patch_stride": [4, 2], "patch_padding": [3, 1], "patch_prenorm": [False, True],
              "projection_dim": 32}  # fmt: skip
    text = {"model_type": "bart", "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 64,
            "decoder_ffn_dim": 64, "encoder_attention_heads": 2, "decoder_attention_heads": 2, "vocab_size": 320,
            "decoder_start_token_id": words.eos_token_id, "forced_bos_token_id": words.bos_token_id,
            **ids(words)}  # fmt: skip
    config = transformers.Florence2Config(
        vision_config=vision, text_config=text, image_token_id=words.convert_tokens_to_ids("<image>"),
        **ids(words), is_encoder_decoder=True,
    )  # fmt: skip
    pictures = transformers.CLIPImageProcessorPil(
        size={"height": 32, "width": 32}, crop_size={"height": 32, "width": 32}, do_center_crop=False
    )
    pictures.image_seq_length = 17
    processor = transformers.Florence2Processor(pictures, words)
    return save(folder, build("Florence2ForConditionalGeneration", config, words), processor)


def silent(folder: Path) -> Path:
    """A Qwen3-VL that ends each answer at once."""
    model = transformers.Qwen3VLForConditionalGeneration.from_pretrained(qwen(folder))
    end = model.generation_config.eos_token_id
    model.generation_config.suppress_tokens = [i for i in range(TEXT["vocab_size"]) if i != end]
    model.save_pretrained(folder)
    return folder
