"""Answers become captions: preambles go, and what people want around them is put there once."""

import pytest

from flux_core.captioning.run import Wording
from flux_core.captioning.words import cleaned


@pytest.mark.parametrize(
    ("answer", "caption"),
    [
        ("a cat", "a cat"),
        ("Here is a caption: a cat", "A cat"),
        ("Sure! Here's a detailed description of the image:\n\nA cat on a mat.", "A cat on a mat."),
        ("The image shows a cat.", "A cat."),
        ("This picture depicts two dogs\nand a cat", "Two dogs and a cat"),
        ("In the image, there is a cat", "A cat"),
        ("**Caption:** A cat", "A cat"),
        ("Caption: the photo shows a cat", "A cat"),
        ('"A cat, by a window."', "A cat, by a window."),
        ('"Stop" is on the sign, and "Go"', '"Stop" is on the sign, and "Go"'),
        ("<think>It is a cat.\nYes.</think>\n\nA cat", "A cat"),
        ("<think>It is a cat.\nYes", ""),
        ("tags: cat, mat", "cat, mat"),
        ("The image is old and shows a cat", "The image is old and shows a cat"),
        ("Here is where the river ends", "Here is where the river ends"),
        ("A cat here is a caption: no", "A cat here is a caption: no"),
        ("Here is a caption:", ""),
        (" \n", ""),
    ],
)
def test_preambles_go(answer, caption):
    assert cleaned(answer) == caption


@pytest.mark.parametrize(
    ("wording", "old", "caption"),
    [
        ({}, "", "a cat"),
        ({"prefix": "noto style,", "suffix": ", 3d"}, "", "noto style, a cat, 3d"),
        ({"trigger": "ohwx"}, "", "ohwx a cat"),
        ({"trigger": "ohwx", "prefix": "a photo of [trigger],"}, "", "a photo of ohwx, a cat"),
        ({"trigger": "cat"}, "", "a cat"),
        ({"existing": "append"}, "old", "old a cat"),
        ({"existing": "prepend", "between": ", "}, "old", "a cat, old"),
        ({"existing": "append", "trigger": "ohwx"}, "ohwx", "ohwx a cat"),
        ({"existing": "append"}, "", "a cat"),
    ],
)
def test_what_is_around_an_answer_is_there_once(wording, old, caption):
    assert Wording(**wording)("a cat", old) == caption
