"""Captions with wildcards, as kohya's trainer has them where it agrees, and separators of tags that stay."""

import json
from itertools import permutations

import pytest
from golden_files import FOLDER

from flux_core.training.captions import variants
from flux_core.training.wildcards import DEEPEST, expansions

KOHYA = json.loads((FOLDER / "train" / "captions.json").read_text(encoding="utf-8"))["kohya_process_caption"]
MANY = 30
"""more than there are"""


def test_expansions_are_those_of_kohya():
    """But for nested ones, of which it makes a text with a brace left, and lines, which here are one."""
    seen = 0
    for case in KOHYA:
        caption = case["caption"]
        if case["options"] != {"enable_wildcard": True} or "\n" in caption or "|{" in caption:
            continue
        expected = case.get("one_of", [case.get("expected")])
        assert set(expansions(caption, MANY)) == {text.strip() for text in expected}
        seen += 1
    assert seen == 3


@pytest.mark.parametrize(("caption", "texts"), [
    ("{a|{b|c}}", ["a", "b", "c"]),
    ("a {big |}{red|blue} car", ["a big red car", "a big blue car", "a red car", "a blue car"]),
    ("{{{a|b}}}", ["{a}", "{b}"]),
    ("{2$$a|b|c} x", [f"{a}, {b} x" for a, b in permutations("abc", 2)]),
    ("{3$$a|b}", ["a, b", "b, a"]),
    ("{a|a}", ["a"]),
    ("plain", ["plain"]),
    ("{", ["{"]), ("{}", ["{}"]), ("}", ["}"]), ("{a|{b|c}", ["{a|b", "{a|c"]),
])  # fmt: skip
def test_what_a_caption_stands_for(caption, texts):
    found = expansions(caption, MANY)
    assert set(found) <= set(texts) and len(set(found)) == len(found)
    assert {frozenset(text) for text in found} == {frozenset(text) for text in texts}  # in whatever order


def test_so_many_are_drawn_from_seed_and_caption_alone():
    caption = "{a|b|c|d} {e|f|g|h} {i|j|k|l}"
    found = expansions(caption, 5, seed=3)
    assert len(set(found)) == 5 and found == expansions(caption, 9, seed=3)[:5]
    assert found != expansions(caption, 5, seed=4)
    assert found[0] == "a h k"


def test_what_is_too_deep_is_plain_text():
    caption = "{a " * (2 * DEEPEST) + "x" + "}" * (2 * DEEPEST)
    assert len(expansions(caption, 3)) == 1
    assert expansions("{ x" * 3000, 3) == ("{ x" * 3000,)


def test_every_variant_has_the_trigger_word_and_shuffles():
    found = variants("a {noto|fat} pig, {b|c}, d", "noto", shuffles=1, keep=1, wildcards=MANY)
    kinds = [kind for kind in found if kind not in ("empty", "trigger")]
    assert kinds[:3] == ["caption", "shuffle-1", "wildcard-1"] and len(kinds) == 8
    assert all("noto" in found[kind] and "{" not in found[kind] for kind in kinds)
    assert variants("a {b|c}")["caption"] == "a {b|c}" and len(variants("a {b|c}")) == 2


def test_a_separator_keeps_what_kohya_keeps():
    seen = 0
    for case in KOHYA:
        options = dict(case["options"])
        separator = options.pop("keep_tokens_separator", None)
        if separator is None or not options.pop("shuffle_caption"):
            continue
        found = variants(case["caption"], shuffles=MANY, keep=options.get("keep_tokens", 0), separator=separator)
        assert {text for kind, text in found.items() if kind != "empty"} == set(case["one_of"])
        seen += 1
    assert seen == 2
    assert variants("x ||| a", separator="|||")["caption"] == "x, a"  # kohya's encoder reads its bars
