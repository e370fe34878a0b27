"""The raw data: about 1,600 emoji pictures with their names, as a table.

Pictures come from npm's `@lobehub/fluent-emoji-3d` (Microsoft Fluent, 256x256 RGBA), words from `emojibase-
data`:

    npm pack @lobehub/fluent-emoji-3d@1.1.0 emojibase-data@17.0.0     # unpack to ROOT/fluent and ROOT/emoji

Emojibase gives three qualities of words. The *label* is the name, unique to a sprite. *Shortcodes* (`:car:`)
are what people call the thing: they become aliases unless another sprite has that name. *Tags* ("driving",
"later") only circle around it: those that at most three sprites share become keywords. An alias may stand
wherever the name may; a keyword is only ever the caption of a picture of the thing alone.

What is left out: country and subdivision flags. What is weighed down: skin tones, which would be half of all
pictures (together 4% of the draws), and men and women where there is also a person, which differ in little.

    python weights/recipe/sprites.py ROOT
"""

import json
import multiprocessing
import re
import sys
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from palette import BACKGROUNDS, COLOUR_ID
from PIL import Image
from shapes import SHAPES
from torch import Tensor

TONE_SHARE = 0.04
SHORTCODES = ("cldr", "emojibase", "github", "joypixels", "iamcal", "emojibase-legacy")
# fmt: off
NOISE = {"yes", "no", "back", "end", "top", "new", "off", "this", "why",
         "you", "one", "two", "three", "four", "and"}
# fmt: on

# Objects to recolour, count and put side by side: whole groups, less scenes, signs and near-twins.
COUNTABLE = {
    "animals-nature": None,
    "food-drink": None,
    "travel-places": None,
    "activities": None,
    "objects": None,
    "smileys-emotion": {"cat-face", "monkey-face", "face-costume", "heart"},
    "people-body": {"body-parts"},
}
TWINS = re.compile(
    r"o'clock|thirty|moon|globe|behind|cityscape|sunrise|sunset|fogg?y?\b|night|speaker|mailbox|heart"
    r"|oncoming|chart|map of|\blocked|unlocked|battery|calendar|card|envelope|with|\d"
)


@dataclass(frozen=True)
class Sprites:
    """Row i of every field is one sprite; `rgba` is None where only words are needed (sampling scenes)."""

    names: list[str]
    aliases: list[list[str]]
    keywords: list[list[str]]
    group: list[str]
    subgroup: list[str]
    hexcodes: list[str]
    tone: list[bool]
    countable: list[bool]
    weight: list[float]
    rgba: Tensor | None = field(default=None, repr=False)  # uint8 [N, 256, 256, 4]

    def __len__(self) -> int:
        return len(self.names)

    def without_pixels(self) -> "Sprites":
        return replace(self, rgba=None)


def load_sprites(root: str | Path, pixels: bool = True) -> Sprites:
    """Read the two unpacked packages under `root`; decoded pictures are cached in ROOT/sprites.npy."""
    root = Path(root)
    files = {_key(p.stem): p for p in (root / "fluent/package/assets").glob("*.webp")}
    data, groups, subgroups = _emojibase(root)
    rows = []
    for entry in data:
        group, subgroup = groups.get(entry.get("group")), subgroups.get(entry.get("subgroup"))
        if group is None or subgroup in ("country-flag", "subdivision-flag"):
            continue
        name = clean_name(entry["label"])
        if _key(entry["hexcode"]) in files:
            rows.append((name, entry, group, subgroup, False))
        for skin in entry.get("skins", []):
            if _key(skin["hexcode"]) in files:
                rows.append((_tone_name(name, skin), {**entry, **skin, "tags": []}, group, subgroup, True))
    names = [r[0] for r in rows]
    tone = [r[4] for r in rows]
    aliases, keywords = _other_words(root, rows)
    sprites = Sprites(
        names=names,
        aliases=aliases,
        keywords=keywords,
        group=[r[2] for r in rows],
        subgroup=[r[3] for r in rows],
        hexcodes=[r[1]["hexcode"] for r in rows],
        tone=tone,
        countable=[not t and is_countable(n, g, s) for n, _, g, s, t in rows],
        weight=_weights(names, tone, [r[3] for r in rows]),
    )
    if not pixels:
        return sprites
    return replace(sprites, rgba=_pixels([files[_key(h)] for h in sprites.hexcodes], root / "sprites.npy"))


def clean_name(label: str) -> str:
    """Lower case, straight apostrophes, no quotes or brackets; "woman: red hair" -> "woman with red hair"."""
    name = label.lower().replace("’", "'")
    name = re.sub(r"[“”().!#]", lambda m: m[0] if m[0] == "#" else "", name)
    kind, colon, rest = name.partition(": ")
    if not colon:
        return name
    if kind in ("person", "man", "woman"):
        return f"{rest} {kind}" if rest == "bald" else f"{kind} with {'a beard' if rest == 'beard' else rest}"
    if kind == "keycap":
        return f"keycap {rest}"
    *most, last = rest.split(", ")
    return f"{kind} with {', '.join(most)} and {last}" if most else f"{kind} with {last}"


def is_countable(name: str, group: str, subgroup: str) -> bool:
    if group not in COUNTABLE or (COUNTABLE[group] is not None and subgroup not in COUNTABLE[group]):
        return False
    if subgroup == "heart":
        return name.endswith(" heart") and len(name.split()) == 2
    return len(name.split()) <= 3 and not TWINS.search(name)


