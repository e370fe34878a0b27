"""What captioners are asked, and what is made of their answers: styles, preambles, prefix, suffix and trigger word."""

import re
from typing import NamedTuple


class Style(NamedTuple):
    """A kind of caption."""

    prompt: str
    """for models that are asked in words"""
    task: str
    """for Florence-2, which knows tasks; empty: it has none for it"""


PLAIN = "Answer with the caption alone, without any introduction, on one line."
STYLES = {
    "straight": Style(
        "Write a caption for this picture, as a prompt from which it could be drawn again. Begin with the main subject "
        "and the medium. Name what is there and where, its colours, its light and any text; nothing that is not there. "
        f"Be definite; say nothing about mood or quality. At most a hundred words. {PLAIN}",
        "<DETAILED_CAPTION>",
    ),
    "descriptive": Style(
        "Describe this picture in one detailed paragraph: subject, medium, composition, background, light, colours, "
        f"textures and style. {PLAIN}",
        "<MORE_DETAILED_CAPTION>",
    ),
    "tags": Style(
        "List tags for this picture, the most important first: subject, medium, things, colours, background, style. "
        "Lower case, of one to three words each, divided by commas, at most thirty. Answer with the tags alone.",
        "",
    ),
    "short": Style(f"Write one short sentence that says what this picture shows. {PLAIN}", "<CAPTION>"),
}

_PICTURE = r"(?:image|picture|photo(?:graph)?|illustration|drawing|painting|artwork|scene)"
PREAMBLES = (
    r"<think>.*?(?:</think>|$)",  # to its end where it was cut off
    r"(?:sure|certainly|of course|okay|absolutely)(?: thing)?[,.!:]+",
    r"(?:here(?: is|'s|’s| are)|(?:this|below|the following) is|these are) [^:.\n]{0,60}"
    r"(?:caption|description|prompt|tags|picture|image)[^:.\n]{0,60}:",
    r"\W{0,3}(?:caption|description|prompt|tags|answer)\W{0,3}:\W{0,3}",
    rf"(?:the|this|in (?:the|this)) {_PICTURE},? (?:shows|depicts|features|displays|presents|portrays|contains|is of"
    r"|(?:there is|we see|you can see))",
)
"""what models say before a caption; what stands behind is it. Each once or several times, in any order"""
_PREAMBLE = re.compile(rf"\s*(?:{'|'.join(PREAMBLES)})\s*", re.IGNORECASE | re.DOTALL)
_QUOTES = {'"': '"', "“": "”", "'": "'", "`": "`", "*": "*"}


def cleaned(answer: str) -> str:
    """An answer as a caption: on one line, without preambles and the quotes or asterisks around all of it.

    What follows a preamble gets the capital that the answer began with.
    """
    text = " ".join(answer.split())
    while True:
        before = text
        if found := _PREAMBLE.match(text):
            rest = text[found.end() :]
            text = rest[:1].upper() + rest[1:] if text.lstrip("*\"“'`")[:1].isupper() else rest
        if len(text) > 1 and _QUOTES.get(text[0]) == text[-1] and text[0] not in text[1:-1]:
            text = text[1:-1]
        if text.startswith("**") and text.endswith("**"):
            text = text[2:-2]
        text = text.strip()
        if text == before:
            return text


def joined(*parts: str) -> str:
    """Texts with a space between them, but none before a comma or full stop; empty ones are left out."""
    return re.sub(r" +([,.;:!?])", r"\1", " ".join(" ".join(part.split()) for part in parts if part.strip()))
