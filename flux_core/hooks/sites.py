"""The catalogue of sites: every value of a forward that has a name, with its shape and meaning.

A site's full name is the block's name and its own: `double_blocks.17.img.k`. Blocks have their names of the checkpoint.
Patterns select several: globs (`double_blocks.*.img.k`), ranges (`single_blocks.9-12.mod.gate`), and the flat numbers
over both kinds that papers use (`layer.28`: the tenth single block of FLUX.1-dev). A glob reaches single heads only
where it says `head`, as in `layer.*.head.*`.

Shapes: B batch rows, L image tokens, T text tokens, D hidden size, H heads, P features of a head.
"""

import re
from dataclasses import dataclass
from fnmatch import fnmatchcase

from ..errors import UsageError, nearest
from ..params import FluxParams

KINDS = ("double_blocks", "single_blocks")


@dataclass(frozen=True)
class Site:
    name: str
    kinds: tuple[str, ...]
    """kinds of blocks that have it; none: it exists once in a forward"""
    shape: str
    meaning: str
    inside: bool = False
    """whether it is inside a block, so that a function there needs another compiled graph"""


def _stream(name: str, shape: str, meaning: str, kinds: tuple[str, ...] = KINDS, inside: bool = True) -> list[Site]:
    """The site `name` of both streams; S in its shape becomes L or T."""
    return [
        Site(f"{stream}.{name}", kinds, shape.replace("S", tokens), meaning.format(word), inside)
        for stream, tokens, word in (("img", "L", "image"), ("txt", "T", "text"))
    ]


def _modulation(name: str, kind: str, what: str) -> list[Site]:
    return [
        Site(f"{name}.shift", (kind,), "[B, 1, D]", f"added to the normed input of {what}"),
        Site(f"{name}.scale", (kind,), "[B, 1, D]", f"1 + scale multiplies the normed input of {what}"),
        Site(f"{name}.gate", (kind,), "[B, 1, D]", f"multiplies the output of {what} before it is added to the stream"),
    ]


SITES = (
    Site("img_in", (), "[B, L, D]", "image tokens as they enter the first block"),
    Site("txt_in", (), "[B, T, D]", "text tokens as they enter the first block"),
    Site("y", (), "[B, V]", "CLIP's pooled vector of the prompt, from which vec is computed"),
    Site("vec", (), "[B, D]", "embedding of time, guidance and pooled prompt: the input of every modulation"),
    Site("pe", (), "[B, 1, T+L, P/2, 2, 2]", "rotations of RoPE, text first"),
    Site("velocity", (), "[B, L, C]", "the output of the forward"),
    *_stream("in", "[B, S, D]", "{} tokens as they enter the block", inside=False),
    *_modulation("img_mod1", "double_blocks", "the image's attention"),
    *_modulation("img_mod2", "double_blocks", "the image's MLP"),
    *_modulation("txt_mod1", "double_blocks", "the text's attention"),
    *_modulation("txt_mod2", "double_blocks", "the text's MLP"),
    *_modulation("mod", "single_blocks", "the block"),
    *_stream("q", "[B, H, S, P]", "queries of {} tokens, before their norm and RoPE"),
    *_stream("k", "[B, H, S, P]", "keys of {} tokens, before their norm and RoPE"),
    *_stream("v", "[B, H, S, P]", "values of {} tokens"),
    Site("q", KINDS, "[B, H, T+L, P]", "queries of all tokens, after their norm and RoPE", True),
    Site("k", KINDS, "[B, H, T+L, P]", "keys of all tokens, after their norm and RoPE", True),
    Site("head.N", KINDS, "[B, T+L, P]", "output of one head of attention, the Nth, from 0", True),
    *_stream("attn", "[B, S, D]", "attention's output for {} tokens, before the projection"),
    *_stream("mlp", "[B, S, D]", "the MLP's output for {} tokens, before its gate", ("double_blocks",)),
    *_stream("linear2", "[B, S, D]", "output of attention and MLP for {} tokens, before the gate", ("single_blocks",)),
    *_stream("out", "[B, S, D]", "{} tokens as they leave the block", inside=False),
)
GLOBAL = tuple(site.name for site in SITES if not site.kinds)
OF_BLOCK = {kind: tuple(site.name for site in SITES if kind in site.kinds) for kind in KINDS}
ATTEND = "attend"
"""a block's attention itself, where functions are placed; no value"""
HEAD = ".head."
_SHAPES = {site.name: site.shape.strip("[]").split(", ") for site in SITES}
_INSIDE = frozenset(site.name for site in SITES if site.inside)
_TOKENS = {"L": "img", "T": "txt", "T+L": "all"}


