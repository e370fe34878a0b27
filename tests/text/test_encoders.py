"""The text encoders: padding, cutting, and what stands for a prompt. All of it on a small random model."""

import json
import shutil
import warnings

import pytest
import torch
from golden_files import distance

from flux_core.errors import FileError
from flux_core.hub import places
from flux_core.text import load_text_encoders
from flux_core.variants import VARIANTS

LONG = "a red apple on a blue table and two green pigs"
FLAGS = ("special", "single_word", "lstrip", "rstrip", "normalized")
"""of an added token in a tokenizer.json"""


@pytest.fixture
def encoders(small):
    return load_text_encoders(small, "cpu", torch.float32)


def test_shapes_and_dtype(small):
    t5, clip = load_text_encoders(small, "cpu", torch.bfloat16)
    txt, vec = t5(["a red apple", ""]), clip(["a red apple", ""])
    assert txt.shape == (2, small.max_text, small.params.context_in_dim)
    assert vec.shape == (2, small.params.vec_in_dim)
    assert txt.dtype == vec.dtype == torch.bfloat16


def test_padding_attends(encoders):
    """No mask: the same words before more padding are not the same tokens."""
    t5, _ = encoders
    before = t5(["a pig"])
    t5.max_length += 10
    assert distance(t5(["a pig"])[:, : before.shape[1]], before) > 1e-3


def test_a_batch_is_its_rows(encoders):
    for encoder in encoders:
        together = encoder(["a red apple", LONG])
        alone = torch.cat([encoder(["a red apple"]), encoder([LONG])])
        assert distance(together, alone) <= 1e-6


def test_the_pooled_vector_is_of_the_first_end_token(encoders):
    _, clip = encoders
    ids = clip.tokens(["a red apple"])
    end = ids[0].tolist().index(clip.tokenizer.backend.token_to_id("<|endoftext|>"))
    states = []
    with clip.model.final_layer_norm.register_forward_hook(lambda module, inputs, x: states.append(x)):
        found = clip(["a red apple"])
    assert torch.equal(found, states[0][:, end])


def test_what_was_cut_is_told_in_the_prompts_own_letters(encoders):
    t5, _ = encoders
    assert t5.truncated("a pig") is None
    assert t5.truncated("") is None
    cut = t5.truncated(LONG + " — ÉTÉ")
    assert LONG.endswith(cut.removesuffix(" — ÉTÉ"))
    kept = (LONG + " — ÉTÉ").removesuffix(cut)
    assert torch.equal(t5([kept]), t5([LONG + " — ÉTÉ"]))


def test_clip_cuts_in_silence(encoders, capfd):
    _, clip = encoders
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        clip([LONG * 50])
        encoders[0].truncated(LONG * 50)
    assert capfd.readouterr() == ("", "")


def test_loading_prints_nothing(small, capfd):
    load_text_encoders(small, "cpu", torch.float32)
    assert capfd.readouterr() == ("", "")


@pytest.fixture
def copied(small, small_root, tmp_path, monkeypatch):
    """A copy of the small model's folder, to be damaged."""
    shutil.copytree(small_root / "flux-mini", tmp_path / "flux-mini")
    monkeypatch.setattr(places, "ROOTS", (tmp_path,))
    return tmp_path / "flux-mini"


def damage(folder, file, change):
    path = folder / file
    path.write_text(json.dumps(change(json.loads(path.read_text()))))


def test_a_missing_encoder(copied, small):
    shutil.rmtree(copied / "clip")
    with pytest.raises(FileError, match=r"clip does not exist\. Next: clone"):
        load_text_encoders(small)


def test_weights_that_are_not_there_are_not_made_up(copied, small):
    damage(copied, "t5/config.json", lambda config: config | {"num_layers": 3})
    with pytest.raises(FileError, match=r"9 missing \(encoder\.block\.2.*Next: fetch it again"):
        load_text_encoders(small)


def test_a_tokenizer_with_more_tokens_than_the_model(copied, small):
    more = [{"id": 120 + i, "content": f"<extra_id_{i}>", **dict.fromkeys(FLAGS, False)} for i in range(100)]
    damage(copied, "t5/tokenizer.json", lambda found: found | {"added_tokens": found["added_tokens"] + more})
    with pytest.raises(FileError, match="embeddings for"):
        load_text_encoders(small)


def test_a_length_that_is_no_number(copied, small):
    damage(copied, "clip/tokenizer_config.json", lambda config: config | {"model_max_length": "77"})
    with pytest.raises(FileError, match="the tokenizer could not be read: model_max_length is '77'"):
        load_text_encoders(small)


def test_a_configuration_of_another_type(copied, small):
    damage(copied, "clip/config.json", lambda config: config | {"eos_token_id": None})
    with pytest.raises(FileError, match="the text encoder's configuration could not be read: eos_token_id is 'None'"):
        load_text_encoders(small)


def test_the_shipped_tokenizers_fit_their_models():
    """On the real files: a pooled vector of the right token, and no token without a row."""
    row = VARIANTS["flux-mini"]
    t5, clip = load_text_encoders(row, "cpu", torch.float32)
    eos = clip.tokenizer.backend.token_to_id("<|endoftext|>")
    assert clip.model.eos_token_id == eos
    assert eos != 2 or eos == len(clip.tokenizer) - 1
    assert t5(["a red apple"]).shape == (1, row.max_text, row.params.context_in_dim)
    assert clip(["a red apple"]).shape == (1, row.params.vec_in_dim)
    assert t5.truncated("three red apples left of a blue house") is None


def test_what_is_cut_and_what_is_unknown_are_a_line_each(encoders):
    t5, _ = encoders
    assert t5.notes("a pig") == t5.notes("") == []
    (cut,) = t5.notes(f"{LONG} and {LONG}")
    assert cut.startswith(f"the prompt is longer than {t5.max_length} tokens; dropped: ")
    (unknown,) = t5.notes("a red 苹果")
    assert "'苹果'" in unknown
    assert len(t5.notes(f"苹果 {LONG} and {LONG}")) == 2


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ("a red 苹果 on a table, 苹果", ["苹果"]),
        ("🍎 and 👩‍🚀", ["🍎", "👩‍🚀"]),
        ("красное яблоко", ["красное", "яблоко"]),
        ("un café naïve — “quoted” …", []),
        ("three red apples left of a blue house\nand a tree", []),
    ],
)
def test_words_that_the_shipped_t5_does_not_know(shipped, prompt, words):
    t5, clip = shipped
    assert t5.unread(prompt)[1] == words
    assert clip.unread(prompt)[1] == []  # it reads bytes


def test_many_unknown_words_are_a_short_line(shipped):
    (line,) = shipped[0].notes(" ".join(chr(0x4E00 + i) for i in range(9)))
    assert line.count("'") == 10 and "…" in line


@pytest.fixture(scope="module")
def shipped():
    return load_text_encoders(VARIANTS["flux-mini"], "cpu", torch.float32)
