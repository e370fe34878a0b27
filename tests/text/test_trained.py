"""Words with trained vectors: where they are in a prompt, and what encoders make of them."""

from copy import deepcopy

import pytest
import torch

from flux_core.text import TrainedWords, load_text_encoders
from flux_core.text.trained import embedding_of
from flux_core.variants import VARIANTS


@pytest.fixture(scope="module")
def encoders():
    return load_text_encoders(VARIANTS["flux-mini"], dtype=torch.float32)


def words_of(encoder, **texts):
    """Words that have the vectors of texts' own tokens."""
    weight = embedding_of(encoder.model).weight.detach()
    return TrainedWords(
        {word: weight[[i for i, begin, end in encoder.pieces(text) if begin < end]] for word, text in texts.items()}
    )


@torch.no_grad()
def test_a_word_with_the_vectors_of_others_is_them_to_the_bit(encoders):
    for encoder in encoders:
        plain = encoder(["red apple on a green pig", "red apple", "a pig"])
        encoder.trained = words_of(encoder, **{"<a>": "red apple", "zwx": "green"})
        assert torch.equal(encoder(["<a> on a zwx pig", "<a>", "a pig"]), plain)
        far = encoder.pieces("a big <a>")
        assert [x[1:] for x in far if x[0] < 0] == [(6, 9)] * 2
        encoder.trained = TrainedWords({})


@pytest.mark.parametrize("text", ["a <a>, big", "<a>", "it's <a>'s (<a>)", " <a>\n<a>", "an <a><a> x"])
def test_pieces_are_those_of_a_token_added_to_the_tokenizer(encoders, text):
    """As other tools add theirs."""
    for encoder in encoders:
        other = deepcopy(encoder.tokenizer)
        other.backend.add_tokens(["<a>"])
        encoder.trained = TrainedWords({"<a>": torch.zeros(1, 1)})
        ids = [len(encoder.tokenizer) if i < 0 else i for i, *_ in encoder.pieces(text)]
        encoder.trained = TrainedWords({})
        assert ids == [token for token, *_ in other.pieces(text)]


def test_what_is_no_word_of_its_own_is_read_as_before(encoders):
    for encoder in encoders:
        plain = encoder.tokens(["zwxs, azwx, Zwx"])
        encoder.trained = words_of(encoder, zwx="green")
        assert torch.equal(encoder.tokens(["zwxs, azwx, Zwx"]), plain)
        assert int((encoder.tokens(["zwx, (zwx) zwx's"]) < 0).sum()) == 3
        encoder.trained = TrainedWords({})


def test_the_longest_word_counts(encoders):
    _, clip = encoders
    clip.trained = TrainedWords({"<a>": torch.zeros(1, 128), "<a><b>": torch.zeros(2, 128)})
    assert [i for i, *_ in clip.pieces("<a><b> <a>") if i < 0] == [-2, -3, -1]
    clip.trained = TrainedWords({})


def test_a_long_prompt_is_cut_at_the_end(encoders):
    for encoder in encoders:
        end = encoder.pieces("")[-1][0]
        encoder.trained = words_of(encoder, **{"<a>": "red apple"})
        text = " ".join(["<a>"] * encoder.max_length)
        ids = encoder.tokens([text, "a"])
        assert (
            ids.shape == (2, encoder.max_length) and ids[0, -1] == end and (ids[0] < 0).sum() >= encoder.max_length - 2
        )
        assert text.endswith(encoder.truncated(text)) and encoder.truncated("<a> on grass") is None
        encoder.trained = TrainedWords({})


@torch.no_grad()
def test_the_end_is_found_by_the_largest_id_too(encoders):
    """As configurations of FLUX.1's CLIP ask for, whose `eos_token_id` is 2."""
    _, clip = encoders
    pooled = clip.model.eos_token_id
    plain = clip(["red apple on grass"])
    clip.trained, clip.model.eos_token_id = words_of(clip, **{"<a>": "red apple"}), 2
    found = clip(["<a> on grass"])
    clip.trained, clip.model.eos_token_id = TrainedWords({}), pooled
    assert torch.equal(found, plain)
