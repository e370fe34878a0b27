"""The text encoders and tokenizers are transformers', to the bit, without importing it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from random_model import random_weights
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel, T5TokenizerFast
from transformers.models.t5.modeling_t5 import T5Attention
from transformers.tokenization_utils_base import VERY_LARGE_INTEGER

from flux_core.checkpoint.shapes import clip_params, clip_shapes, t5_params, t5_shapes
from flux_core.model import ClipText, T5Encoder
from flux_core.model.t5 import buckets
from flux_core.text import load_text_encoders
from flux_core.text.tokenizer import load_tokenizer
from flux_core.variants import VARIANTS

ROOT = Path(__file__).parents[2]
MINI = ROOT / "weights" / "flux-mini"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
DEV = VARIANTS["flux-dev"]
SIZES = {"d_model": 48, "d_kv": 16, "num_heads": 2, "d_ff": 96, "num_layers": 3, "vocab_size": 100}
T5 = {**SIZES, "feed_forward_proj": "gated-gelu"}
CLIP = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 3, "vocab_size": 50}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("std", [0.1, 3.0])
def test_t5_is_that_of_transformers(dtype, std):
    """Also where tokens leave the range of fp16."""
    config = T5Config(**T5)
    theirs = random_weights(T5EncoderModel(config), std=std).to(dtype)
    ours = T5Encoder(t5_params(config.to_dict())).to(dtype)
    ours.load_state_dict({name: x for name, x in theirs.state_dict().items() if "embed_tokens" not in name})
    ids = torch.randint(100, (2, 300), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(ours(ids), theirs(input_ids=ids).last_hidden_state)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("changes", [{"eos_token_id": 49}, {"eos_token_id": 2}, {"hidden_act": "gelu"}])
def test_clip_is_that_of_transformers(dtype, changes):
    config = CLIPTextConfig(**CLIP, **changes)
    theirs = random_weights(CLIPTextModel(config)).to(dtype)
    ours = ClipText(clip_params(config.to_dict())).to(dtype)
    ours.load_state_dict(theirs.state_dict())
    ids = torch.randint(50, (3, 77), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(ours(ids), theirs(input_ids=ids).pooler_output)


@pytest.mark.parametrize(("count", "reach"), [(32, 128), (8, 20), (16, 512)])
def test_every_distance_has_its_row(count, reach):
    distance = torch.arange(-2000, 2000)
    theirs = T5Attention._relative_position_bucket(distance, True, count, reach)
    assert torch.equal(buckets(distance, count, reach), theirs)


@pytest.mark.parametrize(("t5", "clip"), [(DEV.t5_config, DEV.clip_config), (T5, CLIP)], ids=["dev", "small"])
def test_the_tables_of_shapes_are_theirs(t5, clip):
    with torch.device("meta"):
        networks = T5Encoder(t5_params(t5)), ClipText(clip_params(clip))
    for network, shapes in zip(networks, (t5_shapes(t5), clip_shapes(clip)), strict=True):
        assert {key: tuple(x.shape) for key, x in network.state_dict().items()} == shapes


@pytest.mark.parametrize(
    ("params", "config", "words"),
    [
        (t5_params, SIZES, "feed_forward_proj is 'relu', not gated-gelu"),
        (t5_params, T5 | {"feed_forward_proj": "gated-silu"}, "feed_forward_proj is 'gated-silu'"),
        (clip_params, CLIP | {"hidden_act": "relu"}, "hidden_act is 'relu', and none of quick_gelu, gelu"),
        (clip_params, CLIP | {"num_attention_heads": 5}, "hidden_size 48 is no multiple of num_attention_heads 5"),
        (clip_params, CLIP | {"eos_token_id": None}, "eos_token_id is 'None'"),
        (clip_params, CLIP | {"eos_token_id": True}, "eos_token_id is 'True'"),
        (t5_params, T5 | {"layer_norm_epsilon": "1e-6"}, "layer_norm_epsilon is '1e-6'"),
        (t5_params, T5 | {"relative_attention_num_buckets": 3}, "relative_attention_num_buckets is 3, and"),
        (t5_params, T5 | {"relative_attention_max_distance": 2}, "and relative_attention_max_distance 2"),
    ],
)
def test_what_would_compute_otherwise_is_refused(params, config, words):
    with pytest.raises(ValueError, match=words):
        ClipText(params(config))


PROMPTS = [
    "",
    " ",
    "a red apple",
    "A  Red\tAPPLE\nand two pigs ",
    "it's don't we'll",
    "3.14 + 27,000 = ?",
    "un café naïve ﬁ Ⅷ ½",
    "“quoted” … – —",
    "красное яблоко 苹果 🍎 👩\u200d🚀",
    "</s> <pad> <unk> <extra_id_0>",
    "<|startoftext|> x<|endoftext|>y",
    "▁a▁b</w>",
    "x\x00y\u200bz\ufeff",
    "apple " * 100,
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    from random_model import small_variant, write_text_encoders

    folder = tmp_path_factory.mktemp("small")
    write_text_encoders(folder, small_variant())
    return {"shipped": MINI, "small": folder}


@pytest.mark.parametrize("which", ["shipped", "small"])
@pytest.mark.parametrize(("part", "kind"), [("t5", T5TokenizerFast), ("clip", CLIPTokenizer)])
def test_ids_and_places_are_those_of_transformers(folders, which, part, kind):
    folder = folders[which] / part
    theirs, ours = kind.from_pretrained(folder), load_tokenizer(folder, part, 10**6)
    assert len(ours) == len(theirs) and (ours.max_length or VERY_LARGE_INTEGER) == theirs.model_max_length
    assert (ours.pad_id, ours.unk_id) == (theirs.pad_token_id, theirs.unk_token_id)
    for prompt in PROMPTS:
        found = theirs(prompt, return_offsets_mapping=True)
        assert ours.pieces(prompt) == [(i, *at) for i, at in zip(found.input_ids, found["offset_mapping"], strict=True)]


@pytest.mark.parametrize("files", [("vocab.json", "merges.txt"), ("spiece.model",)])
def test_a_folder_with_a_vocabulary_alone_is_read_as_transformers_does(files, tmp_path):
    part, kind = ("t5", T5TokenizerFast) if len(files) == 1 else ("clip", CLIPTokenizer)
    for name in (*files, "tokenizer_config.json"):
        (tmp_path / name).write_bytes((MINI / part / name).read_bytes())
    ours, theirs = load_tokenizer(tmp_path, part, 10**6), kind.from_pretrained(tmp_path)
    assert [[token for token, *_ in ours.pieces(prompt)] for prompt in PROMPTS] == theirs(PROMPTS).input_ids


def test_special_tokens_are_read_as_old_files_have_them(tmp_path):
    (tmp_path / "tokenizer.json").write_bytes((MINI / "clip" / "tokenizer.json").read_bytes())
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"pad_token": {"content": "!", "lstrip": False}}))
    found = load_tokenizer(tmp_path, "clip", 10**6)
    assert found.pad_id == found.backend.token_to_id("!") != found.unk_id


def test_a_batch_is_padded_and_cut_as_transformers_does():
    for encoder, kind in zip(load_text_encoders(VARIANTS["flux-mini"]), (T5TokenizerFast, CLIPTokenizer), strict=True):
        folder = MINI / ("t5" if kind is T5TokenizerFast else "clip")
        how = {"padding": "max_length", "max_length": encoder.max_length, "truncation": True, "return_tensors": "pt"}
        assert torch.equal(encoder.tokens(PROMPTS), kind.from_pretrained(folder)(PROMPTS, **how).input_ids)


def test_a_picture_costs_none_of_what_it_does_not_use(tmp_path):
    """In a process of its own, from flags to file."""
    heavy = {"transformers", "accelerate", "torch._dynamo", "torch._inductor", "torch.distributed.tensor", "sympy"}
    flags = ["--prompt", "a red apple", "--steps", "1", "--width", "128", "--height", "128"]
    flags += ["--output-dir", str(tmp_path)]
    code = f"import sys; from flux_core.main import main; assert main({flags}) == 0; print({heavy} & {{*sys.modules}})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.splitlines()[-1] == "set()"
