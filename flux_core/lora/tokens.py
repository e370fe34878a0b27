"""Trained tokens in a file: words of a prompt that stand for vectors (textual inversion, Gal et al. 2022, arXiv
2208.01618). No torch.

Two forms. Beside a LoRA's factors `bundle_emb.WORD.clip_l` and `bundle_emb.WORD.t5`, as OneTrainer bundles them, and
ComfyUI reads; alone `clip_l` and `t5`, as diffusers' FLUX script and OneTrainer write them, with ComfyUI's `t5xxl` for
the latter. Alone they have the word in the header, or the file's name is the word, as elsewhere.
"""

from collections.abc import Iterable, Mapping

from .dialects import Network

KEYS: Mapping[str, Network] = {"clip_l": "clip", "t5": "t5", "t5xxl": "t5"}
"""how files name the encoder that vectors are for; of two names of one the first counts"""
NAMES: Mapping[Network, tuple[str, ...]] = {"clip": ("clip_l",), "t5": ("t5", "t5xxl")}
"""the same by encoder: all are written, for all readers"""
BUNDLED = "bundle_emb."
SAID = "modelspec.trigger_phrase"
"""a header's key for the word of vectors that are alone"""


def are_tokens(names: Iterable[str]) -> bool:
    """Whether a file of these tensors has vectors alone."""
    found = set(names)
    return bool(found) and found <= KEYS.keys()


def tokens_of(names: Iterable[str], metadata: Mapping[str, str], stem: str) -> dict[str, dict[Network, str]]:
    """The words that a file's tensors stand for, and the tensors' names by encoder. stem: the file's own name."""
    found: dict[str, dict[Network, str]] = {}
    every = list(names)
    alone = metadata.get(SAID, "").strip() or stem if are_tokens(every) else ""
    for name in sorted(every, key=lambda name: len(name)):  # t5 before t5xxl
        word, _, key = (alone, "", name) if alone else name.removeprefix(BUNDLED).rpartition(".")
        if word and key in KEYS and (alone or name.startswith(BUNDLED)):
            found.setdefault(word, {}).setdefault(KEYS[key], name)
    return found