def plain_names(meta: Sprites) -> dict[int, str]:
    """Sprites that can be recoloured, with their names less any colour: "red apple" -> "apple".

    Not among them: what without its colour is another sprite ("black cat"), the second of the same rest
    ("green apple"), and what a shape is called ("ring").
    """
    taken = set(meta.names) | {n for names in SHAPES for n in names}
    shapes = {n for names in SHAPES for n in names}
    plain: dict[int, str] = {}
    for i, name in enumerate(meta.names):
        if not meta.countable[i]:
            continue
        rest = " ".join(w for w in name.split() if w not in COLOUR_ID)
        if (rest == name and name not in shapes) or (rest and rest not in taken):
            plain[i] = rest
            taken.add(rest)
    return plain


def _key(hexcode: str) -> str:
    """File names and hexcodes differ in case, variation selectors and leading zeros."""
    return "-".join(part.lstrip("0") for part in hexcode.lower().split("-") if part != "fe0f")


def _emojibase(root: Path) -> tuple[list[dict], dict[int, str], dict[int, str]]:
    folder = root / "emoji/package/en"
    messages = json.loads((folder / "messages.json").read_text(encoding="utf-8"))
    data = json.loads((folder / "data.json").read_text(encoding="utf-8"))
    return (
        sorted(data, key=lambda d: d.get("order", 0)),
        {g["order"]: g["key"] for g in messages["groups"]},
        {g["order"]: g["key"] for g in messages["subgroups"]},
    )


def _tone_name(name: str, skin: dict) -> str:
    tones = ("light", "medium-light", "medium", "medium-dark", "dark")
    ids = skin["tone"] if isinstance(skin["tone"], list) else [skin["tone"]]
    return f"{name}, {' and '.join(tones[i - 1] for i in ids)} skin tone"


def _other_words(root: Path, rows: list[tuple]) -> tuple[list[list[str]], list[list[str]]]:
    taken = {r[0] for r in rows} | set(COLOUR_ID) - {"orange"} | set(BACKGROUNDS) - {"orange"}
    tag_count = Counter(tag for r in rows for tag in set(r[1].get("tags", [])))
    code_tables = [
        json.loads((root / f"emoji/package/en/shortcodes/{t}.json").read_text(encoding="utf-8")) for t in SHORTCODES
    ]
    codes = [[] if r[4] else _shortcodes(code_tables, r[1]["hexcode"]) for r in rows]
    code_count = Counter(c for cs in codes for c in cs)
    good = [
        [c for c in cs if c not in taken and code_count[c] == 1 and _colours(c) <= _colours(r[0])]
        for cs, r in zip(codes, rows, strict=True)
    ]
    moods = [
        [c for c in cs if " " not in c and r[2] == "smileys-emotion" and r[3].startswith("face")]
        for cs, r in zip(good, rows, strict=True)
    ]  # "astonished": no noun, so no alias
    aliases = [[c for c in cs if c not in mood] for cs, mood in zip(good, moods, strict=True)]
    used = taken | {a for alias in aliases for a in alias}
    keywords = [
        mood
        + [
            t
            for t in map(str.lower, r[1].get("tags", []))
            if tag_count[t] <= 3 and t not in used and t not in mood and _is_word(t) and len(t) > 2
        ]
        for mood, r in zip(moods, rows, strict=True)
    ]
    return aliases, keywords


def _colours(name: str) -> set[str]:
    return {word for word in re.split(r"[ -]", name) if word in COLOUR_ID}


def _shortcodes(tables: list[dict], hexcode: str) -> list[str]:
    found: dict[str, None] = {}
    for table in tables:
        codes = table.get(hexcode, [])
        for code in [codes] if isinstance(codes, str) else codes:
            word = code.replace("_", " ").lower()
            if _is_word(word) and 2 < len(word) < 32:
                found.setdefault(word)
    return list(found)


def _is_word(text: str) -> bool:
    return bool(re.fullmatch(r"[a-zñéãí' -]+", text)) and text not in NOISE and not text.startswith(("ja ", "flag "))


def _weights(names: list[str], tone: list[bool], subgroup: list[str]) -> list[float]:
    known = set(names)
    base = []
    for name, group in zip(names, subgroup, strict=True):
        person = re.sub(r"^(wo)?m[ae]n\b", lambda m: "people" if m[0].endswith("men") else "person", name)
        role = re.sub(r"^(wo)?man ", "", name)
        twin = (name != person and person in known) or (name != role and role in known) or group == "family"
        base.append(0.7 if twin else 1.0)
    total = sum(w for w, t in zip(base, tone, strict=True) if not t)
    each = TONE_SHARE / (1 - TONE_SHARE) * total / max(sum(tone), 1)
    return [each if t else w for w, t in zip(base, tone, strict=True)]


def _decode(path: Path) -> np.ndarray:
    image = Image.open(path).convert("RGBA")
    return np.asarray(image if image.size == (256, 256) else image.resize((256, 256), Image.Resampling.LANCZOS))


def _pixels(paths: list[Path], cache: Path) -> Tensor:
    if cache.exists():
        array = np.load(cache, allow_pickle=False)
        if len(array) == len(paths):
            return torch.from_numpy(array)
    with multiprocessing.get_context("fork").Pool() as pool:
        array = np.stack(pool.map(_decode, paths, chunksize=64))
    np.save(cache, array)
    return torch.from_numpy(array)


def main(root: str) -> None:
    s = load_sprites(root)
    groups = Counter(g for g, t in zip(s.group, s.tone, strict=True) if not t)
    print(f"{len(s)} pictures: {len(s) - sum(s.tone)} base, {sum(s.tone)} skin tones, {sum(s.countable)} countable")
    print(f"{sum(map(len, s.aliases))} aliases, {sum(map(len, s.keywords))} keywords; rgba {tuple(s.rgba.shape)}")
    print(", ".join(f"{g} {n}" for g, n in groups.items()))


if __name__ == "__main__":
    main(sys.argv[1])
