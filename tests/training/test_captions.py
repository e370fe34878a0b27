"""The texts that may stand for a caption, and how often each is drawn."""

import json
import math
import re

import pytest
import torch
from golden_files import FOLDER

from flux_core.errors import UsageError
from flux_core.training.captions import draw, variants

KOHYA = json.loads((FOLDER / "train" / "captions.json").read_text())["kohya_process_caption"]
MANY = 1000
"""more than there are orders"""


def orders(texts):
    return [text for kind, text in texts.items() if kind.startswith("shuffle-")]


def drawn(kinds, count, **chances):
    """What so many steps draw, each from numbers of its own."""
    return [draw(kinds, torch.Generator("cpu").manual_seed(step), **chances) for step in range(count)]


def is_near(share, chance, count):
    """Within four standard deviations of a binomial distribution."""
    return abs(share - chance) <= 4 * math.sqrt(chance * (1 - chance) / count)


def test_kinds_and_their_texts():
    assert variants("a, b") == {"caption": "a, b", "empty": ""}
    assert variants("noto pig, b,c ", "noto", 1, 1) == {
        "caption": "noto pig, b,c ", "shuffle-1": "noto pig, c, b", "empty": "", "trigger": "noto",
    }  # fmt: skip


def test_all_orders_are_those_of_kohya():
    seen = 0
    for case in KOHYA:
        options = dict(case["options"])
        if not options.pop("shuffle_caption", False) or options.keys() - {"keep_tokens", "caption_prefix"}:
            continue
        caption = " ".join(filter(None, [options.get("caption_prefix"), case["caption"]]))
        found = orders(variants(caption, shuffles=MANY, keep=options.get("keep_tokens", 0)))
        own = ", ".join(tag.strip() for tag in caption.split(","))
        assert len(set(found)) == len(found) and own not in found
        assert {own, *found} == set(case.get("one_of", [case.get("expected")])), case
        seen += 1
    assert seen == 5


def test_a_trigger_word_in_front_stays_there():
    found = orders(variants("a noto pig, b, c, d", "noto", MANY))
    assert len(found) == 5 and all(text.startswith("a noto pig, ") for text in found)
    assert len(orders(variants("a noto pig, b, c, d", shuffles=MANY))) == 23
    assert orders(variants("noto, b, c", "noto", MANY)) == ["noto, c, b"]


@pytest.mark.parametrize("caption", ["", "a pig", "a pig,", "a, a, a", "noto pig, b"])
def test_what_has_no_other_order_has_no_shuffles(caption):
    assert orders(variants(caption, "noto", MANY)) == []


def test_equal_tags_are_not_told_apart():
    assert sorted(orders(variants("a, a, b", shuffles=MANY))) == ["a, b, a", "b, a, a"]


def test_orders_hang_on_seed_and_caption_alone():
    caption = ", ".join("abcdefgh")
    first = orders(variants(caption, shuffles=5, seed=3))
    assert len(set(first)) == 5 and all(sorted(text) == sorted(caption) for text in first)
    assert first == orders(variants(caption, "noto", 9, seed=3))[:5]
    assert first != orders(variants(caption, shuffles=5, seed=4))
    assert first[0] == "c, b, h, a, g, f, e, d"


def test_a_step_draws_the_same_again_and_as_many_numbers_whatever_comes():
    kinds = variants("noto, a, b, c", "noto", 5)
    assert drawn(kinds, 20, caption_dropout=0.3) == drawn(kinds, 20, caption_dropout=0.3)
    states = []
    for chances in ({}, {"caption_dropout": 1.0}, {"trigger_only": 1.0}):
        generator = torch.Generator("cpu").manual_seed(0)
        draw(kinds, generator, **chances)
        states.append(generator.get_state())
    assert all(torch.equal(states[0], state) for state in states)


def test_shares_are_the_chances():
    count, kinds = 2000, variants("noto, a, b, c", "noto", 3)
    found = drawn(kinds, count, caption_dropout=0.1, trigger_only=0.25)
    chances = {
        "empty": 0.1,
        "trigger": 0.25,
        **dict.fromkeys(["caption", "shuffle-1", "shuffle-2", "shuffle-3"], 0.1625),
    }
    assert set(found) == set(chances)
    for kind, chance in chances.items():
        assert is_near(found.count(kind) / count, chance, count), kind


def test_certain_chances():
    kinds = variants("a, b", "noto", 1)
    assert set(drawn(kinds, 50, caption_dropout=1.0)) == {"empty"}
    assert set(drawn(kinds, 50, trigger_only=1.0)) == {"trigger"}
    assert set(drawn(kinds, 50)) == {"caption", "shuffle-1"}
    assert set(drawn(variants("a"), 50)) == {"caption"}


@pytest.mark.parametrize(
    ("chances", "said"),
    [
        ({"caption_dropout": 1.5}, "caption_dropout is 1.5. Next: give a chance from 0 to 1"),
        ({"trigger_only": -0.1}, "trigger_only is -0.1. Next:"),
        ({"caption_dropout": math.nan}, "caption_dropout is nan. Next:"),
        ({"caption_dropout": 0.6, "trigger_only": 0.6}, "are more than 1 together. Next:"),
        ({"trigger_only": 0.1}, "trigger_only is 0.1, and there is no trigger word. Next:"),
    ],
)
def test_wrong_chances_are_said(chances, said):
    with pytest.raises(UsageError, match=re.escape(said)):
        drawn(variants("a"), 1, **chances)