def is_inside(site: str) -> bool:
    """Whether a site's own name is inside a block, so that a function there needs another compiled graph."""
    return site in _INSIDE or site == ATTEND or site.startswith("head.")


def head_of(name: str) -> int | None:
    """The head's number in `double_blocks.3.head.7`; None for any other site or block."""
    _, head, number = name.rpartition(HEAD)
    return int(number) if head else None


def token_axis(name: str) -> tuple[int, str] | None:
    """The axis of a site's tokens, and whose they are: img, txt or all. None for a site without tokens."""
    site = split(name)[1]
    shape = _SHAPES["head.N" if site.startswith("head.") else site]
    return next(((axis, _TOKENS[size]) for axis, size in enumerate(shape) if size in _TOKENS), None)


def split(name: str) -> tuple[str, str]:
    """(block, site): `double_blocks.3.img.k` -> ("double_blocks.3", "img.k"); of the whole forward: ("", name)."""
    kind, _, rest = name.partition(".")
    if kind not in KINDS:
        return "", name
    index, _, local = rest.partition(".")
    return f"{kind}.{index}", local


def block_names(params: FluxParams) -> list[str]:
    """All blocks, in the order in which they run."""
    doubles = [f"double_blocks.{i}" for i in range(params.depth)]
    return doubles + [f"single_blocks.{i}" for i in range(params.depth_single_blocks)]


def site_names(params: FluxParams) -> list[str]:
    """Full names of all sites of a model, but for those of single heads."""
    inner = [f"{block}.{site}" for block in block_names(params) for site in OF_BLOCK[block.partition(".")[0]]]
    return [*GLOBAL, *(name for name in inner if HEAD not in name)]


def head_names(params: FluxParams) -> list[str]:
    """Full names of the sites of all heads."""
    return [f"{block}{HEAD}{i}" for block in block_names(params) for i in range(params.num_heads)]


def match_blocks(patterns: tuple[str, ...], params: FluxParams) -> list[str]:
    """The blocks that any of the patterns matches. UsageError for a pattern without a match."""
    names = block_names(params)
    last = f"double_blocks.0-{params.depth - 1}, single_blocks.0-{params.depth_single_blocks - 1}"
    return _match(patterns, names, params, "block", f"blocks are {last}, or layer.0-{len(names) - 1}")


def match_sites(patterns: tuple[str, ...], params: FluxParams) -> list[str]:
    """The sites that any of the patterns matches. UsageError for a pattern without a match."""
    for pattern in patterns:
        if pattern.endswith(f".{ATTEND}"):
            raise UsageError(
                f"{pattern}: attend is attention itself, for functions of Custom, and no value. Next: its output is at "
                f"{pattern.removesuffix(ATTEND)}img.attn and txt.attn"
            )
    heads = head_names(params) if any(HEAD in pattern for pattern in patterns) else []
    return _match(patterns, [*site_names(params), *heads], params, "site", "`python cli.py sites` lists them")


def _match(patterns: tuple[str, ...], names: list[str], params: FluxParams, what: str, hint: str) -> list[str]:
    found: set[str] = set()
    for pattern in patterns:
        globs = list(_expand(pattern, params))
        fitting = [name for name in names if (HEAD in name) <= (HEAD in pattern)]
        matching = {name for name in fitting if any(fnmatchcase(name, glob) for glob in globs)}
        if not matching:
            raise UsageError(f"no {what} is called {pattern!r}: {hint}.{nearest(pattern, names)}")
        found |= matching
    return [name for name in names if name in found]


def _expand(pattern: str, params: FluxParams) -> list[str]:
    """Globs for a pattern with a range or a flat number: `layer.18-19.q` -> double_blocks.18.q, single_blocks.0.q."""
    if pattern.startswith("layer.*"):
        return [name + pattern.removeprefix("layer.*") for name in block_names(params)]
    numbered = re.fullmatch(r"(layer|double_blocks|single_blocks)\.(\d+)(?:-(\d+))?((?:\..+)?)", pattern)
    if not numbered:
        return [pattern]
    kind, first, last, rest = numbered.groups()
    names = block_names(params)
    names = names if kind == "layer" else [name for name in names if name.startswith(kind)]
    chosen = range(int(first), int(last or first) + 1)
    return [names[i] + rest for i in chosen] if chosen and chosen[-1] < len(names) else []
